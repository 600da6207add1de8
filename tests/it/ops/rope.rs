//! `rope`: QK-norm, rotation, and the append to the pages.

use bespoke::kernels::abi::RopeArgs;
use bespoke::kernels::pages::{KvF16, KvF32, KvI4, KvI8, page_bytes};
use bespoke::kernels::rope;
use half::f16;

use super::{Instance, Random, assert_close, hadamard, instances, run};

/// Rotated values lie below 6: norm, two products and a sum, 2⁻²⁴ each.
const F32_TOLERANCE: f64 = 3e-6;
/// Half a unit of the last of eleven bits.
const F16_TOLERANCE: f64 = 1.0 / 2048.0;

#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rotary_dim: usize,
    page: usize,
    qk_norm: bool,
    kv: &'static str,
}

const EPS: f32 = 1e-6;
const NUM_PAGES: usize = 6;

impl Shape {
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn page_bytes(&self) -> usize {
        page_bytes(super::kv_bits(self.kv), self.kv_heads, self.head_dim, self.page)
    }

    /// A head as the cache holds it.
    fn spread(&self, x: &[f64]) -> Vec<f64> {
        if self.kv == "int4" { hadamard(x) } else { x.to_vec() }
    }

    /// A head after norm and rotation.
    fn rotated(&self, x: &[f32], norm: &[f32], cos_sin: &[f32]) -> Vec<f64> {
        let mut x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        if self.qk_norm {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
            x.iter_mut().zip(norm).for_each(|(x, weight)| *x *= factor * f64::from(*weight));
        }
        let half = self.rotary_dim / 2;
        for i in 0..half {
            let (cos, sin) = (f64::from(cos_sin[i]), f64::from(cos_sin[half + i]));
            let (a, b) = (x[i], x[half + i]);
            (x[i], x[half + i]) = (a * cos - b * sin, b * cos + a * sin);
        }
        x
    }

    /// K (`part` 0) or V (1) of a slot as the layout's description says.
    fn stored(&self, pages: &[u8], slot: usize, head: usize, part: usize) -> Vec<f64> {
        let (page, place) = (slot / self.page, slot % self.page);
        let bits = super::kv_bits(self.kv);
        let block = &pages[page * self.page_bytes()..][..self.page_bytes()];
        let half = |at: usize| f64::from(f16::from_le_bytes([block[at], block[at + 1]]));
        let v_row =
            if bits == 4 { self.head_dim.div_ceil(16) * 8 } else { self.head_dim * bits / 8 };
        let (k_bytes, v_bytes) = (self.head_dim * self.page * bits / 8, self.page * v_row);
        let v = self.kv_heads * k_bytes + head * v_bytes;
        let params = self.kv_heads * (k_bytes + v_bytes);
        let param = |i: usize| half(params + ((4 * head + 2 * part + i) * self.page + place) * 2);
        let value = |dim: usize| {
            let (row, idx) = match part {
                0 => (head * k_bytes + dim * self.page * bits / 8, place),
                _ => (v + place * v_row, dim),
            };
            match self.kv {
                "f32" => {
                    let at = row + idx * 4;
                    f64::from(f32::from_le_bytes(block[at..at + 4].try_into().unwrap()))
                }
                "f16" => half(row + idx * 2),
                "int8" => f64::from(block[row + idx]) * param(0) + param(1),
                _ => {
                    let byte = block[row + idx / 16 * 8 + idx % 8];
                    let level = if idx % 16 < 8 { byte & 15 } else { byte >> 4 };
                    f64::from(level) * param(0) + param(1)
                }
            }
        };
        (0..self.head_dim).map(value).collect()
    }

    /// Panics unless `got` is `expected` as well as the element type can hold it.
    fn check_stored(&self, got: &[f64], expected: &[f64], what: &str) {
        let largest = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        let low = expected.iter().fold(f64::MAX, |min, x| min.min(*x));
        let high = expected.iter().fold(f64::MIN, |max, x| max.max(*x));
        let f16_error = largest * F16_TOLERANCE;
        // The step is rounded up to float16, the minimum to the nearest.
        let step = |levels_max: f64| (high - low + f16_error) / levels_max * (1.0 + 1e-3) + 1e-7;
        let error = match self.kv {
            "f32" => 0.0,
            "f16" => f16_error,
            "int8" => (step(255.0) * 0.501).max(f16_error),
            _ => (step(15.0) * 0.501).max(f16_error),
        };
        let errors = got.iter().zip(expected).map(|(got, expected)| (got - expected).abs());
        for (dim, found) in errors.enumerate() {
            assert!(found <= error + F32_TOLERANCE, "{what}: dimension {dim}: off by {found}");
        }
    }
}

