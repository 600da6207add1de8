//! What this machine can do at best, measured now: shared and throttled machines drift by tens of
//! percent within an hour, so shares only mean something against limits of the same run.

use std::time::Instant;

use bespoke_kernel_gen::target::Target;

use super::is_available;
use super::memory::Memory;
use super::team::Team;
use crate::error::Error;
use crate::kernels::bf16::DotBf16;
use crate::kernels::simd::Simd;
use crate::kernels::simd_portable::Portable;

/// Bytes each thread reads again and again: beyond the first cache level, within the second.
const CACHE_BYTES: usize = 512 << 10;
/// Each limit is the best of this many tries.
const NUM_TRIES: usize = 7;
/// Rows and columns of the register block whose dot and multiply-add rates are measured.
const ROWS: usize = 4;
const COLS: usize = 3;
/// Steps of the register block in one try.
const NUM_STEPS: usize = 1_000_000;
/// Operand vectors that the register block walks through; they stay in the first cache level.
const NUM_OPERANDS: usize = 64;

/// Rates of the whole team with the best instructions of the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Whose instructions were measured.
    pub target: Target,
    pub num_threads: usize,
    /// Reading memory once.
    pub memory_gb_per_s: f64,
    /// Reading 512 KB a thread repeatedly.
    pub cache_gb_per_s: f64,
    /// Byte dot products (`vpdpbusd` or `sdot` where there is one), 2 operations a multiply-add.
    pub dot_gop_per_s: f64,
    /// Products of bfloat16 pairs (`vdpbf16ps` where there is one), 2 operations a multiply-add.
    pub bf16_gop_per_s: f64,
    /// float32 multiply-adds, 2 operations each.
    pub fma_gop_per_s: f64,
}

/// The inner loops on one instruction set; each returns a value that depends on all its work.
#[derive(Clone, Copy)]
struct Loops {
    /// Reads `len` bytes, a multiple of 1024.
    read: unsafe fn(*const u8, usize) -> i32,
    /// `NUM_STEPS` register blocks over `NUM_OPERANDS` vectors.
    dot: unsafe fn(*const u8) -> i32,
    bf16: unsafe fn(*const u8) -> f32,
    fma: unsafe fn(*const u8) -> f32,
    lanes: usize,
}

impl Limits {
    /// Measures with `team`, and `stream_bytes` of memory: more than any cache holds. Takes about a
    /// second for 600 MB.
    pub fn measure(team: &mut Team, stream_bytes: usize) -> Result<Limits, Error> {
        let (target, loops) = best_loops();
        let num_threads = team.len();
        let mut stream = Memory::new(stream_bytes, "the memory stream")?;
        // A page that was never written is the one zero page, which no stream has to fetch.
        stream.bytes_mut().fill(1);
        let (bytes, floats) = (byte_operands(loops.lanes), float_operands(loops.lanes));
        let pairs = bf16_operands(loops.lanes);
        let per_thread = stream_bytes / num_threads / 1024 * 1024;
        let parts: Vec<&[u8]> = stream.bytes_mut().chunks_exact(per_thread).collect();
        // SAFETY: `best_loops` checked the instructions, a slice holds its length.
        let read = |part: &[u8]| keep(unsafe { (loops.read)(part.as_ptr(), part.len()) });
        let memory_s = best_seconds(team, &|idx| read(parts[idx]));
        let num_repeats = (32 << 20) / CACHE_BYTES;
        let cache_s = best_seconds(team, &|idx| {
            for _ in 0..num_repeats {
                read(std::hint::black_box(&parts[idx][..CACHE_BYTES]));
            }
        });
        // SAFETY: `best_loops` checked the instructions; the operands are as many as a loop reads.
        let dot_s = best_seconds(team, &|_| keep(unsafe { (loops.dot)(bytes.as_ptr().cast()) }));
        // SAFETY: as above.
        let bf16_s = best_seconds(team, &|_| keep(unsafe { (loops.bf16)(pairs.as_ptr().cast()) }));
        // SAFETY: as above.
        let fma_s = best_seconds(team, &|_| keep(unsafe { (loops.fma)(floats.as_ptr().cast()) }));
        let per_lane = (2 * NUM_STEPS * ROWS * COLS * num_threads) as f64;
        let giga = |amount: f64, seconds: f64| amount / seconds / 1e9;
        Ok(Limits {
            target,
            num_threads,
            memory_gb_per_s: giga((per_thread * num_threads) as f64, memory_s),
            cache_gb_per_s: giga((num_repeats * CACHE_BYTES * num_threads) as f64, cache_s),
            dot_gop_per_s: giga(per_lane * (loops.lanes * 4) as f64, dot_s),
            bf16_gop_per_s: giga(per_lane * (loops.lanes * 2) as f64, bf16_s),
            fma_gop_per_s: giga(per_lane * loops.lanes as f64, fma_s),
        })
    }

