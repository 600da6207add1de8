//! Evidence: what the records say about one spec, target and device, as far as it still holds.

mod predicted;

use std::collections::{BTreeMap, BTreeSet};

use super::kernel::Kernel;
use super::{CaseTimes, LockedVariant, Options, Profile};
use crate::tuning::intervals::{Candidate, Point};
use crate::tuning::record::{Case, Record, SAMPLES_MIN, Time};
use crate::tuning::trace::Trace;

/// Cases that one choice is made over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// All row counts, in intervals; of ops with one kernel for all row counts, as one.
    Rows,
    Decode,
    Prompts,
}

/// What the records say about one spec, target and device.
pub(super) struct Evidence {
    pub(super) spec: String,
    pub(super) target: &'static str,
    pub(super) device: String,
    /// One of the spec's kernels.
    pub(super) kernel: Kernel,
    /// Whether the times are a model's: shares of the default's, which is 1.
    pub(super) is_predicted: bool,
    cases: BTreeMap<Case, CaseEvidence>,
    kernels: BTreeMap<String, Kernel>,
    code_bytes: BTreeMap<String, usize>,
    /// What the lock says of certified variants.
    pub(super) locked: BTreeMap<String, LockedVariant>,
    /// Symbol and reason.
    pub(super) rejected: BTreeMap<String, String>,
}

struct CaseEvidence {
    default: String,
    default_us: f64,
    noise: f64,
    limit_us: Option<f64>,
    /// Median ratio to the default.
    ratios: BTreeMap<String, f64>,
}

/// Kernels that may serve together.
pub(super) struct Grid {
    pub(super) symbols: Vec<String>,
    /// In the order of symbols.
    pub(super) candidates: Vec<Candidate>,
    /// Whether the defaults are among them.
    pub(super) has_default: bool,
}

/// Which records are of one problem: device, spec, target.
type Key = (String, String, &'static str);

/// The problems of the records, in canonical order, and how many records are of no use for which
/// reason.
pub(super) fn gather(
    records: &[Record],
    hashes: &BTreeMap<String, String>,
    options: &Options,
) -> (Vec<Evidence>, BTreeMap<String, usize>) {
    let mut unused: BTreeMap<String, usize> = BTreeMap::new();
    let mut problems: BTreeMap<Key, Vec<(&Record, &Time, Kernel)>> = BTreeMap::new();
    for record in records {
        let Some(time) = record.time() else { continue };
        match usable(record, time, options) {
            Ok(kernel) => {
                let key = (record.device.key(), record.problem.spec.clone(), kernel.target());
                problems.entry(key).or_default().push((record, time, kernel));
            }
            Err(reason) => *unused.entry(reason).or_default() += 1,
        }
    }
    let trust = Trust::new(records, hashes);
    let evidence = problems.into_iter().filter_map(|(key, records)| {
        let found = Evidence::new(key, &records, &trust);
        (!found.cases.is_empty()).then_some(found)
    });
    let mut all: Vec<Evidence> = evidence.collect();
    all.extend(predicted::predicted(records, &trust, &all, options));
    all.sort_by(|a, b| (&a.spec, a.target, &a.device).cmp(&(&b.spec, b.target, &b.device)));
    (all, unused)
}

/// The kernel of a time that a selection can use.
fn usable(record: &Record, time: &Time, options: &Options) -> Result<Kernel, String> {
    if time.num_samples < SAMPLES_MIN {
        return Err("dropped out early".to_string());
    }
    let kernel = Kernel::parse(&record.variant.symbol)
        .ok_or_else(|| "no kernel of this generator".to_string())?;
    if kernel.spec_name() != record.problem.spec || kernel.target() != record.problem.target {
        return Err("a kernel of another problem".to_string());
    }
    if !kernel.is_feasible() {
        return Err("a kernel that cannot be built".to_string());
    }
    if !options.uses.is_empty() && !options.uses.contains_key(&record.problem.spec) {
        return Err("not of these models".to_string());
    }
    let default = kernel.default_of(record.problem.case);
    if !kernel.serves(record.problem.case) || default.is_none() {
        return Err("a case that the kernel does not serve".to_string());
    }
    if default.as_ref() != Some(&time.default) {
        return Err("raced against what is no longer the default".to_string());
    }
    Ok(kernel)
}

/// Who may be trusted: certificates, failures and today's sources.
struct Trust<'a> {
    hashes: &'a BTreeMap<String, String>,
    /// (symbol, source hash, compiler) → hash of the certificate, the least of several.
    certificates: BTreeMap<(&'a str, &'a str, &'a str), String>,
    /// Why a certificate is none.
    incomplete: BTreeMap<&'a str, String>,
    failures: BTreeMap<(&'a str, &'a str), &'a str>,
}

impl<'a> Trust<'a> {
    fn new(records: &'a [Record], hashes: &'a BTreeMap<String, String>) -> Trust<'a> {
        let mut trust = Trust {
            hashes,
            certificates: BTreeMap::new(),
            incomplete: BTreeMap::new(),
            failures: BTreeMap::new(),
        };
        for record in records {
            let (symbol, source) = (&*record.variant.symbol, &*record.variant.source_hash);
            if let Some(failure) = record.failure() {
                trust.failures.insert((symbol, source), &failure.reason);
            }
            let Some(certificate) = record.certificate() else { continue };
            match certificate.check() {
                Ok(()) => {
                    let hash = certificate.hash();
                    let key = (symbol, source, &*certificate.compiler);
                    let kept = trust.certificates.entry(key).or_insert_with(|| hash.clone());
                    if hash < *kept {
                        *kept = hash;
                    }
                }
                Err(reason) => {
                    trust.incomplete.insert(symbol, reason);
                }
            }
        }
        trust
    }

    /// The certificate of a measured variant, or why it cannot be trusted.
    fn certificate(&self, record: &Record) -> Result<String, String> {
        let variant = &record.variant;
        let (symbol, source) = (&*variant.symbol, &*variant.source_hash);
        if self.hashes.get(symbol).is_none_or(|hash| hash != source) {
            return Err("stale: measured with another source".to_string());
        }
        if let Some(reason) = self.failures.get(&(symbol, source)) {
            return Err(format!("failed: {reason}"));
        }
        match self.certificates.get(&(symbol, source, &variant.compiler)) {
            Some(hash) => Ok(hash.clone()),
            None => Err(match self.incomplete.get(symbol) {
                Some(reason) => format!("uncertified: {reason}"),
                None => "uncertified".to_string(),
            }),
        }
    }
}

