//! The ladder of verification of one CUDA matmul: nothing that fails a step is timed.
//!
//! - V0: the kernel's symbol reads back as a variant that can exist. The build has refused spills,
//!   local and static shared memory.
//! - V1: products against float64, within a bound from the number formats.
//! - V2: repeated launches with outputs and workspace poisoned in another way each time give the
//!   same bits, and leave the counters of the workspace at zero.
//! - V4: at row counts around those of the tiles, every row has the bits that the default kernel
//!   gives it among many.
//!
//! V3, compute-sanitizer, is run by `benches/gpu/check`. V5 holds by construction: launches are
//! recorded, and a recording cannot allocate.

use std::collections::BTreeSet;

use bespoke_kernel_gen::cuda::{OutType, Regime, RowType, Spec, Variant};
use bespoke_kernel_gen::spec::{KvDType, LinearRole, ModelShape};
use bespoke_kernel_gen::tuning::certificate::Level;
use bespoke_kernel_gen::tuning::record::Failure;

use super::super::cases::Case;
use super::super::ladder::{Verdict, level, mismatch, note};
use super::super::ledger::{Begin, TakeVerdict};
use super::bench::{Bench, BenchOptions, shape_of};
use crate::backend::cuda::device::Device;
use crate::error::Error;

/// Rows of a launch at most: of blocks of many rows, the last one in part.
const ROWS_MAX: usize = 200;
/// Repeats, and fewer where their outputs take more memory than this.
const NUM_REPEATS: usize = 64;
const NUM_LARGE_REPEATS: usize = 16;
const LARGE_BYTES: usize = 1 << 20;
/// Bytes of outputs and workspace before a launch: of no numbers, of zeros and of large numbers.
const POISONS: [u8; 3] = [0xff, 0, 0x7a];
/// Columns at either end, and between them, whose products are compared with float64.
const EDGE_COLUMNS: usize = 40;
const NUM_INNER_COLUMNS: usize = 32;
const REFERENCE_ROWS: [usize; 6] = [0, 1, 2, 7, 32, 128];

/// A product, and how far a kernel may be off.
struct Exact {
    row: usize,
    column: usize,
    value: f64,
    allowed: f64,
}

/// Where one matmul's kernels are verified.
struct Ladder<D: Device> {
    bench: Bench<D>,
    role: LinearRole,
    spec: Spec,
    /// Outputs, and bytes of one.
    n: usize,
    element: usize,
    exact: Vec<Exact>,
    /// What the default kernel for many rows gives, `[ROWS_MAX, n]`.
    expected: Vec<u8>,
}

/// Verifies kernels of matmuls by their symbols on the devices that `open` gives, each as soon as
/// those before it: `begin` is told before one is launched, `end` what came out.
///
/// # Errors
/// There is no device or not the memory, or a symbol names no matmul of `shapes`.
pub fn verify_all<D: Device>(
    open: &mut dyn FnMut() -> Result<D, Error>,
    shapes: &[ModelShape],
    symbols: &[String],
    begin: &mut Begin<'_>,
    end: &mut TakeVerdict<'_>,
) -> Result<(), Error> {
    let parse = |symbol: &String| {
        Variant::parse(symbol).ok_or_else(|| {
            Error::Unsupported(format!("{symbol} is no CUDA kernel of this program"))
        })
    };
    let variants = symbols.iter().map(parse).collect::<Result<Vec<Variant>, Error>>()?;
    let specs: BTreeSet<Spec> = variants.iter().map(Variant::spec).collect();
    for spec in specs {
        let of_spec: Vec<Variant> =
            variants.iter().filter(|variant| variant.spec() == spec).copied().collect();
        let (shape, role) = place_of(&spec, shapes)?;
        let mut ladder = Ladder::new(open()?, &shape, role, spec, &of_spec)?;
        for variant in of_spec {
            let symbol = variant.symbol();
            begin(&symbol)?;
            end(&symbol, ladder.levels(&variant))?;
        }
    }
    Ok(())
}

/// The linear that a spec serves.
fn place_of(spec: &Spec, shapes: &[ModelShape]) -> Result<(ModelShape, LinearRole), Error> {
    for shape in shapes {
        let shape = shape_of(shape, 1);
        for role in LinearRole::ALL {
            if shape.cuda_linear(role)? == *spec {
                return Ok((shape, role));
            }
        }
    }
    Err(Error::Unsupported(format!("{} is no matmul of these models", spec.name())))
}

