//! The integration tests of Bespoke live in `it/`; here are the kernels that they run.

use bespoke::kernels::KernelTable;

/// A generated file of `OUT_DIR` as a module with its table.
macro_rules! generated {
    ($name:ident, $path:literal) => {
        mod $name {
            #![allow(non_snake_case, reason = "a symbol's target stands behind two underscores")]

            include!(concat!(env!("OUT_DIR"), $path));

            pub(crate) const TABLE: bespoke::kernels::KernelTable = bespoke::kernels::KernelTable {
                kernels: KERNELS,
                servings: SERVINGS,
                page_size: PAGE_SIZE,
                is_tuner: IS_TUNER,
                lock: LOCK,
            };
        }
    };
}

generated!(tiny, "/kernels.rs");
generated!(locked, "/locked/kernels.rs");
generated!(pages16, "/pages16/kernels.rs");
generated!(pages64, "/pages64/kernels.rs");
generated!(targets, "/targets/kernels.rs");
generated!(bf16, "/bf16/kernels.rs");

/// The table of the tiny golden models' kernels.
pub fn tiny_kernels() -> KernelTable {
    tiny::TABLE
}

/// Kernels of the tiny model `llama-awq-g32`, with a lock that chooses others than the default ones
/// for two threads of the machine that builds the tests.
pub fn locked_kernels() -> KernelTable {
    locked::TABLE
}

/// Kernels of the tiny model `llama-gqa2` with pages of `page_size` slots, 16, 32 or 64.
pub fn tiny_kernels_with_pages(page_size: usize) -> KernelTable {
    let tables = [pages16::TABLE, tiny::TABLE, pages64::TABLE];
    let found = tables.into_iter().find(|table| table.page_size == page_size);
    found.unwrap_or_else(|| panic!("no tests are built with pages of {page_size}"))
}

/// Kernels of the tiny model `llama-awq-mixed` for every target.
pub fn tiny_kernels_of_all_targets() -> KernelTable {
    targets::TABLE
}

/// Kernels of the tiny model `llama-hd80-bias` with bfloat16 weights, for every target.
pub fn bf16_kernels() -> KernelTable {
    bf16::TABLE
}
