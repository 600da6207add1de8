//! Kernel bodies against naive loops, on every vector type that the machine has.

mod awq_gemm;
mod embed;
mod exponentials;
mod gemm;
mod gemm_bf16;
mod matmul;
mod paged_attention;
mod quantize;
mod rms_norm;
mod rope;
mod sample;
mod silu_and_mul;

use std::ptr::null_mut;

use bespoke::kernels::abi::{RowsOut, Share, bf16_stride, int8_stride};
use bespoke_kernel_gen::spec::KvDType;

/// A kernel with its vector type's name.
pub(crate) type Instance<A> = (&'static str, unsafe fn(&A, Share));

/// Whether the machine runs kernels of a vector type; says so if not.
pub(crate) fn has(vectors: &str) -> bool {
    #[cfg(target_arch = "x86_64")]
    let found = match vectors {
        "v3" => has_v3(),
        _ => has_v3() && has_avx512(),
    };
    #[cfg(target_arch = "aarch64")]
    let found = vectors == "neon" && std::arch::is_aarch64_feature_detected!("dotprod");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found = false;
    if !found {
        println!("skipped: no {vectors}");
    }
    found
}

#[cfg(target_arch = "x86_64")]
fn has_v3() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bf16")
}

/// The instances of a kernel body, in which `S` stands for the vector type.
macro_rules! instances {
    ($args:ty, $body:expr) => {{
        #[allow(unused_mut)]
        let mut instances: Vec<$crate::ops::Instance<$args>> = Vec::new();
        {
            unsafe fn portable(args: &$args, share: bespoke::kernels::abi::Share) {
                type S = bespoke::kernels::simd_portable::Portable;
                // SAFETY: as the caller promises.
                unsafe { $body(args, share) }
            }
            instances.push(("portable", portable));
        }
        #[cfg(target_arch = "x86_64")]
        if $crate::ops::has("v3") {
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn v3(args: &$args, share: bespoke::kernels::abi::Share) {
                type S = bespoke::kernels::simd_x86::V3;
                // SAFETY: as the caller promises.
                unsafe { $body(args, share) }
            }
            instances.push(("v3", v3));
        }
        #[cfg(target_arch = "x86_64")]
        if $crate::ops::has("avx512") {
            #[target_feature(
                enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c"
            )]
            unsafe fn avx512(args: &$args, share: bespoke::kernels::abi::Share) {
                type S = bespoke::kernels::simd_x86::Avx512;
                // SAFETY: as the caller promises.
                unsafe { $body(args, share) }
            }
            instances.push(("avx512", avx512));
        }
        #[cfg(target_arch = "aarch64")]
        if $crate::ops::has("neon") {
            #[target_feature(enable = "neon,dotprod")]
            unsafe fn neon(args: &$args, share: bespoke::kernels::abi::Share) {
                type S = bespoke::kernels::simd_neon::Neon;
                // SAFETY: as the caller promises.
                unsafe { $body(args, share) }
            }
            instances.push(("neon", neon));
        }
        instances
    }};
}
pub(crate) use instances;

/// Runs all shares of a call, each with its own scratch memory full of NaN.
pub(crate) fn run<A>(kernel: unsafe fn(&A, Share), args: &A, count: usize, scratch_bytes: usize) {
    for idx in 0..count {
        let mut scratch = vec![[u8::MAX; 64]; scratch_bytes / 64 + 1];
        let share = Share { idx, count, scratch: scratch.as_mut_ptr().cast() };
        // SAFETY: the caller's arguments, and `instances` holds kernels of this machine only.
        unsafe { kernel(args, share) };
    }
}

/// Bits of an element of the KV cache, by its name.
pub(crate) fn kv_bits(name: &str) -> usize {
    let found = KvDType::ALL.into_iter().find(|kv| kv.name() == name);
    found.expect("an element type").bits()
}

/// A head as int4 holds it, or what it stands for: an orthogonal Hadamard matrix, block by block.
pub(crate) fn hadamard(x: &[f64]) -> Vec<f64> {
    let block = 1 << x.len().trailing_zeros();
    let sign = |i: usize, j: usize| 1.0 - 2.0 * f64::from((i & j).count_ones() & 1);
    let row = |x: &[f64], i: usize| (0..block).map(|j| sign(i, j) * x[j]).sum::<f64>();
    let blocks = x.chunks(block).flat_map(|x| (0..block).map(move |i| row(x, i)));
    blocks.map(|x| x / (block as f64).sqrt()).collect()
}

/// Random numbers by SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In −1..1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }
}

