//! What the tests of both matmuls share: instances for every instruction set, rows, threads.

use bespoke::kernels::abi::{Share, int8_stride};

/// Row counts at the edges of the regimes and of the row blocks.
pub(super) const ROWS: [usize; 9] = [1, 2, 3, 5, 8, 9, 13, 50, 61];

pub(super) type Run<A> = unsafe fn(&A, Share);

/// SplitMix64, so that a failing seed is reproducible anywhere.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in −1..1.
    pub(super) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

/// Instruction sets that templates are instantiated for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Set {
    Portable,
    V3,
    Avx512,
}

/// The sets of this machine with their lanes.
pub(super) fn machine() -> Vec<(usize, Set)> {
    use bespoke::backend::cpu::is_available;
    use bespoke_kernel_gen::target::Target;
    let mut sets = vec![(Target::Portable.lanes(), Set::Portable)];
    for (target, set) in [(Target::X86_64V3, Set::V3), (Target::Avx512, Set::Avx512)] {
        match is_available(target) {
            true => sets.push((target.lanes(), set)),
            false => println!("skipped: no {}", target.name()),
        }
    }
    sets
}

/// A kernel body in a shell that has the features of its instruction set.
macro_rules! shell {
    ([$($attribute:meta)?], $args:ty, $body:expr) => {{
        $(#[$attribute])?
        unsafe fn shell(args: &$args, share: bespoke::kernels::abi::Share) {
            // SAFETY: the caller vouches for the arguments, and the machine has the features.
            unsafe { $body(args, share) }
        }
        shell as $crate::ops::matmul::Run<$args>
    }};
}
pub(super) use shell;

/// The three row regimes of a matmul on one instruction set; element type, where there is one, and
/// sizes follow the entry points.
macro_rules! kernels {
    ($set:expr, $args:ty, $op:ident, [$one:ident, $few:ident, $many:ident], $($generic:tt)+) => {{
        use $crate::ops::matmul::{Set, shell};
        use bespoke::kernels::simd_portable::Portable;
        use bespoke::kernels::simd_x86::{Avx512, V3};
        match $set {
            Set::Portable => [
                shell!([], $args, $op::$one::<Portable, $($generic)+, 4, 6>),
                shell!([], $args, $op::$few::<Portable, $($generic)+, 4, 6>),
                shell!([], $args, $op::$many::<Portable, $($generic)+, 4, 6>),
            ],
            Set::V3 => [
                shell!([target_feature(enable = "avx2,fma,f16c")], $args,
                    $op::$one::<V3, $($generic)+, 4, 6>),
                shell!([target_feature(enable = "avx2,fma,f16c")], $args,
                    $op::$few::<V3, $($generic)+, 4, 6>),
                shell!([target_feature(enable = "avx2,fma,f16c")], $args,
                    $op::$many::<V3, $($generic)+, 4, 6>),
            ],
            Set::Avx512 => [
                shell!([target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")],
                    $args, $op::$one::<Avx512, $($generic)+, 4, 6>),
                shell!([target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")],
                    $args, $op::$few::<Avx512, $($generic)+, 4, 6>),
                shell!([target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")],
                    $args, $op::$many::<Avx512, $($generic)+, 4, 6>),
            ],
        }
    }};
}
pub(super) use kernels;

/// Scratch memory of up to three threads.
pub(super) struct Scratch(Vec<Vec<u64>>);

impl Scratch {
    pub(super) fn new() -> Scratch {
        // K_BLOCK inputs of four tiles of sixteen float32 columns, and more than 2048 bytes each.
        Scratch((0..3).map(|_| vec![0x7ff8_dead_7fc0_beef; 32768]).collect())
    }
}

/// Runs the kernel of the regime of `rows` in `count` shares.
pub(super) fn run_shares<A>(
    runs: &[Run<A>; 3],
    rows: usize,
    args: &A,
    count: usize,
    scratch: &mut Scratch,
) {
    let run = match rows {
        1 => runs[0],
        2..=8 => runs[1],
        _ => runs[2],
    };
    for idx in 0..count {
        let share = Share { idx, count, scratch: scratch.0[idx].as_mut_ptr().cast() };
        // SAFETY: the tests' buffers hold `rows` rows, and `machine()` offered the instruction set.
        unsafe { run(args, share) }
    }
}

/// Compares rows with the same rows of earlier, shorter calls bit for bit, and remembers new ones.
pub(super) fn assert_same_rows(known: &mut Vec<f32>, out: &[f32], rows: usize, n: usize) {
    for (at, (a, b)) in known.iter().zip(out).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "row {} of {rows} has other bits", at / n);
    }
    if out.len() > known.len() {
        known.extend_from_slice(&out[known.len()..]);
    }
}

/// int8 rows by a plain loop: `(q, scales, sums)` as `quantize` lays them out.
pub(super) fn quantize_rows(x: &[f32], k: usize, group: usize) -> (Vec<i8>, Vec<f32>, Vec<i32>) {
    let rows = x.len() / k;
    let mut q = vec![0i8; rows * int8_stride(k)];
    let (mut scales, mut sums) = (Vec::new(), Vec::new());
    for (row, values) in x.chunks_exact(k).enumerate() {
        for (group_idx, values) in values.chunks_exact(group).enumerate() {
            let scale = values.iter().fold(0.0f32, |max, v| max.max(v.abs())) / 127.0;
            let mut sum = 0;
            for (i, value) in values.iter().enumerate() {
                let rounded = (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
                q[row * int8_stride(k) + group_idx * group + i] = rounded;
                sum += i32::from(rounded);
            }
            scales.push(scale);
            sums.push(sum);
        }
    }
    (q, scales, sums)
}
