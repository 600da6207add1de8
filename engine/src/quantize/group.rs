//! Linears that share an input: from float weights and calibration statistics to 4 bits.

use ndarray::{Array2, ArrayView2};

use super::gram::{Gram, energy};
use super::grid::{Grid, Rounded};
use super::linalg::{multiply, solve};
use super::quantized_layer::{AwqOptions, GroupReport, ModuleReport};
use super::rounding::{Feedback, compensated, damped_factor, improved};
use super::scales::{Carrier, Choice, Costs, Search};

/// Shares of the mean of a Gram matrix's diagonal that are added to the diagonal: where errors are
/// compensated for, and where weights make up for other inputs, which follows noise more easily.
const DAMPING: f32 = 0.01;
const TARGET_DAMPING: f32 = 0.03;
/// How often levels and scales are improved after they were found.
const NUM_SWEEPS: usize = 2;

/// A module of the checkpoint.
pub(super) struct Module {
    pub(super) name: String,
    /// `[n, k]`, rows as the checkpoint has them.
    pub(super) weights: Array2<f32>,
    /// Stays in 16 bits.
    pub(super) is_skipped: bool,
}

/// What is known of the input that linears share.
pub(super) struct Calibration {
    /// Of the rows that the quantized linears will read.
    pub(super) gram: Gram,
    /// What the outputs lack of the float model's, as far as it follows from the input.
    pub(super) deviation: Deviation,
}

/// How the rows that the quantized model's linears read differ from the float model's.
pub(super) enum Deviation {
    /// They are the same.
    None,
    /// `(X − X̂)ᵀ · X̂`, `[k, k]`.
    Inputs(Array2<f32>),
    /// `(Y − X̂ · Wᵀ)ᵀ · X̂` of the only module, `[n, k]`, for wanted outputs Y.
    Outputs(Array2<f32>),
}

/// Modules in 4 bits, and the factors on their input.
pub(super) struct QuantizedGroup {
    pub(super) factors: Vec<f32>,
    /// By module; `None` for those that are skipped.
    pub(super) rounded: Vec<Option<Rounded>>,
    pub(super) report: GroupReport,
}

/// How a group is quantized.
pub(super) struct Settings<'a> {
    pub(super) options: &'a AwqOptions,
    pub(super) num_threads: usize,
}

/// A group scale that float16 does not hold: module, output and group.
pub(super) struct Overflow {
    pub(super) module_idx: usize,
    pub(super) output: usize,
    pub(super) group: usize,
}

/// Quantizes the modules of one group.
pub(super) fn quantize(
    role: &str,
    modules: &[Module],
    calibration: &Calibration,
    carrier: &Carrier,
    settings: &Settings<'_>,
) -> Result<QuantizedGroup, Overflow> {
    let gram = calibration.gram.matrix.view();
    let num_threads = settings.num_threads;
    let targets: Vec<Array2<f32>> =
        modules.iter().map(|module| target(module, calibration, num_threads)).collect();
    let energies: Vec<f64> = targets.iter().map(|t| energy(t.view(), gram, num_threads)).collect();
    let compensate = settings.options.compensate;
    let k = gram.nrows();
    let group = (settings.options.group_size.of(k), settings.options.symmetric);
    let choice = {
        let sought: Vec<(ArrayView2<'_, f32>, f64)> = modules
            .iter()
            .zip(targets.iter().zip(&energies))
            .filter(|(module, _)| !module.is_skipped)
            .map(|(_, (target, energy))| (target.view(), *energy))
            .collect();
        let feedback = compensate.then(|| Feedback::new(gram, DAMPING, num_threads)).flatten();
        let importance = feedback.map(|feedback| feedback.importance());
        let costs = match &importance {
            Some(importance) => Costs::Importance(importance),
            None => Costs::Gram(gram),
        };
        let means = calibration.gram.means();
        Search::new(&sought, &means, costs, group, num_threads).run(carrier)
    };
    let job = Job { modules, targets: &targets, energies: &energies, gram, group, settings };
    let found = job.run(role, choice)?;
    // What the search expects of some outputs may not hold for all of them.
    if found.is_worse_than_plain() {
        return job.run(role, Choice::none(k));
    }
    Ok(found)
}

/// Linears that are to be quantized.
struct Job<'a> {
    modules: &'a [Module],
    targets: &'a [Array2<f32>],
    /// Sums of squares of the outputs.
    energies: &'a [f64],
    gram: ArrayView2<'a, f32>,
    group: (usize, bool),
    settings: &'a Settings<'a>,
}

