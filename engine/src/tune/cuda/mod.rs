//! Tuning of a model's CUDA kernels: verify, race, record.
//!
//! Matmuls have candidates, which are verified first. Of other ops the default kernels are timed.

mod bench;
mod ladder;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use bespoke_kernel_gen::cuda::compiler_name;
use bespoke_kernel_gen::cuda::{KvType, Regime, Serving, Spec, Variant};
use bespoke_kernel_gen::spec::{KvDType, ModelShape};
use bespoke_kernel_gen::tuning::device::{CudaDevice, Device as AnyDevice};
use bespoke_kernel_gen::tuning::record::{self, Record};

use super::cases::{Case, Cases, rows_served, spec_of};
use super::ledger::{Append, Batches, Ledger, Origin, TuneProgress, TuneSummary, Verify, time};
use super::race::{Field, RaceOptions, Track, race};
use crate::backend::cuda::device::Device;
use crate::batch::Batch;
use crate::error::Error;
use bench::{Bench, Recording, shape_of};

pub use bench::BenchOptions;
pub use ladder::verify_all;

/// Share of the time that all problems have alike; the rest goes by the bytes of their cases.
const EQUAL_SHARE: f64 = 0.4;
/// Share of the time for verification.
const VERIFY_SHARE: f64 = 0.5;
/// Kernels that are verified at a time; the time that is left is looked at in between. Each time
/// the weights of the matmul are made and packed, which for the largest takes seconds.
const BATCH: usize = 128;

/// What a run knows of the machine and the binary.
pub struct CudaSetting<'a> {
    pub device: CudaDevice,
    /// Version of the compiler that made the kernels.
    pub toolkit: &'a str,
    /// Source hash and bytes of machine code of a kernel, by its symbol.
    pub made_from: &'a dyn Fn(&str) -> Option<(String, usize)>,
    pub verify: &'a mut Verify<'a>,
}

/// How a run is done.
#[derive(Clone, Debug, Default)]
pub struct CudaTuneOptions {
    pub cases: Cases,
    pub bench: BenchOptions,
    /// All but the row counts, which are those of the cases.
    pub race: RaceOptions,
}

/// A tuning run.
pub struct CudaTuning<'a> {
    verify: &'a mut Verify<'a>,
    ledger: Ledger<'a>,
    /// Bytes that a second moves, once it is known.
    bandwidth: f64,
}

/// The kernels of a spec, and the cases they are timed at.
struct CudaProblem {
    spec: Spec,
    cases: Vec<Case>,
    /// Those that serve without a lock among them.
    kernels: Vec<Variant>,
    /// Of all bytes that the problems' cases move.
    share: f64,
}

