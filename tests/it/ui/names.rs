//! All wrong names are reported, each at its place.

extern crate self as bespoke;

#[path = "stub/mod.rs"]
mod kernels;
#[allow(unused_imports)]
use kernels as kernel_gen;

bespoke_macros::kernels! {
    kernel sample_v512__portable {
        run: sampel::run<S = Portable, VOCAB = 512>,
        spec: Sample { vocab: 512 },
        regime: Any,
        target: Portable,
        features: "",
        rows: 1,
        cols: 0,
        scratch_bytes: 0,
        reduction_class: "sample.portable",
        source_hash: "0",
    }
    kernel gemm_n64_k64_f32_few__portable {
        run: gemm::few<S = Portable, E = F32, N = 64, K = 64, COLS = 4, ROW = 8>,
        spec: Gemm { n: 64, k: 64, weight: F32 },
        regime: Few,
        target: Portable,
        features: "",
        rows: 8,
        cols: 4,
        scratch_bytes: 0,
        reduction_class: "gemm_float.portable",
        source_hash: "0",
    }
    kernel embed_h64_f32__portable {
        run: embed::run<S = Portable, E = F32, HIDDEN = 64>,
        spec: Embed { hidden: 64, dtype: BF16 },
        regime: Any,
        target: Portable,
        features: "",
        rows: 1,
        cols: 0,
        scratch_bytes: 0,
        reduction_class: "embed.portable",
        source_hash: "0",
    }
}

fn main() {}
