//! What tuning found, as numbers for programs and a page for people: what `kernel-gen select` would
//! choose from the records, beside the defaults and the machine's limits.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bespoke_kernel_gen::tuning::device::Device;
use bespoke_kernel_gen::tuning::explain::Explanation;
use bespoke_kernel_gen::tuning::lock::LockedProblem;
use bespoke_kernel_gen::tuning::record::{Case, Record};
use bespoke_kernel_gen::tuning::select::{CaseTimes, Options, Selection, select};
use serde::Serialize;

use crate::plot::{self, Band, Line, LinePlot, Scale, escape, number};

const PAGE: &str = include_str!("report.html");

/// The fastest kernels of one device, and those that are chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuningReport {
    pub program: String,
    pub model: String,
    /// Key of the device.
    pub device: String,
    pub device_name: String,
    pub problems: Vec<TuningProblem>,
    /// By problem, then by row count.
    pub rows: Vec<TuningRow>,
}

/// What is chosen for one problem.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuningProblem {
    pub spec: String,
    /// Time of what is chosen as a share of the defaults', mean over the measured row counts.
    pub ratio: f64,
    /// Ascending.
    pub intervals: Vec<Explanation>,
}

/// One problem at one row count.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuningRow {
    pub spec: String,
    pub num_rows: usize,
    /// Symbol of the kernel that serves where nothing was measured.
    pub default: String,
    pub default_us: f64,
    /// Symbol of the fastest kernel, which may be the default.
    pub best: String,
    /// The fastest kernel's time as a share of the default's in the same rounds.
    pub ratio: f64,
    /// Of the default against itself, relative.
    pub noise: f64,
    /// Symbol of the kernel that is chosen for the interval of this row count.
    pub chosen: String,
    /// Null where it was measured at other row counts of the interval only.
    pub chosen_ratio: Option<f64>,
    pub limit_us: Option<f64>,
    /// The physical limit as a share of the fastest kernel's time.
    pub limit_share: Option<f64>,
    pub default_limit_share: Option<f64>,
    pub chosen_limit_share: Option<f64>,
    /// Kernels that were measured.
    pub num_measured: usize,
}

impl TuningReport {
    /// Of all `records` of `device`, which are of kernels as they are today.
    pub fn new(model: &str, device: &Device, records: &[Record]) -> TuningReport {
        let key = device.key();
        let is_own = |record: &&Record| record.device.key() == key;
        let records: Vec<Record> = records.iter().filter(is_own).cloned().collect();
        let hash =
            |record: &Record| (record.variant.symbol.clone(), record.variant.source_hash.clone());
        let hashes: BTreeMap<String, String> = records.iter().map(hash).collect();
        // NOTE: only a budget of bytes can be impossible to keep, and there is none.
        let selection = select(&records, &hashes, &Options::default()).ok();
        let (problems, rows) = selection.as_ref().map(chosen).unwrap_or_default();
        let device_name = match device {
            Device::Cpu(cpu) => cpu.name.clone(),
            Device::Cuda(gpu) => gpu.name.clone(),
        };
        TuningReport {
            program: concat!("bespoke ", env!("CARGO_PKG_VERSION")).to_owned(),
            model: model.to_owned(),
            device: key,
            device_name,
            problems,
            rows,
        }
    }

    /// The content of `tuning.json`.
    pub fn json(&self) -> String {
        // Finite numbers and strings alone.
        format!("{:#}\n", serde_json::json!(self))
    }

    /// A page that stands alone: no script, no other file.
    pub fn page(&self) -> String {
        let parts: [(&str, String); 6] = [
            ("style", plot::STYLE.to_owned()),
            ("model", escape(&self.model)),
            ("program", escape(&self.program)),
            ("facts", self.facts()),
            ("plots", self.plots()),
            ("rows", self.table()),
        ];
        let mut page = String::with_capacity(PAGE.len() + (64 << 10));
        let mut rest = PAGE;
        while let Some((before, after)) = rest.split_once("{{") {
            page.push_str(before);
            let Some((name, after)) = after.split_once("}}") else { break };
            page.push_str(parts.iter().find(|part| part.0 == name).map_or("", |part| &part.1));
            rest = after;
        }
        page.push_str(rest);
        page
    }

