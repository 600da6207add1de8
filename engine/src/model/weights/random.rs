//! Random weights in a model's shapes: for measuring speed where there is no checkpoint, and for
//! comparing backends. What a model says with them means nothing.

use std::sync::Arc;

use bespoke_kernel_gen::spec::{DType, LinearRole, ModelShape, WeightFormat};
use half::{bf16, f16};

use super::{AwqTensors, DenseTensor, LayerNorms, LinearTensors, ModelWeights, PartTensors};
use crate::error::Error;

/// Weights that depend on the shape and on a seed alone.
#[derive(Clone, Debug)]
pub struct RandomWeights {
    shape: ModelShape,
    seed: u64,
}

/// Dense weights are whole numbers up to this, over 2¹⁰: every element type holds them, and int8
/// with the scale of a row's largest holds them exactly.
const LEVEL_MAX: i32 = 127;
/// Root mean square of dense weights and of the differences between AWQ's levels and zeros times
/// their scales.
const DENSE_RMS: f32 = 0.0716;
const AWQ_RMS: f32 = 0.13;

impl RandomWeights {
    pub fn new(shape: &ModelShape, seed: u64) -> RandomWeights {
        RandomWeights { shape: shape.clone(), seed }
    }

    fn random(&self, part: u64, layer_idx: usize) -> Random {
        let mut random = Random(self.seed ^ (part << 56) ^ ((layer_idx as u64) << 32));
        random.next();
        random
    }

    /// A norm before the linear `role`: outputs of the linear have about unit variance.
    fn norm(&self, random: &mut Random, role: LinearRole, layer_idx: usize) -> Vec<f32> {
        let linear = self.shape.linear_in(role, layer_idx);
        let rms = match linear.format {
            WeightFormat::Dense(_) => DENSE_RMS,
            WeightFormat::Awq(_) => AWQ_RMS,
        };
        let size = 1.0 / (rms * (linear.k as f32).sqrt());
        (0..self.shape.hidden_size).map(|_| size * (0.5 + random.unit())).collect()
    }
}

impl ModelWeights for RandomWeights {
    fn embedding(&self) -> Result<DenseTensor, Error> {
        let ModelShape { vocab_size, hidden_size, dtype, .. } = self.shape;
        dense(&mut self.random(1, 0), vocab_size, hidden_size, dtype)
    }

    fn final_norm(&self) -> Result<Vec<f32>, Error> {
        Ok(self.norm(&mut self.random(2, 0), LinearRole::Head, 0))
    }

    fn norms(&self, layer_idx: usize) -> Result<LayerNorms, Error> {
        let mut random = self.random(3, layer_idx);
        let attention = self.norm(&mut random, LinearRole::Qkv, layer_idx);
        let mlp = self.norm(&mut random, LinearRole::GateUp, layer_idx);
        let mut head = || (0..self.shape.head_dim).map(|_| 0.5 + random.unit()).collect();
        let qk = self.shape.qk_norm.then(|| (head(), head()));
        Ok(LayerNorms { attention, mlp, qk })
    }

    fn linear(&self, role: LinearRole, layer_idx: usize) -> Result<LinearTensors, Error> {
        let linear = self.shape.linear_in(role, layer_idx);
        let (n, k) = (linear.n, linear.k);
        let mut random = self.random(4 + role as u64, layer_idx);
        let part = match linear.format {
            WeightFormat::Dense(dtype) => PartTensors::Dense(dense(&mut random, n, k, dtype)?),
            WeightFormat::Awq(group) => {
                let group = group.of(k);
                let params = (k / group).checked_mul(n).ok_or_else(|| too_large(n, k))?;
                let mut scales = zeroed(params, 2)?;
                for scale in scales.as_chunks_mut::<2>().0 {
                    *scale = f16::from_f32(0.01 + 0.02 * random.unit()).to_le_bytes();
                }
                let mut qweight = zeroed(n, k.div_ceil(2))?;
                random.fill(&mut qweight);
                let mut qzeros = zeroed(params, 1)?;
                qzeros.truncate(params / 2);
                random.fill(&mut qzeros);
                PartTensors::Awq(AwqTensors { n, k, group, qweight, qzeros: Some(qzeros), scales })
            }
        };
        let bias = linear.bias.then(|| (0..n).map(|_| random.unit() - 0.5).collect());
        Ok(LinearTensors { parts: vec![part], row_map: None, bias })
    }
}

fn too_large(n: usize, k: usize) -> Error {
    Error::Resources(format!("a matrix of {n} × {k} weights does not fit any memory"))
}

fn zeroed(a: usize, b: usize) -> Result<Vec<u8>, Error> {
    let len = a.checked_mul(b).ok_or_else(|| too_large(a, b))?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(len)
        .map_err(|_| Error::Resources(format!("no memory for {len} bytes of random weights")))?;
    bytes.resize(len, 0);
    Ok(bytes)
}

/// A matrix whose rows each begin with the largest level.
fn dense(random: &mut Random, n: usize, k: usize, dtype: DType) -> Result<DenseTensor, Error> {
    let size = dtype.size();
    let mut bytes = zeroed(n, k.checked_mul(size).ok_or_else(|| too_large(n, k))?)?;
    let mut elements: Vec<[u8; 4]> = Vec::with_capacity(2 * LEVEL_MAX as usize + 1);
    for level in -LEVEL_MAX..=LEVEL_MAX {
        let value = level as f32 / 1024.0;
        let mut element = [0; 4];
        match dtype {
            DType::F32 => element = value.to_le_bytes(),
            DType::F16 => element[..2].copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            DType::BF16 => element[..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            DType::I8 => unreachable!("checkpoints hold no int8 tensors"),
        }
        elements.push(element);
    }
    let num_levels = elements.len() as u64;
    for row in bytes.chunks_exact_mut((k * size).max(1)) {
        for eight in row.chunks_mut(8 * size) {
            let mut bits = random.next();
            for out in eight.chunks_exact_mut(size) {
                let level = ((bits & 255) * num_levels) >> 8;
                out.copy_from_slice(&elements[level as usize][..size]);
                bits >>= 8;
            }
        }
        row[..size].copy_from_slice(&elements[2 * LEVEL_MAX as usize][..size]);
    }
    Ok(DenseTensor { n, k, dtype, bytes: Arc::new(bytes) })
}

/// Random numbers by SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// In 0..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for eight in bytes.chunks_mut(8) {
            let random = self.next().to_le_bytes();
            eight.copy_from_slice(&random[..eight.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bespoke_kernel_gen::presets;

    /// The scales of norms keep what linears give around one.
    #[test]
    fn sizes_are_those_of_the_shape() {
        let shape = presets::shape("smollm2-135m-awq", &[]).unwrap();
        let weights = RandomWeights::new(&shape, 3);
        let qkv = weights.linear(LinearRole::Qkv, 0).unwrap();
        let source = qkv.source();
        assert_eq!((source.n(), source.k()), (shape.qkv.n, shape.qkv.k));
        let norms = weights.norms(0).unwrap();
        let mut row = vec![0.0; shape.qkv.k];
        let mut square = 0.0;
        for n in 0..64 {
            source.row(n, &mut row);
            square += row.iter().zip(&norms.attention).map(|(w, x)| (w * x).powi(2)).sum::<f32>();
        }
        let rms = (square / 64.0).sqrt();
        assert!((0.5..2.0).contains(&rms), "{rms}");
        let other = weights.linear(LinearRole::Qkv, 1).unwrap();
        let mut other_row = row.clone();
        other.source().row(63, &mut other_row);
        assert_ne!(row, other_row, "layers differ");
    }
}
