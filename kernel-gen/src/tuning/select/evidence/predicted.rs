//! Predictions: what may serve a problem of which no time was measured, on a device of whose family
//! other problems were.
//!
//! Only kernels that are certified on the very device are predicted. The noise of a prediction is
//! such that the margin over the default is the model's own error about problems left out.

use std::collections::BTreeMap;

use super::{CaseEvidence, Evidence, Kernel, Key, Trust, version};
use crate::name::spec_name;
use crate::plan::KernelVariant;
use crate::tuning::cost_model::{CostModel, held_out};
use crate::tuning::distance::distance;
use crate::tuning::record::{Case, Record};
use crate::tuning::select::Options;

/// A kernel with a certificate that holds, and the certificate's hash.
type Certified<'a> = (&'a Record, KernelVariant, String);

/// What a class's model is worth.
struct Oracle {
    model: CostModel,
    /// Relative error about problems left out, by reduction class.
    errors: BTreeMap<String, f64>,
}

/// Evidence about the problems that have certificates but no times, neither on their device nor on
/// one of its family. `measured` are those that have.
pub(super) fn predicted(
    records: &[Record],
    trust: &Trust<'_>,
    measured: &[Evidence],
    options: &Options,
) -> Vec<Evidence> {
    let mut problems: BTreeMap<Key, Vec<Certified<'_>>> = BTreeMap::new();
    for record in records {
        if let Some((key, certified)) = certified(record, trust, options) {
            problems.entry(key).or_default().push(certified);
        }
    }
    problems.retain(|(device, spec, target), _| {
        let is_nearer = |one: &Evidence| {
            one.spec == *spec && one.target == *target && distance(device, &one.device).is_some()
        };
        !measured.iter().any(is_nearer)
    });
    let is_current = |record: &&Record| {
        trust.hashes.get(&record.variant.symbol) == Some(&record.variant.source_hash)
    };
    let mut oracles: BTreeMap<String, Oracle> = BTreeMap::new();
    let mut all = Vec::new();
    for ((device, spec, target), kernels) in problems {
        let oracle = oracles.entry(device.clone()).or_insert_with(|| {
            let current = || records.iter().filter(is_current);
            let scored = held_out(current(), &device).into_iter();
            let errors = scored.filter_map(|one| Some((one.class, one.scores?.error)));
            Oracle { model: CostModel::fit(current(), &device), errors: errors.collect() }
        });
        all.extend(oracle.evidence((device, spec, target), kernels));
    }
    all
}

fn certified<'a>(
    record: &'a Record,
    trust: &Trust<'_>,
    options: &Options,
) -> Option<(Key, Certified<'a>)> {
    let certificate = record.certificate()?;
    let variant = KernelVariant::parse(&record.variant.symbol)?;
    let spec = spec_name(&variant.spec);
    let is_wanted = options.uses.is_empty() || options.uses.contains_key(&spec);
    if !is_wanted || spec != record.problem.spec || certificate.device != record.device.key() {
        return None;
    }
    let hash = trust.certificate(record).ok()?;
    Some(((certificate.device.clone(), spec, variant.target.name()), (record, variant, hash)))
}

impl Oracle {
    /// `None` where nothing was measured of other problems.
    fn evidence(&self, key: Key, mut kernels: Vec<Certified<'_>>) -> Option<Evidence> {
        // NOTE: as with times, the newest compiler's kernels count.
        let compiler = kernels.iter().map(|(record, _, _)| &*record.variant.compiler);
        let newest = compiler.max_by(|a, b| version(a).cmp(&version(b)))?.to_string();
        kernels.retain(|(record, _, _)| record.variant.compiler == newest);
        let first = kernels.first()?.1;
        let error = *self.errors.get(&first.reduction_class())?;
        let empty = Evidence::empty(key, Kernel::Cpu(first));
        let mut evidence = Evidence { is_predicted: true, ..empty };
        for (record, variant, hash) in &kernels {
            evidence.certify(record, hash);
            evidence.kernels.insert(record.variant.symbol.clone(), Kernel::Cpu(*variant));
            evidence.count_bytes(record);
        }
        for rows in self.model.rows(&first) {
            let case = Case::Rows(rows);
            let default = Kernel::Cpu(first).default_of(case)?;
            let ratio = |(record, variant, _): &Certified<'_>| {
                let is_known = self.model.is_grounded(variant, rows, &evidence.spec);
                let ratio = self.model.predict(variant, rows).filter(|_| is_known)?;
                Kernel::Cpu(*variant).serves(case).then(|| (record.variant.symbol.clone(), ratio))
            };
            let mut ratios: BTreeMap<String, f64> = kernels.iter().filter_map(ratio).collect();
            ratios.insert(default.clone(), 1.0);
            let noise = error / 2.0;
            let found = CaseEvidence { default, default_us: 1.0, noise, limit_us: None, ratios };
            evidence.cases.insert(case, found);
        }
        Some(evidence)
    }
}
