//! Selection: from records to the lock. A pure function: the same records and options in any order
//! give the same lock.
//!
//! For each spec, target and device, the measured row counts are a grid. A table of intervals is
//! chosen whose sum of weight · time over the grid is least, exactly (`intervals`), such that
//! - only kernels serve that are certified, with today's source, by the compiler of their times;
//! - an interval begins and ends at row counts at which its kernel was measured; between them its
//!   ratio to the default is interpolated over the logarithm of the row count;
//! - row counts between two of the grid belong to the upper one, whose time bounds theirs, and
//!   those above the last one to its kernel;
//! - no kernel serves a row count at which it is slower than the default by more than the noise,
//!   and an interval without the default beats it by 3 % and by twice the noise;
//! - all kernels of a table read one layout of packed weights, and have one reduction class.
//!
//! Where a problem has certificates but no times, the cost model's predictions take their place if
//! it knows enough other problems; the margin is then the model's own error.
//!
//! Of the tables that cost the same but for the noise, one of fewest kernels is taken: of kernels
//! that another device's table has already, so that the binary grows least, else the first in
//! canonical order.

mod evidence;
mod kernel;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::budget;
use super::intervals::{Instance, MarginOver, Point, Table};
use super::lock::{self, Lock, LockedInterval, LockedOptions, LockedProblem, LockedVariant};
use super::record::Record;
use super::trace::Trace;
use crate::error::Error;
use crate::plan::KernelVariant;
use crate::{compile, cuda, render};
use evidence::{Evidence, Grid, Part};

/// Which kernels may serve one spec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Those of one reduction class: a row's bits do not depend on the rows beside it.
    #[default]
    Invariant,
    /// All.
    Free,
}

impl Profile {
    pub fn name(self) -> &'static str {
        match self {
            Profile::Invariant => "invariant",
            Profile::Free => "free",
        }
    }

    pub fn from_name(name: &str) -> Option<Profile> {
        [Profile::Invariant, Profile::Free].into_iter().find(|profile| profile.name() == name)
    }
}

/// What a selection depends on besides records.
#[derive(Clone, Debug)]
pub struct Options {
    pub profile: Profile,
    /// Kernels of a spec, target and device besides the defaults, which every binary has.
    pub variants_max: usize,
    /// Machine code of all chosen kernels besides the defaults.
    pub kernel_bytes_max: Option<usize>,
    /// Without one, all row counts of the grid count the same: times relative to the default's.
    pub trace: Option<Trace>,
    /// How often each wanted spec is in the models; empty: all specs, once each.
    pub uses: BTreeMap<String, usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            profile: Profile::Invariant,
            variants_max: 4,
            kernel_bytes_max: None,
            trace: None,
            uses: BTreeMap::new(),
        }
    }
}

impl Options {
    /// What the lock says of them.
    fn locked(&self) -> LockedOptions {
        LockedOptions {
            profile: self.profile.name().to_string(),
            weights: if self.trace.is_some() { "trace" } else { "uniform" }.to_string(),
            variants_max: self.variants_max,
            kernel_bytes_max: self.kernel_bytes_max,
        }
    }
}

/// The least gain over the default for which another kernel is taken.
const MARGIN_MIN: f64 = 0.03;
/// Costs that differ less are the same whatever the noise.
const TIE_MAX: f64 = 0.01;

/// The lock, and what led to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    pub lock: Lock,
    pub decisions: Vec<Decision>,
    /// Bytes of kernels besides the defaults, and cost of all problems as a share of the defaults'.
    /// One row without a budget.
    pub frontier: Vec<(usize, f64)>,
    /// Records that are of no use, by reason.
    pub unused: BTreeMap<String, usize>,
}

