//! `embed`: rows of the embedding table.

use bespoke::kernels::abi::EmbedArgs;
use bespoke::kernels::embed;
use bespoke::kernels::simd::{BF16, F16, F32};
use half::{bf16, f16};

use super::{Instance, Random, assert_same_bits, instances, run};

const VOCAB: usize = 37;

/// A table, and what its bytes mean.
fn table(hidden: usize, dtype: &str) -> (Vec<u8>, Vec<f32>) {
    let values = Random(7).floats(VOCAB * hidden);
    match dtype {
        "f32" => (values.iter().flat_map(|x| x.to_le_bytes()).collect(), values),
        "f16" => {
            let values: Vec<f16> = values.into_iter().map(f16::from_f32).collect();
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (bytes, values.into_iter().map(f32::from).collect())
        }
        _ => {
            let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (bytes, values.into_iter().map(f32::from).collect())
        }
    }
}

fn check(instances: Vec<Instance<EmbedArgs>>, hidden: usize, dtype: &str) {
    let (bytes, values) = table(hidden, dtype);
    for (vectors, kernel) in instances {
        for (rows, shares) in [(1, 1), (1, 2), (5, 2), (7, 3)] {
            let mut random = Random(rows as u64);
            let mut tokens: Vec<u32> = (0..rows).map(|_| random.below(VOCAB) as u32).collect();
            tokens[0] = VOCAB as u32 - 1;
            let mut out = vec![f32::NAN; rows * hidden];
            let args = EmbedArgs {
                rows,
                tokens: tokens.as_ptr(),
                table: bytes.as_ptr(),
                out: out.as_mut_ptr(),
            };
            run(kernel, &args, shares, 0);
            let expected: Vec<f32> = tokens
                .iter()
                .flat_map(|token| &values[*token as usize * hidden..][..hidden])
                .copied()
                .collect();
            assert_same_bits(&out, &expected, &format!("{vectors}, {dtype}, hidden {hidden}"));
        }
    }
}

#[test]
fn embed_copies_rows() {
    check(instances!(EmbedArgs, embed::run::<S, F32, 64>), 64, "f32");
    check(instances!(EmbedArgs, embed::run::<S, F32, 20>), 20, "f32");
    check(instances!(EmbedArgs, embed::run::<S, F16, 576>), 576, "f16");
    check(instances!(EmbedArgs, embed::run::<S, F16, 24>), 24, "f16");
    check(instances!(EmbedArgs, embed::run::<S, BF16, 40>), 40, "bf16");
}
