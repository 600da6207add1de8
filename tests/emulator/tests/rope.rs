//! `rope` against plain loops in float64.

use bespoke_emulator::Access;
use bespoke_kernel_gen::cuda::pages::Layout;
use bespoke_kernel_gen::cuda::{Arch, KvType, Regime, Rope, RowType, Spec};

use crate::common::kv_cache::{Cache, Part, hadamard};
use crate::common::{
    Params, Random, SEEDS, emulator, generated, launch, models, round, to_u16, tolerance, upload,
    widen,
};

const EPSILON: f32 = 1e-5;

struct Inputs {
    qkv: Vec<u16>,
    cos_sin: Vec<f32>,
    slots: Vec<u32>,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    num_rows: usize,
}

const NUM_PAGES: usize = 4;

fn inputs(op: &Rope, num_rows: usize, random: &mut Random) -> Inputs {
    let width = (op.num_heads + 2 * op.num_kv_heads) * op.head_dim;
    let values = random.floats(num_rows * width, 3.0);
    let qkv = values.iter().map(|&v| round(op.rows, v)).collect();
    let angles = random.floats(num_rows * op.rotary_dim / 2, 3.0);
    let mut cos_sin = Vec::new();
    for row in angles.chunks(op.rotary_dim / 2) {
        cos_sin.extend(row.iter().map(|a| a.cos()));
        cos_sin.extend(row.iter().map(|a| a.sin()));
    }
    // NOTE: distinct slots in any order; a run of them starts inside of eight tokens.
    let num_slots = NUM_PAGES * op.page_size;
    let first = random.below(num_slots);
    let slots = (0..num_rows).map(|i| ((first + i) % num_slots) as u32).collect();
    let q_norm = random.floats(op.head_dim, 2.0);
    let k_norm = random.floats(op.head_dim, 2.0);
    Inputs { qkv, cos_sin, slots, q_norm, k_norm, num_rows }
}

/// Head `unit` of a row as the kernel is to write it.
fn expected(op: &Rope, inputs: &Inputs, row: usize, unit: usize) -> Vec<f64> {
    let units = op.num_heads + 2 * op.num_kv_heads;
    let at = (row * units + unit) * op.head_dim;
    let bits = &inputs.qkv[at..at + op.head_dim];
    let mut x: Vec<f64> = bits.iter().map(|b| f64::from(widen(op.rows, *b))).collect();
    if unit < op.num_heads + op.num_kv_heads {
        if op.qk_norm {
            let weight = if unit < op.num_heads { &inputs.q_norm } else { &inputs.k_norm };
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let factor = 1.0 / (mean + f64::from(EPSILON)).sqrt();
            x.iter_mut().zip(weight).for_each(|(v, w)| *v *= factor * f64::from(*w));
        }
        let half = op.rotary_dim / 2;
        for i in 0..half {
            let angle = row * op.rotary_dim + i;
            let cos = f64::from(inputs.cos_sin[angle]);
            let sin = f64::from(inputs.cos_sin[angle + half]);
            (x[i], x[i + half]) = (x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin);
        }
    }
    if op.kv == KvType::I4 {
        hadamard(&mut x);
    }
    x
}

fn check_cache(op: &Rope, cache: &Cache, inputs: &Inputs) {
    for row in 0..inputs.num_rows {
        for unit in op.num_heads..op.num_heads + 2 * op.num_kv_heads {
            let kv_head = (unit - op.num_heads) % op.num_kv_heads;
            let part = if unit < op.num_heads + op.num_kv_heads { Part::K } else { Part::V };
            let slot = inputs.slots[row] as usize;
            let wanted = expected(op, inputs, row, unit);
            let got = cache.head(slot, kv_head, part);
            let (scale, _) = cache.params(slot, kv_head, part);
            let low = wanted.iter().copied().fold(f64::INFINITY, f64::min);
            let high = wanted.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if op.kv != KvType::Rows {
                let levels_max = f64::from((1 << op.kv.bits()) - 1);
                let wanted_scale = (high - low) / levels_max;
                let scale = f64::from(scale);
                // NOTE: float16 steps of the scale, and of the minimum on every level.
                let slack = low.abs() / 1024.0 / levels_max + wanted_scale / 500.0;
                assert!((scale - wanted_scale).abs() <= slack, "{op:?}: {scale} {wanted_scale}");
            }
            for (dim, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                let half_step = match op.kv {
                    KvType::Rows => f64::from(tolerance(op.rows, *wanted as f32)),
                    _ => f64::from(scale) * 0.501,
                };
                assert!(
                    (got - wanted).abs() <= half_step + 1e-5,
                    "{op:?} {part:?} row {row} head {kv_head} dim {dim}: {got} not {wanted}"
                );
            }
            // NOTE: attention multiplies what is beyond the head by zeros.
            for dim in op.head_dim..cache.layout.dims() {
                assert_eq!(cache.level(slot, kv_head, part, dim), 0.0);
            }
        }
    }
}