/// What was chosen for one spec, target and device, and from what.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    pub spec: String,
    pub target: String,
    pub device: String,
    pub cases: Vec<CaseTimes>,
    /// Symbol and why it was not to be chosen.
    pub rejected: BTreeMap<String, String>,
    /// Cost of the chosen kernels as a share of the defaults'.
    pub cost: f64,
    /// Whether the times are a model's, as shares of the default's, and not measured.
    pub is_predicted: bool,
}

/// All times of one case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CaseTimes {
    pub case: String,
    pub default: String,
    pub default_us: f64,
    /// Relative.
    pub noise: f64,
    pub limit_us: Option<f64>,
    pub chosen: String,
    /// Symbol and microseconds, ascending.
    pub times: Vec<(String, f64)>,
}

/// Today's source hash of each symbol that names a kernel.
pub fn source_hashes<'a>(
    symbols: impl IntoIterator<Item = &'a str>,
) -> Result<BTreeMap<String, String>, Error> {
    let symbols: BTreeSet<&str> = symbols.into_iter().collect();
    let variants = symbols.into_iter().filter_map(KernelVariant::parse);
    let feasible = variants.filter(|variant| {
        let KernelVariant { spec, regime, target, config } = variant;
        config.is_feasible(spec, *regime, *target).is_ok()
    });
    let sources = feasible.map(|variant| render::render(&variant)).collect();
    let artifacts = compile::compile(sources)?;
    let hash = |artifact: compile::Artifact| (artifact.source.symbol, artifact.hash);
    Ok(artifacts.into_iter().map(hash).collect())
}

/// As [`source_hashes`], of all kernels that records name. The hash of a CUDA kernel is that of the
/// newest compiler that it was measured with: none is needed to select.
pub fn hashes_of(records: &[Record]) -> Result<BTreeMap<String, String>, Error> {
    let mut newest: BTreeMap<&str, (cuda::Variant, &str)> = BTreeMap::new();
    for record in records {
        let Record { variant: measured, .. } = record;
        let Some(variant) = cuda::Variant::parse(&measured.symbol) else { continue };
        if variant.is_feasible().is_err() {
            continue;
        }
        let entry = newest.entry(&measured.symbol).or_insert((variant, &measured.compiler));
        if evidence::version(&measured.compiler) > evidence::version(entry.1) {
            entry.1 = &measured.compiler;
        }
    }
    let mut hashes = source_hashes(records.iter().map(|record| &*record.variant.symbol))?;
    for (symbol, (variant, compiler)) in newest {
        let source = cuda::render::render(&variant)?;
        let hash = cuda::compile::source_hash(&source, cuda::version_of(compiler));
        hashes.insert(symbol.to_string(), hash);
    }
    Ok(hashes)
}

/// Chooses kernels. `hashes` has today's source hash of every symbol, see [`hashes_of`].
pub fn select(
    records: &[Record],
    hashes: &BTreeMap<String, String>,
    options: &Options,
) -> Result<Selection, Error> {
    let (all, unused) = evidence::gather(records, hashes, options);
    let problems: Vec<Problem> = all.into_iter().map(|one| Problem::new(one, options)).collect();
    // One question for each part of each problem that can be answered.
    let questions: Vec<&Question> = problems.iter().flat_map(|problem| &problem.parts).collect();
    let (limits, frontier) = limits(&questions, options)?;
    let mut limits = limits.into_iter();
    let mut lock = Lock { version: lock::VERSION, options: options.locked(), ..Lock::default() };
    let (mut decisions, mut variants) = (Vec::new(), BTreeMap::new());
    for problem in &problems {
        let tables: Vec<(&Question, Answer)> = problem
            .parts
            .iter()
            .map(|question| {
                let bytes_max = limits.next().unwrap_or(usize::MAX);
                (question, question.answer(bytes_max, &variants))
            })
            .collect();
        decisions.push(problem.decision(&tables));
        let intervals = problem.intervals(&tables);
        // What the model leaves to the defaults is no choice.
        let is_chosen = |interval: &LockedInterval| interval.provenance != "default";
        if problem.evidence.is_predicted && !intervals.iter().any(is_chosen) {
            continue;
        }
        for symbol in intervals.iter().map(|interval| &interval.symbol) {
            if let Some(variant) = problem.evidence.locked.get(symbol) {
                variants.insert(symbol.clone(), variant.clone());
            }
        }
        let Evidence { spec, target, device, .. } = &problem.evidence;
        lock.problems.push(LockedProblem {
            spec: spec.clone(),
            target: target.to_string(),
            device: device.clone(),
            intervals,
        });
    }
    lock.certificates = variants.into_values().collect();
    Ok(Selection { lock, decisions, frontier, unused })
}

