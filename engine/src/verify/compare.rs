//! How far a kernel's output may be from the reference's.

use bespoke_kernel_gen::spec::{KvDType, ModelShape};

use super::Part;
use crate::backend::Precision;

pub(super) struct Tolerance {
    /// Elements of the KV cache; the reference keeps float32.
    pub(super) kv: KvDType,
}

pub(super) struct Outcome {
    /// The largest error, as a share of what is allowed.
    pub(super) error: f32,
    pub(super) problem: Option<String>,
}

/// Of a matmul, as a share of the root mean square of a row: sums in another order, and products
/// that tensor cores cut off, not round, at 24 bits.
const SUM: f32 = 1e-3;
/// Of functions that a GPU approximates, and of short sums.
const FUNCTION: f32 = 1e-4;
/// How much larger than its root mean square the error of a single element may be.
const PEAK: f32 = 8.0;

impl Tolerance {
    /// Compares `(found, expected, width)`.
    pub(super) fn compare(
        &self,
        part: Part,
        precision: Precision,
        shape: &ModelShape,
        (found, expected, width): (&[f32], &[f32], usize),
    ) -> Outcome {
        assert_eq!(found.len(), expected.len(), "both wrote the same rows");
        let mut outcome = Outcome { error: 0.0, problem: None };
        let rows = found.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate();
        for (row, (found, expected)) in rows {
            // NOTE: keys and values behind the queries may be anything: they are in the cache.
            let compared = match part {
                Part::Rope => shape.num_heads * shape.head_dim,
                _ => width,
            };
            let allowed = self.allowed(part, precision, shape, expected);
            for idx in 0..compared {
                let (got, want) = (found[idx], expected[idx]);
                let error = (got - want).abs();
                let share = if error == 0.0 { 0.0 } else { error / allowed(idx) };
                if is_above(share, outcome.error) {
                    outcome.error = share;
                }
                if is_above(share, 1.0) && outcome.problem.is_none() {
                    outcome.problem = Some(format!(
                        "row {row}, element {idx} is {got}, the reference has {want}, an error of \
                         at most {} is allowed",
                        allowed(idx)
                    ));
                }
            }
        }
        if part == Part::Attention && outcome.problem.is_none() {
            self.compare_squares(precision, found, expected, &mut outcome);
        }
        outcome
    }

    /// The error allowed of each element of a row.
    fn allowed<'a>(
        &self,
        part: Part,
        precision: Precision,
        shape: &ModelShape,
        row: &'a [f32],
    ) -> impl Fn(usize) -> f32 + 'a {
        let row_max = row.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
        let row_rms = root_mean_square(row);
        let head_dim = shape.head_dim;
        let unit = match precision {
            Precision::Float { bits } => 2.0_f32.powi(-bits),
            Precision::Levels { .. } => 0.0,
        };
        let cache = PEAK * self.cache_error(precision);
        move |idx| {
            let want = row[idx].abs();
            let computed = match part {
                Part::Embed => return 0.0,
                Part::Norm(_) => FUNCTION * want,
                Part::Linear(_) => SUM * row_rms,
                // Rotated and, with norms, scaled: rounded once each.
                Part::Rope => FUNCTION * want + unit * row_max + 1e-6 * row_max,
                Part::Attention => {
                    let head = idx / head_dim * head_dim;
                    cache * root_mean_square(&row[head..head + head_dim])
                }
                Part::SiluAndMul => FUNCTION * want,
                // The largest logit and its index are what they are.
                Part::Sample if idx < 2 => return 0.0,
                Part::Sample => FUNCTION * want.max(1.0),
            };
            let rounded = match precision {
                Precision::Float { .. } => unit * want,
                Precision::Levels { group } => {
                    let first = idx / group * group;
                    let group = &row[first..row.len().min(first + group)];
                    let largest = group.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
                    largest / 127.0 * 0.51
                }
            };
            // The smallest float16 numbers are further apart.
            computed + 1.01 * rounded + 2.0_f32.powi(-24)
        }
    }

    /// Root mean square of the error that the KV cache's type brings, as a share of the output's.
    fn cache_error(&self, precision: Precision) -> f32 {
        let rows = match precision {
            Precision::Float { bits } => 4.0 * 2.0_f32.powi(-bits),
            Precision::Levels { .. } => 1e-2,
        };
        let cache = match self.kv {
            KvDType::F32 => 1e-5,
            KvDType::F16 => 2e-3,
            KvDType::I8 => 2e-2,
            KvDType::I4 => 0.3,
        };
        rows + cache
    }

    fn compare_squares(
        &self,
        precision: Precision,
        found: &[f32],
        expected: &[f32],
        outcome: &mut Outcome,
    ) {
        let errors: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
        let allowed = self.cache_error(precision) * root_mean_square(expected);
        let error = root_mean_square(&errors);
        outcome.error = outcome.error.max(error / allowed);
        if is_above(error, allowed) {
            outcome.problem =
                Some(format!("the root mean square of errors is {error}, {allowed} is allowed"));
        }
    }
}

/// Also true of an error that is no number.
fn is_above(error: f32, limit: f32) -> bool {
    error.is_nan() || error > limit
}

fn root_mean_square(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
    (sum / values.len().max(1) as f64).sqrt() as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use bespoke_kernel_gen::presets;
    use bespoke_kernel_gen::spec::LinearRole;

    fn problem(part: Part, precision: Precision, found: &[f32], expected: &[f32]) -> bool {
        let shape = presets::shape("smollm2-135m", &[]).unwrap();
        let tolerance = Tolerance { kv: KvDType::F16 };
        let rows = (found, expected, found.len());
        tolerance.compare(part, precision, &shape, rows).problem.is_some()
    }

    #[test]
    fn what_is_wrong_is_found() {
        let float = Precision::Float { bits: 24 };
        let linear = Part::Linear(LinearRole::O);
        assert!(!problem(linear, float, &[1.0, -2.0], &[1.0001, -2.0]));
        assert!(problem(linear, float, &[1.0, -2.0], &[1.01, -2.0]));
        assert!(problem(linear, float, &[1.0, f32::NAN], &[1.0, -2.0]));
        assert!(problem(linear, float, &[f32::INFINITY, 1.0], &[1.0, 1.0]));
        assert!(problem(Part::Embed, float, &[1.0], &[1.0 + f32::EPSILON]));
        let bf16 = Precision::Float { bits: 8 };
        assert!(!problem(linear, bf16, &[1.0, -2.0], &[1.003, -2.0]));
        assert!(problem(linear, bf16, &[1.0, -2.0], &[1.02, -2.0]));
        let levels = Precision::Levels { group: 2 };
        assert!(!problem(Part::SiluAndMul, levels, &[1.27, 0.0], &[1.27, 0.004]));
        assert!(problem(Part::SiluAndMul, levels, &[1.27, 0.0], &[1.27, 0.009]));
    }
}
