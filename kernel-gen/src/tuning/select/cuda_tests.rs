//! Selection from planted records of a GPU, and what a build makes of the lock.

use super::*;
use crate::cuda::plan::{Options as PlanOptions, Plan, plan_with};
use crate::cuda::{Arch, KvType, Regime, Spec, Variant};
use crate::plan::Provenance;
use crate::spec::{LinearRole, ModelShape};
use crate::tuning::certificate::tests::certificate;
use crate::tuning::device::{CudaDevice, Device};
use crate::tuning::record::{
    Case, Failure, Outcome, Problem as Measured, Time, VERSION, Variant as Recorded,
};

const TOOLKIT: &str = "13.0.88";

fn shape() -> ModelShape {
    crate::presets::shape("llama-3.1-8b-awq", &[]).unwrap()
}

fn qkv() -> Spec {
    shape().cuda_linear(LinearRole::Qkv).unwrap()
}

fn default(regime: Regime) -> Variant {
    qkv().variant(regime, Arch::Sm90a)
}

/// The `idx`th candidate that is not the default.
fn candidate(regime: Regime, idx: usize) -> Variant {
    let all = qkv().candidates(regime, Arch::Sm90a).into_iter();
    all.filter(|one| !one.is_default()).nth(idx).unwrap()
}

fn hash(variant: &Variant, toolkit: &str) -> String {
    cuda::compile::source_hash(&cuda::render::render(variant).unwrap(), toolkit)
}

fn record(variant: &Variant, case: Case, outcome: Outcome) -> Record {
    Record {
        v: VERSION,
        problem: Measured { spec: variant.spec_name(), target: "sm_90a".to_string(), case },
        device: Device::Cuda(CudaDevice::new("sm_90a", 132, 80 << 30, "a GPU")),
        variant: Recorded {
            symbol: variant.symbol(),
            source_hash: hash(variant, TOOLKIT),
            compiler: cuda::compiler_name(TOOLKIT),
            code_bytes: 30_000,
        },
        outcome,
        measured_at: 0,
    }
}

fn time(variant: &Variant, case: Case, default: &Variant, vs_default: f64) -> Record {
    let us = 20.0 * vs_default;
    record(
        variant,
        case,
        Outcome::Time(Time {
            mode: "graph".to_string(),
            cache: "cold".to_string(),
            us: [us, us, us],
            num_samples: 20,
            default: default.symbol(),
            vs_default,
            noise: 0.005,
            limit_us: Some(10.0),
        }),
    )
}

fn certified(variant: &Variant) -> Record {
    let mut certificate = certificate(&variant.symbol(), &hash(variant, TOOLKIT));
    certificate.compiler = cuda::compiler_name(TOOLKIT);
    record(variant, Case::All, Outcome::Certificate(certificate))
}

/// Times of a kernel at row counts, and its certificate.
fn times(variant: &Variant, ratios: &[(usize, f64)]) -> Vec<Record> {
    let regime = |rows: usize| default(Regime::of_rows(rows));
    let time =
        |(rows, ratio): &(usize, f64)| time(variant, Case::Rows(*rows), &regime(*rows), *ratio);
    ratios.iter().map(time).chain([certified(variant)]).collect()
}

/// Of every regime's default, of a faster one for up to 8 rows, and of one for many.
fn records() -> Vec<Record> {
    let rows = [vec![1, 4, 8], vec![16], vec![32], vec![64], vec![128, 512]];
    let mut all = Vec::new();
    for (regime, rows) in Regime::MATMUL.into_iter().zip(&rows) {
        let ratios: Vec<(usize, f64)> = rows.iter().map(|rows| (*rows, 1.0)).collect();
        all.extend(times(&default(regime), &ratios));
    }
    all.extend(times(&candidate(Regime::UpTo(8), 0), &[(1, 0.8), (4, 0.8), (8, 0.9)]));
    all.extend(times(&candidate(Regime::Many, 0), &[(128, 0.9), (512, 0.85)]));
    all
}

fn selected(records: &[Record]) -> Selection {
    let hashes = hashes_of(records).unwrap();
    let selection = select(records, &hashes, &Options::default()).unwrap();
    let text = selection.lock.print();
    assert_eq!(Lock::parse(&text).unwrap(), selection.lock);
    selection
}

