//! Weights and rows for one matmul, and its products in float64.
//!
//! The values are there to find mistakes: scales at both ends, zeros of 0 and 15, rows of nothing,
//! rows with a single value, and rows that are large. All weights can be represented in every
//! format, so that what is computed from them is exact but for the kernel's own rounding.

use bespoke_kernel_gen::spec::{DType, KernelSpec, RowFormat};
use half::{bf16, f16};

use crate::backend::cpu::trial::{Rows, row_format};
use crate::error::Error;
use crate::model::linear::{AWQ_NIBBLE, AwqView, DenseView, LinearPart, LinearSource};

/// Operands of `rows_max` rows.
pub(super) struct Operands {
    pub rows: Rows,
    /// `[n]`
    pub bias: Vec<f32>,
    n: usize,
    k: usize,
    weights: Weights,
}

enum Weights {
    Dense { dtype: DType, bytes: Vec<u8> },
    Awq { group: usize, qweight: Vec<u8>, qzeros: Vec<u8>, scales: Vec<u8> },
}

/// A product, and what its rounding is measured by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Exact {
    pub value: f64,
    /// How far a kernel may be off.
    pub allowed: f64,
}

impl Operands {
    /// # Errors
    /// `spec` is no matmul, or one that AWQ checkpoints cannot hold.
    pub(super) fn new(spec: &KernelSpec, rows_max: usize) -> Result<Operands, Error> {
        let mut random = Random(0x9e37_79b9);
        let (n, k, weights) = match *spec {
            KernelSpec::AwqGemm { n, k, group, .. } => {
                if !n.is_multiple_of(8) {
                    return Err(Error::Unsupported(format!(
                        "{n} outputs of an AWQ matmul; multiples of 8 are possible"
                    )));
                }
                (n, k, awq(n, k, group.of(k), &mut random))
            }
            KernelSpec::Gemm { n, k, weight } => (n, k, dense(n, k, weight, &mut random)),
            KernelSpec::GemmBf16 { n, k } => (n, k, dense(n, k, DType::BF16, &mut random)),
            _ => return Err(Error::Unsupported(format!("{} is no matmul", spec.op()))),
        };
        let bias = (0..n).map(|n| if n % 3 == 0 { 0.0 } else { (n % 17) as f32 / 8.0 }).collect();
        let rows = rows(row_format(spec), rows_max, k, &mut random);
        Ok(Operands { rows, bias, n, k, weights })
    }

    /// The weights as a checkpoint has them.
    pub(super) fn source(&self) -> LinearSource<'_> {
        let (n, k) = (self.n, self.k);
        let part = match &self.weights {
            Weights::Dense { dtype, bytes } => {
                LinearPart::Dense(DenseView { n, k, dtype: *dtype, bytes })
            }
            Weights::Awq { group, qweight, qzeros, scales } => LinearPart::Awq(AwqView {
                n,
                k,
                group: *group,
                qweight,
                qzeros: Some(qzeros),
                scales,
            }),
        };
        LinearSource { parts: vec![part], row_map: None, bias: None }
    }

    pub(super) fn num_weights(&self) -> usize {
        self.n * self.k
    }

    /// What output `column` of all `row_idxs` has to be.
    ///
    /// A sum of `k` rounded products is off by about √k units in the last place of the sum of their
    /// magnitudes (N. Higham, T. Mary, "A New Approach to Probabilistic Rounding Error Analysis").
    pub(super) fn exact(&self, row_idxs: &[usize], column: usize) -> Vec<Exact> {
        let mut weights = vec![0.0; self.k];
        self.source().row(column, &mut weights);
        let of_row = |row: &usize| {
            let bias = f64::from(self.bias[column]);
            let (mut value, mut magnitude) = (bias, bias.abs());
            for (k, weight) in weights.iter().enumerate() {
                let product = self.element(*row, k) * f64::from(*weight);
                value += product;
                magnitude += product.abs();
            }
            let units = 4.0 * (self.k as f64).sqrt() + 8.0;
            Exact { value, allowed: units * 2f64.powi(-24) * magnitude + 1e-37 }
        };
        row_idxs.iter().map(of_row).collect()
    }

    fn element(&self, row: usize, k: usize) -> f64 {
        match &self.rows {
            Rows::Float(values) => f64::from(values[row * self.k + k]),
            Rows::Bf16(values) => f64::from(bf16::from_bits(values[row * self.k + k])),
            Rows::Int8 { q, scales, group } => {
                let scale = scales[row * (self.k / group) + k / group];
                f64::from(q[row * self.k + k]) * f64::from(scale)
            }
        }
    }
}

