//! `bespoke verify` where a lock has chosen: logits have the bits that the default kernels give.

use bespoke::kernels::{Interval, KernelTable, Serving};
use bespoke::verify::{Check, Report, cpu};
use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::presets;
use bespoke_tuning_tests::planted::{self, Fault};

/// A table whose lock lets the kernel with `fault` serve the rows above `rows_min`.
fn table(fault: Fault, rows_min: usize) -> KernelTable {
    let default = planted::default_kernel();
    let table = planted::table(&[fault]);
    let interval = |rows_max, symbol, provenance| Interval { rows_max, symbol, provenance };
    let below = table.serving_kernel(&default.spec, rows_min, default.target);
    let mut intervals = vec![interval(usize::MAX, planted::symbol(fault), Provenance::Measured)];
    if let Some(below) = below.filter(|_| rows_min > 0) {
        intervals.insert(0, interval(rows_min, below.symbol, Provenance::Default));
    }
    let locked = Serving {
        spec: default.spec,
        target: default.target,
        device: Some("of-a-test"),
        intervals: intervals.leak(),
    };
    let servings: Vec<Serving> = table.servings.iter().copied().chain([locked]).collect();
    KernelTable { servings: servings.leak(), is_tuner: false, ..table }
}

fn verify(table: &KernelTable) -> Report {
    let config = bespoke_tuning_tests::model().join("config.json");
    let shape = presets::shape(&config.to_string_lossy(), &[std::path::PathBuf::new()]).unwrap();
    let mut report = Report::default();
    cpu(table, &[shape], &mut report, &mut |_| {}).unwrap();
    report
}

/// The comparisons of whole models that `symbol` takes part in.
fn end_to_end<'a>(report: &'a Report, symbol: &str) -> Vec<&'a Check> {
    let of_models = report.checks.iter().filter(|check| check.case.contains("end to end"));
    of_models.filter(|check| check.kernels.iter().any(|kernel| kernel == symbol)).collect()
}

#[test]
fn a_sound_choice_passes() {
    let report = verify(&table(Fault::None, 1));
    let failures: Vec<&Check> = report.failures().collect();
    assert!(failures.is_empty(), "{failures:#?}");
    let checks = end_to_end(&report, planted::symbol(Fault::None));
    for rows in [", 2 rows", ", 7 rows", ", 33 rows"] {
        assert!(checks.iter().any(|check| check.case.ends_with(rows)), "{rows}: {checks:#?}");
    }
}

/// Each op alone is near enough to the reference, and alike at all row counts.
#[test]
fn what_rounding_hides_shows_end_to_end() {
    let report = verify(&table(Fault::Rounding, 0));
    let symbol = planted::symbol(Fault::Rounding);
    let checks = end_to_end(&report, symbol);
    let is_wrong = |check: &&Check| check.problem.is_some();
    assert!(checks.iter().copied().any(|check| is_wrong(&check)), "{checks:#?}");
    for check in report.failures() {
        assert!(check.case.contains("end to end"), "{check:?}");
        assert!(check.kernels.iter().any(|kernel| kernel == symbol), "{check:?}");
    }
}

#[test]
fn a_serving_that_is_wrong_at_one_row_count_is_found() {
    let report = verify(&table(Fault::Wrong, 16));
    let checks = end_to_end(&report, planted::symbol(Fault::Wrong));
    let wrong: Vec<&&Check> = checks.iter().filter(|check| check.problem.is_some()).collect();
    let rows = format!(", {} rows", planted::WRONG_ROWS);
    assert!(
        !wrong.is_empty() && wrong.iter().all(|check| check.case.ends_with(&rows)),
        "{wrong:?}"
    );
}
