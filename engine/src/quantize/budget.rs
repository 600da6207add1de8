//! Bits per weight: which linears stay in 16 bits so that the whole keeps to a budget.

use std::collections::{BTreeMap, BTreeSet};

use super::quantized_layer::LayerReport;
use super::source::{Linear, Linears};
use crate::error::Error;

const DENSE_BITS: f64 = 16.0;

/// A linear of one layer that is quantized as a whole or not at all: q, k and v; gate and up.
type Unit = (usize, &'static str);

/// Bits that one weight of a linear takes: 4, and its part of a 16-bit scale and a 4-bit zero.
fn packed_bits(linear: &Linear) -> f64 {
    4.0 + 20.0 / linear.group as f64
}

/// Average over all weights of all linears, where those of `left_out` have 16 bits.
pub(super) fn bits_per_weight(linears: &Linears, left_out: &BTreeSet<String>) -> f64 {
    let (mut bits, mut weights) = (0.0, 0.0);
    for (module, linear) in linears {
        let num = (linear.n * linear.k) as f64;
        bits += num * if left_out.contains(module) { DENSE_BITS } else { packed_bits(linear) };
        weights += num;
    }
    bits / weights
}

/// Refuses a budget that cannot be kept, or that leaves nothing to do.
pub(super) fn check(
    linears: &Linears,
    skipped: &BTreeSet<String>,
    bits_max: f64,
) -> Result<(), Error> {
    let least = bits_per_weight(linears, skipped);
    let refuse = |why: String| {
        Err(Error::Request(format!("at most {bits_max} bits per weight are asked for, {why}")))
    };
    if bits_max.is_nan() || bits_max >= DENSE_BITS {
        return refuse(format!("but {DENSE_BITS} and more quantize nothing; give less"));
    }
    if bits_max < least {
        let remedy = match skipped.is_empty() {
            true => "give a larger group size or a larger budget",
            false => "skip less, or give a larger group size or a larger budget",
        };
        return refuse(format!("but 4-bit weights take {least:.3} with their scales; {remedy}"));
    }
    Ok(())
}

/// The modules that stay in 16 bits: `skipped`, and those whose error per extra bit is largest, as
/// many as the budget allows.
pub(super) fn choose(
    linears: &Linears,
    skipped: &BTreeSet<String>,
    reports: &[LayerReport],
    bits_max: f64,
) -> BTreeSet<String> {
    let mut left_out = skipped.clone();
    let total: f64 = linears.values().map(|linear| (linear.n * linear.k) as f64).sum();
    let mut spare = (bits_max - bits_per_weight(linears, skipped)) * total;
    for (_, unit) in by_error_per_bit(linears, skipped, reports) {
        let modules: Vec<(&String, &Linear)> = linears
            .iter()
            .filter(|(name, linear)| unit_of(linear) == unit && !skipped.contains(*name))
            .collect();
        let extra: f64 = modules.iter().map(|(_, linear)| extra_bits(linear)).sum();
        if extra <= spare {
            spare -= extra;
            left_out.extend(modules.into_iter().map(|(name, _)| name.clone()));
        }
    }
    left_out
}

fn unit_of(linear: &Linear) -> Unit {
    (linear.layer_idx, linear.role)
}

/// Bits that a linear takes more in 16 bits.
fn extra_bits(linear: &Linear) -> f64 {
    (linear.n * linear.k) as f64 * (DENSE_BITS - packed_bits(linear))
}

/// Units that are not skipped, the worst first.
fn by_error_per_bit(
    linears: &Linears,
    skipped: &BTreeSet<String>,
    reports: &[LayerReport],
) -> Vec<(f64, Unit)> {
    let modules = reports.iter().flat_map(|layer| &layer.groups).flat_map(|group| &group.modules);
    let errors: BTreeMap<&str, f64> =
        modules.map(|module| (module.name.as_str(), module.error)).collect();
    let mut units: BTreeMap<Unit, (f64, f64)> = BTreeMap::new();
    for (name, linear) in linears.iter().filter(|(name, _)| !skipped.contains(*name)) {
        let (error, extra) = units.entry(unit_of(linear)).or_default();
        *error += errors.get(name.as_str()).copied().unwrap_or(0.0);
        *extra += extra_bits(linear);
    }
    let mut ranked: Vec<(f64, Unit)> =
        units.into_iter().map(|(unit, (error, extra))| (error / extra, unit)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::quantized_layer::{GroupReport, ModuleReport};

    fn linears() -> Linears {
        let mut linears = Linears::new();
        for layer_idx in 0..2 {
            for (module, role, n, k) in [
                ("q", "qkv", 32, 32),
                ("k", "qkv", 32, 32),
                ("o", "o", 32, 32),
                ("d", "down", 32, 64),
            ] {
                let linear = Linear { layer_idx, role, n, k, group: 32 };
                linears.insert(format!("{layer_idx}.{module}"), linear);
            }
        }
        linears
    }

    fn reports(errors: &[(&str, f64)]) -> Vec<LayerReport> {
        let module = |(name, error): &(&str, f64)| ModuleReport {
            name: (*name).to_owned(),
            num_weights: 1,
            error_rtn: 1.0,
            error_awq: 1.0,
            error: *error,
            clipped: 0.0,
            is_skipped: false,
        };
        let group = GroupReport {
            role: "qkv".to_owned(),
            alpha: 0.0,
            beta: 0.0,
            factors: [1.0; 3],
            modules: errors.iter().map(module).collect(),
        };
        vec![LayerReport { layer_idx: 0, groups: vec![group], seconds: 0.0 }]
    }

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn averages_over_weights() {
        let none = BTreeSet::new();
        assert_eq!(bits_per_weight(&linears(), &none), 4.625);
        // A fifth of a layer's weights, in one of two layers.
        let one = bits_per_weight(&linears(), &names(&["0.o"]));
        assert!((one - (4.625 * 0.9 + 16.0 * 0.1)).abs() < 1e-12, "{one}");
    }

    #[test]
    fn the_worst_stay_as_long_as_there_are_bits() {
        let reports =
            reports(&[("0.q", 0.1), ("0.k", 0.3), ("0.o", 0.15), ("1.d", 0.35), ("1.o", 0.1)]);
        let choose = |bits_max| choose(&linears(), &BTreeSet::new(), &reports, bits_max);
        assert_eq!(choose(4.625), names(&[]));
        // The pair of q and k has 0.2 for each, then comes down with 0.175, then o with 0.15.
        assert_eq!(choose(4.625 + 2.3), names(&["0.q", "0.k"]));
        assert_eq!(choose(4.625 + 4.6), names(&["0.q", "0.k", "1.d"]));
        // What does not fit makes room for what does.
        assert_eq!(choose(4.625 + 1.2), names(&["0.o"]));
        let skipped = names(&["0.q", "0.k"]);
        let more = super::choose(&linears(), &skipped, &reports, 9.3);
        assert_eq!(more, names(&["0.q", "0.k", "1.d"]));
    }

    #[test]
    fn impossible_budgets_are_refused() {
        let none = BTreeSet::new();
        let message = |bits| check(&linears(), &none, bits).unwrap_err().to_string();
        assert!(check(&linears(), &none, 4.625).is_ok());
        assert!(message(4.5).contains("at most 4.5") && message(4.5).contains("4.625"));
        assert!(message(16.0).contains("quantize nothing"));
        assert!(message(f64::NAN).contains("quantize nothing"));
        let skipped = names(&["0.q", "0.k"]);
        let message = check(&linears(), &skipped, 6.0).unwrap_err().to_string();
        assert!(message.contains("6.900") && message.contains("skip less"), "{message}");
    }
}
