//! The model against planted times.

use super::*;
use crate::config::KernelConfig;
use crate::plan;
use crate::spec::RowRegime;
use crate::target::Target;
use crate::tuning::device::{CpuDevice, Device};
use crate::tuning::record::{Outcome, Problem, Time, VERSION, Variant};

const KEY: &str = "avx512-amd-25-17-l2-1024-l3-32768-t2";
const NEAR: &str = "avx512-amd-25-17-l2-512-l3-32768-t8";
const ROWS: [usize; 6] = [1, 2, 4, 8, 32, 256];
const SPECS: [&str; 4] = [
    "awq_gemm_n960_k576_g64_int8",
    "awq_gemm_n576_k576_g64_int8",
    "awq_gemm_n3072_k576_g64_int8",
    "awq_gemm_n576_k1536_g64_int8",
];

/// What the planted machine takes: prefetching helps few rows, blocks that are not full cost, and
/// streaming many rows costs.
fn true_cost(variant: &KernelVariant, rows: usize) -> f64 {
    let KernelConfig { rows: block, prefetch, tiles, .. } = variant.config;
    let padded = rows.next_multiple_of(block) as f64;
    let passes = if variant.regime == RowRegime::Many { 4.0 } else { padded / block as f64 };
    let fetched = if prefetch > 0 { 1.0 } else { 1.0 + 0.4 / rows as f64 };
    (padded + passes) * fetched * (1.0 + 0.1 / tiles as f64)
}

fn true_ratio(variant: &KernelVariant, rows: usize) -> f64 {
    let default = default_at(&variant.spec, variant, rows).unwrap();
    true_cost(variant, rows) / true_cost(&default, rows)
}

/// Times of every fourth candidate of a spec, with an error of up to 2 % either way.
fn records(spec: &str, key: &str) -> Vec<Record> {
    let spec = crate::name::parse_spec(spec).unwrap();
    let device = Device::Cpu(CpuDevice::parse_key(key).unwrap());
    let mut all = Vec::new();
    for (idx, variant) in plan::candidates(&spec, Target::Avx512).iter().enumerate() {
        for (place, rows) in ROWS.into_iter().enumerate() {
            let serves = variant.regime != RowRegime::One || rows == 1;
            let default = default_at(&spec, variant, rows).unwrap();
            if !serves || (*variant != default && !(idx + place).is_multiple_of(4)) {
                continue;
            }
            let error = ((idx * 7 + place * 3) % 5) as f64 / 100.0 - 0.02;
            all.push(record(variant, &default, rows, device.clone(), error));
        }
    }
    all
}

fn record(
    variant: &KernelVariant,
    default: &KernelVariant,
    rows: usize,
    device: Device,
    error: f64,
) -> Record {
    let is_default = variant == default;
    let vs_default = if is_default { 1.0 } else { true_ratio(variant, rows) * (1.0 + error) };
    let us = 10.0 * vs_default;
    Record {
        v: VERSION,
        problem: Problem {
            spec: crate::name::spec_name(&variant.spec),
            target: variant.target.name().to_string(),
            case: Case::Rows(rows),
        },
        device,
        variant: Variant {
            symbol: variant.symbol(),
            source_hash: "1".to_string(),
            compiler: "rustc 1.89.0".to_string(),
            code_bytes: 1000,
        },
        outcome: Outcome::Time(Time {
            mode: "backend".to_string(),
            cache: "cold".to_string(),
            us: [us, us, us],
            num_samples: 20,
            default: default.symbol(),
            vs_default,
            noise: 0.01,
            limit_us: Some((rows as f64 / 16.0).max(1.0)),
        }),
        measured_at: 0,
    }
}

fn all_records() -> Vec<Record> {
    SPECS.into_iter().flat_map(|spec| records(spec, KEY)).collect()
}

/// The true ratio of the kernel that is predicted to be fastest, over that of the fastest.
fn regret(model: &CostModel, spec: &str, rows: usize) -> f64 {
    let spec = crate::name::parse_spec(spec).unwrap();
    let all = plan::candidates(&spec, Target::Avx512);
    let serving = || all.iter().filter(|variant| variant.regime != RowRegime::One || rows == 1);
    let predicted = |variant: &KernelVariant| model.predict(variant, rows).unwrap();
    let picked = serving().min_by(|a, b| predicted(a).total_cmp(&predicted(b))).unwrap();
    let fastest = serving().map(|one| true_ratio(one, rows)).fold(f64::INFINITY, f64::min);
    true_ratio(picked, rows) / fastest - 1.0
}

#[test]
fn a_problem_that_was_not_measured_is_predicted() {
    let (unseen, seen) = SPECS.split_last().unwrap();
    let records: Vec<Record> = seen.iter().flat_map(|spec| records(spec, KEY)).collect();
    let model = CostModel::fit(&records, KEY);
    let default: f64 = ROWS.iter().map(|rows| default_regret(unseen, *rows)).sum();
    let predicted: f64 = ROWS.iter().map(|rows| regret(&model, unseen, *rows)).sum();
    assert!(predicted < 0.25 * default, "{predicted} {default}");
    for rows in ROWS {
        let found = regret(&model, unseen, rows);
        assert!(found < 0.08, "rows {rows}: {found}");
    }
}

