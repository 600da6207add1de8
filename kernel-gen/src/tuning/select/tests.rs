//! Selection from planted records.

use proptest::prelude::*;

use super::*;
use crate::tuning::certificate::tests::certificate;
use crate::tuning::device::{CpuDevice, Device};
use crate::tuning::record::{Case, Failure, Outcome, Problem as Measured, Time, VERSION, Variant};

const SPEC: &str = "awq_gemm_n960_k576_g64_int8";
const ATTENTION: &str = "paged_attention_h9_v3_d64_w0_p32_f32";
const KEY: &str = "avx512-amd-25-17-l2-1024-l3-32768-t2";

/// A name for tests: the `idx`th candidate of a regime.
fn candidate(regime: &str, idx: usize) -> String {
    let default = format!("{SPEC}_{regime}__avx512");
    let KernelVariant { spec, regime, target, config } = KernelVariant::parse(&default).unwrap();
    let all = crate::config::KernelConfig::candidates(&spec, regime, target);
    let others = all.into_iter().filter(|other| *other != config && other.cols == config.cols);
    let other = others.into_iter().nth(idx).unwrap();
    KernelVariant { spec, regime, target, config: other }.symbol()
}

fn record(symbol: &str, case: Case, outcome: Outcome) -> Record {
    let (spec, target) = symbol.rsplit_once("__").unwrap();
    let spec = [SPEC, ATTENTION].into_iter().find(|name| spec.starts_with(name)).unwrap();
    Record {
        v: VERSION,
        problem: Measured { spec: spec.to_string(), target: target.to_string(), case },
        device: Device::Cpu(CpuDevice::parse_key(KEY).unwrap()),
        variant: Variant {
            symbol: symbol.to_string(),
            source_hash: hash(symbol),
            compiler: "rustc 1.89.0".to_string(),
            code_bytes: 1000,
        },
        outcome,
        measured_at: 0,
    }
}

fn hash(symbol: &str) -> String {
    source_hashes([symbol]).unwrap()[symbol].clone()
}

fn time(symbol: &str, rows: usize, vs_default: f64) -> Record {
    let regime = ["one", "few", "many"][usize::from(rows > 1) + usize::from(rows > 8)];
    raced(symbol, Case::Rows(rows), vs_default, &format!("{SPEC}_{regime}__avx512"))
}

fn raced(symbol: &str, case: Case, vs_default: f64, default: &str) -> Record {
    let us = 100.0 * vs_default;
    record(
        symbol,
        case,
        Outcome::Time(Time {
            mode: "backend".to_string(),
            cache: "cold".to_string(),
            us: [us * 0.9, us, us * 1.1],
            num_samples: 20,
            default: default.to_string(),
            vs_default,
            noise: 0.01,
            limit_us: Some(50.0),
        }),
    )
}

fn certified(symbol: &str) -> Record {
    let certificate = certificate(symbol, &hash(symbol));
    record(symbol, Case::All, Outcome::Certificate(certificate))
}

fn select_all(records: &[Record], options: &Options) -> Selection {
    let symbols = records.iter().map(|record| &*record.variant.symbol);
    let hashes = source_hashes(symbols).unwrap();
    let selection = select(records, &hashes, options).unwrap();
    // Whatever is chosen, a build can read.
    let text = selection.lock.print();
    assert_eq!(Lock::parse(&text).unwrap(), selection.lock);
    selection
}

/// Times of a kernel at row counts, and its certificate.
fn times(symbol: &str, ratios: &[(usize, f64)]) -> Vec<Record> {
    let times = ratios.iter().map(|(rows, ratio)| time(symbol, *rows, *ratio));
    times.chain([certified(symbol)]).collect()
}

fn defaults() -> Vec<Record> {
    let default = |regime: &str| format!("{SPEC}_{regime}__avx512");
    [
        times(&default("one"), &[(1, 1.0)]),
        times(&default("few"), &[(2, 1.0), (4, 1.0), (8, 1.0)]),
        times(&default("many"), &[(16, 1.0), (64, 1.0), (512, 1.0)]),
    ]
    .concat()
}

