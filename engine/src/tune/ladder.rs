//! The ladder of verification of one matmul kernel: nothing that fails a step is timed.
//!
//! - V0: the kernel's symbol reads back as a variant that can exist, and its scratch memory is what
//!   that says.
//! - V1: products against float64, within a bound from the number formats.
//! - V2: repeated calls with poisoned outputs and scratch, in another way each time, canaries
//!   around both, by one thread, by three, and by as many as serve, give the same bits.
//! - V4: at all row counts, every row has the bits that the default kernel gives it.
//!
//! V3 is of GPUs; V5 holds by construction: a kernel gets pointers and numbers, and no allocator.
//! V6 is of what a lock makes of them: `verify` compares whole models.

use std::collections::BTreeMap;

use bespoke_kernel_gen::plan::KernelVariant;
use bespoke_kernel_gen::spec::{KernelSpec, RowRegime};
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::certificate::Level;
use bespoke_kernel_gen::tuning::record::Failure;

use super::ledger::{Begin, TakeVerdict};
use super::operands::{Exact, Operands};
use crate::backend::cpu::trial::{Trial, TrialOptions};
use crate::error::Error;
use crate::kernels::{Kernel, KernelTable};

/// Rows of a call at most.
const ROWS_MAX: usize = 129;
/// Row counts around the sizes of register blocks and of parts of a call.
const ROW_COUNTS: [usize; 35] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 23, 24, 25, 29, 31, 32, 33, 47,
    48, 49, 64, 65, 95, 96, 97, 128, 129,
];
/// The same for a matmul of many weights, where each row takes long: all remainders of a block, and
/// one count above each part of a call.
const LARGE_ROW_COUNTS: [usize; 22] =
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 31, 49, 65, 129];
/// Weights from which that is so.
const LARGE_WEIGHTS: usize = 8 << 20;
const NUM_REPEATS: usize = 64;
/// Rows of the repeated calls.
const REPEAT_ROWS: usize = 13;
/// Columns at either end, and between them, whose products are compared with float64.
const EDGE_COLUMNS: usize = 80;
const NUM_INNER_COLUMNS: usize = 64;
const REFERENCE_ROWS: [usize; 10] = [0, 1, 2, 3, 4, 5, 6, 7, 32, 128];

/// Where one matmul's kernels are verified.
pub struct Ladder {
    operands: Operands,
    /// By as many threads as serve, by one, and by three.
    trials: [Trial; 3],
    n: usize,
    row_counts: &'static [usize],
    /// Products in float64, with their row and column.
    exact: Vec<(usize, usize, Exact)>,
    /// What the default kernel gives, `[ROWS_MAX, n]`.
    expected: Vec<f32>,
    reduction_class: &'static str,
}

/// Products of the rows and columns that are compared.
fn exact(operands: &Operands, n: usize) -> Vec<(usize, usize, Exact)> {
    let step = n.div_ceil(NUM_INNER_COLUMNS).max(1);
    let is_edge = |column: usize| column < EDGE_COLUMNS || column + EDGE_COLUMNS >= n;
    let columns = (0..n).filter(|column| is_edge(*column) || column % step == 0);
    let of_column = |column: usize| {
        let exact = operands.exact(&REFERENCE_ROWS, column);
        REFERENCE_ROWS.into_iter().zip(exact).map(move |(row, exact)| (row, column, exact))
    };
    columns.flat_map(of_column).collect()
}

/// A kernel's levels, or the first that it failed.
pub type Verdict = Result<Vec<Level>, Failure>;

