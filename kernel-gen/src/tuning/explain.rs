//! Explanations: what serves which rows and why, from a lock, and the times behind a decision.

use serde::Serialize;

use super::lock::LockedInterval;
use super::select::{CaseTimes, Decision};
use crate::plan::Provenance;

/// What serves some rows of a spec, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    pub rows_min: usize,
    /// `None`: no limit.
    pub rows_max: Option<usize>,
    /// `None`: there is no kernel.
    pub symbol: Option<String>,
    /// Name of a [`Provenance`], or `missing`.
    pub provenance: &'static str,
    /// Key of the device class that the choice was made on; `None`: any.
    pub chosen_on: Option<String>,
    /// Microseconds; `None` where nothing was measured.
    pub us: Option<f64>,
    pub default_us: Option<f64>,
    pub runner_up: Option<String>,
    pub runner_up_us: Option<f64>,
    /// By how much the runner-up is slower; negative where it is faster, but not by enough.
    pub margin: Option<f64>,
}

impl Explanation {
    /// A kernel of which nothing was measured.
    pub fn unmeasured(
        rows_min: usize,
        rows_max: Option<usize>,
        symbol: String,
        provenance: Provenance,
    ) -> Explanation {
        let provenance = provenance.name();
        let symbol = Some(symbol);
        Explanation { rows_min, rows_max, symbol, provenance, ..Explanation::missing() }
    }

    /// No kernel for any rows.
    pub fn missing() -> Explanation {
        Explanation {
            rows_min: 1,
            rows_max: None,
            symbol: None,
            provenance: "missing",
            chosen_on: None,
            us: None,
            default_us: None,
            runner_up: None,
            runner_up_us: None,
            margin: None,
        }
    }

    /// An interval of a lock's problem that was chosen on the device of a key.
    pub fn locked(rows_min: usize, fact: &LockedInterval, device: &str) -> Explanation {
        let provenance = Provenance::from_name(&fact.provenance).unwrap_or(Provenance::Default);
        let (rows_max, symbol) = (fact.rows_max, fact.symbol.clone());
        Explanation::unmeasured(rows_min, rows_max, symbol, provenance).with_times(fact, device)
    }

    /// With what a lock says that was chosen on the device of a key.
    pub fn with_times(self, fact: &LockedInterval, device: &str) -> Explanation {
        let measured = |us: f64| (us > 0.0).then_some(us);
        Explanation {
            chosen_on: Some(device.to_string()),
            us: measured(fact.us),
            default_us: measured(fact.default_us),
            runner_up: fact.runner_up.clone(),
            runner_up_us: fact.runner_up_us,
            margin: fact.runner_up.as_ref().map(|_| fact.margin),
            ..self
        }
    }

    /// `1`, `2-8` or `9-`
    pub fn rows(&self) -> String {
        match self.rows_max {
            Some(max) if max == self.rows_min => format!("{max}"),
            Some(max) => format!("{}-{max}", self.rows_min),
            None => format!("{}-", self.rows_min),
        }
    }

    /// As text.
    pub fn line(&self) -> String {
        let symbol = self.symbol.as_deref().unwrap_or("no kernel");
        let mut text = format!("  rows {:8} {:11} {symbol}", self.rows(), self.provenance);
        if let (Some(us), Some(default_us)) = (self.us, self.default_us) {
            text.push_str(&format!(" {us:.1} µs, default {default_us:.1} µs"));
        }
        if let (Some(symbol), Some(margin)) = (&self.runner_up, self.margin) {
            text.push_str(&format!(", {symbol} {:+.1} %", margin * 100.0));
        }
        text + "\n"
    }
}

/// The times behind a decision as text; of `case` alone where it is given.
pub fn print(decision: &Decision, case: Option<&str>) -> String {
    let Decision { spec, target, device, cases, rejected, cost, is_predicted } = decision;
    let (unit, source) = match is_predicted {
        true => ("times the default's", ", predicted from other problems"),
        false => ("µs", ""),
    };
    let mut text = format!(
        "{spec} for {target} on {device}: {:.1} % of the default's time{source}\n",
        cost * 100.0
    );
    for times in cases.iter().filter(|times| case.is_none_or(|case| times.case == case)) {
        print_case(times, unit, &mut text);
    }
    for (symbol, reason) in rejected {
        text.push_str(&format!("  rejected {symbol}: {reason}\n"));
    }
    text
}

fn print_case(times: &CaseTimes, unit: &str, text: &mut String) {
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
        text.push_str(&format!("    {us:10.2} {unit} {gain:+6.1} %  {symbol}  {why}\n"));
    }
}
