//! The functions of the emulator's `ptx.cuh`, each against its definition.

use bespoke_emulator::{Access, Emulator, Launch, Library, Source, compile};
use half::{bf16, f16};

use crate::common::{Params, Random, emulator, to_f32, to_u32, upload};

/// One block of a warp; `in` and `out` hold what a test wants.
const KERNELS: &str = r#"
#include "types.cuh"
struct Params {
    const u32* in;
    u32* out;
    u32 n;
    u32 pad;
};
using namespace ptx;

KERNEL(bits, Params, 32, 1) {
    for (u32 i = thread_idx(); i < params.n; i += 32) {
        u32 a = load_constant(params.in + i * 3), b = load_constant(params.in + i * 3 + 1);
        u32 c = load_constant(params.in + i * 3 + 2);
        u32* out = params.out + i * 5;
        grid_wait();
        store(out, lop3<0xea>(a, b, c));
        store(out + 1, lop3<0x96>(a, b, c));
        store(out + 2, lop3<0xca>(a, b, c));
        store(out + 3, prmt(a, b, c));
        store(out + 4, u32(cvt_rni_s32(as_float(a))));
    }
}

KERNEL(widen, Params, 32, 1) {
    grid_wait();
    for (u32 i = thread_idx(); i < params.n; i += 32) {
        store(params.out + i, as_bits(cvt_f32_f16(u16(i))));
    }
}

KERNEL(narrow, Params, 32, 1) {
    grid_wait();
    for (u32 i = thread_idx(); i < params.n; i += 32) {
        float a = as_float(load_constant(params.in + i));
        store(params.out + 2 * i, cvt_f16x2(a, -a));
        store(params.out + 2 * i + 1, cvt_bf16x2(a, -a));
    }
}

KERNEL(pairs, Params, 32, 1) {
    grid_wait();
    for (u32 i = thread_idx(); i < params.n; i += 32) {
        u32 a = load_constant(params.in + i * 3), b = load_constant(params.in + i * 3 + 1);
        u32 c = load_constant(params.in + i * 3 + 2);
        u32* out = params.out + i * 5;
        store(out, add_f16x2(a, b));
        store(out + 1, sub_f16x2(a, b));
        store(out + 2, mul_f16x2(a, b));
        store(out + 3, fma_f16x2(a, b, c));
        store(out + 4, fma_bf16x2(a, b, c));
    }
}

KERNEL(functions, Params, 32, 1) {
    grid_wait();
    for (u32 i = thread_idx(); i < params.n; i += 32) {
        float a = as_float(load_constant(params.in + i));
        u32* out = params.out + i * 4;
        store(out, as_bits(ex2(a)));
        store(out + 1, as_bits(lg2(a)));
        store(out + 2, as_bits(rcp(a)));
        store(out + 3, as_bits(rsqrt(a)));
    }
}

KERNEL(lanes, Params, 32, 1) {
    grid_wait();
    u32 t = thread_idx();
    u32 value = load_constant(params.in + t);
    store(params.out + t, shfl_xor(value, 5));
    store(params.out + 32 + t, shfl(value, t / 2));
    store(params.out + 64 + t, as_bits(shfl_xor(as_float(value), 16)));
    store(params.out + 96 + t, u32(any(value == params.n)));
    store(params.out + 128 + t, movmatrix_trans(value));
}

KERNEL(matrices, Params, 32, 1) {
    grid_wait();
    u32 t = thread_idx(), base = shared_base();
    for (u32 i = 0; i < 4; i++) {
        store_shared(base + (t * 4 + i) * 4, load_constant(params.in + t * 4 + i));
    }
    warp_sync();
    u32 d[4];
    ldmatrix_x4(d, base + t * 16);
    for (u32 i = 0; i < 4; i++) store(params.out + i * 32 + t, d[i]);
    ldmatrix_x4_trans(d, base + t * 16);
    for (u32 i = 0; i < 4; i++) store(params.out + 128 + i * 32 + t, d[i]);
}