fn check(op: Rope, num_rows: usize) {
    let variant = Spec::from(op).variant(Regime::Any, Arch::Sm90a);
    variant.is_feasible().unwrap();
    let library = generated(&variant);
    let Rope { num_kv_heads, head_dim, page_size, kv, .. } = op;
    let layout = Layout { num_kv_heads, head_dim, page_size, kv };
    for seed in SEEDS {
        let inputs = inputs(&op, num_rows, &mut Random(seed));
        let mut device = emulator(seed);
        let mut cache = Cache::poisoned(layout, op.rows, NUM_PAGES);
        let qkv = upload(&mut device, &inputs.qkv, Access::ReadWrite);
        let pages = device.upload(&cache.bytes, Access::ReadWrite);
        let params = Params::default()
            .u64(qkv)
            .u64(upload(&mut device, &inputs.cos_sin, Access::ReadOnly))
            .u64(upload(&mut device, &inputs.slots, Access::ReadOnly))
            .u64(if op.qk_norm { upload(&mut device, &inputs.q_norm, Access::Constant) } else { 0 })
            .u64(if op.qk_norm { upload(&mut device, &inputs.k_norm, Access::Constant) } else { 0 })
            .u64(pages)
            .u32(num_rows as u32)
            .f32(EPSILON);
        let result = launch(&mut device, &library, &variant, num_rows, &params);
        let report = result.unwrap_or_else(|fault| panic!("{op:?} seed {seed}: {fault}"));
        assert!(report.grid_waited);
        let got = to_u16(&device.read(qkv, inputs.qkv.len() * 2).unwrap());
        let units = op.num_heads + 2 * op.num_kv_heads;
        for (head, bits) in got.chunks(op.head_dim).enumerate() {
            let (row, unit) = (head / units, head % units);
            if unit >= op.num_heads {
                assert_eq!(bits, &inputs.qkv[head * op.head_dim..][..op.head_dim]);
                continue;
            }
            for (dim, (bits, wanted)) in
                bits.iter().zip(expected(&op, &inputs, row, unit)).enumerate()
            {
                let value = widen(op.rows, *bits);
                assert!(
                    (value - wanted as f32).abs() <= tolerance(op.rows, wanted as f32) + 1e-5,
                    "{op:?} seed {seed} row {row} head {unit} dim {dim}: {value} not {wanted}"
                );
            }
        }
        cache.bytes = device.read(pages, cache.bytes.len()).unwrap();
        check_cache(&op, &cache, &inputs);
    }
}

fn rope(heads: (usize, usize), head_dim: usize, rotary_dim: usize, page_size: usize) -> Rope {
    Rope {
        num_heads: heads.0,
        num_kv_heads: heads.1,
        head_dim,
        rotary_dim,
        qk_norm: head_dim != 80,
        rows: RowType::F16,
        kv: KvType::Rows,
        page_size,
    }
}

#[test]
fn equals_plain_loops() {
    for kv in KvType::ALL {
        for (op, num_rows) in [
            (rope((2, 1), 128, 128, 16), 11),
            (rope((3, 3), 80, 20, 64), 9),
            (rope((2, 2), 256, 64, 32), 3),
            (rope((1, 1), 8, 6, 16), 17),
        ] {
            check(Rope { kv, ..op }, num_rows);
        }
        check(Rope { kv, rows: RowType::BF16, ..rope((4, 1), 96, 96, 32) }, 1);
    }
}

#[test]
fn kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::Rope(op) = spec {
            check(op, 5);
        }
    }
}