impl<'a> CudaTuning<'a> {
    /// `append` keeps a record before the next one is measured.
    pub fn new(
        setting: CudaSetting<'a>,
        records: Vec<Record>,
        append: &'a mut Append<'a>,
    ) -> CudaTuning<'a> {
        let CudaSetting { device, toolkit, made_from, verify } = setting;
        let origin = Origin {
            target: device.arch.clone(),
            device: AnyDevice::Cuda(device),
            compiler: compiler_name(toolkit),
            made_from: Box::new(made_from),
        };
        CudaTuning { verify, ledger: Ledger::new(origin, records, append), bandwidth: 0.0 }
    }

    /// Tunes the kernels of `shape` with one type of KV cache within `budget`, verification
    /// included.
    ///
    /// # Errors
    /// A record cannot be kept, the device has not the memory or not the kernels, or kernels cannot
    /// be verified.
    pub fn run<D: Device>(
        &mut self,
        device: D,
        shape: &ModelShape,
        kv_dtype: KvDType,
        options: &CudaTuneOptions,
        budget: Duration,
        progress: &mut dyn FnMut(TuneProgress<'_>),
    ) -> Result<TuneSummary, Error> {
        let end = Instant::now() + budget;
        let kv = KvType::of(kv_dtype).ok_or_else(|| {
            Error::Request("a KV cache of float32 elements exists on the CPU only".into())
        })?;
        let shape = shape_of(shape, options.bench.num_layers);
        let cases = options.cases.all(&shape, kv);
        let mut problems = problems(&device, &shape, kv, &cases)?;
        let verified = Instant::now() + budget.mul_f64(VERIFY_SHARE);
        for problem in problems.iter_mut().filter(|problem| problem.is_matmul()) {
            self.verify(problem, verified, progress)?;
        }
        let all: Vec<Variant> =
            problems.iter().flat_map(|problem| &problem.kernels).copied().collect();
        let mut bench = Bench::new(device, &shape, kv_dtype, &cases, &all, &options.bench)?;
        if self.bandwidth == 0.0 {
            self.bandwidth = bench.bandwidth(&cases, kv)?;
        }
        for (idx, problem) in problems.iter().enumerate() {
            let left = end.saturating_duration_since(Instant::now()).as_secs_f64();
            let rest: f64 = problems[idx..].iter().map(|problem| problem.share).sum();
            let seconds = left * problem.share / rest;
            let (spec, num_kernels) = (problem.spec.name(), problem.kernels.len());
            progress(TuneProgress::Racing { spec: &spec, pass: 1, num_kernels, seconds });
            self.race(&mut bench, problem, kv, options, seconds)?;
        }
        Ok(self.ledger.summary())
    }

    /// All records of this device and these kernels.
    pub fn into_records(self) -> Vec<Record> {
        self.ledger.into_records()
    }

    /// Verifies what was not before, and leaves the problem those that passed.
    fn verify(
        &mut self,
        problem: &mut CudaProblem,
        end: Instant,
        progress: &mut dyn FnMut(TuneProgress<'_>),
    ) -> Result<(), Error> {
        let name = problem.spec.name();
        let verdicts = self.ledger.verdicts();
        let mut new: Vec<Variant> = problem.kernels.clone();
        new.retain(|variant| !verdicts.contains_key(&variant.symbol()));
        // The defaults first, beside which all others are raced.
        new.sort_by_key(|variant| !variant.is_default());
        let symbols: Vec<String> = new.iter().map(Variant::symbol).collect();
        let batches = Batches { len: BATCH, end };
        self.ledger.verify(&name, &symbols, batches, self.verify, progress)?;
        let verdicts = self.ledger.verdicts();
        problem.kernels.retain(|variant| verdicts.get(&variant.symbol()) == Some(&true));
        Ok(())
    }

    fn race<D: Device>(
        &mut self,
        bench: &mut Bench<D>,
        problem: &CudaProblem,
        kv: KvType,
        options: &CudaTuneOptions,
        budget: f64,
    ) -> Result<(), Error> {
        let CudaTuning { ledger, bandwidth, .. } = self;
        let CudaProblem { spec, cases, kernels, .. } = problem;
        let arch = kernels.first().map(|kernel| kernel.arch);
        let Some(arch) = arch else { return Ok(()) };
        let default = Serving::default_for(spec, arch);
        let default_of = |idx: usize| {
            let variant = default.interval(rows_served(&cases[idx])).variant;
            kernels.iter().position(|kernel| *kernel == variant)
        };
        // NOTE: a race counts cases; those without a default are not raced.
        let idxs = |is_first: bool| -> Vec<usize> {
            let is_of = |idx: &usize| {
                let first = match cases[*idx] {
                    Case::Linear { rows, .. } => options.cases.linear_rows.contains(&rows),
                    _ => true,
                };
                first == is_first && default_of(*idx).is_some()
            };
            (0..cases.len()).filter(is_of).collect()
        };
        let race_options =
            RaceOptions { first_rows: idxs(true), other_rows: idxs(false), ..options.race.clone() };
        let known = known(ledger.records(), &spec.name(), kernels, cases);
        let limit = |idx: usize| match *bandwidth > 0.0 {
            true => cases[idx].cost(&bench.shape, kv).bytes as f64 / *bandwidth,
            false => 0.0,
        };
        let limits: Vec<f64> = (0..cases.len()).map(limit).collect();
        let field = Field {
            num_kernels: kernels.len(),
            default_of: &|idx| default_of(idx).unwrap_or(0),
            can_serve: &|kernel, idx| is_made_for(&kernels[kernel], &cases[idx]),
            prior: &|kernel, _| f64::from(u8::from(!kernels[kernel].is_default())),
            limit: &|idx| limits[idx],
            known: &|kernel, idx| known.get(&(kernel, idx)).copied(),
        };
        let mut track = CudaTrack::new(bench, kernels, cases);
        let mut result = Ok(());
        race(&mut track, &field, &race_options, budget, &mut |finish| {
            let default = kernels[(field.default_of)(finish.num_rows)].symbol();
            let symbol = kernels[finish.kernel].symbol();
            let limit_us = limits[finish.num_rows] * 1e6;
            let (case, time) = (cases[finish.num_rows], time(&finish, "graph", &default, limit_us));
            result = ledger.keep(&spec.name(), &symbol, case.into(), time);
            result.is_ok()
        });
        let failed = track.failed.take();
        result?;
        failed.map_or(Ok(()), Err)
    }
}

impl CudaProblem {
    fn is_matmul(&self) -> bool {
        self.spec.is_matmul()
    }
}

/// The specs of the cases, in their order, with the kernels that the device has.
fn problems<D: Device>(
    device: &D,
    shape: &ModelShape,
    kv: KvType,
    cases: &[Case],
) -> Result<Vec<CudaProblem>, Error> {
    let mut all: Vec<(CudaProblem, f64)> = Vec::new();
    for case in cases {
        let Some(spec) = spec_of(case, shape, kv)? else { continue };
        let bytes = case.cost(shape, kv).bytes as f64;
        match all.iter_mut().find(|(problem, _)| problem.spec == spec) {
            Some((problem, sum)) => {
                // NOTE: two roles may have one spec; each row count is measured once.
                let is_new = |other: &Case| record::Case::from(*other) != record::Case::from(*case);
                if problem.cases.iter().all(is_new) {
                    problem.cases.push(*case);
                    *sum += bytes;
                }
            }
            None => {
                let mut problem =
                    CudaProblem { spec, cases: vec![*case], kernels: Vec::new(), share: 0.0 };
                problem.kernels = device.kernels(&spec);
                if !problem.is_matmul() {
                    problem.kernels.retain(Variant::is_default);
                }
                all.push((problem, bytes));
            }
        }
    }
    let sum: f64 = all.iter().map(|(_, bytes)| bytes).sum();
    let num = all.len().max(1) as f64;
    let with_share = |(problem, bytes): (CudaProblem, f64)| CudaProblem {
        share: EQUAL_SHARE / num + (1.0 - EQUAL_SHARE) * bytes / sum.max(1.0),
        ..problem
    };
    Ok(all.into_iter().map(with_share).collect())
}

/// Whether the case lies among the row counts that a kernel is made for.
fn is_made_for(variant: &Variant, case: &Case) -> bool {
    match (case, variant.regime) {
        (_, Regime::Any) => true,
        (Case::Linear { rows, .. }, regime) => Regime::of_rows(*rows) == regime,
        _ => variant.serves(rows_served(case)),
    }
}

/// Ratios to the default that earlier runs have measured, by index of the kernel and of the case.
fn known(
    records: &[Record],
    spec: &str,
    kernels: &[Variant],
    cases: &[Case],
) -> BTreeMap<(usize, usize), f64> {
    let symbols: Vec<String> = kernels.iter().map(Variant::symbol).collect();
    let ratio = |record: &Record| {
        let time = record.time()?;
        let is_same = |case: &Case| record::Case::from(*case) == record.problem.case;
        let case_idx = cases.iter().position(is_same)?;
        let kernel_idx = symbols.iter().position(|symbol| *symbol == record.variant.symbol)?;
        (record.problem.spec == spec).then_some(((kernel_idx, case_idx), time.vs_default))
    };
    records.iter().filter_map(ratio).collect()
}

/// Launches on a device. What a race calls a row count is the index of a case.
struct CudaTrack<'a, D: Device> {
    bench: &'a mut Bench<D>,
    kernels: &'a [Variant],
    cases: &'a [Case],
    /// The case that is prepared.
    prepared: Option<(usize, Batch)>,
    /// By kernel, of that case.
    recordings: HashMap<usize, Recording<D::Graph>>,
    failed: Option<Error>,
    start: Instant,
}