template <class Rows> DEVICE void multiply(const Params& params) {
    grid_wait();
    u32 t = thread_idx();
    u32 a[4], b[2];
    float d[4];
    for (u32 i = 0; i < 4; i++) a[i] = load_constant(params.in + i * 32 + t);
    for (u32 i = 0; i < 2; i++) b[i] = load_constant(params.in + 128 + i * 32 + t);
    for (u32 i = 0; i < 4; i++) d[i] = as_float(load_constant(params.in + 192 + i * 32 + t));
    Rows::mma(d, a, b);
    for (u32 i = 0; i < 4; i++) store(params.out + i * 32 + t, as_bits(d[i]));
}
KERNEL(mma_f16, Params, 32, 1) { multiply<F16>(params); }
KERNEL(mma_bf16, Params, 32, 1) { multiply<BF16>(params); }

KERNEL(zero_fill, Params, 32, 1) {
    grid_wait();
    u32 t = thread_idx(), base = shared_base();
    cp_async_16(base + t * 16, params.in + t % 2 * 4, t % 17);
    cp_async_4(base + 512 + t * 4, params.in + t, t % 5);
    cp_async_commit();
    cp_async_wait<0>();
    for (u32 i = 0; i < 4; i++) {
        store(params.out + t * 5 + i, load_shared<u32>(base + t * 16 + i * 4));
    }
    store(params.out + t * 5 + 4, load_shared<u32>(base + 512 + t * 4));
}

KERNEL(banks, Params, 32, 1) {
    u32 t = thread_idx(), base = shared_base();
    for (u32 i = 0; i < 3; i++) {
        store_shared(base + t * params.n, t);
        warp_sync();
    }
}
KERNEL(wide_banks, Params, 32, 1) {
    u32 t = thread_idx(), base = shared_base();
    store_shared(base + t * params.n, u32x4{t, t, t, t});
}
"#;

const SYMBOLS: &[&str] = &[
    "bits",
    "widen",
    "narrow",
    "pairs",
    "functions",
    "lanes",
    "matrices",
    "mma_f16",
    "mma_bf16",
    "zero_fill",
    "banks",
    "wide_banks",
];

fn kernels() -> Library {
    let sources: Vec<Source> = SYMBOLS.iter().map(|name| Source::new(*name, KERNELS)).collect();
    compile(&sources).unwrap_or_else(|e| panic!("{e}"))
}

const LAUNCH: Launch = Launch { grid: [1, 1], block: 32, shared_bytes: 16384 };

/// `num_out` words that `symbol` makes of `input`.
fn run(symbol: &str, input: &[u32], n: usize, num_out: usize) -> Vec<u32> {
    let mut device: Emulator = emulator(n as u64);
    let from = upload(&mut device, input, Access::Constant);
    let to = device.alloc(num_out * 4, Access::ReadWrite);
    let params = Params::default().u64(from).u64(to).u32(n as u32).u32(0);
    let report = device.launch(&kernels(), symbol, LAUNCH, &params.0);
    report.unwrap_or_else(|fault| panic!("{fault}"));
    to_u32(&device.read(to, num_out * 4).unwrap())
}

fn words(count: usize) -> Vec<u32> {
    let mut random = Random(count as u64);
    (0..count).map(|_| random.next() as u32).collect()
}

#[test]
fn bit_operations() {
    let input = words(3 * 2000);
    let out = run("bits", &input, 2000, 5 * 2000);
    for (x, y) in input.chunks(3).zip(out.chunks(5)) {
        let (a, b, c) = (x[0], x[1], x[2]);
        assert_eq!(y[0], (a & b) | c);
        assert_eq!(y[1], a ^ b ^ c);
        assert_eq!(y[2], (a & b) | (!a & c));
        let bytes = [a.to_le_bytes(), b.to_le_bytes()].concat();
        for i in 0..4 {
            let select = c >> (4 * i);
            let byte = bytes[(select & 7) as usize];
            let sign = if byte >= 128 { 255 } else { 0 };
            let expected = if select & 8 != 0 { sign } else { byte };
            assert_eq!((y[3] >> (8 * i)) as u8, expected);
        }
        let value = f32::from_bits(a);
        assert_eq!(y[4] as i32, value.round_ties_even() as i32, "{value}");
    }
}

#[test]
fn every_float16_widens() {
    for (bits, value) in run("widen", &[0], 65536, 65536).into_iter().enumerate() {
        let (expected, value) = (f16::from_bits(bits as u16).to_f32(), f32::from_bits(value));
        assert!(expected.to_bits() == value.to_bits() || (expected.is_nan() && value.is_nan()));
    }
}

