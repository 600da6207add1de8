//! The report of planted records.

use bespoke_kernel_gen::tuning::certificate::{Certificate, LEVELS_NEEDED, Level};
use bespoke_kernel_gen::tuning::device::CpuDevice;
use bespoke_kernel_gen::tuning::record::{Outcome, Problem, Time, VERSION, Variant};

use super::*;

const SPEC: &str = "awq_gemm_n960_k576_g64_int8";
const FAST: &str = "awq_gemm_n960_k576_g64_int8_few_r8_c4_t2_u1_h1__avx512";

fn device(num_threads: usize) -> Device {
    let key = format!("avx512-amd-25-17-l2-1024-l3-32768-t{num_threads}");
    let device = CpuDevice::parse_key(&key).unwrap();
    Device::Cpu(CpuDevice { name: "a <CPU>".to_owned(), ..device })
}

fn default_at(rows: usize) -> String {
    let regime = ["one", "few", "many"][usize::from(rows > 1) + usize::from(rows > 8)];
    format!("{SPEC}_{regime}__avx512")
}

fn record(symbol: &str, case: Case, outcome: Outcome) -> Record {
    Record {
        v: VERSION,
        problem: Problem { spec: SPEC.to_owned(), target: "avx512".to_owned(), case },
        device: device(2),
        variant: Variant {
            symbol: symbol.to_owned(),
            source_hash: "1".to_owned(),
            compiler: "rustc 1.89.0".to_owned(),
            code_bytes: 1000,
        },
        outcome,
        measured_at: 0,
    }
}

fn time(symbol: &str, rows: usize, vs_default: f64) -> Record {
    let us = 100.0 * vs_default;
    let time = Time {
        mode: "backend".to_owned(),
        cache: "cold".to_owned(),
        us: [us, us, us],
        num_samples: 20,
        default: default_at(rows),
        vs_default,
        noise: 0.01,
        limit_us: Some(40.0),
    };
    record(symbol, Case::Rows(rows), Outcome::Time(time))
}

fn certificate(symbol: &str) -> Record {
    let level = |name: &str| Level {
        name: name.to_owned(),
        num_cases: 1,
        max_error: 0.0,
        num_repeats: 1,
        note: String::new(),
    };
    let certificate = Certificate {
        symbol: symbol.to_owned(),
        source_hash: "1".to_owned(),
        compiler: "rustc 1.89.0".to_owned(),
        device: device(2).key(),
        levels: LEVELS_NEEDED.map(level).to_vec(),
    };
    record(symbol, Case::All, Outcome::Certificate(certificate))
}

/// A kernel that takes half of the default's time at 2 to 8 rows, and a faster one without a
/// certificate.
fn records() -> Vec<Record> {
    let rows = [1, 2, 4, 8, 16];
    let mut all: Vec<Record> = rows.map(|rows| time(&default_at(rows), rows, 1.0)).to_vec();
    all.extend([2, 4, 8].map(|rows| time(FAST, rows, 0.5)));
    all.push(certificate(FAST));
    all.extend([2, 4, 8].map(|rows| time(&FAST.replace("_u1_", "_u2_"), rows, 0.1)));
    all
}

#[test]
fn the_report_shows_what_would_be_chosen() {
    let report = TuningReport::new("a <model>", &device(2), &records());
    let [problem] = &report.problems[..] else { panic!("{:?}", report.problems) };
    let intervals: Vec<(String, &str)> =
        problem.intervals.iter().map(|one| (one.rows(), one.symbol.as_deref().unwrap())).collect();
    let (one, many) = (default_at(1), default_at(16));
    assert_eq!(intervals[..2], [("1".to_owned(), &*one), ("2-8".to_owned(), FAST)]);
    assert_eq!(intervals[2], ("9-".to_owned(), &*many));
    assert_eq!(problem.letters(), ["A", "B", "C"]);
    assert!((problem.ratio - 0.7).abs() < 1e-9, "{}", problem.ratio);
    assert_eq!(report.rows.len(), 5);
    let row = &report.rows[2];
    assert_eq!((row.num_rows, &*row.chosen, row.chosen_ratio), (4, FAST, Some(0.5)));
    assert_eq!((row.default_limit_share, row.chosen_limit_share), (Some(0.4), Some(0.8)));
    assert_eq!(row.best, FAST, "the other has no certificate");
    let other = TuningReport::new("a <model>", &device(3), &records());
    assert_eq!((other.problems.len(), other.rows.len()), (0, 0));
}

#[test]
fn the_page_stands_alone() {
    let report = TuningReport::new("a <model>", &device(2), &records());
    let page = report.page();
    assert_eq!(page.matches("<svg").count(), 2, "times and shares of the limit");
    assert!(page.contains(&format!("<li>B, rows 2-8: {FAST}, measured</li>")), "{page}");
    assert!(page.contains("<title>rows 4, chosen: 50 µs</title>"), "{page}");
    assert!(page.contains("<title>rows 4, limit: 40 µs</title>"), "{page}");
    assert!(page.contains("<title>rows 4, chosen: 80 %</title>"), "{page}");
    assert!(page.contains("prefers-color-scheme: dark"));
    assert!(page.contains("a &lt;model&gt;") && page.contains("a &lt;CPU&gt;"));
    for word in ["http", "src=", "href=", "@import", "url(", "<script", "{{", "<model>"] {
        assert!(!page.contains(word), "{word}");
    }
    let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
    assert_eq!(json["rows"][2]["chosen"], FAST);
    assert_eq!(json["problems"][0]["intervals"][1]["provenance"], "measured");
    assert_eq!(json["problems"][0]["intervals"][1]["us"], 50.0);
    let empty = TuningReport::new("none", &device(2), &[]).page();
    assert!(!empty.contains("<svg") && empty.contains("unknown"));
}