    /// Geometric mean of the fastest kernels' ratios; 1 without any.
    pub fn mean_ratio(&self) -> f64 {
        geometric_mean(self.rows.iter().map(|row| row.ratio)).unwrap_or(1.0)
    }

    fn facts(&self) -> String {
        let percent = |share: Option<f64>| match share {
            Some(share) => format!("{:.1} %", 100.0 * share),
            None => "unknown".to_owned(),
        };
        let mean = |share: &dyn Fn(&TuningRow) -> Option<f64>| {
            percent(geometric_mean(self.rows.iter().filter_map(share)))
        };
        let facts = [
            ("Device", format!("{}, {}", self.device_name, self.device)),
            ("Problems", self.problems.len().to_string()),
            ("Measured row counts", self.rows.len().to_string()),
            (
                "Time beside the defaults",
                format!(
                    "{} of the chosen kernels, {} of the fastest at each row count",
                    mean(&|row| row.chosen_ratio),
                    percent(Some(self.mean_ratio()))
                ),
            ),
            (
                "Share of the limit",
                format!(
                    "{} with the defaults, {} with the chosen kernels",
                    mean(&|row| row.default_limit_share),
                    mean(&|row| row.chosen_limit_share)
                ),
            ),
        ];
        let mut html = String::new();
        for (name, value) in facts {
            let _ = writeln!(html, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
        }
        html
    }

    fn plots(&self) -> String {
        let mut html = String::new();
        for (idx, problem) in self.problems.iter().enumerate() {
            let rows: Vec<&TuningRow> =
                self.rows.iter().filter(|row| row.spec == problem.spec).collect();
            if rows.is_empty() {
                continue;
            }
            let _ = writeln!(
                html,
                "<figure>{}<figcaption>{}</figcaption></figure><figure>{}</figure>",
                problem.times(idx, &rows).svg(),
                problem.caption(),
                problem.limits(idx, &rows).svg()
            );
        }
        html
    }

    fn table(&self) -> String {
        let percent = |share: Option<f64>| match share {
            Some(share) => format!("{:.0} %", 100.0 * share),
            None => String::new(),
        };
        let mut html = String::new();
        for row in &self.rows {
            let _ = writeln!(
                html,
                "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{:.3}</td><td>{}</td>\
                 <td>{:.3}</td><td>{}</td><td>{}</td></tr>",
                row.num_rows,
                escape(&row.best),
                number(row.default_us),
                row.ratio,
                row.chosen_ratio.map_or(String::new(), |ratio| format!("{ratio:.3}")),
                row.noise,
                percent(row.default_limit_share),
                percent(row.chosen_limit_share),
            );
        }
        html
    }
}

impl TuningProblem {
    fn new(problem: &LockedProblem, ratio: f64) -> TuningProblem {
        let mut rows_min = 1;
        let explain = |fact| {
            let found = Explanation::locked(rows_min, fact, &problem.device);
            rows_min = fact.rows_max.map_or(usize::MAX, |rows| rows.saturating_add(1));
            found
        };
        let intervals = problem.intervals.iter().map(explain).collect();
        TuningProblem { spec: problem.spec.clone(), ratio, intervals }
    }

    /// Time against row count, over the intervals.
    fn times(&self, idx: usize, rows: &[&TuningRow]) -> LinePlot {
        LinePlot {
            id: format!("times-{idx}"),
            title: self.spec.clone(),
            description: format!("Microseconds of {} by row count. Lower is better.", self.spec),
            unit: " µs",
            scale: Scale::Log,
            x_name: "rows",
            x_scale: Scale::Log,
            lines: vec![
                line("default", rows, &|row| Some(row.default_us)),
                line("chosen", rows, &|row| Some(row.default_us * row.chosen_ratio?)),
                line("limit", rows, &|row| row.limit_us),
                line("fastest", rows, &|row| Some(row.default_us * row.ratio)),
            ],
            bands: self.bands(),
        }
    }