/// The numbers in a compiler's version, by which versions are ordered.
pub(super) fn version(compiler: &str) -> (Vec<u64>, &str) {
    let numbers = compiler.split(|letter: char| !letter.is_ascii_digit());
    (numbers.filter_map(|number| number.parse().ok()).take(3).collect(), compiler)
}

impl Evidence {
    fn empty((device, spec, target): Key, kernel: Kernel) -> Evidence {
        Evidence {
            spec,
            target,
            device,
            kernel,
            is_predicted: false,
            cases: BTreeMap::new(),
            kernels: BTreeMap::new(),
            code_bytes: BTreeMap::new(),
            locked: BTreeMap::new(),
            rejected: BTreeMap::new(),
        }
    }

    fn new(key: Key, records: &[(&Record, &Time, Kernel)], trust: &Trust<'_>) -> Evidence {
        let mut evidence = Evidence::empty(key, records[0].2);
        let is_current = |record: &Record| {
            let hash = trust.hashes.get(&record.variant.symbol);
            hash == Some(&record.variant.source_hash)
        };
        // NOTE: times of several compilers are not compared; the newest one's count.
        let compilers = records.iter().filter(|(record, _, _)| is_current(record));
        let compiler = compilers
            .map(|(record, _, _)| &*record.variant.compiler)
            .max_by(|a, b| version(a).cmp(&version(b)));
        let mut cases: BTreeMap<Case, Vec<(&Record, &Time)>> = BTreeMap::new();
        let mut reasons: BTreeMap<&str, String> = BTreeMap::new();
        for (record, time, kernel) in records {
            let symbol = &*record.variant.symbol;
            let found = match Some(&*record.variant.compiler) == compiler || !is_current(record) {
                true => trust.certificate(record),
                false => Err("stale: measured with another compiler".to_string()),
            };
            let is_default = symbol == time.default;
            match found {
                Ok(hash) => evidence.certify(record, &hash),
                // The default's time counts without a certificate: it serves anyway.
                Err(reason) if is_default && reason.starts_with("uncertified") => {}
                Err(reason) => {
                    // The first reason in alphabetical order, whatever the records' order.
                    let kept = reasons.entry(symbol).or_insert_with(|| reason.clone());
                    if reason < *kept {
                        *kept = reason;
                    }
                    continue;
                }
            }
            evidence.kernels.insert(symbol.to_string(), *kernel);
            evidence.count_bytes(record);
            cases.entry(record.problem.case).or_default().push((record, time));
        }
        evidence.cases = cases.iter().map(|(case, all)| (*case, CaseEvidence::new(all))).collect();
        reasons.retain(|symbol, _| !evidence.kernels.contains_key(*symbol));
        let owned = |(symbol, reason): (&str, String)| (symbol.to_string(), reason);
        evidence.rejected = reasons.into_iter().map(owned).collect();
        evidence
    }