impl Job<'_> {
    fn run(&self, role: &str, choice: Choice) -> Result<QuantizedGroup, Overflow> {
        let num_threads = self.settings.num_threads;
        let scaled = scaled_gram(self.gram, &choice.factors);
        let feedback = match self.settings.options.compensate {
            true => Feedback::new(scaled.view(), DAMPING, num_threads),
            false => None,
        };
        let scaled = scaled.view();
        let rounding =
            Rounding { scaled, feedback, choice: &choice, group: self.group, num_threads };
        let mut rounded = Vec::new();
        let mut reports = Vec::new();
        for (module_idx, module) in self.modules.iter().enumerate() {
            let mut report = report_of(module);
            if module.is_skipped {
                rounded.push(None);
            } else {
                let overflow = |(output, group)| Overflow { module_idx, output, group };
                let (target, whole) = (self.targets[module_idx].view(), self.energies[module_idx]);
                let share = |error: f64| if whole > 0.0 { error / whole } else { 0.0 };
                let found = rounding.run(target).map_err(overflow)?;
                report.error_rtn = share(self.plain_error(target).map_err(overflow)?);
                report.error_awq = share(found.nearest_error);
                report.error = share(found.error);
                report.clipped = found.clipped;
                rounded.push(Some(found.rounded));
            }
            reports.push(report);
        }
        let report = GroupReport {
            role: role.to_owned(),
            alpha: choice.alpha,
            beta: choice.beta,
            factors: spread(&choice.factors),
            modules: reports,
        };
        Ok(QuantizedGroup { factors: choice.factors, rounded, report })
    }

    /// Of rounding to nearest over the whole range of each group; an output and group whose range
    /// float16 does not hold.
    fn plain_error(&self, target: ArrayView2<'_, f32>) -> Result<f64, (usize, usize)> {
        let grid = Grid::covering(target, self.group.0, self.group.1);
        if let Some(at) = grid.overflow() {
            return Err(at);
        }
        let errors = grid.nearest(target).errors(target);
        Ok(energy(errors.view(), self.gram, self.settings.num_threads))
    }
}

impl QuantizedGroup {
    /// Whether all errors together are above those of plain rounding.
    fn is_worse_than_plain(&self) -> bool {
        let modules = &self.report.modules;
        let sum = |error: fn(&ModuleReport) -> f64| modules.iter().map(error).sum::<f64>();
        sum(|module| module.error) > sum(|module| module.error_rtn)
    }
}

/// The weights to be approached: those that best make, of the rows that the quantized model has,
/// the outputs of the float model.
fn target(module: &Module, calibration: &Calibration, num_threads: usize) -> Array2<f32> {
    let weights = module.weights.view();
    let mut moment = match &calibration.deviation {
        Deviation::None => return module.weights.clone(),
        Deviation::Inputs(deviation) => {
            let mut moment = Array2::zeros(weights.dim());
            let out = &mut moment.view_mut();
            multiply(1.0, weights, deviation.view(), 0.0, out, num_threads);
            moment
        }
        Deviation::Outputs(moment) => moment.clone(),
    };
    let gram = calibration.gram.matrix.view();
    let Some(l) = damped_factor(gram, TARGET_DAMPING, num_threads) else {
        return module.weights.clone();
    };
    solve(&mut moment, l.view(), num_threads);
    moment + &module.weights
}

/// How the modules of a group are rounded.
struct Rounding<'a> {
    /// The Gram matrix of inputs divided by their factors.
    scaled: ArrayView2<'a, f32>,
    feedback: Option<Feedback>,
    choice: &'a Choice,
    group: (usize, bool),
    num_threads: usize,
}

struct Found {
    rounded: Rounded,
    nearest_error: f64,
    error: f64,
    clipped: f64,
}

impl Rounding<'_> {
    fn run(&self, target: ArrayView2<'_, f32>) -> Result<Found, (usize, usize)> {
        let num_threads = self.num_threads;
        let mut weights = target.to_owned();
        for mut row in weights.rows_mut() {
            row.iter_mut().zip(&self.choice.factors).for_each(|(weight, f)| *weight *= f);
        }
        let weights = weights.view();
        let cost =
            |rounded: &Rounded| energy(rounded.errors(weights).view(), self.scaled, num_threads);
        let grid = Grid::by_gram(weights, self.scaled, self.group, num_threads);
        if let Some(at) = grid.overflow() {
            return Err(at);
        }
        let mut nearest = grid.nearest(weights);
        let mut nearest_error = cost(&nearest);
        // Grids that suit each group alone may not suit them together.
        let plain = Grid::covering(weights, self.group.0, self.group.1).nearest(weights);
        let plain_error = cost(&plain);
        if plain_error < nearest_error {
            (nearest, nearest_error) = (plain, plain_error);
        }
        let (mut rounded, mut error) = (nearest, nearest_error);
        if let Some(feedback) = &self.feedback {
            let importance = feedback.importance();
            let grid = Grid::by_importance(weights, &importance, self.group, num_threads);
            let found = compensated(weights, grid, feedback, num_threads);
            let found = improved(found, weights, self.scaled, NUM_SWEEPS, num_threads);
            let found_error = cost(&found);
            if found_error < error {
                (rounded, error) = (found, found_error);
            }
        }
        let clipped = rounded.clipped(weights);
        Ok(Found { rounded, nearest_error, error, clipped })
    }
}

/// The Gram matrix of inputs that are divided by `factors`.
fn scaled_gram(gram: ArrayView2<'_, f32>, factors: &[f32]) -> Array2<f32> {
    let mut scaled = gram.to_owned();
    for (mut row, factor) in scaled.rows_mut().into_iter().zip(factors) {
        row.iter_mut().zip(factors).for_each(|(value, other)| *value /= factor * other);
    }
    scaled
}

fn report_of(module: &Module) -> ModuleReport {
    ModuleReport {
        name: module.name.clone(),
        num_weights: module.weights.len() as u64,
        error_rtn: 0.0,
        error_awq: 0.0,
        error: 0.0,
        clipped: 0.0,
        is_skipped: module.is_skipped,
    }
}

/// Smallest, median and largest.
fn spread(factors: &[f32]) -> [f32; 3] {
    let mut sorted = factors.to_vec();
    sorted.sort_by(f32::total_cmp);
    [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]]
}