/// Output rows in the int8 form, prefilled with zeros as the engine does.
pub(crate) struct Int8Rows {
    pub(crate) k: usize,
    pub(crate) group: usize,
    pub(crate) q: Vec<i8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) sums: Vec<i32>,
}

impl Int8Rows {
    pub(crate) fn new(rows: usize, k: usize, group: usize) -> Int8Rows {
        Int8Rows {
            k,
            group,
            q: vec![0; rows * int8_stride(k)],
            scales: vec![f32::NAN; rows * (k / group)],
            sums: vec![-1; rows * (k / group)],
        }
    }

    pub(crate) fn out(&mut self) -> RowsOut {
        RowsOut {
            f32: null_mut(),
            bf16: null_mut(),
            q: self.q.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        }
    }

    /// Panics unless the rows are `expected`, `[rows, k]`, rounded to the nearest level, where
    /// `expected` itself may be off by `tolerance`.
    pub(crate) fn check(&self, expected: &[f32], tolerance: f32, what: &str) {
        for (row, expected) in expected.chunks(self.k).enumerate() {
            let q = &self.q[row * int8_stride(self.k)..][..int8_stride(self.k)];
            assert!(q[self.k..].iter().all(|q| *q == 0), "{what}: row {row} has no zero padding");
            for (group, expected) in expected.chunks(self.group).enumerate() {
                let q = &q[group * self.group..][..self.group];
                let at = row * (self.k / self.group) + group;
                let absmax = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                let scale = self.scales[at];
                assert!(
                    (scale - absmax / 127.0).abs() <= tolerance + absmax * 1e-6,
                    "{what}: row {row} group {group}: scale {scale} for absmax {absmax}"
                );
                assert_eq!(self.sums[at], q.iter().map(|q| i32::from(*q)).sum::<i32>(), "{what}");
                for (q, x) in q.iter().zip(expected) {
                    let error = (f32::from(*q) * scale - x).abs();
                    assert!(
                        error <= scale * 0.5001 + tolerance,
                        "{what}: row {row} group {group}: {q} · {scale} for {x}"
                    );
                }
            }
        }
    }
}

/// Output rows in bfloat16, prefilled with zeros as the engine does.
pub(crate) struct Bf16Rows {
    k: usize,
    bits: Vec<u16>,
}

impl Bf16Rows {
    pub(crate) fn new(rows: usize, k: usize) -> Bf16Rows {
        Bf16Rows { k, bits: vec![0; rows * bf16_stride(k)] }
    }

    pub(crate) fn out(&mut self) -> RowsOut {
        let float = float_out(&mut []);
        RowsOut { f32: null_mut(), bf16: self.bits.as_mut_ptr(), ..float }
    }

    /// Panics unless the rows are `expected`, `[rows, k]`, rounded to the nearest, where `expected`
    /// itself may be off by `tolerance`. Tiny results may be zero, as AVX-512 has them.
    pub(crate) fn check(&self, expected: &[f32], tolerance: f32, what: &str) {
        for (row, expected) in expected.chunks(self.k).enumerate() {
            let (bits, padding) =
                self.bits[row * bf16_stride(self.k)..][..bf16_stride(self.k)].split_at(self.k);
            assert!(padding.iter().all(|bits| *bits == 0), "{what}: row {row} has no zero padding");
            for (bits, x) in bits.iter().zip(expected) {
                let got = half::bf16::from_bits(*bits).to_f32();
                let round = |x: f32| half::bf16::from_f32(x).to_f32();
                let is_tiny = x.abs() < f32::MIN_POSITIVE && got == 0.0;
                let is_near = got >= round(x - tolerance) && got <= round(x + tolerance);
                let is_nan = x.is_nan() && got.is_nan();
                assert!(is_near || is_tiny || is_nan, "{what}: row {row}: {got} for {x}");
            }
        }
    }
}

/// Output rows in the float form.
pub(crate) fn float_out(out: &mut [f32]) -> RowsOut {
    RowsOut {
        f32: out.as_mut_ptr(),
        bf16: null_mut(),
        q: null_mut(),
        scales: null_mut(),
        sums: null_mut(),
    }
}

/// Panics unless every value lies within `tolerance` of the expected one.
pub(crate) fn assert_close(got: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - expected).abs();
        assert!(error <= tolerance, "{what}: element {i}: {got}, expected {expected}");
    }
}

/// Panics unless both have the same bits.
pub(crate) fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let same = got.to_bits() == expected.to_bits();
        assert!(same, "{what}: element {i}: {got:?} is not {expected:?}");
    }
}