    fn certify(&mut self, record: &Record, certificate: &str) {
        let variant = &record.variant;
        let locked = || LockedVariant {
            symbol: variant.symbol.clone(),
            source_hash: variant.source_hash.clone(),
            certificate: certificate.to_string(),
            compiler: variant.compiler.clone(),
            code_bytes: variant.code_bytes,
        };
        let kept = self.locked.entry(variant.symbol.clone()).or_insert_with(locked);
        // NOTE: 0 where a record does not know them.
        kept.code_bytes = kept.code_bytes.max(variant.code_bytes);
    }

    fn count_bytes(&mut self, record: &Record) {
        let bytes = self.code_bytes.entry(record.variant.symbol.clone()).or_default();
        *bytes = (*bytes).max(record.variant.code_bytes);
    }

    /// The parts that there are cases of.
    pub(super) fn parts(&self) -> Vec<Part> {
        let parts: BTreeSet<Part> = self.cases.keys().map(|case| part_of(*case)).collect();
        parts.into_iter().collect()
    }

    fn cases_of(&self, part: Part) -> impl Iterator<Item = (Case, &CaseEvidence)> {
        let cases = self.cases.iter().filter(move |(case, _)| part_of(**case) == part);
        cases.map(|(case, found)| (*case, found))
    }

    /// The row count of a point of [`Part::Rows`].
    pub(super) fn rows(&self, point_idx: usize) -> usize {
        match self.cases_of(Part::Rows).nth(point_idx) {
            Some((Case::Rows(rows), _)) => rows,
            _ => usize::MAX,
        }
    }

    /// Up to which row count the records say what serves.
    pub(super) fn rows_served(&self) -> usize {
        let last = self.cases_of(Part::Rows).last().map_or(0, |(case, _)| match case {
            Case::Rows(rows) => rows,
            _ => 0,
        });
        // The kernel of the largest row count serves those above it, if it is one for many rows.
        if self.kernel.has_no_limit_from(last) { usize::MAX } else { last }
    }

    pub(super) fn points(&self, part: Part, trace: Option<&Trace>) -> Vec<Point> {
        let cases: Vec<(Case, &CaseEvidence)> = self.cases_of(part).collect();
        let rows = |case: &Case| match case {
            Case::Rows(rows) => *rows,
            Case::Decode { num_sequences, .. } => *num_sequences,
            Case::Prefill(len) => *len,
            Case::All => 0,
        };
        let grid: Vec<usize> = cases.iter().map(|(case, _)| rows(case)).collect();
        // NOTE: of attention, each case counts the same, since one choice serves them all.
        let trace = trace.filter(|_| part == Part::Rows).map(|trace| trace.weights(&grid));
        let point = |(idx, (_, found)): (usize, &(Case, &CaseEvidence))| Point {
            weight: trace.as_ref().map_or(1.0 / found.default_us, |weights| weights[idx]),
            default_us: found.default_us,
            noise: found.noise,
        };
        cases.iter().enumerate().map(point).collect()
    }

    /// The sets of kernels that may serve together, the defaults' first.
    pub(super) fn grids(&self, part: Part, profile: Profile) -> Vec<Grid> {
        let group = |kernel: &Kernel| {
            let class = match profile {
                Profile::Invariant => kernel.reduction_class(),
                Profile::Free => String::new(),
            };
            (kernel.layout(), class)
        };
        let mut groups: BTreeMap<(usize, String), Vec<&str>> = BTreeMap::new();
        let defaults = self.kernel.defaults();
        let default = defaults.first().and_then(|(_, symbol)| Kernel::parse(symbol));
        let default_group = group(&default.unwrap_or(self.kernel));
        for (symbol, kernel) in &self.kernels {
            groups.entry(group(kernel)).or_default().push(symbol);
        }
        let mut defaults: BTreeSet<String> =
            self.cases_of(part).map(|(_, found)| found.default.clone()).collect();
        let own = groups.remove(&default_group).unwrap_or_default();
        defaults.extend(own.into_iter().map(str::to_string));
        let mut grids = vec![self.grid(part, defaults.into_iter().collect(), true)];
        // NOTE: the defaults, which serve above the grid otherwise, cannot read another layout.
        if self.rows_served() == usize::MAX || part != Part::Rows {
            grids.extend(groups.into_values().map(|symbols| {
                self.grid(part, symbols.into_iter().map(str::to_string).collect(), false)
            }));
        }
        grids
    }

