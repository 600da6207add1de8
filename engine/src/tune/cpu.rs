//! Tuning of a model's CPU matmuls: verify, race, record.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use bespoke_kernel_gen::name::spec_name;
use bespoke_kernel_gen::plan::KernelVariant;
use bespoke_kernel_gen::spec::{ActivationType, KernelSpec, LinearRole, ModelShape, RowRegime};
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::cost_model::CostModel;
use bespoke_kernel_gen::tuning::device::Device;
use bespoke_kernel_gen::tuning::record::{Case, Record};

use super::isolation::Isolation;
use super::known::Known;
use super::ledger::{
    Append, Batches, Ledger, Origin, TakeVerdict, TuneProgress, TuneSummary, time,
};
use super::operands::Operands;
use super::race::{Field, RaceOptions, Track, race};
use crate::backend::cpu::limits::Limits;
use crate::backend::cpu::trial::{Trial, TrialOptions};
use crate::backend::cpu::work::Work;
use crate::error::Error;
use crate::kernels::{Kernel, KernelTable};

/// Weights of one layout are repeated until they fill this: more than caches hold, as the weights
/// of all layers do.
const COLD_BYTES: usize = 64 << 20;
/// Memory that is read to measure its rate.
const STREAM_BYTES: usize = 192 << 20;
/// Rows of a step at most, and those that logits are wanted of.
const ROWS_MAX: usize = 512;
const HEAD_ROWS_MAX: usize = 64;
/// Rows beyond which kernels that stream packed weights are not tried.
const STREAM_ROWS_MAX: usize = 64;
/// A sample takes at least this long, in calls of one kernel after the other.
const SAMPLE_SECONDS: f64 = 100e-6;
const SAMPLE_CALLS_MAX: f64 = 64.0;
/// A call that takes this long is a sample; a first one does not matter.
const LONG_SECONDS: f64 = 500e-6;
/// Kernels that a process verifies, the time that is left looked at before each.
const BATCH: usize = 16;
/// Share of a problem's time for verification.
const VERIFY_SHARE: f64 = 0.5;
/// How often the fastest race, some time apart: a machine that others use as well is in one state
/// for a minute and in another one later.
const NUM_PASSES: usize = 12;
/// Share of the time for the first pass, in which all kernels race.
const FIRST_PASS_SHARE: f64 = 0.6;
/// Share of the time that all problems have alike; the rest goes by their work.
const EQUAL_SHARE: f64 = 0.4;

/// One matmul of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuProblem {
    pub spec: KernelSpec,
    /// Share of the model's weights that it multiplies.
    pub share: f64,
    pub rows_max: usize,
}

/// The matmuls of `shape` with these activations, the largest first.
///
/// # Errors
/// A linear has no kernel.
pub fn problems(shape: &ModelShape, activation: ActivationType) -> Result<Vec<CpuProblem>, Error> {
    let mut weights: BTreeMap<KernelSpec, (f64, usize)> = BTreeMap::new();
    for role in LinearRole::ALL {
        let is_head = role == LinearRole::Head;
        let num_times = if is_head { 1 } else { shape.num_layers };
        let rows_max = if is_head { HEAD_ROWS_MAX } else { ROWS_MAX };
        for linear in shape.served_forms(role, activation) {
            let entry = weights.entry(linear.kernel(activation)?).or_default();
            entry.0 += (num_times * linear.n * linear.k) as f64;
            entry.1 = entry.1.max(rows_max);
        }
    }
    let sum: f64 = weights.values().map(|(weight, _)| weight).sum();
    let mut all: Vec<CpuProblem> = weights
        .into_iter()
        .map(|(spec, (weight, rows_max))| CpuProblem { spec, share: weight / sum, rows_max })
        .collect();
    all.sort_by(|a, b| b.share.total_cmp(&a.share));
    Ok(all)
}

/// What a run knows of the machine and the binary.
pub struct CpuSetting<'a> {
    pub table: &'a KernelTable,
    pub target: Target,
    pub device: Device,
    pub num_threads: usize,
    /// Version of the compiler that made the kernels.
    pub compiler: &'a str,
    /// Bytes of machine code by symbol.
    pub code_bytes: &'a HashMap<&'static str, u64>,
    pub isolation: Isolation<'a>,
}

