//! A lock → servings, as far as what it was decided on still holds.

use std::collections::{BTreeMap, BTreeSet};

use crate::compile;
use crate::error::Error;
use crate::name::spec_name;
use crate::plan::{INTERVALS_MAX, Interval, KernelVariant, Provenance, Serving};
use crate::render;
use crate::spec::{KernelSpec, RowRegime};
use crate::target::Target;
use crate::tuning::lock::{Lock, LockedInterval, LockedProblem, LockedVariant};

/// What a lock says about some specs and targets.
#[derive(Debug, Default)]
pub(super) struct Locked {
    pub(super) servings: Vec<Serving>,
    /// Decisions that no longer hold, in words.
    pub(super) warnings: Vec<String>,
}

/// The servings of `lock` for `specs` on `targets`; what it says about others is left alone.
///
/// # Errors
/// The lock names a kernel that cannot be, or that has no certificate, or its intervals are none.
pub(super) fn servings(
    lock: &Lock,
    specs: &BTreeSet<KernelSpec>,
    targets: &[Target],
) -> Result<Locked, Error> {
    let by_name: BTreeMap<String, KernelSpec> =
        specs.iter().map(|spec| (spec_name(spec), *spec)).collect();
    let certificates = Certificates::of(lock);
    let mut seen = BTreeSet::new();
    let mut locked = Locked::default();
    for problem in &lock.problems {
        let target = Target::from_name(&problem.target).filter(|target| targets.contains(target));
        let (Some(spec), Some(target)) = (by_name.get(&problem.spec), target) else { continue };
        if !seen.insert((*spec, target, problem.device.as_str())) {
            return Err(refused(problem, "is decided twice; keep one of the two".to_string()));
        }
        let intervals = intervals(problem, spec, target)?;
        let mut stale = None;
        for Interval { variant, provenance, .. } in &intervals {
            let (symbol, is_default) = (variant.symbol(), variant.is_default());
            let found = certificates.of_kernel(problem, &symbol, *provenance, is_default)?;
            // Another hash: other code than the one that was verified.
            if found.is_some_and(|one| one.source_hash != compile::hash(&render::render(variant))) {
                stale.get_or_insert(*variant);
            }
        }
        match stale {
            Some(variant) => locked.warnings.push(format!(
                "{} of kernels.lock was measured with other code than today's, so the defaults \
                 serve {} on {}; measure again with `bespoke tune` and `kernel-gen select`",
                variant.symbol(),
                problem.spec,
                problem.device
            )),
            None => locked.servings.push(Serving {
                spec: *spec,
                target,
                device: Some(problem.device.clone()),
                intervals,
            }),
        }
    }
    Ok(locked)
}

/// The intervals of a problem, each with a kernel that can be and serves its rows.
fn intervals(
    problem: &LockedProblem,
    spec: &KernelSpec,
    target: Target,
) -> Result<Vec<Interval>, Error> {
    let rows = locked_rows(problem)?.into_iter().zip(&problem.intervals);
    let all = rows.map(|(rows, locked)| interval(problem, locked, (spec, target), rows));
    let all = all.collect::<Result<Vec<Interval>, Error>>()?;
    let cols: BTreeSet<usize> = all.iter().map(|interval| interval.variant.config.cols).collect();
    if cols.len() > 1 {
        let what = format!("mixes panels of {cols:?} tiles; one weight has one layout");
        return Err(refused(problem, what));
    }
    Ok(all)
}

/// The rows of each interval of a problem: above the first number, up to the second.
pub(crate) fn locked_rows(problem: &LockedProblem) -> Result<Vec<(usize, usize)>, Error> {
    let num = problem.intervals.len();
    if !(1..=INTERVALS_MAX).contains(&num) {
        let what = format!("has {num} intervals; 1 to {INTERVALS_MAX} are possible");
        return Err(refused(problem, what));
    }
    let mut all = Vec::with_capacity(num);
    let mut below = 0;
    for (idx, locked) in problem.intervals.iter().enumerate() {
        let rows_max = match locked.rows_max {
            None if idx + 1 == num => usize::MAX,
            Some(rows) if idx + 1 < num && rows > below => rows,
            _ => {
                let what = "wants ascending `rows_max`, and none for the last interval alone";
                return Err(refused(problem, what.to_string()));
            }
        };
        all.push((below, rows_max));
        below = rows_max;
    }
    Ok(all)
}

