//! `bespoke tune` on emulated CUDA: everything but the times is as on a device.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use bespoke::Error;
use bespoke::backend::cuda::device::Device as _;
use bespoke::tune::cuda::{BenchOptions, CudaSetting, CudaTuneOptions, CudaTuning, verify_all};
use bespoke::tune::ladder::Verdict;
use bespoke::tune::race::RaceOptions;
use bespoke::tune::{Cases, TakeVerdict, TuneProgress, TuneSummary};
use bespoke_kernel_gen::cuda::compile::source_hash;
use bespoke_kernel_gen::cuda::render::render;
use bespoke_kernel_gen::cuda::{Arch, Regime, Spec, Variant};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{KvDType, LinearRole, ModelShape};
use bespoke_kernel_gen::tuning::record::{Case, Outcome, Record};
use bespoke_kernel_gen::tuning::select::{self, Options};

use crate::engine::device::Emulated;

const TOOLKIT: &str = "13.0.88";

fn shape(case: &str) -> ModelShape {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden/tiny").join(case);
    ModelConfig::from_file(&folder.join("config.json")).unwrap().shape(case).unwrap()
}

fn options() -> CudaTuneOptions {
    let cases = Cases {
        linear_rows: vec![1, 9],
        other_rows: vec![3],
        decode: vec![(3, 40)],
        prefill: vec![33],
        small_rows: vec![5],
        logit_rows: 4,
    };
    let bench = BenchOptions {
        cold_bytes: 1 << 14,
        num_launches_max: 2,
        sample_seconds: 0.0,
        num_layers: 2,
    };
    let race = RaceOptions {
        warmup_rounds: 5,
        heat_rounds: 1,
        final_rounds: (5, 5),
        ..RaceOptions::default()
    };
    CudaTuneOptions { cases, bench, race }
}

/// Two candidates of the down projection for up to 8 rows.
fn candidates(shape: &ModelShape) -> Vec<Variant> {
    let spec = shape.cuda_linear(LinearRole::Down).unwrap();
    let all = spec.candidates(Regime::UpTo(8), Arch::Sm90a).into_iter();
    let found: Vec<Variant> = all.filter(|one| !one.is_default()).step_by(3).take(2).collect();
    assert_eq!(found.len(), 2);
    found
}

fn made_from(symbol: &str) -> Option<(String, usize)> {
    let source = render(&Variant::parse(symbol)?).unwrap();
    Some((source_hash(&source, TOOLKIT), 30_000))
}

/// Verdicts by symbol, of kernels of which those with a `broken` name do nothing.
fn verify(
    shape: &ModelShape,
    broken: Option<&str>,
    symbols: &[String],
    take: &mut TakeVerdict<'_>,
) -> Result<(), Error> {
    let mut begun = BTreeSet::new();
    let mut open = || {
        let device = broken.map_or_else(|| Emulated::new(3), |name| Emulated::broken(3, name));
        Ok(device.with_candidates(&candidates(shape)))
    };
    let mut begin = |symbol: &str| {
        begun.insert(symbol.to_owned());
        Ok(())
    };
    let shapes = std::slice::from_ref(shape);
    verify_all(&mut open, shapes, symbols, &mut begin, take)?;
    assert_eq!(begun.len(), symbols.len());
    Ok(())
}

/// A run on top of `known` records: all records, and how it ended.
fn tune(
    shape: &ModelShape,
    kv: KvDType,
    known: Vec<Record>,
    broken: Option<&str>,
) -> (Vec<Record>, TuneSummary) {
    let device = Emulated::new(21).with_candidates(&candidates(shape));
    let mut kept = Vec::new();
    let mut append = |record: &Record| {
        kept.push(record.line().unwrap());
        Ok(())
    };
    let setting = CudaSetting {
        device: device.info().class(),
        toolkit: TOOLKIT,
        made_from: &made_from,
        verify: &mut |symbols, take| verify(shape, broken, symbols, take),
    };
    let num_known = known.len();
    let mut tuning = CudaTuning::new(setting, known, &mut append);
    let mut refused = Vec::new();
    let progress = &mut |progress: TuneProgress<'_>| {
        if let TuneProgress::Refused { symbol, .. } = progress {
            refused.push(symbol.to_owned());
        }
    };
    let hour = Duration::from_secs(3600);
    let summary = tuning.run(device, shape, kv, &options(), hour, progress).unwrap();
    let records = tuning.into_records();
    assert_eq!(refused.len(), summary.num_failed, "{refused:?}");
    assert_eq!(kept.len() + num_known, records.len());
    (records, summary)
}