fn check(instances: Vec<Instance<RopeArgs>>, shape: Shape) {
    for (vectors, kernel) in instances {
        for (seed, rows) in [1, shape.page - 1, shape.page + 1, 3].into_iter().enumerate() {
            let what = format!("{vectors}, {}, head_dim {}, {rows}", shape.kv, shape.head_dim);
            check_call(kernel, shape, rows, seed as u64, &what);
        }
    }
}

fn check_call(
    kernel: unsafe fn(&RopeArgs, bespoke::kernels::abi::Share),
    shape: Shape,
    rows: usize,
    seed: u64,
    what: &str,
) {
    let Shape { heads, kv_heads, head_dim, .. } = shape;
    let mut random = Random(seed);
    let mut qkv = random.floats(rows * shape.width());
    qkv.iter_mut().for_each(|x| *x *= 3.0);
    // Constant values have no range to divide by.
    for (row, constant) in [0.0, -2.5, 1e-42].into_iter().enumerate().take(rows) {
        qkv[row * shape.width()..][(heads + kv_heads) * head_dim..shape.width()].fill(constant);
    }
    let before = qkv.clone();
    let angles = random.floats(rows * shape.rotary_dim / 2);
    let cos_sin: Vec<f32> = (angles.chunks(shape.rotary_dim / 2))
        .flat_map(|row| row.iter().map(|x| x.cos()).chain(row.iter().map(|x| x.sin())))
        .collect();
    let (q_norm, k_norm) = (random.floats(head_dim), random.floats(head_dim));
    let first = random.below(NUM_PAGES * shape.page - rows);
    let slots: Vec<u32> = (first..first + rows).map(|slot| slot as u32).collect();
    let mut pages = vec![0xa5u8; NUM_PAGES * shape.page_bytes()];
    let args = RopeArgs {
        rows,
        qkv: qkv.as_mut_ptr(),
        cos_sin: cos_sin.as_ptr(),
        slots: slots.as_ptr(),
        kv: pages.as_mut_ptr(),
        q_norm: q_norm.as_ptr(),
        k_norm: k_norm.as_ptr(),
        eps: EPS,
    };
    run(kernel, &args, 1 + seed as usize % 3, 0);
    for row in 0..rows {
        let cos_sin = &cos_sin[row * shape.rotary_dim..][..shape.rotary_dim];
        for head in 0..heads + 2 * kv_heads {
            let what = format!("{what}, row {row}, head {head}");
            let x = &before[row * shape.width() + head * head_dim..][..head_dim];
            let slot = slots[row] as usize;
            if head < heads {
                let got = &qkv[row * shape.width() + head * head_dim..][..head_dim];
                let expected = shape.spread(&shape.rotated(x, &q_norm, cos_sin));
                assert_close(got, &expected, F32_TOLERANCE, &what);
            } else if head < heads + kv_heads {
                let expected = shape.spread(&shape.rotated(x, &k_norm, cos_sin));
                shape.check_stored(&shape.stored(&pages, slot, head - heads, 0), &expected, &what);
            } else {
                let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                let got = shape.stored(&pages, slot, head - heads - kv_heads, 1);
                shape.check_stored(&got, &shape.spread(&x), &what);
            }
        }
    }
    check_untouched(shape, &pages, &slots, what);
    check_pieces(kernel, &args, shape, (&before, &pages), what);
}

