//! Selection from planted records.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::target::Target;
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
    let KernelVariant { spec, target, .. } = KernelVariant::parse(symbol).unwrap();
    let (spec, target) = (crate::name::spec_name(&spec), target.name().to_string());
    Record {
        v: VERSION,
        problem: Measured { spec, target, case },
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
    static HASHES: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let mut hashes = HASHES.lock().unwrap();
    let new = || source_hashes([symbol]).unwrap()[symbol].clone();
    hashes.entry(symbol.to_string()).or_insert_with(new).clone()
}

/// What serves so many rows of a spec without a lock.
fn default_at(spec: &str, rows: usize) -> String {
    let regime = ["one", "few", "many"][usize::from(rows > 1) + usize::from(rows > 8)];
    format!("{spec}_{regime}__avx512")
}

fn time(symbol: &str, rows: usize, vs_default: f64) -> Record {
    let KernelVariant { spec, .. } = KernelVariant::parse(symbol).unwrap();
    raced(symbol, Case::Rows(rows), vs_default, &default_at(&crate::name::spec_name(&spec), rows))
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
    let hash = |record: &Record| (record.variant.symbol.clone(), hash(&record.variant.symbol));
    let hashes: BTreeMap<String, String> = records.iter().map(hash).collect();
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

/// The record of another spec, as if measured there.
fn of_spec(record: &Record, spec: &str) -> Record {
    let symbol = |text: &str| text.replace(SPEC, spec);
    let mut record = record.clone();
    record.variant.symbol = symbol(&record.variant.symbol);
    record.variant.source_hash = hash(&record.variant.symbol);
    record.problem.spec = spec.to_string();
    match &mut record.outcome {
        Outcome::Time(time) => time.default = symbol(&time.default),
        Outcome::Certificate(found) => {
            *found = certificate(&record.variant.symbol, &record.variant.source_hash);
        }
        Outcome::Failure(_) => {}
    }
    record
}

fn of_device(mut record: Record, key: &str) -> Record {
    record.device = Device::Cpu(CpuDevice::parse_key(key).unwrap());
    if let Outcome::Certificate(certificate) = &mut record.outcome {
        certificate.device = key.to_string();
    }
    record
}

/// Problems in which the same kernels are faster: some of few rows and one of many.
fn three_problems() -> Vec<Record> {
    let mut one = defaults();
    for idx in 0..16 {
        let symbol = candidate("few", idx);
        let config = KernelVariant::parse(&symbol).unwrap().config;
        let ratio = if config.prefetch == 0 { 0.6 } else { 1.1 } + 0.002 * idx as f64;
        one.extend(times(&symbol, &[(2, ratio), (4, ratio), (8, ratio)]));
    }
    let specs = [SPEC, "awq_gemm_n576_k576_g64_int8", "awq_gemm_n1536_k576_g64_int8"];
    specs.iter().flat_map(|spec| one.iter().map(|record| of_spec(record, spec))).collect()
}

const UNMEASURED: &str = "awq_gemm_n768_k576_g64_int8";

/// Certificates of a problem that was not measured.
fn certificates(records: &[Record]) -> Vec<Record> {
    let own = records.iter().filter(|one| one.problem.spec == SPEC && one.certificate().is_some());
    own.map(|record| of_spec(record, UNMEASURED)).collect()
}

fn predicted(records: &[Record]) -> Option<LockedProblem> {
    let lock = select_all(records, &Options::default()).lock;
    lock.problem(UNMEASURED, "avx512", KEY).cloned()
}

#[test]
fn certified_kernels_without_times_are_predicted() {
    let mut records = three_problems();
    records.extend(certificates(&records));
    let found = predicted(&records).expect("a problem");
    let provenances: Vec<&str> = found.intervals.iter().map(|one| &*one.provenance).collect();
    assert_eq!(provenances, ["default", "model", "default"]);
    let chosen = &found.intervals[1];
    let config = KernelVariant::parse(&chosen.symbol).unwrap().config;
    assert_eq!((config.prefetch, chosen.rows_max, chosen.us), (0, Some(8), 0.0));
    let lock = select_all(&records, &Options::default()).lock;
    let shape = crate::presets::shape("smollm2-135m-awq", &[]).unwrap();
    let options = crate::plan::PlanOptions { lock: Some(&lock), tuner: None };
    crate::plan::plan(&[shape], &[Target::Avx512], &options).expect("a build can follow it");
    let selection = select_all(&records, &Options::default());
    let decision = selection.decisions.iter().find(|one| one.spec == UNMEASURED).unwrap();
    let text = crate::tuning::explain::print(decision, Some("rows 4"));
    assert!(text.contains("predicted") && text.contains(&chosen.symbol), "{text}");
}

#[test]
fn predictions_need_certificates_problems_and_a_gain_beyond_their_error() {
    let three = three_problems();
    let certificates = certificates(&three);
    assert_eq!(predicted(&three), None, "no certificate");
    let is_bad = |record: &&Record| {
        let config = KernelVariant::parse(&record.variant.symbol).unwrap().config;
        config.prefetch > 0 || KernelVariant::parse(&record.variant.symbol).unwrap().is_default()
    };
    let slow = certificates.iter().filter(is_bad).cloned();
    assert_eq!(predicted(&[three.clone(), slow.collect()].concat()), None, "none is faster");
    let of_two = three.iter().filter(|record| !record.problem.spec.contains("n1536"));
    let two = of_two.cloned().chain(certificates.clone()).collect::<Vec<Record>>();
    assert_eq!(predicted(&two), None, "two problems are too few");
    // Each problem has another order: what holds of two is wrong about the third.
    let mut erratic = three.clone();
    for (idx, record) in erratic.iter_mut().enumerate() {
        if let Outcome::Time(time) = &mut record.outcome
            && time.default != record.variant.symbol
        {
            time.vs_default = if idx * 7919 % 64 < 32 { 0.4 } else { 1.2 };
        }
    }
    erratic.extend(certificates.clone());
    assert_eq!(predicted(&erratic), None, "the model is wrong about problems left out");
    // Measured on a device of the family: that is nearer than a prediction.
    let near = "avx512-amd-25-17-l2-1024-l3-32768-t8";
    let measured = three.iter().filter(|record| record.problem.spec == SPEC);
    let measured = measured.map(|record| of_device(of_spec(record, UNMEASURED), near));
    let all = [three.clone(), certificates.clone(), measured.collect()].concat();
    assert_eq!(predicted(&all), None, "transferred");
    assert!(predicted(&[three, certificates].concat()).is_some());
}

#[test]
fn ties_go_to_what_another_device_has() {
    let (first, second) = (candidate("few", 0), candidate("few", 1));
    let near = "avx512-amd-25-17-l2-1024-l3-32768-t8";
    let rows = [2, 4, 8];
    let with = |own: f64| {
        let mut here = defaults();
        here.extend(times(&first, &rows.map(|rows| (rows, own))));
        here.extend(times(&second, &rows.map(|rows| (rows, 0.8))));
        let mut there = defaults();
        there.extend(times(&first, &rows.map(|rows| (rows, 1.2))));
        there.extend(times(&second, &rows.map(|rows| (rows, 0.8))));
        // NOTE: by key, the other device is decided first or last; so it is both.
        let other = |key: &'static str| there.iter().map(move |one| of_device(one.clone(), key));
        let before = "avx512-amd-25-17-l2-1024-l3-32768-t1";
        let all: Vec<Record> = here.into_iter().chain(other(near)).chain(other(before)).collect();
        let lock = select_all(&all, &Options::default()).lock;
        let problem = lock.problem(SPEC, "avx512", KEY).unwrap();
        problem.interval(4).unwrap().symbol.clone()
    };
    assert!(first < second, "first in canonical order");
    assert_eq!(with(0.8), second, "a tie");
    assert_eq!(with(0.6), first);
}

/// Random numbers from a seed (SplitMix64, Steele and others 2014).
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ (word >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// About normal: of a mean of 0 and a deviation of 1.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
}

const GRID: [usize; 12] = [1, 2, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512];

/// True ratios of kernels: each has its own gain and slope over the row counts.
fn machine(seed: u64) -> BTreeMap<String, Vec<f64>> {
    let mut random = Random(seed);
    let center = 0.15 * random.uniform();
    let mut all = BTreeMap::new();
    for symbol in (0..14).map(|idx| candidate(if idx % 2 == 0 { "few" } else { "many" }, idx)) {
        let gain = 0.06 * random.normal() - center;
        let slope = 0.02 * random.normal();
        let ratio = |rows: &usize| {
            (gain + slope * ((*rows as f64).log2() - 4.0) + 0.01 * random.normal()).exp()
        };
        all.insert(symbol, GRID.iter().map(ratio).collect());
    }
    all
}

/// What a tuning run records of a machine: not every kernel at every row count.
fn tuned(machine: &BTreeMap<String, Vec<f64>>, noise: f64, seed: u64) -> Vec<Record> {
    let mut random = Random(seed);
    let mut records: Vec<Record> = Vec::new();
    for rows in GRID {
        records.push(time(&default_at(SPEC, rows), rows, 1.0));
    }
    for (symbol, ratios) in machine {
        records.push(certified(symbol));
        for (rows, ratio) in GRID.into_iter().zip(ratios) {
            let is_measured = random.uniform() < 0.8;
            let measured = ratio * (noise * random.normal()).exp();
            if is_measured {
                records.push(time(symbol, rows, measured));
            }
        }
    }
    for record in &mut records {
        if let Outcome::Time(time) = &mut record.outcome {
            time.noise = noise;
        }
    }
    records
}

#[test]
fn two_tunings_choose_kernels_that_are_as_fast() {
    let mut num_chosen = 0;
    for seed in 0..24 {
        let machine = machine(1000 + seed);
        let cost = |seed: u64| {
            let records = tuned(&machine, 0.01, seed);
            let selection = select_all(&records, &Options::default());
            let problem = &selection.lock.problems[0];
            let ratio = |(idx, rows): (usize, &usize)| {
                let symbol = &problem.interval(*rows).unwrap().symbol;
                machine.get(symbol).map_or(1.0, |ratios| ratios[idx])
            };
            GRID.iter().enumerate().map(ratio).sum::<f64>() / GRID.len() as f64
        };
        let (first, second) = (cost(2 * seed), cost(2 * seed + 1));
        let difference = (first / second).ln().abs();
        assert!(difference < 0.03, "machine {seed}: {first} and {second}");
        assert!(first < 1.0 + 1e-9 && second < 1.0 + 1e-9, "slower than the defaults");
        num_chosen += usize::from(first < 0.97);
    }
    assert!(num_chosen > 12, "{num_chosen} of 24 machines leave the defaults");
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