/// A problem and the questions that its records can answer.
struct Problem {
    evidence: Evidence,
    parts: Vec<Question>,
}

/// Which kernels serve a part of a problem's cases: the row counts; of attention, decoding or
/// prompts.
struct Question {
    part: Part,
    /// Weight against other questions.
    importance: f64,
    grids: Vec<(Grid, Instance)>,
    points: Vec<Point>,
    /// By bytes ascending: (grid, table).
    frontier: Vec<(usize, Table)>,
    variants_max: usize,
}

/// The chosen table, of which grid; `None`: the defaults.
type Answer = Option<(usize, Table)>;

impl Question {
    /// Cost of the defaults.
    fn default_cost(&self) -> f64 {
        self.points.iter().map(|point| point.weight * point.default_us).sum()
    }

    /// The table for so many bytes; `used` are the kernels that serve other problems.
    fn answer(&self, bytes_max: usize, used: &BTreeMap<String, LockedVariant>) -> Answer {
        let fitting = self.frontier.iter().filter(|(_, table)| table.bytes <= bytes_max);
        let (_, best) = fitting.min_by(|a, b| a.1.cost.total_cmp(&b.1.cost))?;
        let noise = self.points.iter().map(|point| point.noise).sum::<f64>();
        let tie = (noise / self.points.len() as f64).min(TIE_MAX);
        let cost_max = best.cost * (1.0 + tie.max(1e-9));
        // NOTE: grids come in canonical order, that of the default's layout first.
        let tables = self.grids.iter().enumerate().filter_map(|(idx, (grid, instance))| {
            let is_used = |candidate: usize| used.contains_key(&grid.symbols[candidate]);
            instance.choose(cost_max, bytes_max, &is_used).map(|table| (idx, table))
        });
        tables.min_by_key(|(_, table)| table.bytes > 0)
    }
}

impl Problem {
    fn new(evidence: Evidence, options: &Options) -> Problem {
        let parts = evidence.parts();
        let uses = options.uses.get(&evidence.spec).copied().unwrap_or(1);
        let question = |part: Part| {
            let points = evidence.points(part, options.trace.as_ref());
            let total: f64 = points.iter().map(|point| point.weight * point.default_us).sum();
            let us = points.iter().map(|point| point.default_us).sum::<f64>();
            let mut question = Question {
                part,
                importance: match options.trace {
                    Some(_) => uses as f64,
                    None => uses as f64 * us / total,
                },
                grids: Vec::new(),
                points,
                frontier: Vec::new(),
                variants_max: if part == Part::Rows { options.variants_max } else { 1 },
            };
            for grid in evidence.grids(part, options.profile) {
                let instance = instance(&grid, &question);
                let tables = instance.frontier(options.kernel_bytes_max.is_some());
                let idx = question.grids.len();
                question.frontier.extend(tables.into_iter().map(|table| (idx, table)));
                question.grids.push((grid, instance));
            }
            question.frontier.sort_by(|a, b| {
                a.1.bytes.cmp(&b.1.bytes).then(a.1.cost.total_cmp(&b.1.cost)).then(a.0.cmp(&b.0))
            });
            question
        };
        let parts = parts.into_iter().map(question).collect();
        Problem { evidence, parts }
    }

