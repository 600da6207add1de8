//! `rope`: QK-norm, rotation, and the append to the pages.

use bespoke::kernels::abi::RopeArgs;
use bespoke::kernels::pages::{KvF16, KvF32, KvI8, page_bytes};
use bespoke::kernels::rope;
use half::f16;

use super::{Instance, Random, assert_close, instances, run};

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

    fn element_size(&self) -> usize {
        match self.kv {
            "f32" => 4,
            "f16" => 2,
            _ => 1,
        }
    }

    fn page_bytes(&self) -> usize {
        let int8 = self.kv == "int8";
        page_bytes(self.element_size(), int8, self.kv_heads, self.head_dim, self.page)
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

    /// K (`part` 0) or V (1) of a slot as the layout's description says, with the largest error
    /// that the element type may make of `expected`.
    fn stored(
        &self,
        pages: &[u8],
        slot: usize,
        head: usize,
        part: usize,
        expected: &[f64],
    ) -> (Vec<f32>, f64) {
        let (page, place) = (slot / self.page, slot % self.page);
        let head_bytes = self.page_bytes() / self.kv_heads;
        let block = &pages[page * self.page_bytes() + head * head_bytes..][..head_bytes];
        let size = self.element_size();
        let float = |at: usize| f32::from_le_bytes(block[at..at + 4].try_into().unwrap());
        let param = |i: usize| {
            float(2 * self.page * self.head_dim + ((2 * part + i) * self.page + place) * 4)
        };
        let value = |dim: usize| {
            let at = match part {
                0 => dim * self.page + place,
                _ => (self.page + place) * self.head_dim + dim,
            } * size;
            match self.kv {
                "f32" => float(at),
                "f16" => f16::from_le_bytes([block[at], block[at + 1]]).to_f32(),
                _ => (f32::from(block[at]) - param(1)) * param(0),
            }
        };
        let largest = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        let low = expected.iter().fold(f64::MAX, |min, x| min.min(*x));
        let high = expected.iter().fold(f64::MIN, |max, x| max.max(*x));
        let error = match self.kv {
            "f32" => 0.0,
            "f16" => largest * F16_TOLERANCE,
            _ => (high - low) / 255.0 * 0.501 + largest * 1e-6,
        };
        ((0..self.head_dim).map(value).collect(), error + F32_TOLERANCE)
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
                assert_close(got, &shape.rotated(x, &q_norm, cos_sin), F32_TOLERANCE, &what);
            } else if head < heads + kv_heads {
                let expected = shape.rotated(x, &k_norm, cos_sin);
                let (got, error) = shape.stored(&pages, slot, head - heads, 0, &expected);
                assert_close(&got, &expected, error, &what);
            } else {
                let expected: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                let head = head - heads - kv_heads;
                let (got, error) = shape.stored(&pages, slot, head, 1, &expected);
                assert_close(&got, &expected, error, &what);
            }
        }
    }
    check_untouched(shape, &pages, &slots, what);
}

/// Panics if anything outside the slots was written.
fn check_untouched(shape: Shape, pages: &[u8], slots: &[u32], what: &str) {
    let untouched = pages.iter().filter(|byte| **byte == 0xa5).count();
    let per_slot = shape.page_bytes() / shape.page;
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
    check!(KvF16, "f16", 2, 1, 24, 24, 16, true);
    check!(KvI8, "int8", 7, 1, 80, 32, 16, true);
    check!(KvF32, "f32", 2, 2, 80, 20, 16, true);
    check!(KvF16, "f16", 1, 1, 8, 8, 16, false);
}