fn default_regret(spec: &str, rows: usize) -> f64 {
    let spec = crate::name::parse_spec(spec).unwrap();
    let all = plan::candidates(&spec, Target::Avx512);
    let serving = all.iter().filter(|variant| variant.regime != RowRegime::One || rows == 1);
    1.0 / serving.map(|one| true_ratio(one, rows)).fold(1.0, f64::min) - 1.0
}

#[test]
fn the_default_is_predicted_to_take_its_own_time() {
    let model = CostModel::fit(&all_records(), KEY);
    for rows in [1, 3, 8, 9, 100, 5000] {
        let spec = crate::name::parse_spec("awq_gemm_n64_k64_g64_int8").unwrap();
        let serving = Serving::default_for(&spec, Target::Avx512);
        let default = serving.intervals.iter().find(|one| rows <= one.rows_max).unwrap().variant;
        assert_eq!(model.predict(&default, rows), Some(1.0));
    }
}

#[test]
fn the_order_of_records_means_nothing() {
    let mut records = all_records();
    // Measured twice, differently.
    records.extend(self::records(SPECS[0], KEY).into_iter().map(|mut record| {
        if let Outcome::Time(time) = &mut record.outcome {
            time.noise = 0.05;
        }
        record
    }));
    let model = CostModel::fit(&records, KEY);
    records.reverse();
    assert_eq!(CostModel::fit(&records, KEY), model);
}

#[test]
fn what_nothing_is_known_about_is_not_predicted() {
    let model = CostModel::fit(&all_records(), KEY);
    let parse = |symbol: &str| KernelVariant::parse(symbol).unwrap();
    for (symbol, expected) in [
        ("awq_gemm_n64_k64_g64_int8_few__avx512", true),
        ("awq_gemm_n64_k64_g64_float_few__avx512", false),
        ("awq_gemm_n64_k64_g64_int8_few__x86_64_v3", false),
        ("gemm_n64_k64_i8_few__avx512", false),
        ("sample_v64__avx512", false),
    ] {
        assert_eq!(model.predict(&parse(symbol), 4).is_some(), expected, "{symbol}");
    }
    assert_eq!(CostModel::fit(&Vec::new(), KEY), CostModel::default());
    let few: Vec<Record> = all_records().into_iter().take(NUM_TIMES_MIN).collect();
    let variant = parse("awq_gemm_n64_k64_g64_int8_few__avx512");
    assert_eq!(CostModel::fit(&few, KEY).predict(&variant, 4), None, "some are the defaults'");
    let stranger = "avx512-intel-6-143-l2-2048-l3-32768-t2";
    assert_eq!(CostModel::fit(&all_records(), stranger), CostModel::default());
    assert_eq!(CostModel::fit(&all_records(), NEAR), model);
}

#[test]
fn few_problems_ground_nothing() {
    let other = "awq_gemm_n64_k64_g64_int8";
    let grounded = |specs: &[&str], regime: &str, rows: usize, spec: &str| {
        let symbol = format!("{other}_{regime}__avx512");
        let records: Vec<Record> = specs.iter().flat_map(|spec| records(spec, KEY)).collect();
        let variant = KernelVariant::parse(&symbol).unwrap();
        CostModel::fit(&records, KEY).is_grounded(&variant, rows, spec)
    };
    assert!(grounded(&SPECS[..3], "few", 4, other));
    assert!(grounded(&SPECS[..3], "few", 100, other), "between two row counts");
    assert!(!grounded(&SPECS[..3], "few", 257, other), "beyond the last");
    assert!(!grounded(&SPECS[..3], "one", 2, other), "no kernel for one row was");
    assert!(!grounded(&SPECS[..2], "few", 4, other));
    assert!(!grounded(&SPECS[..3], "few", 4, SPECS[0]), "its own times are no other problem's");
}

#[test]
fn regret_is_that_of_problems_left_out() {
    let mut all = all_records();
    let [scored] = &held_out(&all, KEY)[..] else { panic!("one class") };
    assert_eq!((&*scored.class, scored.num_problems), ("awq_gemm_int8.avx512", 4));
    let scores = scored.scores.clone().unwrap();
    assert!(scores.mean_regret < 0.25 * scores.default_regret, "{scores:?}");
    assert!(scores.rank_correlation > 0.8, "{scores:?}");
    assert!(scores.error < 0.15, "{scores:?}");
    // A problem whose kernels behave in another way is held against the model.
    for record in all.iter_mut().filter(|record| record.problem.spec == SPECS[1]) {
        if let Outcome::Time(time) = &mut record.outcome {
            time.vs_default = 1.0 / time.vs_default;
        }
    }
    let worse = held_out(&all, KEY)[0].scores.clone().unwrap();
    assert!(worse.worst_case.contains(SPECS[1]), "{worse:?}");
    assert!(worse.worst_regret > 2.0 * scores.worst_regret, "{worse:?}");
    assert!(worse.error > 2.0 * scores.error, "{worse:?}");
    all.extend(records(SPECS[0], NEAR));
    assert_eq!(families(&all), [KEY.min(NEAR)]);
    let alone = held_out(&records(SPECS[0], KEY), KEY);
    assert_eq!((alone.len(), &alone[0].scores), (1, &None));
}