/// Random bits, and every float16 and bfloat16 with their neighbours and the ties between them.
fn floats_to_round() -> Vec<u32> {
    let mut values = words(20_000);
    for bits in (0..=u16::MAX).step_by(7) {
        let half = f16::from_bits(bits).to_f32().to_bits();
        let brain = u32::from(bits) << 16;
        for near in [half, half ^ 1, half ^ 0x1000, half ^ 0x1001, brain, brain | 0x8000] {
            values.extend([near, near.wrapping_add(1), near.wrapping_sub(1)]);
        }
    }
    for special in [f32::INFINITY, f32::NAN, 65504.0, 65519.9, 65520.0, f32::MAX, 5e-8, 1e-45, 0.0]
    {
        values.extend([special.to_bits(), (-special).to_bits()]);
    }
    values
}

#[test]
fn rounding_to_16_bits() {
    let input = floats_to_round();
    let out = run("narrow", &input, input.len(), 2 * input.len());
    for (bits, y) in input.iter().zip(out.chunks(2)) {
        let a = f32::from_bits(*bits);
        if a.is_nan() {
            assert!(f16::from_bits(y[0] as u16).is_nan() && bf16::from_bits(y[1] as u16).is_nan());
            continue;
        }
        assert_eq!(y[0] as u16, f16::from_f32(a).to_bits(), "{a:e} as float16");
        assert_eq!((y[0] >> 16) as u16, f16::from_f32(-a).to_bits());
        assert_eq!(y[1] as u16, bf16::from_f32(a).to_bits(), "{a:e} as bfloat16");
        assert_eq!((y[1] >> 16) as u16, bf16::from_f32(-a).to_bits());
    }
}

/// a · b + c in multiples of 2^−96: exact for the numbers below.
fn exact(a: f64, b: f64, c: f64) -> i128 {
    let scaled = |x: f64| (x * 2_f64.powi(48)) as i128;
    scaled(a) * scaled(b) + (scaled(c) << 48)
}

/// Whether no number of the format is nearer to `sum` than `got`, and ties went to even.
fn is_nearest(sum: i128, got: u16, value: impl Fn(u16) -> f64) -> bool {
    let distance = |bits: u16| (exact(value(bits), 1.0, 0.0) - sum).abs();
    [got.wrapping_sub(1), got.wrapping_add(1)].into_iter().all(|other| {
        let finite = value(other).is_finite() && value(other).abs() <= 65504.0;
        !finite
            || distance(got) < distance(other)
            || (distance(got) == distance(other) && (got & 1 == 0 || value(got) == value(other)))
    })
}

#[test]
fn arithmetic_on_pairs_rounds_once() {
    let mut random = Random(5);
    // Exponents near each other, so that sums cancel and ties come up.
    let mut near = |bits: u32, low: u32, count: u32| {
        let exponent = low + random.next() as u32 % count;
        let mantissa = random.next() as u32 & ((1 << bits) - 1);
        ((random.next() as u32 & 1) << 15 | exponent << bits | mantissa) as u16
    };
    let mut input = Vec::new();
    for _ in 0..4000 {
        input.extend((0..3).map(|_| u32::from(near(10, 8, 12)) | u32::from(near(10, 0, 16)) << 16));
    }
    for _ in 0..4000 {
        input.extend(
            (0..3).map(|_| u32::from(near(7, 120, 12)) | u32::from(near(7, 115, 20)) << 16),
        );
    }
    let n = input.len() / 3;
    let out = run("pairs", &input, n, 5 * n);
    let half = |bits: u16| f16::from_bits(bits).to_f64();
    let brain = |bits: u16| bf16::from_bits(bits).to_f64();
    for (i, (x, y)) in input.chunks(3).zip(out.chunks(5)).enumerate() {
        for shift in [0, 16] {
            let of = |word: u32| (word >> shift) as u16;
            if i >= n / 2 {
                let sum = exact(brain(of(x[0])), brain(of(x[1])), brain(of(x[2])));
                assert!(is_nearest(sum, of(y[4]), brain), "bfloat16 {x:x?} {y:x?}");
                continue;
            }
            let (a, b, c) = (half(of(x[0])), half(of(x[1])), half(of(x[2])));
            for (got, sum) in [
                (y[0], exact(a, 1.0, b)),
                (y[1], exact(a, 1.0, -b)),
                (y[2], exact(a, b, 0.0)),
                (y[3], exact(a, b, c)),
            ] {
                assert!(is_nearest(sum, of(got), half), "float16 {x:x?} {y:x?}");
            }
        }
    }
}