fn planned(lock: &Lock, toolkit: &str) -> Result<Plan, String> {
    let options = PlanOptions { lock: Some(lock), toolkit: Some(toolkit), tuner: &[] };
    let plan = plan_with(&[shape()], &[Arch::Sm80, Arch::Sm90a], &options);
    plan.map_err(|error| error.to_string())
}

#[test]
fn measured_kernels_are_locked_and_served() {
    let selection = selected(&records());
    let [problem] = &selection.lock.problems[..] else { panic!("{:?}", selection.lock) };
    assert_eq!(problem.device, "sm_90a-sms-132-mem-80");
    let (few, many) = (candidate(Regime::UpTo(8), 0), candidate(Regime::Many, 0));
    let plan = planned(&selection.lock, TOOLKIT).unwrap();
    assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
    let [serving] = &plan.servings[..] else { panic!("{:?}", plan.servings) };
    assert_eq!((serving.spec, serving.arch), (qkv(), Arch::Sm90a));
    assert_eq!(serving.device.as_deref(), Some("sm_90a-sms-132-mem-80"));
    for (rows, expected) in [(1, few), (8, few), (16, default(Regime::UpTo(16))), (4000, many)] {
        let interval = serving.interval(rows);
        assert_eq!(interval.variant, expected, "{rows} rows");
        assert_eq!(interval.provenance, Provenance::Measured);
    }
    assert!(plan.variants.contains(&few) && plan.variants.contains(&many));
    assert!(plan.variants.contains(&default(Regime::UpTo(8))), "other devices have the default");
}

#[test]
fn kernels_serve_rows_of_their_regime_alone() {
    let few = candidate(Regime::UpTo(8), 0);
    let mut all = records();
    all.push(time(&few, Case::Rows(16), &default(Regime::UpTo(16)), 0.1));
    let selection = selected(&all);
    let problem = &selection.lock.problems[0];
    assert_eq!(problem.interval(16).unwrap().symbol, default(Regime::UpTo(16)).symbol());
    assert_eq!(selection.unused["a case that the kernel does not serve"], 1);
}

#[test]
fn attention_is_decided_for_decoding_and_for_prompts() {
    let spec = shape().cuda_paged_attention(KvType::Rows);
    let of = |regime| spec.variant(regime, Arch::Sm90a);
    let other = |regime| {
        let mut all = spec.candidates(regime, Arch::Sm90a).into_iter();
        all.find(|one| !one.is_default()).unwrap()
    };
    let (decode, prompts) = (other(Regime::Decode), of(Regime::Prefill));
    let case = Case::Decode { num_sequences: 8, context_len: 2048 };
    let records = [
        time(&of(Regime::Decode), case, &of(Regime::Decode), 1.0),
        time(&decode, case, &of(Regime::Decode), 0.7),
        time(&prompts, Case::Prefill(512), &prompts, 1.0),
        certified(&of(Regime::Decode)),
        certified(&decode),
        certified(&prompts),
    ];
    let selection = selected(&records);
    let plan = planned(&selection.lock, TOOLKIT).unwrap();
    assert_eq!(plan.servings[0].interval(1).variant, decode);
    assert_eq!(plan.servings[0].interval(700).variant, prompts);
}

#[test]
fn kernels_that_cannot_be_trusted_are_not_chosen() {
    let few = candidate(Regime::UpTo(8), 0);
    let check = |change: &dyn Fn(&mut Vec<Record>), reason: &str| {
        let mut all = records();
        change(&mut all);
        let selection = selected(&all);
        let intervals = &selection.lock.problems[0].intervals;
        assert!(intervals.iter().all(|one| one.symbol != few.symbol()), "{reason}");
        let found = &selection.decisions[0].rejected[&few.symbol()];
        assert!(found.contains(reason), "{found}");
    };
    let is_few = |record: &Record| record.variant.symbol == few.symbol();
    check(&|all| all.retain(|one| !is_few(one) || one.time().is_some()), "uncertified");
    let with_hash = |all: &mut Vec<Record>, hash: &str| {
        for record in all.iter_mut().filter(|one| is_few(one)) {
            record.variant.source_hash = hash.to_string();
        }
    };
    check(&|all| with_hash(all, "0123"), "another source");
    // The hash is of the compiler too, so that another's is no other kernel's.
    check(&|all| with_hash(all, &hash(&few, "12.8.93")), "another source");
    let failure = Failure { reason: "mismatch".to_string(), message: "V4".to_string() };
    let failed = record(&few, Case::All, Outcome::Failure(failure));
    check(&|all| all.push(failed.clone()), "mismatch");
}