/// A tuning run.
pub struct CpuTuning<'a> {
    setting: CpuSetting<'a>,
    ledger: Ledger<'a>,
}

impl<'a> CpuTuning<'a> {
    /// `append` keeps a record before the next one is measured.
    pub fn new(
        setting: CpuSetting<'a>,
        records: Vec<Record>,
        append: &'a mut Append<'a>,
    ) -> CpuTuning<'a> {
        let CpuSetting { table, code_bytes, .. } = setting;
        let made_from = move |symbol: &str| {
            let source_hash = table.kernel(symbol)?.source_hash.to_owned();
            Some((source_hash, code_bytes.get(symbol).map_or(0, |bytes| *bytes as usize)))
        };
        let origin = Origin {
            device: setting.device.clone(),
            target: setting.target.name().to_owned(),
            compiler: setting.compiler.to_owned(),
            made_from: Box::new(made_from),
        };
        CpuTuning { setting, ledger: Ledger::new(origin, records, append) }
    }

    /// Tunes all `problems` within `budget`, verification included.
    ///
    /// # Errors
    /// A record cannot be kept, there is no memory, or kernels cannot be verified.
    pub fn run(
        &mut self,
        problems: &[CpuProblem],
        options: &RaceOptions,
        budget: Duration,
        progress: &mut dyn FnMut(TuneProgress<'_>),
    ) -> Result<TuneSummary, Error> {
        let start = Instant::now();
        for pass in 1..=NUM_PASSES {
            let share = if pass == 1 { FIRST_PASS_SHARE } else { 1.0 };
            let end = start + budget.mul_f64(share);
            if pass > 1 && Instant::now() >= end {
                break;
            }
            self.pass(problems, options, (pass, end), progress)?;
        }
        Ok(self.ledger.summary())
    }

    fn pass(
        &mut self,
        problems: &[CpuProblem],
        options: &RaceOptions,
        (pass, end): (usize, Instant),
        progress: &mut dyn FnMut(TuneProgress<'_>),
    ) -> Result<(), Error> {
        let share = |problem: &CpuProblem| {
            EQUAL_SHARE / problems.len() as f64 + (1.0 - EQUAL_SHARE) * problem.share
        };
        let shares: Vec<f64> = problems.iter().map(share).collect();
        for (idx, problem) in problems.iter().enumerate() {
            let left = end.saturating_duration_since(Instant::now()).as_secs_f64();
            // NOTE: the first pass begins with each problem, so that all defaults are verified.
            if left == 0.0 && pass > 1 {
                break;
            }
            let share = shares[idx] / shares[idx..].iter().sum::<f64>();
            let deadline = Instant::now() + Duration::from_secs_f64(left * share);
            self.tune(problem, options, (pass, deadline), progress)?;
        }
        Ok(())
    }

    /// All records of this device and these kernels.
    pub fn into_records(self) -> Vec<Record> {
        self.ledger.into_records()
    }

    fn tune(
        &mut self,
        problem: &CpuProblem,
        options: &RaceOptions,
        (pass, deadline): (usize, Instant),
        progress: &mut dyn FnMut(TuneProgress<'_>),
    ) -> Result<(), Error> {
        let (spec, target) = (problem.spec, self.setting.target);
        let name = spec_name(&spec);
        let of_problem = |kernel: &&Kernel| kernel.spec == spec && kernel.target == target;
        let kernels: Vec<&'static Kernel> =
            self.setting.table.kernels.iter().filter(of_problem).collect();
        if pass == 1 {
            self.verify_new(problem, &kernels, options, deadline, progress)?;
        }
        let verdicts = self.ledger.verdicts();
        let is_certified = |kernel: &&Kernel| verdicts.get(kernel.symbol) == Some(&true);
        let kernels: Vec<&'static Kernel> = kernels.into_iter().filter(is_certified).collect();
        let seconds = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        progress(TuneProgress::Racing { spec: &name, pass, num_kernels: kernels.len(), seconds });
        self.race(problem, &kernels, options, (pass, deadline))
    }

    /// Verifies the kernels that no run has verified, as many as there is time for.
    fn verify_new(
        &mut self,
        problem: &CpuProblem,
        kernels: &[&'static Kernel],
        options: &RaceOptions,
        deadline: Instant,
        progress: &mut dyn FnMut(TuneProgress<'_>),
    ) -> Result<(), Error> {
        let (spec, target) = (problem.spec, self.setting.target);
        let name = spec_name(&spec);
        let verdicts = self.ledger.verdicts();
        let is_new = |kernel: &&'static Kernel| !verdicts.contains_key(kernel.symbol);
        let new: Vec<&Kernel> = kernels.iter().copied().filter(is_new).collect();
        let is_default = |kernel: &Kernel| {
            let mut defaults = options
                .first_rows
                .iter()
                .filter_map(|rows| self.setting.table.serving_kernel(&spec, *rows, target));
            defaults.any(|default| default.symbol == kernel.symbol)
        };
        let new = promising(&new, &options.first_rows, &is_default);
        let now = Instant::now();
        let time = deadline.saturating_duration_since(now).mul_f64(VERIFY_SHARE);
        let batches = Batches { len: BATCH, end: now + time };
        let isolation = &self.setting.isolation;
        let verify =
            &mut |symbols: &[String], take: &mut TakeVerdict<'_>| isolation.verify(symbols, take);
        self.ledger.verify(&name, &new, batches, verify, progress)
    }

    fn race(
        &mut self,
        problem: &CpuProblem,
        kernels: &[&'static Kernel],
        options: &RaceOptions,
        (pass, deadline): (usize, Instant),
    ) -> Result<(), Error> {
        let CpuTuning { setting, ledger } = self;
        let (setting, spec) = (&*setting, problem.spec);
        let default_of = |rows: usize| {
            let default = setting.table.serving_kernel(&spec, rows, setting.target);
            kernels
                .iter()
                .position(|kernel| default.is_some_and(|default| default.symbol == kernel.symbol))
        };
        let rows = |all: &[usize]| -> Vec<usize> {
            let fits = |rows: &usize| *rows <= problem.rows_max && default_of(*rows).is_some();
            all.iter().copied().filter(fits).collect()
        };
        let options = RaceOptions {
            first_rows: rows(&options.first_rows),
            other_rows: rows(&options.other_rows),
            ..options.clone()
        };
        let name = spec_name(&spec);
        let known = Known::new(ledger.records(), &name, kernels);
        let finalists = known.finalists(&options);
        let is_in = |kernel: usize, rows: usize| {
            let is_finalist = pass == 1 || finalists.contains(&(kernel, rows));
            is_finalist && can_serve(kernels[kernel], rows)
        };
        let model = CostModel::fit(ledger.records().iter(), &setting.device.key());
        let cost = |kernel: usize, rows: usize| expected(&model, kernels[kernel], rows);
        let operands = Operands::new(&spec, problem.rows_max)?;
        let mut trial = setting.trial(problem, &operands)?;
        for kernel in kernels {
            trial.prepare(kernel, &operands.source())?;
        }
        let limits = Limits::measure(trial.team(), STREAM_BYTES)?;
        let limit = |rows: usize| {
            let work = kernels.first().map_or(Work::default(), |kernel| Work::of(kernel, rows));
            work.bound(&limits).0 * 1e-9
        };
        let field = Field {
            num_kernels: kernels.len(),
            // Rows without a default are not raced.
            default_of: &|rows| default_of(rows).unwrap_or(0),
            can_serve: &is_in,
            prior: &cost,
            limit: &limit,
            known: &|kernel, rows| known.ratio(kernel, rows, pass),
        };
        let mut track = CpuTrack::new(trial, kernels);
        let mut result = Ok(());
        let budget = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        race(&mut track, &field, &options, budget, &mut |finish| {
            let default = kernels[(field.default_of)(finish.num_rows)].symbol;
            let limit_us = limit(finish.num_rows) * 1e6;
            let (symbol, case) = (kernels[finish.kernel].symbol, Case::Rows(finish.num_rows));
            result = ledger.keep(&name, symbol, case, time(&finish, "backend", default, limit_us));
            result.is_ok()
        });
        result
    }
}

impl CpuSetting<'_> {
    fn trial(&self, problem: &CpuProblem, operands: &Operands) -> Result<Trial, Error> {
        let options = TrialOptions {
            num_threads: self.num_threads,
            cold_bytes: COLD_BYTES,
            rows_max: problem.rows_max,
        };
        Trial::new(problem.spec, self.target, &operands.rows, &operands.bias, options)
    }
}

/// Symbols, the defaults first, beside which nothing else is raced, then those that may win at some
/// row count.
fn promising(
    kernels: &[&Kernel],
    row_counts: &[usize],
    is_default: &dyn Fn(&Kernel) -> bool,
) -> Vec<String> {
    let place = |kernel: &&Kernel| {
        if is_default(kernel) {
            return 0;
        }
        let places = row_counts.iter().filter(|rows| can_serve(kernel, **rows)).map(|rows| {
            let own = prior(kernel, *rows);
            let is_ahead = |other: &&&Kernel| can_serve(other, *rows) && prior(other, *rows) < own;
            kernels.iter().filter(is_ahead).count()
        });
        places.min().map_or(usize::MAX, |place| place + 1)
    };
    let mut order = kernels.to_vec();
    order.sort_by_cached_key(place);
    order.into_iter().map(|kernel| kernel.symbol.to_owned()).collect()
}

fn can_serve(kernel: &Kernel, rows: usize) -> bool {
    match kernel.regime {
        RowRegime::One => rows == 1,
        RowRegime::Few => rows <= STREAM_ROWS_MAX,
        RowRegime::Many | RowRegime::Any => rows > 1,
    }
}

/// What a kernel is expected to cost beside others of its matmul: as the cost model predicts from
/// earlier problems and runs, which knows all of a matmul's kernels or none.
fn expected(model: &CostModel, kernel: &Kernel, rows: usize) -> f64 {
    let variant = KernelVariant::parse(kernel.symbol);
    let predicted = variant.and_then(|variant| model.predict(&variant, rows));
    predicted.unwrap_or_else(|| prior(kernel, rows))
}

/// Register blocks that are not full cost as much as full ones; weights that are unpacked first
/// cost about four rows more; blocks of few rows read every weight more often.
fn prior(kernel: &Kernel, rows: usize) -> f64 {
    let block = kernel.rows.max(1);
    let padded = rows.div_ceil(block) * block;
    let unpacking = if kernel.regime == RowRegime::Many { 4.0 } else { 0.0 };
    padded as f64 * (1.0 + 1.0 / block as f64) + unpacking
}

/// Calls on this machine.
struct CpuTrack<'a> {
    trial: Trial,
    kernels: &'a [&'static Kernel],
    /// Calls of a sample, once a first call has shown how long one takes.
    num_calls: HashMap<(usize, usize), usize>,
    start: Instant,
}

impl CpuTrack<'_> {
    fn new<'a>(trial: Trial, kernels: &'a [&'static Kernel]) -> CpuTrack<'a> {
        CpuTrack { trial, kernels, num_calls: HashMap::new(), start: Instant::now() }
    }
}

impl Track for CpuTrack<'_> {
    fn run(&mut self, kernel: usize, num_rows: usize) -> Option<f64> {
        let key = (kernel, num_rows);
        let kernel = self.kernels[kernel];
        let trial = &mut self.trial;
        // NOTE: the first call also brings the code into the caches.
        let first = trial.time(kernel, num_rows).as_secs_f64().max(1e-9);
        if first >= LONG_SECONDS {
            return Some(first);
        }
        let num_calls = *self.num_calls.entry(key).or_insert_with(|| {
            (SAMPLE_SECONDS / first).ceil().clamp(1.0, SAMPLE_CALLS_MAX) as usize
        });
        let start = Instant::now();
        for _ in 0..num_calls {
            trial.time(kernel, num_rows);
        }
        Some(start.elapsed().as_secs_f64() / num_calls as f64)
    }

    fn elapsed(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}
