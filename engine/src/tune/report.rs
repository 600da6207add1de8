//! What tuning found, as numbers for programs and a page for people.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use bespoke_kernel_gen::tuning::device::Device;
use bespoke_kernel_gen::tuning::record::{Case, Record, Time};
use serde::Serialize;

use crate::plot::{self, Line, LinePlot, Scale, escape, number};

const PAGE: &str = include_str!("report.html");

/// The fastest kernels of one device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuningReport {
    pub program: String,
    pub model: String,
    /// Key of the device.
    pub device: String,
    pub device_name: String,
    /// By problem, then by row count.
    pub rows: Vec<TuningRow>,
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
    pub limit_us: Option<f64>,
    /// The physical limit as a share of the fastest kernel's time.
    pub limit_share: Option<f64>,
    pub default_limit_share: Option<f64>,
    /// Kernels that were measured.
    pub num_measured: usize,
}

impl TuningReport {
    /// Of all `records` of `device`; certificates and failures are passed over.
    pub fn new(model: &str, device: &Device, records: &[Record]) -> TuningReport {
        let key = device.key();
        let mut groups: BTreeMap<(&str, usize), Vec<(&Record, &Time)>> = BTreeMap::new();
        for record in records.iter().filter(|record| record.device.key() == key) {
            if let (Case::Rows(rows), Some(time)) = (record.problem.case, record.time()) {
                groups.entry((&record.problem.spec, rows)).or_default().push((record, time));
            }
        }
        let rows = groups
            .into_iter()
            .filter_map(|((spec, num_rows), group)| TuningRow::new(spec, num_rows, &group));
        let device_name = match device {
            Device::Cpu(cpu) => cpu.name.clone(),
            Device::Cuda(gpu) => gpu.name.clone(),
        };
        TuningReport {
            program: concat!("bespoke ", env!("CARGO_PKG_VERSION")).to_owned(),
            model: model.to_owned(),
            device: key,
            device_name,
            rows: rows.collect(),
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

    /// Geometric mean of the ratios; 1 without any.
    pub fn mean_ratio(&self) -> f64 {
        let sum: f64 = self.rows.iter().map(|row| row.ratio.ln()).sum();
        (sum / self.rows.len().max(1) as f64).exp()
    }

    fn facts(&self) -> String {
        let facts = [
            ("Device", format!("{}, {}", self.device_name, self.device)),
            ("Problems", self.specs().len().to_string()),
            ("Measured row counts", self.rows.len().to_string()),
            (
                "Time of the fastest kernels",
                format!("{:.1} % of the defaults', geometric mean", 100.0 * self.mean_ratio()),
            ),
        ];
        let mut html = String::new();
        for (name, value) in facts {
            let _ = writeln!(html, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
        }
        html
    }

    fn specs(&self) -> BTreeSet<&str> {
        self.rows.iter().map(|row| row.spec.as_str()).collect()
    }

    fn plots(&self) -> String {
        let mut html = String::new();
        for (idx, spec) in self.specs().into_iter().enumerate() {
            let rows: Vec<&TuningRow> = self.rows.iter().filter(|row| row.spec == spec).collect();
            let line = |name: &str, us: &dyn Fn(&TuningRow) -> Option<f64>| Line {
                name: name.to_owned(),
                points: rows.iter().filter_map(|row| Some((row.num_rows, us(row)?))).collect(),
            };
            let plot = LinePlot {
                id: format!("problem-{idx}"),
                title: spec.to_owned(),
                description: format!("Microseconds of {spec} by row count. Lower is better."),
                unit: " µs",
                scale: Scale::Log,
                x_name: "rows",
                x_scale: Scale::Log,
                lines: vec![
                    line("default", &|row| Some(row.default_us)),
                    line("limit", &|row| row.limit_us),
                    line("fastest", &|row| Some(row.default_us * row.ratio)),
                ],
            };
            let _ = writeln!(html, "<figure>{}</figure>", plot.svg());
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
                "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{:.3}</td><td>{:.3}</td>\
                 <td>{}</td><td>{}</td></tr>",
                row.num_rows,
                escape(&row.best),
                number(row.default_us),
                row.ratio,
                row.noise,
                percent(row.default_limit_share),
                percent(row.limit_share),
            );
        }
        html
    }
}

impl TuningRow {
    /// `None` where the default was not measured.
    fn new(spec: &str, num_rows: usize, group: &[(&Record, &Time)]) -> Option<TuningRow> {
        let is_default = |(record, time): &&(&Record, &Time)| record.variant.symbol == time.default;
        let (_, default) = group.iter().find(is_default)?;
        let ratio = |pair: &&(&Record, &Time)| pair.1.vs_default;
        let (best, time) = group.iter().min_by(|a, b| ratio(a).total_cmp(&ratio(b)))?;
        let [_, default_us, _] = default.us;
        let share = |us: f64| time.limit_us.map(|limit| limit / us);
        let symbols: BTreeSet<&str> =
            group.iter().map(|(record, _)| record.variant.symbol.as_str()).collect();
        Some(TuningRow {
            spec: spec.to_owned(),
            num_rows,
            default: default.default.clone(),
            default_us,
            best: best.variant.symbol.clone(),
            ratio: time.vs_default,
            noise: default.noise,
            limit_us: time.limit_us,
            limit_share: share(default_us * time.vs_default),
            default_limit_share: share(default_us),
            num_measured: symbols.len(),
        })
    }
}
