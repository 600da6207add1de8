//! What a tuning run knows of its kernels: records of earlier runs and its own, each kept in a file
//! before the next one is made.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bespoke_kernel_gen::tuning::certificate::Certificate;
use bespoke_kernel_gen::tuning::device::Device;
use bespoke_kernel_gen::tuning::record::{Case, Outcome, Problem, Record, Time, VERSION, Variant};

use super::ladder::Verdict;
use super::race::Finish;
use crate::error::Error;

/// How far a run is.
#[derive(Clone, Debug, PartialEq)]
pub enum TuneProgress<'a> {
    Verifying {
        spec: &'a str,
        num_kernels: usize,
    },
    Refused {
        symbol: &'a str,
        reason: &'a str,
    },
    /// There is no time to verify these; another run will.
    Postponed {
        spec: &'a str,
        num_kernels: usize,
    },
    Racing {
        spec: &'a str,
        /// How often the kernels race, with this time.
        pass: usize,
        num_kernels: usize,
        seconds: f64,
    },
}

/// How a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TuneSummary {
    pub num_verified: usize,
    pub num_failed: usize,
    pub num_measured: usize,
    /// Measurements of earlier runs.
    pub num_known: usize,
}

/// Keeps a record before the next one is measured.
pub type Append<'a> = dyn FnMut(&Record) -> Result<(), Error> + 'a;

/// Is told before a kernel is called, by its symbol.
pub type Begin<'a> = dyn FnMut(&str) -> Result<(), Error> + 'a;

/// Takes the verdict on the kernel of a symbol.
pub type TakeVerdict<'a> = dyn FnMut(&str, Verdict) -> Result<(), Error> + 'a;

/// Verifies kernels by their symbols, and says what came out, each at once.
pub type Verify<'a> = dyn FnMut(&[String], &mut TakeVerdict<'_>) -> Result<(), Error> + 'a;

/// Source hash and bytes of machine code of a kernel, by its symbol.
pub(super) type MadeFrom<'a> = dyn Fn(&str) -> Option<(String, usize)> + 'a;

/// What all records of a run say of its machine and its binary.
pub(super) struct Origin<'a> {
    pub(super) device: Device,
    /// Of the kernels.
    pub(super) target: String,
    /// Name and version of what made them.
    pub(super) compiler: String,
    pub(super) made_from: Box<MadeFrom<'a>>,
}

/// Records of one device, one compiler, and kernels as they are.
pub(super) struct Ledger<'a> {
    origin: Origin<'a>,
    records: Vec<Record>,
    append: &'a mut Append<'a>,
    summary: TuneSummary,
}

/// Kernels that are verified at a time, and when no further ones begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batches {
    pub(super) len: usize,
    pub(super) end: Instant,
}

