//! A lock → servings on GPUs, as far as what it was decided on still holds.

use std::collections::{BTreeMap, BTreeSet};

use super::compile::source_hash;
use super::render::render;
use super::serving::{Interval, Serving};
use super::{Arch, Spec, Variant};
use crate::error::Error;
use crate::plan::locked::{Certificates, locked_provenance, locked_rows, refused};
use crate::tuning::lock::{Lock, LockedInterval, LockedProblem};

/// What a lock says about some specs and architectures.
#[derive(Debug, Default)]
pub(super) struct Locked {
    pub(super) servings: Vec<Serving>,
    /// Decisions that no longer hold, in words.
    pub(super) warnings: Vec<String>,
}

/// The servings of `lock` for `specs` on `archs`, for kernels that are compiled by `toolkit` (its
/// version; `None`: by what they were measured with). What the lock says about others is left
/// alone.
///
/// # Errors
/// The lock names a kernel that cannot be, or that has no certificate, or its intervals are none.
pub(super) fn servings(
    lock: &Lock,
    specs: &BTreeSet<Spec>,
    archs: &[Arch],
    toolkit: Option<&str>,
) -> Result<Locked, Error> {
    let by_name: BTreeMap<String, Spec> = specs.iter().map(|spec| (spec.name(), *spec)).collect();
    let certificates = Certificates::of(lock);
    let mut seen = BTreeSet::new();
    let mut locked = Locked::default();
    for problem in &lock.problems {
        let arch = Arch::from_name(&problem.target).filter(|arch| archs.contains(arch));
        let (Some(spec), Some(arch)) = (by_name.get(&problem.spec), arch) else { continue };
        if !seen.insert((*spec, arch, problem.device.as_str())) {
            return Err(refused(problem, "is decided twice; keep one of the two".to_string()));
        }
        let mut intervals = Vec::new();
        for ((below, rows_max), one) in locked_rows(problem)?.into_iter().zip(&problem.intervals) {
            intervals.push(interval(problem, one, (*spec, arch), (below, rows_max))?);
        }
        let mut stale = None;
        for Interval { variant, provenance, .. } in &intervals {
            let found = certificates.of_kernel(
                problem,
                &variant.symbol(),
                *provenance,
                variant.is_default(),
            )?;
            let Some(certificate) = found else { continue };
            let version = toolkit.unwrap_or_else(|| version_of(&certificate.compiler));
            if certificate.source_hash != source_hash(&render(variant)?, version) {
                stale.get_or_insert(*variant);
            }
        }
        match stale {
            Some(variant) => locked.warnings.push(format!(
                "{} of kernels.lock was measured with other code or another compiler than today's, \
                 so the defaults serve {} on {}; measure again with `bespoke tune` and `kernel-gen \
                 select`",
                variant.symbol(),
                problem.spec,
                problem.device
            )),
            None => locked.servings.push(Serving {
                spec: *spec,
                arch,
                device: Some(problem.device.clone()),
                intervals,
            }),
        }
    }
    Ok(locked)
}

/// What records call a compiler of this version.
pub fn compiler_name(toolkit: &str) -> String {
    format!("nvcc {toolkit}")
}

/// The version in [`compiler_name`].
pub fn version_of(compiler: &str) -> &str {
    compiler.strip_prefix("nvcc ").unwrap_or(compiler)
}

/// One interval, for the row counts above `below` and up to `rows_max`.
fn interval(
    problem: &LockedProblem,
    locked: &LockedInterval,
    (spec, arch): (Spec, Arch),
    (below, rows_max): (usize, usize),
) -> Result<Interval, Error> {
    let symbol = &locked.symbol;
    let refuse = |reason: String| {
        refused(problem, format!("names {symbol}, {reason}; run `kernel-gen select` again"))
    };
    let variant = Variant::parse(symbol)
        .ok_or_else(|| refuse("which is no kernel of this generator".to_string()))?;
    if variant.spec() != spec || variant.arch != arch {
        return Err(refuse("which computes something else".to_string()));
    }
    variant.is_feasible().map_err(|reason| refuse(format!("which cannot be built: {reason}")))?;
    if !variant.serves(below + 1) || !variant.serves(rows_max) {
        return Err(refuse(format!("which does not serve the rows from {} on", below + 1)));
    }
    Ok(Interval { rows_max, variant, provenance: locked_provenance(problem, locked)? })
}