    /// What the lock says of the problem.
    fn intervals(&self, tables: &[(&Question, Answer)]) -> Vec<LockedInterval> {
        let defaults = self.evidence.kernel.defaults();
        let mut all: Vec<LockedInterval> = Vec::new();
        let mut rows_done = 0;
        for (question, answer) in tables {
            if question.part == Part::Prompts && all.is_empty() {
                all.push(default_interval(&defaults[0].1, Some(1)));
            }
            match answer {
                Some((grid_idx, table)) => {
                    let grid = &question.grids[*grid_idx].0;
                    all.extend(self.table_intervals(question, grid, table));
                }
                None => all.extend(defaults.iter().map(|(rows_max, symbol)| {
                    default_interval(symbol, (*rows_max < usize::MAX).then_some(*rows_max))
                })),
            }
            rows_done = match question.part {
                Part::Decode => 1,
                Part::Prompts => usize::MAX,
                Part::Rows => self.evidence.rows_served(),
            };
        }
        // What no record says anything about is left to the defaults.
        for (rows_max, symbol) in defaults.iter().filter(|(rows_max, _)| *rows_max > rows_done) {
            all.push(default_interval(symbol, (*rows_max < usize::MAX).then_some(*rows_max)));
        }
        all.dedup_by(|next, before| {
            let is_same = before.symbol == next.symbol && before.provenance == next.provenance;
            if is_same {
                before.rows_max = next.rows_max;
            }
            is_same
        });
        all
    }

    fn table_intervals(
        &self,
        question: &Question,
        grid: &Grid,
        table: &Table,
    ) -> Vec<LockedInterval> {
        let mut first = 0;
        let mut all = Vec::new();
        for (place, (last, idx)) in table.intervals.iter().enumerate() {
            let is_last = place + 1 == table.intervals.len();
            let rows_max = match question.part {
                Part::Decode => Some(1),
                Part::Prompts => None,
                Part::Rows if is_last && self.evidence.rows_served() == usize::MAX => None,
                Part::Rows => Some(self.evidence.rows(*last)),
            };
            let mean = |us: &dyn Fn(usize) -> f64| {
                (first..=*last).map(us).sum::<f64>() / (last - first + 1) as f64
            };
            let symbol = grid.symbols[*idx].clone();
            if self.evidence.is_predicted {
                all.push(self.predicted_interval(grid, *idx, (first, *last), rows_max));
                first = last + 1;
                continue;
            }
            let us = mean(&|point| grid.us(*idx, point).unwrap_or(0.0));
            let runner_up = grid.runner_up(&question.points, *idx, (first, *last));
            let is_certified = self.evidence.locked.contains_key(&symbol);
            let other_us =
                runner_up.map(|other| rounded(mean(&|point| grid.us(other, point).unwrap_or(0.0))));
            let margin = other_us.filter(|_| us > 0.0).map_or(0.0, |other| other / us - 1.0);
            all.push(LockedInterval {
                rows_max,
                provenance: if is_certified { "measured" } else { "default" }.to_string(),
                us: rounded(us),
                default_us: rounded(mean(&|point| question.points[point].default_us)),
                runner_up: runner_up.map(|other| grid.symbols[other].clone()),
                runner_up_us: other_us,
                margin: (margin * 1e4).round() / 1e4,
                symbol,
            });
            first = last + 1;
        }
        all
    }

    /// An interval of which nothing was measured.
    fn predicted_interval(
        &self,
        grid: &Grid,
        idx: usize,
        (first, last): (usize, usize),
        rows_max: Option<usize>,
    ) -> LockedInterval {
        let is_default = &grid.candidates[idx].is_default[first..=last];
        let provenance = if is_default.iter().all(|is| *is) { "default" } else { "model" };
        LockedInterval {
            rows_max,
            symbol: grid.symbols[idx].clone(),
            provenance: provenance.to_string(),
            us: 0.0,
            default_us: 0.0,
            runner_up: None,
            runner_up_us: None,
            margin: 0.0,
        }
    }

