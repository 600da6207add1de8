//! Tables of kernels for the tests of the tuner: sound ones, and some with planted faults.

pub mod planted;

use std::path::{Path, PathBuf};

use bespoke::kernels::KernelTable;

mod generated {
    #![allow(non_snake_case, reason = "a symbol's target stands behind two underscores")]

    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// The default kernels of the tiny model.
pub fn default_kernels() -> KernelTable {
    KernelTable {
        kernels: generated::KERNELS,
        servings: generated::SERVINGS,
        page_size: generated::PAGE_SIZE,
        is_tuner: generated::IS_TUNER,
        lock: generated::LOCK,
    }
}

/// The tiny model's folder.
pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/tiny/llama-awq-g32")
}