fn served(selection: &Selection) -> Vec<(Option<usize>, &str)> {
    let intervals = &selection.lock.problems[0].intervals;
    intervals.iter().map(|one| (one.rows_max, &*one.symbol)).collect()
}

#[test]
fn faster_kernels_serve_the_rows_they_are_faster_at() {
    let (few, many) = (candidate("few", 0), candidate("many", 0));
    let one = format!("{SPEC}_one__avx512");
    let mut records = defaults();
    records.extend(times(&few, &[(2, 0.8), (4, 0.7), (8, 0.7), (16, 0.6), (64, 1.2)]));
    records.extend(times(&many, &[(16, 0.8), (64, 0.8), (512, 0.7)]));
    let selection = select_all(&records, &Options::default());
    assert_eq!(served(&selection), [(Some(1), &*one), (Some(16), &*few), (None, &*many)]);
    let interval = &selection.lock.problems[0].intervals[1];
    assert_eq!((interval.us, interval.default_us), (70.0, 100.0));
    assert_eq!(interval.provenance, "measured");
    let names: Vec<&String> = selection.lock.certificates.iter().map(|one| &one.symbol).collect();
    assert_eq!(names.len(), 3);
    assert!(names.is_sorted());
    let text = crate::tuning::explain::print(&selection.decisions[0], Some("rows 16"));
    assert!(text.contains(&few) && text.contains("rows 16") && !text.contains("rows 64"), "{text}");
}

#[test]
fn small_gains_and_wide_noise_leave_the_default() {
    let few = candidate("few", 0);
    let with = |ratio: f64, noise: f64| {
        let mut records = defaults();
        records.extend(times(&few, &[(2, ratio), (4, ratio), (8, ratio)]));
        for record in &mut records {
            if let Outcome::Time(time) = &mut record.outcome {
                time.noise = noise;
            }
        }
        let selection = select_all(&records, &Options::default());
        served(&selection).iter().any(|(_, symbol)| *symbol == few)
    };
    assert!(!with(0.98, 0.001), "2 % are not enough");
    assert!(with(0.96, 0.001));
    assert!(!with(0.96, 0.03), "4 % are less than twice the noise");
    assert!(with(0.9, 0.03));
}

#[test]
fn no_row_count_becomes_slower() {
    let few = candidate("few", 0);
    let mut records = defaults();
    records.extend(times(&few, &[(2, 0.5), (4, 1.1), (8, 0.5)]));
    let selection = select_all(&records, &Options::default());
    let default = format!("{SPEC}_few__avx512");
    let symbols: Vec<&str> = served(&selection).iter().map(|(_, symbol)| *symbol).collect();
    assert_eq!(symbols[1..4], [&*few, &*default, &*few]);
}

#[test]
fn kernels_that_cannot_be_trusted_are_not_chosen() {
    let few = candidate("few", 0);
    let fast = times(&few, &[(2, 0.5), (4, 0.5), (8, 0.5)]);
    let check = |mut fast: Vec<Record>, reason: &str| {
        let mut records = defaults();
        records.append(&mut fast);
        let selection = select_all(&records, &Options::default());
        assert!(served(&selection).iter().all(|(_, symbol)| *symbol != few), "{reason}");
        let found = &selection.decisions[0].rejected[&few];
        assert!(found.contains(reason), "{found}");
    };
    check(fast[..3].to_vec(), "uncertified");
    let stale = fast.iter().cloned().map(|mut record| {
        record.variant.source_hash = "0".repeat(32);
        record
    });
    check(stale.collect(), "another source");
    let mut older = fast.clone();
    for record in &mut older[..3] {
        record.variant.compiler = "rustc 1.9.0".to_string();
    }
    check(older, "another compiler");
    let mut incomplete = fast.clone();
    if let Outcome::Certificate(certificate) = &mut incomplete[3].outcome {
        certificate.levels.pop();
    }
    check(incomplete, "V4");
    let failure = Failure { reason: "mismatch".to_string(), message: "case 12".to_string() };
    let failed = record(&few, Case::All, Outcome::Failure(failure));
    check([fast, vec![failed]].concat(), "mismatch");
}

