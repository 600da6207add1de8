//! Explanations: what serves which rows and why, from a lock, and the times behind a decision.

use serde::Serialize;

use super::lock::{Lock, LockedInterval};
use super::select::{CaseTimes, Decision};

/// What a lock says of some rows of a spec.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    pub rows_min: usize,
    /// `None`: no limit.
    pub rows_max: Option<usize>,
    pub symbol: String,
    pub provenance: String,
    pub us: f64,
    pub default_us: f64,
    pub runner_up: Option<String>,
    pub runner_up_us: Option<f64>,
    /// By how much the runner-up is slower; negative where it is faster, but not by enough.
    pub margin: Option<f64>,
}

impl Explanation {
    /// What serves where a lock says nothing.
    pub fn of_default(rows_min: usize, rows_max: Option<usize>, symbol: String) -> Explanation {
        Explanation {
            rows_min,
            rows_max,
            symbol,
            provenance: "default".to_string(),
            us: 0.0,
            default_us: 0.0,
            runner_up: None,
            runner_up_us: None,
            margin: None,
        }
    }

    /// As text.
    pub fn line(&self) -> String {
        let rows = match self.rows_max {
            Some(max) if max == self.rows_min => format!("{max}"),
            Some(max) => format!("{}-{max}", self.rows_min),
            None => format!("{}-", self.rows_min),
        };
        let mut text = format!("  rows {rows:8} {:10} {}", self.provenance, self.symbol);
        if self.us > 0.0 {
            text.push_str(&format!(" {:.1} µs, default {:.1} µs", self.us, self.default_us));
        }
        if let (Some(symbol), Some(margin)) = (&self.runner_up, self.margin) {
            text.push_str(&format!(", {symbol} {:+.1} %", margin * 100.0));
        }
        text + "\n"
    }
}

/// What a lock says of a spec on a target and the device of a key; nothing where it knows none.
pub fn from_lock(lock: &Lock, spec: &str, target: &str, device: &str) -> Vec<Explanation> {
    let found = lock.problems.iter().find(|problem| {
        (&*problem.spec, &*problem.target, &*problem.device) == (spec, target, device)
    });
    let mut rows_min = 1;
    let intervals = found.map(|problem| &*problem.intervals).unwrap_or_default();
    let explained = intervals.iter().map(|interval| {
        let found = explanation(interval, rows_min);
        rows_min = interval.rows_max.map_or(usize::MAX, |rows| rows.saturating_add(1));
        found
    });
    explained.collect()
}

fn explanation(interval: &LockedInterval, rows_min: usize) -> Explanation {
    let margin = |us: f64| (interval.us > 0.0).then_some(us / interval.us - 1.0);
    Explanation {
        rows_min,
        rows_max: interval.rows_max,
        symbol: interval.symbol.clone(),
        provenance: interval.provenance.clone(),
        us: interval.us,
        default_us: interval.default_us,
        runner_up: interval.runner_up.clone(),
        runner_up_us: interval.runner_up_us,
        margin: interval.runner_up_us.and_then(margin),
    }
}

/// The times behind a decision as text; of `case` alone where it is given.
pub fn print(decision: &Decision, case: Option<&str>) -> String {
    let Decision { spec, target, device, cases, rejected, cost } = decision;
    let mut text =
        format!("{spec} for {target} on {device}: {:.1} % of the default's time\n", cost * 100.0);
    for times in cases.iter().filter(|times| case.is_none_or(|case| times.case == case)) {
        print_case(times, &mut text);
    }
    for (symbol, reason) in rejected {
        text.push_str(&format!("  rejected {symbol}: {reason}\n"));
    }
    text
}

fn print_case(times: &CaseTimes, text: &mut String) {
    let CaseTimes { case, default, default_us, noise, limit_us, chosen, times } = times;
    let limit = limit_us.map(|us| format!(", limit {us:.1} µs")).unwrap_or_default();
    text.push_str(&format!("  {case} (noise {:.1} %{limit})\n", noise * 100.0));
    for (symbol, us) in times {
        let gain = (1.0 - us / default_us) * 100.0;
        let why = match (symbol == chosen, symbol == default) {
            (true, true) => "chosen, the default",
            (true, false) => "chosen",
            (false, true) => "the default",
            (false, false) if *us > default_us * (1.0 + noise) => "slower than the default",
            (false, false) if gain < 3.0_f64.max(200.0 * noise) => "within the margin",
            (false, false) => "dearer over its interval, or one kernel too many",
        };
        text.push_str(&format!("    {us:10.2} µs {gain:+6.1} %  {symbol}  {why}\n"));
    }
}