    fn grid(&self, part: Part, symbols: Vec<String>, has_default: bool) -> Grid {
        let cases: Vec<(Case, &CaseEvidence)> = self.cases_of(part).collect();
        let every_default: BTreeSet<String> =
            self.kernel.defaults().into_iter().map(|(_, symbol)| symbol).collect();
        let candidate = |symbol: &String| {
            let ratios: Vec<Option<f64>> =
                cases.iter().map(|(_, found)| found.ratio(symbol)).collect();
            Candidate {
                bytes: self.code_bytes.get(symbol).copied().unwrap_or_default(),
                is_free: every_default.contains(symbol),
                is_measured: ratios.iter().map(Option::is_some).collect(),
                is_default: cases.iter().map(|(_, found)| found.default == *symbol).collect(),
                us: interpolated(&cases, &ratios, part),
            }
        };
        Grid { candidates: symbols.iter().map(candidate).collect(), symbols, has_default }
    }

    /// All times of a part's cases; `chosen` says what serves a point, `None` the default.
    pub(super) fn case_times(
        &self,
        part: Part,
        chosen: impl Fn(usize) -> Option<String>,
    ) -> Vec<CaseTimes> {
        let times = |(idx, (case, found)): (usize, (Case, &CaseEvidence))| {
            let time =
                |(symbol, ratio): (&String, &f64)| (symbol.clone(), ratio * found.default_us);
            let mut times: Vec<(String, f64)> = found.ratios.iter().map(time).collect();
            times.sort_by(|a, b| a.1.total_cmp(&b.1).then_with(|| a.0.cmp(&b.0)));
            CaseTimes {
                case: case.to_string(),
                default: found.default.clone(),
                default_us: found.default_us,
                noise: found.noise,
                limit_us: found.limit_us,
                chosen: chosen(idx).unwrap_or_else(|| found.default.clone()),
                times,
            }
        };
        self.cases_of(part).enumerate().map(times).collect()
    }
}

fn part_of(case: Case) -> Part {
    match case {
        Case::Decode { .. } => Part::Decode,
        Case::Prefill(_) => Part::Prompts,
        Case::Rows(_) | Case::All => Part::Rows,
    }
}

/// Microseconds at all points between the first and last measured one: the ratio to the default is
/// a straight line over the logarithm of the row count. Of attention's cases nothing lies between.
fn interpolated(
    cases: &[(Case, &CaseEvidence)],
    ratios: &[Option<f64>],
    part: Part,
) -> Vec<Option<f64>> {
    let log = |idx: usize| match cases[idx].0 {
        Case::Rows(rows) => (rows as f64).ln(),
        _ => 0.0,
    };
    let ratio = |idx: usize| {
        if ratios[idx].is_some() || part != Part::Rows {
            return ratios[idx];
        }
        let before = (0..idx).rev().find(|other| ratios[*other].is_some())?;
        let after = (idx..ratios.len()).find(|other| ratios[*other].is_some())?;
        let share = (log(idx) - log(before)) / (log(after) - log(before));
        Some(ratios[before]? * (1.0 - share) + ratios[after]? * share)
    };
    (0..ratios.len()).map(|idx| Some(ratio(idx)? * cases[idx].1.default_us)).collect()
}

impl CaseEvidence {
    /// `all` is not empty, and its times were raced against one default.
    fn new(all: &[(&Record, &Time)]) -> CaseEvidence {
        let mut ratios: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for (record, time) in all {
            ratios.entry(record.variant.symbol.clone()).or_default().push(time.vs_default);
        }
        let default = all[0].1.default.clone();
        ratios.insert(default.clone(), vec![1.0]);
        let median_of = |value: &dyn Fn(&Time) -> Option<f64>| {
            median(all.iter().filter_map(|(_, time)| value(time)).collect())
        };
        CaseEvidence {
            default,
            default_us: median_of(&|time| Some(time.us[1] / time.vs_default)).unwrap_or(1.0),
            noise: median_of(&|time| Some(time.noise)).unwrap_or(0.0),
            limit_us: median_of(&|time| time.limit_us),
            ratios: ratios
                .into_iter()
                .filter_map(|(symbol, all)| Some((symbol, median(all)?)))
                .collect(),
        }
    }

    fn ratio(&self, symbol: &str) -> Option<f64> {
        self.ratios.get(symbol).copied()
    }
}

/// Of an even number of values the mean of the middle two.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

impl Grid {
    pub(super) fn us(&self, idx: usize, point_idx: usize) -> Option<f64> {
        self.candidates[idx].us[point_idx]
    }

    /// The cheapest other kernel that has times at all points of an interval.
    pub(super) fn runner_up(
        &self,
        points: &[Point],
        idx: usize,
        (first, last): (usize, usize),
    ) -> Option<usize> {
        let cost = |other: usize| {
            let costs = (first..=last).map(|p| Some(self.us(other, p)? * points[p].weight));
            costs.sum::<Option<f64>>()
        };
        let others = (0..self.symbols.len()).filter(|other| *other != idx);
        let costs = others.filter_map(|other| Some((other, cost(other)?)));
        costs.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(other, _)| other)
    }
}