    /// All limits in one line.
    pub fn line(&self) -> String {
        format!(
            "{} threads, {} limits: memory {:.1} GB/s, cache {:.1} GB/s, int8 dot {:.0} GOP/s, \
             bf16 dot {:.0} GOP/s, f32 fma {:.0} GOP/s",
            self.num_threads,
            self.target.name(),
            self.memory_gb_per_s,
            self.cache_gb_per_s,
            self.dot_gop_per_s,
            self.bf16_gop_per_s,
            self.fma_gop_per_s
        )
    }

    /// The higher of both, limit by limit: noise only ever slows a machine down.
    pub fn or_higher(self, other: Limits) -> Limits {
        Limits {
            memory_gb_per_s: self.memory_gb_per_s.max(other.memory_gb_per_s),
            cache_gb_per_s: self.cache_gb_per_s.max(other.cache_gb_per_s),
            dot_gop_per_s: self.dot_gop_per_s.max(other.dot_gop_per_s),
            bf16_gop_per_s: self.bf16_gop_per_s.max(other.bf16_gop_per_s),
            fma_gop_per_s: self.fma_gop_per_s.max(other.fma_gop_per_s),
            ..self
        }
    }
}

fn keep<T>(value: T) {
    std::hint::black_box(value);
}

fn best_seconds(team: &mut Team, job: &(dyn Fn(usize) + Sync)) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..NUM_TRIES {
        let start = Instant::now();
        team.run(job);
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Elements of `NUM_OPERANDS` vectors and of one more register block.
fn num_elements(lanes: usize) -> usize {
    (NUM_OPERANDS + ROWS + COLS) * lanes
}

/// Four bytes an element, 0 and 1: no sum overflows.
fn byte_operands(lanes: usize) -> Vec<[u8; 4]> {
    (0..num_elements(lanes)).map(|i| if i % 3 == 0 { [1, 0, 1, 0] } else { [0, 0, 0, 1] }).collect()
}

/// Pairs of the numbers that `float_operands` has.
fn bf16_operands(lanes: usize) -> Vec<[u16; 2]> {
    let pair = |i: usize| if i.is_multiple_of(3) { [1.0, -0.25] } else { [-0.25, 1.0] };
    let bits = |value| half::bf16::from_f32(value).to_bits();
    (0..num_elements(lanes)).map(|i| pair(i).map(bits)).collect()
}

/// Floats far from overflow and from the slow small numbers.
fn float_operands(lanes: usize) -> Vec<f32> {
    (0..num_elements(lanes)).map(|i| if i % 3 == 0 { 1.0 } else { -0.25 }).collect()
}

/// # Safety
/// The instruction set of `S`; `p` holds `len` bytes, a multiple of 1024.
#[inline(always)]
unsafe fn read<S: Simd>(p: *const u8, len: usize) -> i32 {
    // SAFETY: every offset stays below `len`; 16 vectors are at most 1024 bytes.
    unsafe {
        let vector = 4 * S::LANES;
        let mut sums = [S::zero_i32(); 8];
        let mut at = 0;
        while at < len {
            let mut i = 0;
            while i < 8 {
                sums[i] = S::add_i32(sums[i], S::load_i32(p.add(at + i * vector)));
                i += 1;
            }
            at += 8 * vector;
        }
        let mut total = sums[0];
        let mut i = 1;
        while i < 8 {
            total = S::add_i32(total, sums[i]);
            i += 1;
        }
        S::reduce_add_i32(total)
    }
}

/// # Safety
/// The instruction set of `S`; `p` holds the operands of its lanes.
#[inline(always)]
unsafe fn dot<S: Simd>(p: *const u8) -> i32 {
    // SAFETY: `step % NUM_OPERANDS + ROWS + COLS` vectors are there.
    unsafe {
        let vector = 4 * S::LANES;
        let mut sums = [[S::zero_i32(); COLS]; ROWS];
        let mut step = 0;
        while step < NUM_STEPS {
            let a = p.add(step % NUM_OPERANDS * vector);
            let mut r = 0;
            while r < ROWS {
                let row = S::load_i32(a.add(r * vector));
                let mut c = 0;
                while c < COLS {
                    let column = S::load_i32(a.add((ROWS + c) * vector));
                    sums[r][c] = S::dot_u4(sums[r][c], column, row);
                    c += 1;
                }
                r += 1;
            }
            step += 1;
        }
        let mut total = S::zero_i32();
        let mut i = 0;
        while i < ROWS * COLS {
            total = S::add_i32(total, sums[i / COLS][i % COLS]);
            i += 1;
        }
        S::reduce_add_i32(total)
    }
}

/// # Safety
/// As [`dot`].
#[inline(always)]
unsafe fn bf16<S: DotBf16>(p: *const u8) -> f32 {
    // SAFETY: as in `dot`.
    unsafe {
        let vector = 4 * S::LANES;
        let mut sums = [[S::zero(); COLS]; ROWS];
        let mut step = 0;
        while step < NUM_STEPS {
            let a = p.add(step % NUM_OPERANDS * vector);
            let mut r = 0;
            while r < ROWS {
                let row = S::load_i32(a.add(r * vector));
                let mut c = 0;
                while c < COLS {
                    let column = S::load_i32(a.add((ROWS + c) * vector));
                    sums[r][c] = S::dot_bf16(sums[r][c], column, row);
                    c += 1;
                }
                r += 1;
            }
            step += 1;
        }
        total::<S>(&sums)
    }
}

/// # Safety
/// As [`dot`].
#[inline(always)]
unsafe fn fma<S: Simd>(p: *const u8) -> f32 {
    // SAFETY: as in `dot`.
    unsafe {
        let vector = 4 * S::LANES;
        let mut sums = [[S::zero(); COLS]; ROWS];
        let mut step = 0;
        while step < NUM_STEPS {
            let a = p.add(step % NUM_OPERANDS * vector);
            let mut r = 0;
            while r < ROWS {
                let row = S::load(a.add(r * vector).cast());
                let mut c = 0;
                while c < COLS {
                    let column = S::load(a.add((ROWS + c) * vector).cast());
                    sums[r][c] = S::fma(row, column, sums[r][c]);
                    c += 1;
                }
                r += 1;
            }
            step += 1;
        }
        total::<S>(&sums)
    }
}

/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn total<S: Simd>(sums: &[[S::F32; COLS]; ROWS]) -> f32 {
    // SAFETY: as the caller promises.
    unsafe {
        let mut total = S::zero();
        let mut i = 0;
        while i < ROWS * COLS {
            total = S::add(total, sums[i / COLS][i % COLS]);
            i += 1;
        }
        S::reduce_add(total)
    }
}

/// The loops in shells that have the features of their instruction set.
macro_rules! loops {
    ([$($attribute:meta)?], $simd:ty) => {{
        $(#[$attribute])?
        unsafe fn read_shell(p: *const u8, len: usize) -> i32 {
            // SAFETY: the caller vouches for the memory, `best_loops` for the features.
            unsafe { read::<$simd>(p, len) }
        }
        $(#[$attribute])?
        unsafe fn dot_shell(p: *const u8) -> i32 {
            // SAFETY: as above.
            unsafe { dot::<$simd>(p) }
        }
        $(#[$attribute])?
        unsafe fn bf16_shell(p: *const u8) -> f32 {
            // SAFETY: as above.
            unsafe { bf16::<$simd>(p) }
        }
        $(#[$attribute])?
        unsafe fn fma_shell(p: *const u8) -> f32 {
            // SAFETY: as above.
            unsafe { fma::<$simd>(p) }
        }
        Loops {
            read: read_shell,
            dot: dot_shell,
            bf16: bf16_shell,
            fma: fma_shell,
            lanes: <$simd as Simd>::LANES,
        }
    }};
}

fn best_loops() -> (Target, Loops) {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::kernels::simd_x86::{Avx512, V3};
        if is_available(Target::Avx512) {
            let features = loops!(
                [target_feature(
                    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
                )],
                Avx512
            );
            return (Target::Avx512, features);
        }
        if is_available(Target::X86_64V3) {
            return (Target::X86_64V3, loops!([target_feature(enable = "avx2,fma,f16c")], V3));
        }
    }
    #[cfg(target_arch = "aarch64")]
    if is_available(Target::Neon) {
        use crate::kernels::simd_neon::Neon;
        return (Target::Neon, loops!([target_feature(enable = "neon,dotprod")], Neon));
    }
    (Target::Portable, loops!([], Portable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_do_all_their_work() {
        let (_, loops) = best_loops();
        let bytes: Vec<u32> = (0..512).map(|i| i % 5).collect();
        let expected: u32 = bytes.iter().sum();
        // SAFETY: 2048 bytes are there, and `best_loops` checked the instructions.
        assert_eq!(unsafe { (loops.read)(bytes.as_ptr().cast(), 2048) }, expected as i32);

        let (bytes, floats) = (byte_operands(loops.lanes), float_operands(loops.lanes));
        let pairs = bf16_operands(loops.lanes);
        let (mut dot, mut bf16, mut fma) = (0i64, 0f64, 0f64);
        for step in 0..NUM_OPERANDS {
            for (r, c) in (0..ROWS * COLS).map(|i| (i / COLS, i % COLS)) {
                for lane in 0..loops.lanes {
                    let row = (step + r) * loops.lanes + lane;
                    let column = (step + ROWS + c) * loops.lanes + lane;
                    let products = bytes[row].iter().zip(bytes[column]);
                    dot += products.map(|(a, b)| i64::from(*a) * i64::from(b)).sum::<i64>();
                    let wide = |bits: u16| f64::from(half::bf16::from_bits(bits));
                    let products = pairs[row].iter().zip(pairs[column]);
                    bf16 += products.map(|(a, b)| wide(*a) * wide(b)).sum::<f64>();
                    fma += f64::from(floats[row]) * f64::from(floats[column]);
                }
            }
        }
        assert_eq!(NUM_STEPS % NUM_OPERANDS, 0);
        let num_rounds = (NUM_STEPS / NUM_OPERANDS) as i64;
        // SAFETY: as above.
        assert_eq!(i64::from(unsafe { (loops.dot)(bytes.as_ptr().cast()) }), dot * num_rounds);
        // SAFETY: as above.
        let sums =
            unsafe { [(loops.bf16)(pairs.as_ptr().cast()), (loops.fma)(floats.as_ptr().cast())] };
        for (sum, round) in sums.map(f64::from).into_iter().zip([bf16, fma]) {
            assert!((sum - round * num_rounds as f64).abs() <= 1e-3 * sum.abs(), "{sum}");
        }
    }
}