/// Panics unless the same rows in two calls, in many shares, leave the same bytes behind: int4 puts
/// two tokens into a byte.
fn check_pieces(
    kernel: unsafe fn(&RopeArgs, bespoke::kernels::abi::Share),
    args: &RopeArgs,
    shape: Shape,
    (qkv, expected): (&[f32], &[u8]),
    what: &str,
) {
    let mut qkv = qkv.to_vec();
    let mut pages = vec![0xa5u8; expected.len()];
    let first = args.rows / 2;
    for (skipped, rows) in [(0, first), (first, args.rows - first)] {
        // SAFETY: `skipped` rows of `args` lie before the others.
        let (cos_sin, slots) =
            unsafe { (args.cos_sin.add(skipped * shape.rotary_dim), args.slots.add(skipped)) };
        let qkv = qkv[skipped * shape.width()..].as_mut_ptr();
        run(kernel, &RopeArgs { rows, qkv, cos_sin, slots, kv: pages.as_mut_ptr(), ..*args }, 7, 0);
    }
    assert!(pages == expected, "{what}: other bytes in two calls");
}

/// Panics if anything outside the slots was written.
fn check_untouched(shape: Shape, pages: &[u8], slots: &[u32], what: &str) {
    let untouched = pages.iter().filter(|byte| **byte == 0xa5).count();
    // Two tokens share the bytes of int4 keys.
    let per_slot = shape.page_bytes() / shape.page * if shape.kv == "int4" { 2 } else { 1 };
    assert!(untouched >= pages.len() - slots.len() * per_slot, "{what}: wrote outside its slots");
}

/// One line an instance: the sizes go to the kernel and to the test.
macro_rules! check {
    ($kv:ty, $name:literal, $heads:literal, $kv_heads:literal, $head_dim:literal,
     $rotary_dim:literal, $page:literal, $qk_norm:literal) => {
        check(
            instances!(
                RopeArgs,
                rope::run::<S, $kv, $heads, $kv_heads, $head_dim, $rotary_dim, $page, $qk_norm>
            ),
            Shape {
                heads: $heads,
                kv_heads: $kv_heads,
                head_dim: $head_dim,
                rotary_dim: $rotary_dim,
                page: $page,
                qk_norm: $qk_norm,
                kv: $name,
            },
        )
    };
}

#[test]
fn rope_rotates_and_appends() {
    check!(KvF32, "f32", 3, 3, 64, 64, 32, false);
    check!(KvF16, "f16", 9, 3, 64, 64, 32, false);
    check!(KvI8, "int8", 4, 2, 128, 128, 32, false);
    check!(KvI4, "int4", 9, 3, 64, 64, 32, false);
    check!(KvF16, "f16", 2, 1, 24, 24, 16, true);
    check!(KvI8, "int8", 7, 1, 80, 32, 16, true);
    check!(KvI4, "int4", 2, 1, 128, 128, 16, true);
    check!(KvF32, "f32", 2, 2, 80, 20, 16, true);
    check!(KvI4, "int4", 4, 2, 24, 24, 64, false);
    check!(KvF16, "f16", 1, 1, 8, 8, 16, false);
    check!(KvI8, "int8", 2, 2, 64, 64, 64, false);
    check!(KvI4, "int4", 1, 1, 8, 8, 16, false);
}

/// Values that no type of the cache holds: nothing panics, nothing outside the slots is written.
#[test]
fn rope_takes_any_float() {
    let kernels = instances!(RopeArgs, rope::run::<S, KvI4, 1, 1, 16, 16, 16, false>);
    let shape = Shape {
        heads: 1,
        kv_heads: 1,
        head_dim: 16,
        rotary_dim: 16,
        page: 16,
        qk_norm: false,
        kv: "int4",
    };
    for (vectors, kernel) in kernels {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -3e38, 7e4] {
            let mut qkv = vec![1.0f32; shape.width()];
            qkv[20] = value;
            qkv[40] = value;
            let cos_sin = [[1.0f32; 8], [0.0; 8]].concat();
            let mut pages = vec![0xa5u8; 2 * shape.page_bytes()];
            let args = RopeArgs {
                rows: 1,
                qkv: qkv.as_mut_ptr(),
                cos_sin: cos_sin.as_ptr(),
                slots: [17].as_ptr(),
                kv: pages.as_mut_ptr(),
                q_norm: std::ptr::null(),
                k_norm: std::ptr::null(),
                eps: EPS,
            };
            run(kernel, &args, 1, 0);
            check_untouched(shape, &pages, &[17], &format!("{vectors}, {value}"));
        }
    }
}