#[test]
fn budgets_are_kept() {
    let (few, many) = (candidate("few", 0), candidate("many", 0));
    let mut records = defaults();
    records.extend(times(&few, &[(2, 0.8), (4, 0.8), (8, 0.8)]));
    records.extend(times(&many, &[(16, 0.5), (64, 0.5), (512, 0.5)]));
    let symbols = |options: &Options| -> Vec<String> {
        let selection = select_all(&records, options);
        let all = served(&selection).iter().map(|(_, symbol)| symbol.to_string()).collect();
        let bytes = |budget: Option<usize>| Options { kernel_bytes_max: budget, ..options.clone() };
        let limited = select_all(&records, &bytes(Some(1000)));
        assert_eq!(limited.frontier.iter().map(|row| row.0).max(), Some(2000));
        assert!(served(&limited).iter().all(|(_, symbol)| *symbol != few));
        assert!(served(&limited).iter().any(|(_, symbol)| *symbol == many));
        let nothing = select_all(&records, &bytes(Some(999)));
        assert!(served(&nothing).iter().all(|(_, symbol)| *symbol != many));
        all
    };
    let all = symbols(&Options::default());
    assert!(all.contains(&few) && all.contains(&many));
    let options = Options { variants_max: 1, ..Options::default() };
    let selection = select_all(&records, &options);
    assert!(served(&selection).iter().all(|(_, symbol)| *symbol != few));
}

#[test]
fn traces_weigh_row_counts() {
    let (slow, fast) = (candidate("few", 0), candidate("few", 1));
    let mut records = defaults();
    records.extend(times(&slow, &[(2, 0.5), (4, 0.9), (8, 0.9)]));
    records.extend(times(&fast, &[(2, 0.9), (4, 0.8), (8, 0.8)]));
    let check = |rows: &str, expected: &str| {
        let trace = Trace::parse(&format!("{{\"rows\": {{\"{rows}\": 1000}}}}")).unwrap();
        let options = Options { trace: Some(trace), variants_max: 1, ..Options::default() };
        let selection = select_all(&records, &options);
        assert!(served(&selection).iter().any(|(_, symbol)| *symbol == expected), "{rows}");
    };
    check("2", &slow);
    check("8", &fast);
}

#[test]
fn attention_has_one_kernel_for_decoding_and_one_for_prompts() {
    let decode = format!("{ATTENTION}_one__avx512");
    let prompts = format!("{ATTENTION}_many__avx512");
    let case = Case::Decode { num_sequences: 8, context_len: 1024 };
    let records = [raced(&decode, case, 1.0, &decode), certified(&decode)];
    let selection = select_all(&records, &Options::default());
    assert_eq!(served(&selection), [(Some(1), &*decode), (None, &*prompts)]);
    let provenances = selection.lock.problems[0].intervals.iter().map(|one| &*one.provenance);
    assert_eq!(provenances.collect::<Vec<_>>(), ["measured", "default"]);
}

#[test]
fn of_no_records_comes_an_empty_lock() {
    let selection = select_all(&[], &Options::default());
    let Lock { version, problems, certificates, .. } = selection.lock;
    assert_eq!((version, problems, certificates), (lock::VERSION, Vec::new(), Vec::new()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_order_of_records_means_nothing(
        ratios in prop::collection::vec(0.6..1.2_f64, 18),
        seed in prop::collection::vec(any::<u32>(), 64),
    ) {
        let mut records = defaults();
        for (idx, chunk) in ratios.chunks(6).enumerate() {
            let rows = [2, 4, 8, 16, 64, 512];
            let pairs: Vec<(usize, f64)> = rows.into_iter().zip(chunk.iter().copied()).collect();
            records.extend(times(&candidate("few", idx % 2), &pairs));
        }
        let text = select_all(&records, &Options::default()).lock.print();
        let mut order: Vec<usize> = (0..records.len()).collect();
        order.sort_by_key(|idx| seed[idx % 64]);
        let shuffled: Vec<Record> = order.iter().map(|idx| records[*idx].clone()).collect();
        prop_assert_eq!(select_all(&shuffled, &Options::default()).lock.print(), text);
    }
}