    fn decision(&self, tables: &[(&Question, Answer)]) -> Decision {
        let Evidence { spec, target, device, rejected, .. } = &self.evidence;
        let (mut cost, mut default) = (0.0, 0.0);
        let mut cases = Vec::new();
        for (question, answer) in tables {
            default += question.default_cost() * question.importance;
            cost += answer.as_ref().map_or(question.default_cost(), |(_, table)| table.cost)
                * question.importance;
            let chosen = |point: usize| {
                let (grid_idx, table) = answer.as_ref()?;
                let found = table.intervals.iter().find(|(last, _)| point <= *last)?;
                Some(question.grids[*grid_idx].0.symbols[found.1].clone())
            };
            cases.extend(self.evidence.case_times(question.part, chosen));
        }
        Decision {
            spec: spec.clone(),
            target: target.to_string(),
            device: device.clone(),
            cases,
            rejected: rejected.clone(),
            cost: if default > 0.0 { cost / default } else { 1.0 },
            is_predicted: self.evidence.is_predicted,
        }
    }
}

fn instance(grid: &Grid, question: &Question) -> Instance {
    Instance {
        points: question.points.clone(),
        candidates: grid.candidates.clone(),
        margin_over: match grid.has_default {
            true => MarginOver::Interval,
            false => MarginOver::Table,
        },
        margin_min: MARGIN_MIN,
        variants_max: question.variants_max,
        intervals_max: match question.part {
            // NOTE: one is left for what lies above the grid.
            Part::Rows => lock_intervals_max() - 1,
            _ => 1,
        },
    }
}

fn lock_intervals_max() -> usize {
    crate::plan::INTERVALS_MAX
}

fn default_interval(symbol: &str, rows_max: Option<usize>) -> LockedInterval {
    LockedInterval {
        rows_max,
        symbol: symbol.to_string(),
        provenance: "default".to_string(),
        us: 0.0,
        default_us: 0.0,
        runner_up: None,
        runner_up_us: None,
        margin: 0.0,
    }
}

/// To hundredths of a microsecond: what a review can read.
fn rounded(us: f64) -> f64 {
    (us * 100.0).round() / 100.0
}

/// Bytes for each question, and the frontier of all.
fn limits(
    questions: &[&Question],
    options: &Options,
) -> Result<(Vec<usize>, Vec<budget::Choice>), Error> {
    let default: f64 = questions.iter().map(|one| one.default_cost() * one.importance).sum();
    let share = |cost: f64| if default > 0.0 { cost / default } else { 1.0 };
    let choices = |question: &&Question| {
        let mut choices = vec![(0, question.default_cost() * question.importance)];
        choices.extend(
            question.frontier.iter().map(|(_, one)| (one.bytes, one.cost * question.importance)),
        );
        choices
    };
    let choices: Vec<Vec<(usize, f64)>> = questions.iter().map(choices).collect();
    let Some(bytes_max) = options.kernel_bytes_max else {
        let cheapest = |all: &Vec<(usize, f64)>| {
            all.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0))
        };
        let total = choices.iter().map(cheapest).fold((0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        return Ok((vec![usize::MAX; questions.len()], vec![(total.0, share(total.1))]));
    };
    let message = || Error::Record {
        message: "too many ways to share --max-kernel-bytes out; select for fewer models or with \
                  fewer --variants"
            .to_string(),
    };
    let all = budget::allocations(&choices, usize::MAX).ok_or_else(message)?;
    let frontier = all.iter().map(|one| (one.bytes, share(one.cost))).collect();
    let best = all.iter().rev().find(|one| one.bytes <= bytes_max);
    let bytes = |best: &budget::Allocation| {
        best.choices.iter().zip(&choices).map(|(idx, all)| all[*idx].0).collect()
    };
    Ok((best.map_or_else(|| vec![0; questions.len()], bytes), frontier))
}

#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;
