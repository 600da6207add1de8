//! Declarations of servings → intervals over declared kernels: ascending, of one op and its sizes,
//! all on one panel layout.

use std::collections::BTreeMap;

use proc_macro2::Span;
use quote::ToTokens;
use syn::{Ident, LitInt, LitStr};

use crate::error::Errors;
use crate::model::{Kernel, Value};
use crate::parse::{IntervalDeclaration, ServingDeclaration};

/// Most intervals of a serving: what the engine's dispatch holds.
const INTERVALS_MAX: usize = 8;

const PROVENANCES: [&str; 5] = ["Measured", "Transferred", "Model", "Default", "Pinned"];

/// A checked serving.
pub(crate) struct Serving<'a> {
    pub(crate) device: Option<LitStr>,
    /// Ascending; at least one.
    pub(crate) intervals: Vec<Interval<'a>>,
}

pub(crate) struct Interval<'a> {
    /// `None`: no limit.
    pub(crate) rows_max: Option<LitInt>,
    pub(crate) kernel: &'a Kernel,
    pub(crate) provenance: Ident,
}

/// The servings that are right; the others are reported. `symbols` are those of all declarations:
/// what is wrong with a kernel is reported once, where it is declared.
pub(crate) fn check<'a>(
    declarations: Vec<ServingDeclaration>,
    symbols: &[Ident],
    kernels: &'a [Kernel],
    errors: &mut Errors,
) -> Vec<Serving<'a>> {
    let by_symbol: BTreeMap<String, &Kernel> =
        kernels.iter().map(|kernel| (kernel.symbol.to_string(), kernel)).collect();
    let mut servings = Vec::new();
    for ServingDeclaration { span, device, intervals } in declarations {
        if !check_limits(span, &intervals, errors) {
            continue;
        }
        let mut found = Vec::new();
        let mut right = true;
        for IntervalDeclaration { rows_max, symbol, provenance } in intervals {
            if !symbols.contains(&symbol) {
                errors.push(symbol.span(), format!("no kernel `{symbol}`"));
                right = false;
            }
            if !PROVENANCES.iter().any(|name| provenance == name) {
                let names = PROVENANCES.join(", ");
                let message = format!("no provenance `{provenance}`; there are {names}");
                errors.push(provenance.span(), message);
                right = false;
            }
            match by_symbol.get(&symbol.to_string()) {
                Some(&kernel) => {
                    right &= check_kernel(&symbol, kernel, found.first(), errors);
                    found.push(Interval { rows_max, kernel, provenance });
                }
                None => right = false,
            }
        }
        if right {
            servings.push(Serving { device, intervals: found });
        }
    }
    servings
}

/// Limits ascend, and only the last interval has none.
fn check_limits(span: Span, intervals: &[IntervalDeclaration], errors: &mut Errors) -> bool {
    if intervals.is_empty() || intervals.len() > INTERVALS_MAX {
        let message = format!("{} intervals; 1 to {INTERVALS_MAX} are possible", intervals.len());
        errors.push(span, message);
        return false;
    }
    let mut below: u64 = 0;
    for (idx, interval) in intervals.iter().enumerate() {
        let is_last = idx + 1 == intervals.len();
        let symbol = &interval.symbol;
        let message = match &interval.rows_max {
            None if is_last => continue,
            None => "`_` before the last interval".to_string(),
            Some(_) if is_last => {
                "the last interval wants `_`: it serves all other row counts".into()
            }
            Some(limit) => match limit.base10_parse::<u64>() {
                Ok(rows) if rows > below => {
                    below = rows;
                    continue;
                }
                _ => format!("the limit {limit} is not above {below}, the one before"),
            },
        };
        errors.push(symbol.span(), message);
        return false;
    }
    true
}

/// A kernel computes what the serving's first does, from the same packed weights.
fn check_kernel(
    symbol: &Ident,
    kernel: &Kernel,
    first: Option<&Interval<'_>>,
    errors: &mut Errors,
) -> bool {
    let Some(Interval { kernel: first, .. }) = first else { return true };
    let what = |kernel: &Kernel| {
        let fields: Vec<String> = kernel.fields.iter().map(text).collect();
        let (target, cols) = (&kernel.target, kernel.cols.base10_digits());
        format!("{} {} {target} {cols}", kernel.op.name, fields.join(" "))
    };
    let is_same = what(first) == what(kernel);
    if !is_same {
        let message = format!("not the op, sizes, target and cols of `{}`", first.symbol);
        errors.push(symbol.span(), message);
    }
    is_same
}

fn text(value: &Value) -> String {
    match value {
        Value::Size(size) => size.base10_digits().to_string(),
        Value::Flag(flag) => flag.value.to_string(),
        Value::Name(name) => name.to_string(),
        Value::Sized(name, size) => format!("{name} {}", size.to_token_stream()),
    }
}