impl<D: Device> Ladder<D> {
    fn new(
        device: D,
        shape: &ModelShape,
        role: LinearRole,
        spec: Spec,
        variants: &[Variant],
    ) -> Result<Ladder<D>, Error> {
        let default = spec.variant(Regime::Many, device.info().arch);
        let mut all = variants.to_vec();
        all.push(default);
        all.sort();
        all.dedup();
        let case = Case::Linear { role, rows: ROWS_MAX };
        let logits = Case::Sample { rows: ROWS_MAX };
        let cases = if role == LinearRole::Head { vec![case, logits] } else { vec![case] };
        let options = BenchOptions {
            cold_bytes: 1,
            num_launches_max: 1,
            num_layers: 1,
            ..BenchOptions::default()
        };
        let mut bench = Bench::new(device, shape, KvDType::F16, &cases, &all, &options)?;
        bench.prepare(&case)?;
        let (n, element) = (bench.shape.linear(role).n, element_bytes(&spec));
        let exact = exact(&mut bench, role, &spec)?;
        let expected = Vec::new();
        let mut ladder = Ladder { bench, role, spec, n, element, exact, expected };
        ladder.expected = ladder.outputs(&default, ROWS_MAX, POISONS[0]);
        Ok(ladder)
    }

    /// All levels of `variant`, or the first that it fails.
    fn levels(&mut self, variant: &Variant) -> Verdict {
        let row_counts = row_counts(variant.regime);
        Ok(vec![
            self.is_possible(variant)?,
            self.products(variant, &row_counts)?,
            self.repeats(variant)?,
            note("V3", "compute-sanitizer is run apart"),
            self.row_bits(variant, &row_counts)?,
            note("V5", "launches are recorded"),
        ])
    }

    fn is_possible(&self, variant: &Variant) -> Result<Level, Failure> {
        variant.is_feasible().map_err(|reason| mismatch("V0", reason))?;
        let default = self.spec.variant(variant.regime, variant.arch);
        if variant.reduction_class() != default.reduction_class() {
            return Err(mismatch("V0", "its reduction class is not the default's".to_owned()));
        }
        Ok(level("V0", 1, 0.0, 1))
    }

    /// Outputs of one launch over poisoned outputs and workspace.
    fn outputs(&mut self, variant: &Variant, num_rows: usize, poison: u8) -> Vec<u8> {
        let case = Case::Linear { role: self.role, rows: num_rows };
        let out = self.bench.outputs(self.role);
        let batch = super::super::cases::batch(&self.bench.shape, &case);
        let backend = self.bench.backend();
        backend.poison_rows(&out, num_rows, poison);
        backend.poison_workspace(variant, num_rows, poison);
        backend.try_out(Some(*variant));
        self.bench.launch(&case, &batch, 0);
        let backend = self.bench.backend();
        backend.try_out(None);
        backend.row_bytes(&out, num_rows)
    }

    fn products(&mut self, variant: &Variant, row_counts: &[usize]) -> Result<Level, Failure> {
        let num_rows = row_counts.iter().copied().max().unwrap_or(1);
        let found = self.outputs(variant, num_rows, POISONS[0]);
        let (mut num_cases, mut max_error) = (0, 0.0_f64);
        for Exact { row, column, value, allowed } in &self.exact {
            if *row >= num_rows {
                continue;
            }
            let at = (row * self.n + column) * self.element;
            let got = element(&self.spec, &found[at..at + self.element]);
            let error = (got - value).abs() / allowed;
            num_cases += 1;
            max_error = max_error.max(error);
            if error.is_nan() || error > 1.0 {
                let message = format!(
                    "row {row}, output {column} of {num_rows} rows is {got}, {value} ± {allowed} \
                     is right"
                );
                return Err(mismatch("V1", message));
            }
        }
        Ok(level("V1", num_cases, max_error, 1))
    }

    fn repeats(&mut self, variant: &Variant) -> Result<Level, Failure> {
        let num_rows = variant.regime.rows_max().unwrap_or(variant.regime.rows_min()).max(1);
        let is_large = num_rows * self.n * self.element > LARGE_BYTES;
        let num_repeats = if is_large { NUM_LARGE_REPEATS } else { NUM_REPEATS };
        for repeat in 0..num_repeats {
            self.compare(variant, num_rows, POISONS[repeat % POISONS.len()], "V2")?;
        }
        match self.bench.backend().num_counters_left() {
            0 => Ok(level("V2", 1, 0.0, num_repeats)),
            num => Err(mismatch("V2", format!("{num} counters of the workspace are left behind"))),
        }
    }

    fn row_bits(&mut self, variant: &Variant, row_counts: &[usize]) -> Result<Level, Failure> {
        for num_rows in row_counts {
            self.compare(variant, *num_rows, POISONS[0], "V4")?;
        }
        Ok(level("V4", row_counts.len(), 0.0, 1))
    }