/// One interval, for the row counts above `below` and up to `rows_max`.
fn interval(
    problem: &LockedProblem,
    locked: &LockedInterval,
    (spec, target): (&KernelSpec, Target),
    (below, rows_max): (usize, usize),
) -> Result<Interval, Error> {
    let symbol = &locked.symbol;
    let refuse = |reason: String| {
        refused(problem, format!("names {symbol}, {reason}; run `kernel-gen select` again"))
    };
    let variant = KernelVariant::parse(symbol)
        .ok_or_else(|| refuse("which is no kernel of this generator".to_string()))?;
    if variant.spec != *spec || variant.target != target {
        return Err(refuse("which computes something else".to_string()));
    }
    let KernelVariant { regime, config, .. } = variant;
    config
        .is_feasible(spec, regime, target)
        .map_err(|reason| refuse(format!("which cannot be built: {reason}")))?;
    let fits = match (spec, regime) {
        // For attention, one row means decoding.
        (KernelSpec::PagedAttention { .. }, RowRegime::One) => rows_max == 1,
        (KernelSpec::PagedAttention { .. }, _) => below == 1,
        (_, RowRegime::One) => rows_max == 1,
        _ => true,
    };
    if !fits {
        let reason = format!("which does not serve the rows from {} on", below + 1);
        return Err(refuse(reason));
    }
    Ok(Interval { rows_max, variant, provenance: locked_provenance(problem, locked)? })
}

/// Where a locked choice comes from.
pub(crate) fn locked_provenance(
    problem: &LockedProblem,
    locked: &LockedInterval,
) -> Result<Provenance, Error> {
    let LockedInterval { symbol, provenance, .. } = locked;
    let found = Provenance::from_name(provenance).filter(|found| *found != Provenance::Pinned);
    found.ok_or_else(|| {
        let what = format!(
            "names {symbol}, with the provenance {provenance:?}, unknown here; run `kernel-gen \
             select` again"
        );
        refused(problem, what)
    })
}

/// The certificates of a lock, by symbol.
pub(crate) struct Certificates<'a>(BTreeMap<&'a str, &'a LockedVariant>);

impl<'a> Certificates<'a> {
    pub(crate) fn of(lock: &'a Lock) -> Certificates<'a> {
        let all = lock.certificates.iter();
        Certificates(all.map(|variant| (variant.symbol.as_str(), variant)).collect())
    }

    /// What a kernel is certified by. What serves without a lock as well needs no certificate.
    pub(crate) fn of_kernel(
        &self,
        problem: &LockedProblem,
        symbol: &str,
        provenance: Provenance,
        is_default: bool,
    ) -> Result<Option<&'a LockedVariant>, Error> {
        let Some(certificate) = self.0.get(symbol) else {
            if provenance == Provenance::Default && is_default {
                return Ok(None);
            }
            let what = format!(
                "names {symbol}, for which the lock has no certificate; verify it with `bespoke \
                 tune` and run `kernel-gen select` again"
            );
            return Err(refused(problem, what));
        };
        if certificate.certificate.is_empty() {
            let what =
                format!("names {symbol}, whose certificate is empty; run `kernel-gen select`");
            return Err(refused(problem, what));
        }
        Ok(Some(certificate))
    }
}