#[test]
fn approximate_functions() {
    let mut values: Vec<f32> = (1..2000).map(|i| i as f32 * 0.037).collect();
    values.extend([f32::INFINITY, 0.0, 1e-40, 1e30]);
    let input: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
    let bytes: Vec<u8> = run("functions", &input, input.len(), 4 * input.len())
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    for (&x, y) in values.iter().zip(to_f32(&bytes).chunks(4)) {
        // Subnormal numbers count as 0.
        let x = if x < f32::MIN_POSITIVE { 0.0 } else { x };
        for (got, expected) in y.iter().zip([x.exp2(), x.log2(), 1.0 / x, 1.0 / x.sqrt()]) {
            let error = (got - expected).abs();
            assert!(
                *got == expected || error <= expected.abs() * 1e-6 + 1e-7,
                "{x}: {got} {expected}"
            );
        }
    }
}

#[test]
fn exchange_between_lanes() {
    let input = words(32);
    let out = run("lanes", &input, input[7] as usize, 160);
    let element = |row: usize, col: usize| input[row * 4 + col / 2] >> (col % 2 * 16) & 0xffff;
    for t in 0..32 {
        assert_eq!(out[t], input[t ^ 5]);
        assert_eq!(out[32 + t], input[t / 2]);
        assert_eq!(out[64 + t], input[t ^ 16]);
        assert_eq!(out[96 + t], 1);
        let (row, col) = (t / 4, t % 4 * 2);
        assert_eq!(out[128 + t], element(col, row) | element(col + 1, row) << 16);
    }
}

#[test]
fn matrices_from_shared_memory() {
    let input = words(128);
    let out = run("matrices", &input, 0, 256);
    let element = |matrix: usize, row: usize, col: usize| {
        input[matrix * 32 + row * 4 + col / 2] >> (col % 2 * 16) & 0xffff
    };
    for matrix in 0..4 {
        for t in 0..32 {
            let (row, col) = (t / 4, t % 4 * 2);
            let plain = element(matrix, row, col) | element(matrix, row, col + 1) << 16;
            let turned = element(matrix, col, row) | element(matrix, col + 1, row) << 16;
            assert_eq!(out[matrix * 32 + t], plain);
            assert_eq!(out[128 + matrix * 32 + t], turned);
        }
    }
}

/// The fragments' layout is written out from the PTX ISA: group = lane / 4, place = lane % 4.
fn check_mma(symbol: &str, round: fn(f32) -> u16, widen: fn(u16) -> f32) {
    for seed in 0..5 {
        let mut random = Random(seed);
        let a: Vec<u16> = random.floats(16 * 16, 3.0).into_iter().map(round).collect();
        let b: Vec<u16> = random.floats(16 * 8, 3.0).into_iter().map(round).collect();
        let d = random.floats(16 * 8, 3.0);
        let pair = |first: u16, second: u16| u32::from(first) | u32::from(second) << 16;
        let mut input = Vec::new();
        for i in 0..4 {
            input.extend((0..32).map(|lane| {
                let row = lane / 4 + if i == 1 || i == 3 { 8 } else { 0 };
                let col = lane % 4 * 2 + if i >= 2 { 8 } else { 0 };
                pair(a[row * 16 + col], a[row * 16 + col + 1])
            }));
        }
        for i in 0..2 {
            input.extend((0..32).map(|lane| {
                let (row, col) = (lane % 4 * 2 + i * 8, lane / 4);
                pair(b[row * 8 + col], b[(row + 1) * 8 + col])
            }));
        }
        let place = |i: usize, lane: usize| {
            let row = lane / 4 + if i >= 2 { 8 } else { 0 };
            row * 8 + lane % 4 * 2 + i % 2
        };
        for i in 0..4 {
            input.extend((0..32).map(|lane| d[place(i, lane)].to_bits()));
        }
        let out = run(symbol, &input, 0, 128);
        for i in 0..4 {
            for lane in 0..32 {
                let (row, col) = (place(i, lane) / 8, place(i, lane) % 8);
                let mut sum = d[row * 8 + col];
                for k in 0..16 {
                    sum += widen(a[row * 16 + k]) * widen(b[k * 8 + col]);
                }
                assert_eq!(out[i * 32 + lane], sum.to_bits());
            }
        }
    }
}