impl Ladder {
    /// # Errors
    /// `spec` is no matmul that `table` serves on `target`, or there is no memory.
    pub fn new(
        table: &KernelTable,
        spec: KernelSpec,
        target: Target,
        num_threads: usize,
    ) -> Result<Ladder, Error> {
        let default = table.serving_kernel(&spec, ROWS_MAX, target).ok_or_else(|| {
            Error::Unsupported(format!("nothing serves {} on {}", spec.op(), target.name()))
        })?;
        let operands = Operands::new(&spec, ROWS_MAX)?;
        let trial = |num_threads| {
            let options = TrialOptions { num_threads, cold_bytes: 1, rows_max: ROWS_MAX };
            let mut trial = Trial::new(spec, target, &operands.rows, &operands.bias, options)?;
            trial.prepare(default, &operands.source())?;
            Ok::<_, Error>(trial)
        };
        let mut trials = [trial(num_threads)?, trial(1)?, trial(3)?];
        let expected = trials[1].checked(default, ROWS_MAX).map_err(Error::Unsupported)?.to_vec();
        let reduction_class = default.reduction_class;
        let n = operands.bias.len();
        let is_large = operands.num_weights() >= LARGE_WEIGHTS;
        let row_counts = if is_large { &LARGE_ROW_COUNTS[..] } else { &ROW_COUNTS };
        let exact = exact(&operands, n);
        Ok(Ladder { operands, trials, n, row_counts, exact, expected, reduction_class })
    }

    /// All levels of `kernel`.
    ///
    /// # Errors
    /// There is no memory for another layout of the weights. That a kernel fails is no error.
    pub fn verify(&mut self, kernel: &Kernel) -> Result<Verdict, Error> {
        for trial in &mut self.trials {
            trial.prepare(kernel, &self.operands.source())?;
        }
        Ok(self.levels(kernel))
    }

    fn levels(&mut self, kernel: &Kernel) -> Verdict {
        let row_counts: Vec<usize> = match kernel.regime {
            RowRegime::One => vec![1],
            _ => self.row_counts.to_vec(),
        };
        Ok(vec![
            self.is_possible(kernel)?,
            self.products(kernel, &row_counts)?,
            self.repeats(kernel)?,
            note("V3", "of GPUs only"),
            self.row_bits(kernel, &row_counts)?,
            note("V5", "a kernel has no allocator"),
        ])
    }

    fn is_possible(&self, kernel: &Kernel) -> Result<Level, Failure> {
        let fail = |message: String| Err(mismatch("V0", message));
        let Some(variant) = KernelVariant::parse(kernel.symbol) else {
            return fail(format!("{} is no symbol of this program", kernel.symbol));
        };
        let KernelVariant { spec, regime, target, config } = variant;
        if let Err(reason) = config.is_feasible(&spec, regime, target) {
            return fail(reason);
        }
        if (spec, regime, target) != (kernel.spec, kernel.regime, kernel.target) {
            return fail("its symbol names another kernel".to_owned());
        }
        if variant.scratch_bytes() != kernel.scratch_bytes {
            let (of_symbol, own) = (variant.scratch_bytes(), kernel.scratch_bytes);
            return fail(format!("{own} bytes of scratch, its symbol says {of_symbol}"));
        }
        if kernel.reduction_class != self.reduction_class {
            return fail(format!(
                "reduction class {}, the default has {}",
                kernel.reduction_class, self.reduction_class
            ));
        }
        Ok(level("V0", 1, 0.0, 1))
    }

    fn products(&mut self, kernel: &Kernel, row_counts: &[usize]) -> Result<Level, Failure> {
        let n = self.n;
        let num_rows = row_counts.iter().copied().max().unwrap_or(1);
        let found = self.trials[0].checked(kernel, num_rows);
        let found = found.map_err(|message| mismatch("V1", message))?;
        let (mut num_cases, mut error_max) = (0, 0.0_f64);
        for (row, column, exact) in self.exact.iter().filter(|(row, ..)| *row < num_rows) {
            let got = found[row * n + column];
            let error = (f64::from(got) - exact.value).abs() / exact.allowed;
            num_cases += 1;
            error_max = error_max.max(error);
            if error.is_nan() || error > 1.0 {
                let message = format!(
                    "row {row}, output {column} of {num_rows} rows is {got}, {} ± {} is right",
                    exact.value, exact.allowed
                );
                return Err(mismatch("V1", message));
            }
        }
        Ok(level("V1", num_cases, error_max, 1))
    }

