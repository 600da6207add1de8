//! What a measurement of a server tells, as JSON and for people.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::load::{Failures, Measurement, Pace, Plan};
use crate::cli::bench::report::{new_table, number, rate};
use crate::cli::bench::samples::Summary;
use crate::cli::bench::workload::Lengths;
use crate::cli::generate::round;

/// The JSON of the command.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    pub(super) model: &'a str,
    pub(super) url: String,
    pub(super) seed: u64,
    #[serde(flatten)]
    pub(super) last: &'a Point,
    pub(super) points: &'a [Point],
}

/// What a point is called.
pub(super) struct Setting {
    pub(super) source: String,
    pub(super) plan: Plan,
    pub(super) has_goodput: bool,
}

impl Setting {
    pub(super) fn name(&self) -> String {
        let Plan { pace, concurrency, .. } = self.plan;
        match pace {
            Pace::Closed => format!("{}, {concurrency} at once", self.source),
            Pace::Open { rate } => {
                format!("{}, {rate} a second, at most {concurrency} at once", self.source)
            }
        }
    }
}

/// Lengths and load, and what was measured with them. Rates are per second, times milliseconds.
/// Tokens, rates and times are those of completed requests.
#[derive(Clone, Serialize)]
pub(super) struct Point {
    mode: &'static str,
    #[serde(skip)]
    name: String,
    /// Of one request; the mean where they differ, as for `max_tokens`.
    prompt_tokens: usize,
    max_tokens: usize,
    concurrency: usize,
    /// Null where a request follows another, `"inf"` where all start at once.
    #[serde(serialize_with = "serialize_rate")]
    request_rate: Option<f64>,
    requests: usize,
    completed_requests: usize,
    failed_requests: usize,
    failures: BTreeMap<String, Failures>,
    prompt_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    output_tokens_per_s: Option<f64>,
    total_tokens_per_s: Option<f64>,
    requests_per_s: Option<f64>,
    requests_per_min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    goodput_requests_per_s: Option<f64>,
    ttft_ms: Summary,
    tpot_ms: Summary,
    request_tpot_ms: Summary,
    e2e_ms: Summary,
    elapsed_s: f64,
    /// How late the latest request started, where they start by the clock.
    start_lag_ms_max: f64,
    total_prompt_tokens: usize,
    total_output_tokens: usize,
    cached_tokens: usize,
}

fn serialize_rate<S: Serializer>(rate: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match rate {
        None => serializer.serialize_none(),
        Some(rate) if rate.is_finite() => serializer.serialize_f64(*rate),
        Some(_) => serializer.serialize_str("inf"),
    }
}

impl Point {
    /// `lengths` are those of all requests.
    pub(super) fn new(setting: Setting, measured: &Measurement, lengths: &[Lengths]) -> Point {
        let Measurement { elapsed, num_completed, num_prompt, num_output, .. } = *measured;
        let mean = |part: fn(&Lengths) -> usize| {
            lengths.iter().map(part).sum::<usize>() / lengths.len().max(1)
        };
        let Plan { pace, concurrency, .. } = setting.plan;
        let requests_per_s = rate(num_completed, elapsed);
        Point {
            mode: "serving",
            name: setting.name(),
            prompt_tokens: mean(|lengths| lengths.prompt_tokens),
            max_tokens: mean(|lengths| lengths.max_tokens),
            concurrency,
            request_rate: match pace {
                Pace::Closed => None,
                Pace::Open { rate } => Some(rate),
            },
            requests: measured.num_sent,
            completed_requests: num_completed,
            failed_requests: measured.num_failed(),
            failures: measured.failures.clone(),
            prompt_tokens_per_s: rate(num_prompt, elapsed),
            decode_tokens_per_s: rate(num_output, elapsed),
            output_tokens_per_s: rate(num_output, elapsed),
            total_tokens_per_s: rate(num_prompt + num_output, elapsed),
            requests_per_s,
            requests_per_min: requests_per_s.map(|rate| round(60.0 * rate)),
            goodput_requests_per_s: setting
                .has_goodput
                .then(|| rate(measured.num_good, elapsed).unwrap_or(0.0)),
            ttft_ms: measured.ttft.summary(),
            tpot_ms: measured.tpot.summary(),
            request_tpot_ms: measured.request_tpot.summary(),
            e2e_ms: measured.e2e.summary(),
            elapsed_s: round(elapsed.as_secs_f64()),
            start_lag_ms_max: round(measured.lag_max.as_secs_f64() * 1e3),
            total_prompt_tokens: num_prompt,
            total_output_tokens: num_output,
            cached_tokens: measured.num_cached,
        }
    }

    /// The table of one point.
    pub(super) fn text(&self) -> String {
        let mut table = new_table(&["ms", "mean", "min", "max", "p50", "p75", "p95", "p99"]);
        for (name, summary) in [
            ("first token", &self.ttft_ms),
            ("per token", &self.tpot_ms),
            ("per token of a request", &self.request_tpot_ms),
            ("request", &self.e2e_ms),
        ] {
            let Summary { mean, min, max, p50, p75, p95, p99 } = *summary;
            let values = [mean, min, max, p50, p75, p95, p99].map(|value| number(value, 2));
            table.add_row([vec![name.to_owned()], values.to_vec()].concat());
        }
        let mut text = format!(
            "\n{}, {} requests in {:.1} s\n{table}\n\
             tokens/s: {} prompt, {} completion, {} prompt + completion; \
             requests: {}/s, {}/min\n\
             tokens: {} prompt ({} cached), {} completion\n\
             requests: {} completed, {} failed\n",
            self.name,
            self.requests,
            self.elapsed_s,
            number(self.prompt_tokens_per_s, 1),
            number(self.output_tokens_per_s, 1),
            number(self.total_tokens_per_s, 1),
            number(self.requests_per_s, 3),
            number(self.requests_per_min, 1),
            self.total_prompt_tokens,
            self.cached_tokens,
            self.total_output_tokens,
            self.completed_requests,
            self.failed_requests,
        );
        for (kind, Failures { count, example }) in &self.failures {
            text.push_str(&format!("failed: {count} × {kind}, the first: {example}\n"));
        }
        if let Some(goodput) = self.goodput_requests_per_s {
            text.push_str(&format!("goodput: {goodput:.3} requests/s\n"));
        }
        if self.request_rate.is_some() {
            text.push_str(&format!("latest start: {:.1} ms late\n", self.start_lag_ms_max));
        }
        text
    }
}

/// All points, a line each.
pub(super) fn overview(points: &[Point]) -> String {
    let mut table = new_table(&[
        "load",
        "completion/s",
        "requests/s",
        "failed",
        "first p50 ms",
        "first p99 ms",
        "token p50 ms",
        "token p99 ms",
    ]);
    for point in points {
        table.add_row([
            point.name.clone(),
            number(point.output_tokens_per_s, 1),
            number(point.requests_per_s, 3),
            point.failed_requests.to_string(),
            number(point.ttft_ms.p50, 1),
            number(point.ttft_ms.p99, 1),
            number(point.tpot_ms.p50, 2),
            number(point.tpot_ms.p99, 2),
        ]);
    }
    format!("\n{table}\n")
}
