//! Features: what a kernel's time at a row count depends on, as numbers.

use crate::plan::KernelVariant;
use crate::spec::{KernelSpec, RowRegime};

/// Row counts, as logarithms to the base 2, at which the effect of a choice may bend; between them
/// it is a straight line.
const KNOTS: [f64; 5] = [0.0, 2.0, 4.0, 6.0, 9.0];
/// Features whose effect depends on the row count, and all of them at the knots.
const NUM_BY_ROWS: usize = 13;
/// Rows that unpacking weights costs as much as, about.
const UNPACKING_ROWS: f64 = 4.0;
/// Weights whose logarithm is 0: about those of one linear of a small model.
const NUM_WEIGHTS: f64 = 1e6;

/// What is known of the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Setting {
    /// Row counts above which arithmetic takes longer than reading the weights.
    pub(super) rows_balanced: f64,
}

impl Setting {
    /// The features of a kernel less those of the default. `None` for what is no matmul.
    pub(super) fn difference(
        &self,
        variant: &KernelVariant,
        default: &KernelVariant,
        rows: usize,
    ) -> Option<Vec<f64>> {
        let (own, other) = (self.features(variant, rows)?, self.features(default, rows)?);
        Some(own.iter().zip(&other).map(|(own, other)| own - other).collect())
    }

    fn features(&self, variant: &KernelVariant, rows: usize) -> Option<Vec<f64>> {
        let (KernelSpec::AwqGemm { n, k, .. }
        | KernelSpec::Gemm { n, k, .. }
        | KernelSpec::GemmBf16 { n, k }) = variant.spec
        else {
            return None;
        };
        let by_rows = by_rows(variant, rows.max(1));
        let mut all = Vec::with_capacity(NUM_BY_ROWS * KNOTS.len() + 8);
        for share in shares(rows.max(1)) {
            all.extend(by_rows.iter().map(|value| share * value));
        }
        let [.., is_many, _, one_tile, two_tiles, no_prefetch, _, _, _, _, _] = by_rows;
        // Larger weights stay in no cache, and share a call out more evenly.
        let size = (n as f64 * k as f64 / NUM_WEIGHTS).ln();
        all.extend([is_many, one_tile, two_tiles, no_prefetch].map(|value| size * value));
        // How far the call is bound by memory, by the physical limits.
        let memory = (self.rows_balanced / rows.max(1) as f64).min(1.0);
        all.extend([is_many, one_tile, two_tiles, no_prefetch].map(|value| memory * value));
        Some(all)
    }
}

/// How near a row count is to each knot: a partition of 1.
fn shares(rows: usize) -> [f64; KNOTS.len()] {
    let log = (rows as f64).log2().min(KNOTS[KNOTS.len() - 1]);
    let mut shares = [0.0; KNOTS.len()];
    let next = KNOTS.iter().position(|knot| log <= *knot).unwrap_or(KNOTS.len() - 1);
    if next == 0 {
        shares[0] = 1.0;
        return shares;
    }
    let share = (log - KNOTS[next - 1]) / (KNOTS[next] - KNOTS[next - 1]);
    shares[next] = share;
    shares[next - 1] = 1.0 - share;
    shares
}

fn by_rows(variant: &KernelVariant, rows: usize) -> [f64; NUM_BY_ROWS] {
    let config = &variant.config;
    let is = f64::from;
    let block = config.rows.max(1);
    // Rows that are computed: a block that is not full costs more than its rows.
    let left = match (rows % block, config.halves) {
        (0, _) => 0,
        (left, 1) if left <= block.div_ceil(2) => block.div_ceil(2),
        (_, 1) => block,
        (left, _) => left.next_multiple_of(2),
    };
    let computed = (rows - rows % block + left) as f64;
    // How often the weights are read.
    let passes = rows.div_ceil(block) as f64;
    let is_many = variant.regime == RowRegime::Many;
    let unpacking = if is_many { UNPACKING_ROWS } else { passes };
    let splits = config.split > 0 && rows >= config.split;
    [
        (computed + unpacking).ln(),
        computed.ln(),
        passes.ln(),
        is(is_many),
        is(variant.regime == RowRegime::One),
        is(config.tiles == 1),
        is(config.tiles == 2),
        is(config.prefetch == 0),
        is((1..=1024).contains(&config.prefetch)),
        is(config.prefetch > 2048),
        is(config.unroll > 1),
        is(splits),
        is(config.halves > 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_one() {
        for rows in [1, 2, 3, 4, 7, 16, 100, 512, 4096] {
            let shares = shares(rows);
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{rows}: {shares:?}");
            assert!(shares.iter().all(|share| *share >= 0.0), "{rows}: {shares:?}");
        }
        assert_eq!(shares(8), [0.0, 0.5, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn rows_that_fill_no_block_cost_more() {
        let few = |config: &str| {
            let symbol = format!("awq_gemm_n960_k576_g64_int8_few_{config}__avx512");
            KernelVariant::parse(&symbol).unwrap()
        };
        let computed = |config, rows| by_rows(&few(config), rows)[1].exp().round() as usize;
        assert_eq!(computed("r8_c4_t2_u1_h1", 16), 16);
        assert_eq!(computed("r8_c4_t2_u1_h1", 9), 12);
        assert_eq!(computed("r8_c4_t2_u1_h1", 13), 16);
        assert_eq!(computed("r6_c4_t4_u1", 9), 10);
    }
}