    fn repeats(&mut self, kernel: &Kernel) -> Result<Level, Failure> {
        let num_rows = if kernel.regime == RowRegime::One { 1 } else { REPEAT_ROWS };
        for repeat in 0..NUM_REPEATS {
            // All threads half of the time.
            let trial_idx = [0, 1, 0, 2][repeat % 4];
            self.compare(kernel, trial_idx, num_rows, "V2")?;
        }
        Ok(level("V2", self.trials.len(), 0.0, NUM_REPEATS))
    }

    fn row_bits(&mut self, kernel: &Kernel, row_counts: &[usize]) -> Result<Level, Failure> {
        for num_rows in row_counts {
            self.compare(kernel, 0, *num_rows, "V4")?;
        }
        Ok(level("V4", row_counts.len(), 0.0, 1))
    }

    fn compare(
        &mut self,
        kernel: &Kernel,
        trial_idx: usize,
        num_rows: usize,
        name: &str,
    ) -> Result<(), Failure> {
        let trial = &mut self.trials[trial_idx];
        let num_threads = trial.team().len();
        let found = trial.checked(kernel, num_rows);
        let found = found.map_err(|message| mismatch(name, message))?;
        let expected = &self.expected[..found.len()];
        let is_same = |(got, want): (&[f32], &[f32])| {
            // NOTE: without a branch for each, so that whole registers are compared.
            got.iter().zip(want).fold(true, |same, (a, b)| same & (a.to_bits() == b.to_bits()))
        };
        if found.chunks(1024).zip(expected.chunks(1024)).all(is_same) {
            return Ok(());
        }
        let mut pairs = found.iter().zip(expected).enumerate();
        match pairs.find(|(_, (got, want))| got.to_bits() != want.to_bits()) {
            None => Ok(()),
            Some((idx, (got, want))) => Err(mismatch(
                name,
                format!(
                    "row {}, output {} of {num_rows} rows by {num_threads} threads is {got:e}, \
                     the default kernel has {want:e}",
                    idx / self.n,
                    idx % self.n
                ),
            )),
        }
    }
}

/// Verifies kernels of `table` by their symbols, with `num_threads` threads where it does not
/// matter with how many, each as soon as those before it: `begin` is told before one is called,
/// `end` what came out.
///
/// # Errors
/// As [`Ladder::new`] and [`Ladder::verify`]; a symbol is not in the table.
pub fn verify_all(
    table: &KernelTable,
    symbols: &[String],
    num_threads: usize,
    begin: &mut Begin<'_>,
    end: &mut TakeVerdict<'_>,
) -> Result<(), Error> {
    let mut by_problem: BTreeMap<(KernelSpec, Target), Vec<&Kernel>> = BTreeMap::new();
    for symbol in symbols {
        let kernel = table
            .kernel(symbol)
            .ok_or_else(|| Error::Unsupported(format!("{symbol} is no kernel of this binary")))?;
        by_problem.entry((kernel.spec, kernel.target)).or_default().push(kernel);
    }
    for ((spec, target), kernels) in by_problem {
        let mut ladder = Ladder::new(table, spec, target, num_threads)?;
        for kernel in kernels {
            begin(kernel.symbol)?;
            let verdict = ladder.verify(kernel)?;
            end(kernel.symbol, verdict)?;
        }
    }
    Ok(())
}

pub(super) fn level(name: &str, num_cases: usize, max_error: f64, num_repeats: usize) -> Level {
    Level { name: name.to_owned(), num_cases, max_error, num_repeats, note: String::new() }
}

pub(super) fn note(name: &str, note: &str) -> Level {
    Level { note: note.to_owned(), ..level(name, 0, 0.0, 0) }
}

pub(super) fn mismatch(level: &str, message: String) -> Failure {
    Failure { reason: "mismatch".to_owned(), message: format!("{level}: {message}") }
}
