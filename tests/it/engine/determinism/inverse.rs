//! The determinism test sees what it is there to see: with one matmul whose order of addition
//! depends on the row count, it fails.

use bespoke::kernels::abi::{GemmArgs, Share};
use bespoke::kernels::{Kernel, KernelFn, KernelTable};
use bespoke_kernel_gen::spec::{DType, KernelSpec, KvDType, RowRegime};

use super::tiny;

/// Output size of the matmul that is replaced, the MLP's last.
const N: usize = 64;
const K: usize = 160;

/// Adds from the last input to the first, where all others add from the first to the last.
///
/// # Safety
/// `args` as documented on its fields, for float32 weights of N × K packed in panels of
/// `COLS · LANES` columns.
unsafe fn backwards<const LANES: usize, const COLS: usize>(args: &GemmArgs, share: Share) {
    let (first, end) = share.range(N);
    let weight: *const f32 = args.weight.cast();
    for row in 0..args.rows {
        for column in first..end {
            let (panel, place) = (column / (COLS * LANES), column % (COLS * LANES));
            // SAFETY: N is a multiple of the panel's columns, so that all panels are full.
            let product = |k: usize| unsafe {
                let x = *args.x.f32.add(row * K + k);
                x * *weight.add((panel * K + k) * COLS * LANES + place)
            };
            let sum = (0..K).rev().map(product).fold(0.0, |sum, product| sum + product);
            // SAFETY: a share's outputs are its own.
            unsafe { *args.out.add(row * N + column) = sum };
        }
    }
}

/// The tiny models' kernels, with several rows of one matmul added up backwards.
fn table() -> KernelTable {
    let replace = |kernel: &Kernel| {
        let is_meant = kernel.spec == KernelSpec::Gemm { n: N, k: K, weight: DType::F32 }
            && kernel.regime != RowRegime::One;
        if !is_meant {
            return *kernel;
        }
        let run = match (kernel.target.lanes(), kernel.cols) {
            (16, 4) => backwards::<16, 4>,
            (8, 4) => backwards::<8, 4>,
            other => panic!("no replacement for lanes and columns {other:?}"),
        };
        Kernel { run: KernelFn::Gemm(run), ..*kernel }
    };
    let all = bespoke_tests::tiny_kernels();
    let kernels: Vec<Kernel> = all.kernels.iter().map(replace).collect();
    let num_replaced =
        kernels.iter().zip(all.kernels).filter(|(new, old)| match (new.run, old.run) {
            (KernelFn::Gemm(new), KernelFn::Gemm(old)) => !std::ptr::fn_addr_eq(new, old),
            _ => false,
        });
    assert_eq!(num_replaced.count(), 2);
    KernelTable { kernels: kernels.leak(), ..all }
}

#[test]
fn a_sum_that_depends_on_the_rows_is_seen() {
    let message = tiny("llama-gqa2", table(), KvDType::F32).check().unwrap_err();
    assert!(message.contains("alone"), "{message}");
}