impl<'a> Ledger<'a> {
    /// Of `records` those count that are of the run's own kernels.
    pub(super) fn new(
        origin: Origin<'a>,
        records: Vec<Record>,
        append: &'a mut Append<'a>,
    ) -> Ledger<'a> {
        let key = origin.device.key();
        let is_current = |record: &Record| {
            let Variant { symbol, source_hash, compiler, .. } = &record.variant;
            let made_from = (origin.made_from)(symbol);
            record.device.key() == key
                && *compiler == origin.compiler
                && made_from.is_some_and(|(hash, _)| hash == *source_hash)
        };
        let records: Vec<Record> = records.into_iter().filter(is_current).collect();
        let num_known = records.iter().filter(|record| record.time().is_some()).count();
        let summary = TuneSummary { num_known, ..TuneSummary::default() };
        Ledger { origin, records, append, summary }
    }

    pub(super) fn records(&self) -> &[Record] {
        &self.records
    }

    pub(super) fn into_records(self) -> Vec<Record> {
        self.records
    }

    pub(super) fn summary(&self) -> TuneSummary {
        self.summary
    }

    /// Whether each kernel that was verified passed, by its symbol.
    pub(super) fn verdicts(&self) -> BTreeMap<String, bool> {
        let verdict = |record: &Record| {
            let symbol = record.variant.symbol.clone();
            match &record.outcome {
                Outcome::Certificate(certificate) => Some((symbol, certificate.check().is_ok())),
                Outcome::Failure(_) => Some((symbol, false)),
                Outcome::Time(_) => None,
            }
        };
        let mut all = BTreeMap::new();
        for (symbol, passed) in self.records.iter().filter_map(verdict) {
            // A failure counts, whatever passed at another time.
            *all.entry(symbol).or_insert(true) &= passed;
        }
        all
    }

    /// Verifies kernels, the first batch whatever the time is.
    pub(super) fn verify(
        &mut self,
        spec: &str,
        symbols: &[String],
        batches: Batches,
        verify: &mut Verify<'_>,
        progress: &mut dyn FnMut(TuneProgress<'_>),
    ) -> Result<(), Error> {
        for (idx, batch) in symbols.chunks(batches.len).enumerate() {
            let num_kernels = symbols.len() - idx * batches.len;
            if idx > 0 && Instant::now() >= batches.end {
                progress(TuneProgress::Postponed { spec, num_kernels });
                break;
            }
            progress(TuneProgress::Verifying { spec, num_kernels });
            verify(batch, &mut |symbol, verdict| {
                if let Err(failure) = &verdict {
                    let reason = format!("{}: {}", failure.reason, failure.message);
                    progress(TuneProgress::Refused { symbol, reason: &reason });
                }
                let outcome = self.origin.outcome(symbol, verdict);
                self.keep(spec, symbol, Case::All, outcome)
            })?;
        }
        Ok(())
    }

    /// Keeps what came out of a kernel.
    pub(super) fn keep(
        &mut self,
        spec: &str,
        symbol: &str,
        case: Case,
        outcome: Outcome,
    ) -> Result<(), Error> {
        let counter = match &outcome {
            Outcome::Certificate(_) => &mut self.summary.num_verified,
            Outcome::Failure(_) => &mut self.summary.num_failed,
            Outcome::Time(_) => &mut self.summary.num_measured,
        };
        *counter += 1;
        let record = self.origin.record(spec, symbol, case, outcome);
        (self.append)(&record)?;
        self.records.push(record);
        Ok(())
    }
}

impl Origin<'_> {
    fn outcome(&self, symbol: &str, verdict: Verdict) -> Outcome {
        match verdict {
            Ok(levels) => Outcome::Certificate(Certificate {
                symbol: symbol.to_owned(),
                source_hash: (self.made_from)(symbol).unwrap_or_default().0,
                compiler: self.compiler.clone(),
                device: self.device.key(),
                levels,
            }),
            Err(failure) => Outcome::Failure(failure),
        }
    }

    fn record(&self, spec: &str, symbol: &str, case: Case, outcome: Outcome) -> Record {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let (source_hash, code_bytes) = (self.made_from)(symbol).unwrap_or_default();
        Record {
            v: VERSION,
            problem: Problem { spec: spec.to_owned(), target: self.target.clone(), case },
            device: self.device.clone(),
            variant: Variant {
                symbol: symbol.to_owned(),
                source_hash,
                compiler: self.compiler.clone(),
                code_bytes,
            },
            outcome,
            measured_at: now,
        }
    }
}

/// A finish beside the default's symbol; `limit_us` is the physical limit, 0 where none is known.
pub(super) fn time(finish: &Finish, mode: &str, default: &str, limit_us: f64) -> Outcome {
    Outcome::Time(Time {
        mode: mode.to_owned(),
        cache: "cold".to_owned(),
        us: finish.us,
        num_samples: finish.num_samples,
        default: default.to_owned(),
        vs_default: finish.vs_default,
        noise: finish.noise,
        limit_us: (limit_us > 0.0).then_some(limit_us),
    })
}