fn awq(n: usize, k: usize, group: usize, random: &mut Random) -> Weights {
    let mut word = |value: &mut dyn FnMut(usize, u32) -> u32, column: usize| {
        let nibbles = (0..8).map(|i| value(column + i, random.next()) << (4 * AWQ_NIBBLE[i]));
        nibbles.sum::<u32>().to_le_bytes()
    };
    let mut words = |lines: usize, value: &mut dyn FnMut(usize, u32) -> u32| {
        let columns = (0..lines).flat_map(|_| (0..n).step_by(8));
        columns.flat_map(|column| word(value, column)).collect::<Vec<u8>>()
    };
    let qweight = words(k, &mut |column, random| match column % 11 {
        5 => 15,
        6 => 0,
        _ => random & 15,
    });
    let qzeros = words(k / group, &mut |column, random| match column % 5 {
        0 => 0,
        1 => 15,
        _ => random & 15,
    });
    let scale = |column: usize| match column % 7 {
        2 => f16::MIN_POSITIVE,
        3 => f16::from_f32(1024.0),
        other => f16::from_f32((other + 1) as f32 / 256.0),
    };
    let columns = (0..k / group).flat_map(|_| 0..n);
    let scales = columns.flat_map(|column| scale(column).to_le_bytes()).collect();
    Weights::Awq { group, qweight, qzeros, scales }
}

/// Levels of ±127 times a power of two, of which every column has its largest.
fn dense(n: usize, k: usize, weight: DType, random: &mut Random) -> Weights {
    let dtype = if weight == DType::I8 { DType::F32 } else { weight };
    let mut bytes = Vec::with_capacity(n * k * dtype.size());
    for column in 0..n {
        let scale = match column % 7 {
            2 => 2f32.powi(-14),
            3 => 16.0,
            other => 2f32.powi(-4 - other as i32),
        };
        for i in 0..k {
            let level = if i == column % k { 127 } else { (random.next() % 255) as i32 - 127 };
            let value = level as f32 * scale;
            match dtype {
                DType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                DType::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                DType::F32 | DType::I8 => bytes.extend(value.to_le_bytes()),
            }
        }
    }
    Weights::Dense { dtype, bytes }
}

fn rows(format: RowFormat, rows_max: usize, k: usize, random: &mut Random) -> Rows {
    let mut level = |row: usize, i: usize| match row % 8 {
        3 => 0,
        5 if i == row * 31 % k => 127,
        5 => 0,
        6 => 127 - 254 * (i as i32 & 1),
        _ => (random.next() % 255) as i32 - 127,
    };
    let levels: Vec<i8> = (0..rows_max)
        .flat_map(|row| (0..k).map(move |i| (row, i)))
        .map(|(row, i)| level(row, i) as i8)
        .collect();
    let scale = |row: usize, idx: usize| match row % 8 {
        3 => 0.0,
        6 => 2f32.powi(10),
        7 => 2f32.powi(-20),
        _ => (1 + (row + idx) % 5) as f32 / 512.0,
    };
    let value = |(idx, level): (usize, &i8)| f32::from(*level) * scale(idx / k, idx % k);
    match format {
        RowFormat::F32 => Rows::Float(levels.iter().enumerate().map(value).collect()),
        RowFormat::Bf16 => {
            let values = levels.iter().enumerate().map(value);
            Rows::Bf16(values.map(|value| bf16::from_f32(value).to_bits()).collect())
        }
        RowFormat::I8 { group } => {
            let groups = (0..rows_max).flat_map(|row| (0..k / group).map(move |idx| (row, idx)));
            let scales = groups.map(|(row, idx)| scale(row, idx)).collect();
            Rows::Int8 { q: levels, scales, group }
        }
    }
}

/// A linear congruential generator (Knuth's MMIX); the upper bits.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bespoke_kernel_gen::spec::{ActivationType, GroupSize};

    #[test]
    fn products_are_those_of_the_weights() {
        let spec = KernelSpec::AwqGemm {
            n: 24,
            k: 64,
            group: GroupSize::Of(32),
            activation: ActivationType::Float,
        };
        let operands = Operands::new(&spec, 9).unwrap();
        let mut weights = vec![0.0; 64];
        operands.source().row(23, &mut weights);
        let Rows::Float(rows) = &operands.rows else { panic!("float rows") };
        let row = &rows[64..128];
        let sum: f64 = row.iter().zip(&weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        let exact = operands.exact(&[1, 3], 23);
        assert!((exact[0].value - sum - f64::from(operands.bias[23])).abs() < 1e-9);
        assert_eq!(exact[1].value, f64::from(operands.bias[23]), "row 3 is all zero");
    }

    #[test]
    fn other_ops_are_refused() {
        let spec = KernelSpec::Sample { vocab: 8 };
        assert!(Operands::new(&spec, 1).is_err());
    }
}