pub(crate) fn refused(problem: &LockedProblem, what: String) -> Error {
    let LockedProblem { spec, device, .. } = problem;
    Error::Lock { message: format!("{spec} on {device} {what}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KernelConfig;
    use crate::plan::{PlanOptions, plan};
    use crate::spec::{LinearRole, ModelShape};
    use crate::tuning::lock::VERSION;

    const DEVICE: &str = "avx512-amd-25-17-l2-1024-l3-32768-t2";

    fn shape() -> ModelShape {
        crate::presets::shape("smollm2-135m-awq", &[]).unwrap()
    }

    fn spec() -> KernelSpec {
        shape().linear_kernel(LinearRole::Qkv, crate::spec::ActivationType::Int8).unwrap()
    }

    fn default_variant(regime: RowRegime) -> KernelVariant {
        let config = KernelConfig::default_for(&spec(), regime, Target::Avx512);
        KernelVariant { spec: spec(), regime, target: Target::Avx512, config }
    }

    /// Another than the default one, of the same layout.
    fn candidate(regime: RowRegime) -> KernelVariant {
        let default = default_variant(regime);
        let configs = KernelConfig::candidates(&spec(), regime, Target::Avx512);
        let config = configs
            .into_iter()
            .find(|config| *config != default.config && config.cols == default.config.cols);
        KernelVariant { config: config.expect("there is a choice"), ..default }
    }

    fn locked(
        rows_max: Option<usize>,
        variant: &KernelVariant,
        provenance: &str,
    ) -> LockedInterval {
        LockedInterval {
            rows_max,
            symbol: variant.symbol(),
            provenance: provenance.to_string(),
            us: 1.0,
            default_us: 2.0,
            runner_up: None,
            runner_up_us: None,
            margin: 0.0,
        }
    }

    fn certificate(variant: &KernelVariant) -> LockedVariant {
        LockedVariant {
            symbol: variant.symbol(),
            source_hash: compile::hash(&render::render(variant)),
            certificate: "00".to_string(),
            compiler: "rustc".to_string(),
            code_bytes: 1,
        }
    }

    fn lock() -> Lock {
        let (one, few) = (default_variant(RowRegime::One), candidate(RowRegime::Few));
        let many = default_variant(RowRegime::Many);
        Lock {
            version: VERSION,
            problems: vec![LockedProblem {
                spec: spec_name(&spec()),
                target: "avx512".to_string(),
                device: DEVICE.to_string(),
                intervals: vec![
                    locked(Some(1), &one, "default"),
                    locked(Some(48), &few, "measured"),
                    locked(None, &many, "default"),
                ],
            }],
            certificates: vec![certificate(&few)],
            ..Lock::default()
        }
    }

    fn planned(lock: &Lock) -> Result<crate::plan::Plan, String> {
        let options = PlanOptions { lock: Some(lock), tuner: None };
        plan(&[shape()], &[Target::Avx512], &options).map_err(|error| error.to_string())
    }

    #[test]
    fn a_lock_decides_who_serves() {
        let plan = planned(&lock()).unwrap();
        assert!(plan.warnings.is_empty());
        let found: Vec<&Serving> =
            plan.servings.iter().filter(|serving| serving.spec == spec()).collect();
        let [any, own] = found[..] else { panic!("{found:?}") };
        assert_eq!(*any, Serving::default_for(&spec(), Target::Avx512));
        assert_eq!(own.device.as_deref(), Some(DEVICE));
        let rows: Vec<(usize, KernelVariant, Provenance)> = own
            .intervals
            .iter()
            .map(|interval| (interval.rows_max, interval.variant, interval.provenance))
            .collect();
        let few = candidate(RowRegime::Few);
        assert_eq!(rows[0], (1, default_variant(RowRegime::One), Provenance::Default));
        assert_eq!(rows[1], (48, few, Provenance::Measured));
        assert_eq!(rows[2], (usize::MAX, default_variant(RowRegime::Many), Provenance::Default));
        assert!(plan.variants.contains(&few));
        assert_eq!(planned(&plan.lock).unwrap(), plan, "what was used of the lock says the same");
    }

    #[test]
    fn what_the_build_has_not_is_left_alone() {
        let mut lock = lock();
        lock.problems[0].target = "x86_64_v3".to_string();
        lock.problems
            .push(LockedProblem { spec: "gemm_n1_k1_f32".into(), ..lock.problems[0].clone() });
        let plan = planned(&lock).unwrap();
        let without = super::super::plan(&[shape()], &[Target::Avx512], &PlanOptions::default());
        let without = without.unwrap();
        assert_eq!((plan.variants, plan.servings), (without.variants, without.servings));
        assert!(plan.lock.problems.is_empty());
    }

    #[test]
    fn a_kernel_with_other_code_serves_no_longer() {
        let mut lock = lock();
        lock.certificates[0].source_hash = "0123".to_string();
        let plan = planned(&lock).unwrap();
        let [warning] = &plan.warnings[..] else { panic!("{:?}", plan.warnings) };
        assert!(warning.contains(&candidate(RowRegime::Few).symbol()), "{warning}");
        assert!(plan.servings.iter().all(|serving| serving.device.is_none()));
        assert!(!plan.variants.contains(&candidate(RowRegime::Few)));
    }

    #[test]
    fn what_cannot_be_followed_is_an_error() {
        type Change = fn(&mut Lock);
        let cases: [(Change, &str); 11] = [
            (|lock| lock.certificates.clear(), "no certificate"),
            (|lock| lock.certificates[0].certificate.clear(), "is empty"),
            (|lock| lock.problems[0].intervals[1].symbol.push('x'), "no kernel of this generator"),
            (|lock| lock.problems[0].intervals.clear(), "0 intervals"),
            (|lock| lock.problems[0].intervals[1].rows_max = Some(1), "ascending"),
            (|lock| lock.problems[0].intervals[1].rows_max = None, "ascending"),
            (|lock| lock.problems[0].intervals[2].rows_max = Some(64), "ascending"),
            (|lock| lock.problems[0].intervals[0].rows_max = Some(2), "does not serve"),
            (|lock| lock.problems[0].intervals[1].provenance = "guessed".into(), "guessed"),
            (|lock| lock.problems[0].intervals[1].provenance = "pinned".into(), "pinned"),
            (|lock| lock.problems.push(lock.problems[0].clone()), "twice"),
        ];
        for (change, expected) in cases {
            let mut lock = lock();
            change(&mut lock);
            let error = planned(&lock).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn kernels_of_other_specs_and_layouts_are_refused() {
        let with = |symbol: String| {
            let mut lock = lock();
            lock.problems[0].intervals[1].symbol = symbol;
            planned(&lock).unwrap_err()
        };
        let other = KernelVariant {
            target: Target::X86_64V3,
            config: KernelConfig::default_for(&spec(), RowRegime::Few, Target::X86_64V3),
            ..default_variant(RowRegime::Few)
        };
        assert!(with(other.symbol()).contains("something else"));
        let few = default_variant(RowRegime::Few);
        let config = KernelConfig { cols: few.config.cols * 2, ..few.config };
        let wide = KernelVariant { config, ..few };
        assert!(with(wide.symbol()).contains("one layout"));
        let config = KernelConfig { cols: 0, ..few.config };
        assert!(with(KernelVariant { config, ..few }.symbol()).contains("cannot be built"));
    }
}