    /// The limit's share of the time, before and after.
    fn limits(&self, idx: usize, rows: &[&TuningRow]) -> LinePlot {
        LinePlot {
            id: format!("limits-{idx}"),
            title: "Share of the limit".to_owned(),
            description: format!(
                "How near {} comes to what memory and arithmetic allow, by row count. Higher is \
                 better.",
                self.spec
            ),
            unit: " %",
            scale: Scale::Linear,
            x_name: "rows",
            x_scale: Scale::Log,
            lines: vec![
                line("default", rows, &|row| Some(100.0 * row.default_limit_share?)),
                line("chosen", rows, &|row| Some(100.0 * row.chosen_limit_share?)),
            ],
            bands: self.bands(),
        }
    }

    fn bands(&self) -> Vec<Band> {
        let band = |(interval, name): (&Explanation, String)| Band {
            last: interval.rows_max,
            name,
            title: interval.symbol.clone().unwrap_or_default(),
        };
        self.intervals.iter().zip(self.letters()).map(band).collect()
    }

    /// A letter for each interval; the same for the same kernel.
    fn letters(&self) -> Vec<String> {
        let mut symbols: Vec<&Option<String>> = Vec::new();
        let mut letters = Vec::new();
        for interval in &self.intervals {
            let known = symbols.iter().position(|symbol| **symbol == interval.symbol);
            let idx = known.unwrap_or(symbols.len());
            if known.is_none() {
                symbols.push(&interval.symbol);
            }
            letters.push(char::from(b'A' + (idx % 26) as u8).to_string());
        }
        letters
    }

    /// What the letters mean.
    fn caption(&self) -> String {
        let mut html = format!("Chosen: {:.1} % of the defaults' time.<ul>", 100.0 * self.ratio);
        for (interval, letter) in self.intervals.iter().zip(self.letters()) {
            let _ = write!(
                html,
                "<li>{letter}, rows {}: {}, {}</li>",
                interval.rows(),
                escape(interval.symbol.as_deref().unwrap_or("no kernel")),
                interval.provenance
            );
        }
        html + "</ul>"
    }
}

impl TuningRow {
    /// `None` of cases that are no row count, or without times.
    fn new(spec: &str, case: &CaseTimes) -> Option<TuningRow> {
        let Ok(Case::Rows(num_rows)) = case.case.parse() else { return None };
        let CaseTimes { default, default_us, noise, limit_us, chosen, times, .. } = case;
        let (best, best_us) = times.first()?;
        let of_chosen = times.iter().find(|(symbol, _)| symbol == chosen);
        let chosen_us = of_chosen.map(|(_, us)| *us);
        let share = |us: f64| limit_us.map(|limit| limit / us);
        Some(TuningRow {
            spec: spec.to_owned(),
            num_rows,
            default: default.clone(),
            default_us: *default_us,
            best: best.clone(),
            ratio: best_us / default_us,
            noise: *noise,
            chosen: chosen.clone(),
            chosen_ratio: chosen_us.map(|us| us / default_us),
            limit_us: *limit_us,
            limit_share: share(*best_us),
            default_limit_share: share(*default_us),
            chosen_limit_share: chosen_us.and_then(share),
            num_measured: times.len(),
        })
    }
}

/// What a selection chose, and between what; predictions are no measurements, and left out.
fn chosen(selection: &Selection) -> (Vec<TuningProblem>, Vec<TuningRow>) {
    let (mut problems, mut rows) = (Vec::new(), Vec::new());
    for decision in selection.decisions.iter().filter(|decision| !decision.is_predicted) {
        let (spec, target, device) = (&decision.spec, &decision.target, &decision.device);
        if let Some(problem) = selection.lock.problem(spec, target, device) {
            problems.push(TuningProblem::new(problem, decision.cost));
            rows.extend(decision.cases.iter().filter_map(|case| TuningRow::new(spec, case)));
        }
    }
    (problems, rows)
}

fn line(name: &str, rows: &[&TuningRow], value: &dyn Fn(&TuningRow) -> Option<f64>) -> Line {
    let points = rows.iter().filter_map(|row| Some((row.num_rows, value(row)?)));
    Line { name: name.to_owned(), points: points.collect() }
}

/// `None` of no values.
fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value.ln(), count + 1));
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

#[cfg(test)]
mod tests;