    fn compare(
        &mut self,
        variant: &Variant,
        num_rows: usize,
        poison: u8,
        name: &str,
    ) -> Result<(), Failure> {
        let found = self.outputs(variant, num_rows, poison);
        let expected = &self.expected[..found.len()];
        if found == expected {
            return Ok(());
        }
        let elements = found.chunks(self.element).zip(expected.chunks(self.element));
        let place = elements.into_iter().position(|(got, want)| got != want).unwrap_or(0);
        let at = place * self.element..(place + 1) * self.element;
        let (got, want) =
            (element(&self.spec, &found[at.clone()]), element(&self.spec, &expected[at]));
        Err(mismatch(
            name,
            format!(
                "row {}, output {} of {num_rows} rows is {got:e}, the default kernel has {want:e}",
                place / self.n,
                place % self.n
            ),
        ))
    }
}

/// Row counts at the ends of a regime, inside of it, and of one row, which all may serve.
fn row_counts(regime: Regime) -> Vec<usize> {
    let min = regime.rows_min();
    let counts = match regime.rows_max() {
        Some(max) => vec![1, min, (min + max) / 2, max - 1, max],
        None => vec![1, min, 127, 128, 129, ROWS_MAX],
    };
    let counts: BTreeSet<usize> = counts.into_iter().filter(|rows| *rows > 0).collect();
    counts.into_iter().collect()
}

fn element_bytes(spec: &Spec) -> usize {
    match spec {
        Spec::Gemm(op) if op.out == OutType::F32 => 4,
        _ => 2,
    }
}

/// An element of the outputs.
fn element(spec: &Spec, bytes: &[u8]) -> f64 {
    match (bytes, rows_of(spec)) {
        ([a, b, c, d], _) => f64::from(f32::from_le_bytes([*a, *b, *c, *d])),
        ([a, b], RowType::F16) => half::f16::from_le_bytes([*a, *b]).to_f64(),
        ([a, b], RowType::BF16) => half::bf16::from_le_bytes([*a, *b]).to_f64(),
        _ => f64::NAN,
    }
}

fn rows_of(spec: &Spec) -> RowType {
    match spec {
        Spec::Gemm(op) => op.rows,
        Spec::AwqGemm(op) => op.rows,
        _ => unreachable!("a ladder is of a matmul"),
    }
}

/// Products of some rows and columns.
///
/// A sum of `k` rounded products is off by about √k units in the last place of the sum of their
/// magnitudes (N. Higham, T. Mary, "A New Approach to Probabilistic Rounding Error Analysis");
/// tensor cores cut bits off instead of rounding, for which a factor of 8 is allowed. Dense weights
/// are first rounded to the rows' type, the output at last.
fn exact<D: Device>(
    bench: &mut Bench<D>,
    role: LinearRole,
    spec: &Spec,
) -> Result<Vec<Exact>, Error> {
    let rows = bench.read_input(role, ROWS_MAX);
    let tensors = bench
        .tensors()
        .ok_or_else(|| Error::Unsupported(format!("{} was not prepared", spec.name())))?;
    let source = tensors.source();
    let (n, k) = (source.n(), source.k());
    let out_unit = match (element_bytes(spec), rows_of(spec)) {
        (4, _) => 2f64.powi(-24),
        (_, RowType::F16) => 2f64.powi(-11),
        (_, RowType::BF16) => 2f64.powi(-8),
    };
    let is_dense = matches!(spec, Spec::Gemm(_));
    let step = n.div_ceil(NUM_INNER_COLUMNS).max(1);
    let is_edge = |column: usize| column < EDGE_COLUMNS || column + EDGE_COLUMNS >= n;
    let mut weights = vec![0.0; k];
    let mut all = Vec::new();
    for column in (0..n).filter(|column| is_edge(*column) || column % step == 0) {
        source.row(column, &mut weights);
        if is_dense {
            weights.iter_mut().for_each(|weight| *weight = rounded(*weight, rows_of(spec)));
        }
        let bias = source.bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]));
        for row in REFERENCE_ROWS {
            let (mut value, mut magnitude) = (bias, bias.abs());
            for (x, weight) in rows[row * k..(row + 1) * k].iter().zip(&weights) {
                let product = f64::from(*x) * f64::from(*weight);
                value += product;
                magnitude += product.abs();
            }
            let units = 8.0 * (4.0 * (k as f64).sqrt() + 8.0);
            let allowed = units * 2f64.powi(-24) * magnitude + out_unit * value.abs() + 1e-7;
            all.push(Exact { row, column, value, allowed });
        }
    }
    Ok(all)
}

fn rounded(value: f32, rows: RowType) -> f32 {
    match rows {
        RowType::F16 => half::f16::from_f32(value).to_f32(),
        RowType::BF16 => half::bf16::from_f32(value).to_f32(),
    }
}
