//! Sizes that do not fit each other fail to compile, with both numbers in the message.

extern crate self as bespoke;

#[path = "stub/mod.rs"]
mod kernels;
#[allow(unused_imports)]
use kernels as kernel_gen;

bespoke_macros::kernels! {
    kernel quantize_k576_g128__portable {
        run: quantize::run<S = Portable, K = 576, GROUP = 128>,
        spec: Quantize { k: 576, out: I8 { group: 128 } },
        regime: Any,
        target: Portable,
        features: "",
        rows: 1,
        cols: 0,
        scratch_bytes: 0,
        reduction_class: "quantize.portable",
        source_hash: "0",
    }
    kernel quantize_k576_bf16__portable {
        run: quantize::run<S = Portable, K = 576, GROUP = 8>,
        spec: Quantize { k: 576, out: Bf16 },
        regime: Any,
        target: Portable,
        features: "",
        rows: 1,
        cols: 0,
        scratch_bytes: 0,
        reduction_class: "quantize.portable",
        source_hash: "0",
    }
    kernel sample_v512__portable {
        run: sample::run<S = Portable, VOCAB = 512>,
        spec: Sample { vocab: 513 },
        regime: Any,
        target: Portable,
        features: "",
        rows: 1,
        cols: 0,
        scratch_bytes: 0,
        reduction_class: "sample.portable",
        source_hash: "0",
    }
}

fn main() {}