#[test]
fn a_stale_lock_warns_and_a_wrong_one_is_refused() {
    let lock = selected(&records()).lock;
    let few = candidate(Regime::UpTo(8), 0).symbol();
    let mut planted = lock.clone();
    let variant = planted.certificates.iter_mut().find(|one| one.symbol == few).unwrap();
    variant.source_hash = "0123".to_string();
    for (lock, toolkit) in [(&planted, TOOLKIT), (&lock, "13.1.0")] {
        let plan = planned(lock, toolkit).unwrap();
        let [warning] = &plan.warnings[..] else { panic!("{:?}", plan.warnings) };
        assert!(warning.contains(&qkv().name()), "{warning}");
        assert!(plan.servings.is_empty() && plan.variants.iter().all(Variant::is_default));
    }
    let mut uncertified = lock.clone();
    uncertified.certificates.retain(|one| one.symbol != few);
    let error = planned(&uncertified, TOOLKIT).unwrap_err();
    assert!(error.contains("no certificate") && error.contains(&few), "{error}");
    let with = |change: &dyn Fn(&mut LockedProblem)| {
        let mut lock = lock.clone();
        change(&mut lock.problems[0]);
        planned(&lock, TOOLKIT).unwrap_err()
    };
    let foreign = few.replace("sm_90a", "sm_80");
    assert!(with(&|one| one.intervals[0].symbol = foreign.clone()).contains("something else"));
    assert!(with(&|one| one.intervals[0].symbol.push('x')).contains("no kernel"));
    assert!(with(&|one| one.intervals[0].rows_max = Some(9)).contains("does not serve"));
    assert!(with(&|one| one.intervals[0].provenance = "guessed".into()).contains("guessed"));
}

#[test]
fn what_a_lock_says_of_other_gpus_and_models_is_left_alone() {
    let lock = selected(&records()).lock;
    let options = PlanOptions { lock: Some(&lock), toolkit: Some(TOOLKIT), tuner: &[] };
    let plan = plan_with(&[shape()], &[Arch::Sm80], &options).unwrap();
    assert!(plan.servings.is_empty() && plan.warnings.is_empty());
    let other = crate::presets::shape("smollm2-135m", &[]).unwrap();
    let plan = plan_with(&[other], &[Arch::Sm90a], &options).unwrap();
    assert!(plan.servings.is_empty());
    // CPU plans know no GPU.
    let cpu = crate::plan::PlanOptions { lock: Some(&lock), tuner: None };
    let plan = crate::plan::plan(&[shape()], &crate::target::Target::ALL, &cpu).unwrap();
    assert!(plan.lock.problems.is_empty() && plan.warnings.is_empty());
}

#[test]
fn the_coverage_of_a_gpu_is_that_of_its_lock() {
    let lock = selected(&records()).lock;
    let covered = |device: &str| {
        let run =
            cuda::coverage::Run { kv: KvType::Rows, arch: Arch::Sm90a, device: device.to_string() };
        let all = cuda::coverage::coverage(&shape(), &lock, &run).unwrap();
        all.into_iter().find(|one| one.spec == qkv()).unwrap().explanations
    };
    let here = covered("sm_90a-sms-132-mem-80");
    assert!(here.iter().all(|one| one.provenance == "measured" && one.us > Some(0.0)));
    let near = covered("sm_90a-sms-114-mem-80");
    assert!(near.iter().all(|one| one.provenance == "transferred"), "{near:?}");
    let elsewhere = covered("sm_120-sms-170-mem-32");
    assert!(elsewhere.iter().all(|one| one.provenance == "default" && one.us.is_none()));
}
