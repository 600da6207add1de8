//! `embed`: rows of tables of each type, exactly.

use bespoke_emulator::Access;
use bespoke_kernel_gen::cuda::{Arch, Embed, Regime, Spec};
use bespoke_kernel_gen::spec::DType;
use half::{bf16, f16};

use crate::common::{
    Bytes, Params, Random, SEEDS, emulator, generated, launch, models, to_f32, upload,
};

/// Bytes of `values` as `dtype`, and the values they stand for.
fn table(dtype: DType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    match dtype {
        DType::F32 => (values.bytes(), values.to_vec()),
        DType::F16 => {
            let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            let bits: Vec<u16> = halves.iter().map(|h| h.to_bits()).collect();
            (bits.bytes(), halves.iter().map(|h| h.to_f32()).collect())
        }
        _ => {
            let halves: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            let bits: Vec<u16> = halves.iter().map(|h| h.to_bits()).collect();
            (bits.bytes(), halves.iter().map(|h| h.to_f32()).collect())
        }
    }
}

fn check(dtype: DType, hidden: usize, seed: u64) {
    const VOCAB: usize = 37;
    let variant = Spec::from(Embed { hidden, table: dtype }).variant(Regime::Any, Arch::Sm80);
    let library = generated(&variant);
    let mut random = Random(seed);
    let (bytes, values) = table(dtype, &random.floats(VOCAB * hidden, 2.0));
    let mut tokens: Vec<u32> = (0..seed).map(|_| random.below(VOCAB) as u32).collect();
    tokens.extend([0, VOCAB as u32 - 1]);
    let mut device = emulator(seed);
    let table = device.upload(&bytes, Access::Constant);
    let tokens_at = upload(&mut device, &tokens, Access::ReadOnly);
    let out = device.alloc(tokens.len() * hidden * 4, Access::ReadWrite);
    let params = Params::default().u64(table).u64(tokens_at).u64(out);
    let params = params.u32(tokens.len() as u32).u32(0);
    let report = launch(&mut device, &library, &variant, tokens.len(), &params);
    report.unwrap_or_else(|fault| panic!("{dtype:?} {hidden} seed {seed}: {fault}"));
    let got = to_f32(&device.read(out, tokens.len() * hidden * 4).unwrap());
    for (i, &token) in tokens.iter().enumerate() {
        let expected = &values[token as usize * hidden..][..hidden];
        assert_eq!(&got[i * hidden..][..hidden], expected, "{dtype:?} {hidden} token {token}");
    }
}

#[test]
fn rows_are_copied() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for hidden in [576, 64, 2056, 4, 1, 33, 90] {
            for seed in SEEDS {
                check(dtype, hidden, seed);
            }
        }
    }
}

#[test]
fn kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::Embed(op) = spec {
            SEEDS.into_iter().for_each(|seed| check(op.table, op.hidden, seed));
        }
    }
}