fn symbols(records: &[Record], is_of: &dyn Fn(&Record) -> bool) -> BTreeSet<String> {
    let found = records.iter().filter(|record| is_of(record));
    found.map(|record| record.variant.symbol.clone()).collect()
}

fn is_certificate(record: &Record) -> bool {
    record.certificate().is_some_and(|certificate| certificate.check().is_ok())
}

#[test]
fn matmuls_are_verified_and_raced_and_all_other_ops_are_timed() {
    let shape = shape("llama-awq-g32");
    let (records, summary) = tune(&shape, KvDType::F16, Vec::new(), None);
    let matmuls: BTreeSet<Spec> =
        LinearRole::ALL.map(|role| shape.cuda_linear(role).unwrap()).into();
    let certified = symbols(&records, &is_certificate);
    assert_eq!(certified.len(), 5 * matmuls.len() + 2);
    assert_eq!((summary.num_verified, summary.num_failed), (certified.len(), 0));
    let timed = symbols(&records, &|record| record.time().is_some());
    for candidate in candidates(&shape) {
        assert!(timed.contains(&candidate.symbol()), "{candidate}");
    }
    for op in ["embed", "rms_norm", "rope", "paged_attention", "silu_and_mul", "sample"] {
        assert!(timed.iter().any(|symbol| symbol.starts_with(op)), "{op}");
    }
    let cases: BTreeSet<Case> =
        records.iter().filter(|one| one.time().is_some()).map(|one| one.problem.case).collect();
    let decode = Case::Decode { num_sequences: 3, context_len: 40 };
    assert!(cases.contains(&decode) && cases.contains(&Case::Prefill(33)));
    for record in &records {
        assert_eq!(record.device.key(), "sm_90a-sms-3-mem-4");
        let Outcome::Time(time) = &record.outcome else { continue };
        assert!(time.limit_us.is_some() && time.vs_default > 0.0, "{record:?}");
    }
    // What came out is what `select` reads.
    let hashes = select::hashes_of(&records).unwrap();
    let selection = select::select(&records, &hashes, &Options::default()).unwrap();
    assert!(selection.unused.keys().all(|reason| reason == "dropped out early"), "{selection:?}");
    let specs: BTreeSet<&str> =
        selection.lock.problems.iter().map(|problem| problem.spec.as_str()).collect();
    assert!(matmuls.iter().all(|spec| specs.contains(spec.name().as_str())), "{specs:?}");

    // Another run measures nothing twice.
    let (again, summary) = tune(&shape, KvDType::F16, records.clone(), None);
    let num_times = records.iter().filter(|record| record.time().is_some()).count();
    assert_eq!((summary.num_verified, summary.num_known), (0, num_times));
    let is_candidate = |record: &&Record| {
        let all = candidates(&shape);
        all.iter().any(|one| one.symbol() == record.variant.symbol) && record.time().is_some()
    };
    let count = |records: &[Record]| records.iter().filter(is_candidate).count();
    assert_eq!(count(&again), count(&records));
}

#[test]
fn a_kernel_that_does_nothing_is_refused_and_never_timed() {
    let shape = shape("llama-awq-g32");
    let [broken, sound] = candidates(&shape)[..] else { panic!("two candidates") };
    let (records, summary) = tune(&shape, KvDType::F16, Vec::new(), Some(&broken.symbol()));
    assert_eq!(summary.num_failed, 1);
    let is_broken = |record: &&Record| record.variant.symbol == broken.symbol();
    let found: Vec<&Record> = records.iter().filter(is_broken).collect();
    let [failed] = found[..] else { panic!("{found:?}") };
    let failure = failed.failure().unwrap();
    assert_eq!(failure.reason, "mismatch");
    assert!(failure.message.starts_with("V1: row"), "{}", failure.message);
    assert!(symbols(&records, &is_certificate).contains(&sound.symbol()));
}

#[test]
fn other_caches_have_kernels_of_their_own() {
    let shape = shape("qwen3-qknorm");
    let (records, summary) = tune(&shape, KvDType::I4, Vec::new(), None);
    assert_eq!(summary.num_verified, 0);
    let timed = symbols(&records, &|record| record.time().is_some());
    assert!(timed.iter().all(|symbol| symbol.contains("_kv4")), "{timed:?}");
    let error = {
        let mut begin = |_: &str| Ok(());
        let mut end = |_: &str, _: Verdict| Ok(());
        let mut open = || Ok(Emulated::new(3));
        let symbols = ["rope".to_owned()];
        verify_all(&mut open, &[shape], &symbols, &mut begin, &mut end).unwrap_err()
    };
    assert!(error.to_string().contains("rope is no CUDA kernel"), "{error}");
}