#[test]
fn matrix_multiplication() {
    check_mma("mma_f16", |x| f16::from_f32(x).to_bits(), |b| f16::from_bits(b).to_f32());
    check_mma("mma_bf16", |x| bf16::from_f32(x).to_bits(), |b| bf16::from_bits(b).to_f32());
}

#[test]
fn copies_fill_up_with_zeros() {
    let input = words(64);
    let out = run("zero_fill", &input, 0, 160);
    for t in 0..32 {
        let mut expected = [0_u8; 20];
        let source: Vec<u8> = input.iter().flat_map(|w| w.to_le_bytes()).collect();
        expected[..t % 17].copy_from_slice(&source[t % 2 * 16..][..t % 17]);
        expected[16..16 + t % 5].copy_from_slice(&source[t * 4..][..t % 5]);
        assert_eq!(out[t * 5..][..5], to_u32(&expected));
    }
}

#[test]
fn bank_conflicts_are_counted() {
    for (symbol, stride, passes, least) in [
        ("banks", 4, 3, 3),
        ("banks", 8, 6, 3),
        ("banks", 128, 96, 3),
        ("banks", 132, 3, 3),
        ("wide_banks", 16, 4, 4),
        ("wide_banks", 128, 32, 4),
        ("wide_banks", 144, 4, 4),
    ] {
        let mut device = emulator(1);
        let params = Params::default().u64(0).u64(0).u32(stride).u32(0);
        let report = device.launch(&kernels(), symbol, LAUNCH, &params.0).unwrap();
        assert_eq!(report.shared.len(), 1, "{report:?}");
        let access = &report.shared[0];
        assert_eq!((access.num_passes, access.num_passes_min), (passes, least), "{stride}");
        assert_eq!(report.bank_conflicts(), passes - least);
    }
}

/// Eight 4-bit weights of an AWQ word, whose nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7: the
/// result tells a wrong order, which no check of accesses can.
#[test]
fn a_wrong_nibble_order_shows_in_the_result() {
    let kernel = |name: &str, shift: &str| {
        format!(
            "KERNEL({name}, Params, 32, 1) {{
    grid_wait();
    u32 word = load_constant(params.in + thread_idx());
    for (u32 i = 0; i < 8; i++) {{
        store(params.out + thread_idx() * 8 + i, word >> ({shift}) & 15u);
    }}
}}
"
        )
    };
    let prelude = KERNELS.split("KERNEL(bits").next().unwrap();
    let right = kernel("right_order", "(i / 2 + i % 2 * 4) * 4");
    let wrong = kernel("wrong_order", "i * 4");
    let text = format!("{prelude}{right}{wrong}");
    let sources = ["right_order", "wrong_order"].map(|name| Source::new(name, text.as_str()));
    let library = compile(&sources).unwrap_or_else(|e| panic!("{e}"));
    let weights: Vec<u32> = words(256).iter().map(|w| w & 15).collect();
    let packed: Vec<u32> = weights
        .chunks(8)
        .map(|w| [0, 2, 4, 6, 1, 3, 5, 7].iter().rev().fold(0, |word, col| word << 4 | w[*col]))
        .collect();
    for (symbol, equal) in [("right_order", true), ("wrong_order", false)] {
        let mut device = emulator(1);
        let from = upload(&mut device, &packed, Access::Constant);
        let to = device.alloc(1024, Access::ReadWrite);
        let params = Params::default().u64(from).u64(to).u32(0).u32(0);
        device.launch(&library, symbol, LAUNCH, &params.0).unwrap();
        assert_eq!(to_u32(&device.read(to, 1024).unwrap()) == weights, equal);
    }
}
