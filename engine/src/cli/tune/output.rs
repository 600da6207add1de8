//! What a tuning run tells.

use std::collections::BTreeMap;
use std::path::Path;

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use super::{Args, Console};
use crate::files::{IfExists, write_file};
use crate::tune::report::{TuningReport, TuningRow};
use crate::tune::{TuneProgress, TuneSummary};

/// The JSON of a run.
#[derive(Serialize)]
struct Summary<'a> {
    device: String,
    model: &'a str,
    num_verified: usize,
    num_failed: usize,
    num_measured: usize,
    /// Measurements of earlier runs.
    num_known: usize,
    records: String,
    rows: &'a [TuningRow],
}

/// Writes the report page, and prints what came out.
pub(super) fn finish(
    args: &Args,
    report: &TuningReport,
    summary: &TuneSummary,
    path: &Path,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    let page = args.records_file(Path::new("tuning.html")).with_file_name("tuning.html");
    write_file(&page, report.page().as_bytes(), IfExists::Replace)?;
    let json = page.with_extension("json");
    write_file(&json, report.json().as_bytes(), IfExists::Replace)?;
    if args.json {
        let TuneSummary { num_verified, num_failed, num_measured, num_known } = *summary;
        return console.print_json(&Summary {
            device: report.device.clone(),
            model: &report.model,
            num_verified,
            num_failed,
            num_measured,
            num_known,
            records: path.display().to_string(),
            rows: &report.rows,
        });
    }
    console.print(&text(report, summary))?;
    console.report(&format!(
        "records: {}, report: {}\nchoose with `cargo run -p bespoke-kernel-gen -- select --records \
         {}`\n",
        path.display(),
        page.display(),
        args.records.display()
    ));
    Ok(())
}

/// One line about how far a run is.
pub(super) fn line(progress: &TuneProgress<'_>) -> String {
    match progress {
        TuneProgress::Verifying { spec, num_kernels } => {
            format!("{spec}: verifying {num_kernels} kernels\n")
        }
        TuneProgress::Refused { symbol, reason } => format!("refused {symbol}: {reason}\n"),
        TuneProgress::Postponed { spec, num_kernels } => format!(
            "{spec}: no time to verify {num_kernels} kernels; call this again to go on with them\n"
        ),
        TuneProgress::Racing { spec, pass, num_kernels, seconds } => match pass {
            1 => format!("{spec}: racing {num_kernels} kernels for {seconds:.0} s at most\n"),
            _ => format!("{spec}: racing the fastest again, pass {pass}\n"),
        },
    }
}

fn text(report: &TuningReport, summary: &TuneSummary) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["problem", "rows", "default µs", "best µs", "ratio", "of limit", "best"]);
    let mut by_spec: BTreeMap<&str, Vec<&TuningRow>> = BTreeMap::new();
    for row in &report.rows {
        by_spec.entry(&row.spec).or_default().push(row);
    }
    for row in by_spec.values().flatten() {
        let share = |share: f64| format!("{:.0} %", 100.0 * share);
        table.add_row([
            row.spec.clone(),
            row.num_rows.to_string(),
            format!("{:.1}", row.default_us),
            format!("{:.1}", row.default_us * row.ratio),
            format!("{:.3} ± {:.3}", row.ratio, row.noise),
            row.limit_share.map_or(String::new(), share),
            row.best.clone(),
        ]);
    }
    format!(
        "{}\n{} kernels verified, {} refused; {} measurements, {} known before\n",
        table.trim_fmt(),
        summary.num_verified,
        summary.num_failed,
        summary.num_measured,
        summary.num_known
    )
}