impl<'a, D: Device> CudaTrack<'a, D> {
    fn new(bench: &'a mut Bench<D>, kernels: &'a [Variant], cases: &'a [Case]) -> CudaTrack<'a, D> {
        CudaTrack {
            bench,
            kernels,
            cases,
            prepared: None,
            recordings: HashMap::new(),
            failed: None,
            start: Instant::now(),
        }
    }

    fn sample(&mut self, kernel: usize, case_idx: usize) -> Result<f64, Error> {
        let case = &self.cases[case_idx];
        if self.prepared.as_ref().is_none_or(|(idx, _)| *idx != case_idx) {
            self.recordings.clear();
            self.prepared = Some((case_idx, self.bench.prepare(case)?));
        }
        if !self.recordings.contains_key(&kernel)
            && let Some((_, batch)) = &self.prepared
        {
            let recording = self.bench.record(case, batch, Some(self.kernels[kernel]));
            // NOTE: a first replay may load what later ones have.
            self.bench.run(&recording);
            self.recordings.insert(kernel, recording);
        }
        Ok(self.bench.run(&self.recordings[&kernel]))
    }
}

impl<D: Device> Track for CudaTrack<'_, D> {
    fn run(&mut self, kernel: usize, case_idx: usize) -> Option<f64> {
        if self.failed.is_some() {
            return None;
        }
        match self.sample(kernel, case_idx) {
            Ok(seconds) => Some(seconds),
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }

    fn elapsed(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}
