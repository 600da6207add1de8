//! What a measurement tells, as JSON and for people.

use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde::Serialize;

use super::Mode;
use super::measurement::Measurement;
use super::samples::Summary;
use crate::backend::KernelUsage;
use crate::cli::generate::{Memory, round};
use crate::engine::Engine;
use crate::files::human_bytes;

/// The JSON of the command.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    pub(super) model: &'a str,
    pub(super) backend: &'static str,
    pub(super) seed: u64,
    #[serde(flatten)]
    pub(super) last: &'a Point,
    pub(super) points: &'a [Point],
}

/// Lengths and concurrency, and what was measured with them. Rates are per second.
#[derive(Clone, Serialize)]
pub(super) struct Point {
    mode: Mode,
    /// What the lengths are: `128 → 128 tokens`, `chats`, `trace`.
    #[serde(skip)]
    source: String,
    #[serde(skip)]
    pub(super) backend: &'static str,
    /// Of one request; the mean where they differ, as for `max_tokens`.
    prompt_tokens: usize,
    max_tokens: usize,
    concurrency: usize,
    requests: usize,
    prompt_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    output_tokens_per_s: Option<f64>,
    total_tokens_per_s: Option<f64>,
    requests_per_s: Option<f64>,
    requests_per_min: Option<f64>,
    ttft_ms: Summary,
    tpot_ms: Summary,
    elapsed_s: f64,
    total_prompt_tokens: usize,
    total_output_tokens: usize,
    cached_tokens: usize,
    preemptions: u64,
    memory: Memory,
    /// Of a sample of steps; empty unless it was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kernels: Vec<KernelUsage>,
}

/// What a point is called.
pub(super) struct Setting {
    pub(super) mode: Mode,
    pub(super) source: String,
    pub(super) concurrency: usize,
}

/// `None` where there was nothing to count.
pub(super) fn rate(count: usize, time: Duration) -> Option<f64> {
    (count > 0).then(|| round(count as f64 / time.as_secs_f64().max(1e-9)))
}

impl Point {
    /// `engine` has run nothing but the measurement and its warm-up.
    pub(super) fn new(setting: Setting, measured: &Measurement, engine: &Engine) -> Point {
        let Setting { mode, source, concurrency } = setting;
        let Measurement { elapsed, num_requests, num_prompt, num_output, .. } = *measured;
        let (prompt_rate, decode_rate) = match mode {
            Mode::Latency => (
                rate(num_prompt, measured.prompt_time),
                rate(measured.num_decoded, elapsed.saturating_sub(measured.prompt_time)),
            ),
            _ => (rate(num_prompt, elapsed), rate(num_output, elapsed)),
        };
        let mean = |total: usize| (total as f64 / num_requests.max(1) as f64).round() as usize;
        Point {
            mode,
            source,
            backend: engine.backend_name(),
            prompt_tokens: mean(num_prompt),
            max_tokens: mean(num_output),
            concurrency,
            requests: num_requests,
            prompt_tokens_per_s: prompt_rate,
            decode_tokens_per_s: decode_rate,
            output_tokens_per_s: rate(num_output, elapsed),
            total_tokens_per_s: rate(num_prompt + num_output, elapsed),
            requests_per_s: rate(num_requests, elapsed),
            requests_per_min: rate(60 * num_requests, elapsed),
            ttft_ms: measured.ttft.summary(),
            tpot_ms: measured.tpot.summary(),
            elapsed_s: round(elapsed.as_secs_f64()),
            total_prompt_tokens: num_prompt,
            total_output_tokens: num_output,
            cached_tokens: measured.num_cached,
            preemptions: engine.status().num_preemptions,
            memory: Memory::of(engine),
            kernels: Vec::new(),
        }
    }

    /// The same with the times of kernels, of which the slowest come first.
    pub(super) fn with_kernels(self, mut kernels: Vec<KernelUsage>) -> Point {
        kernels.sort_by(|left, right| right.seconds.total_cmp(&left.seconds));
        Point { kernels, ..self }
    }

    /// The table of one point.
    pub(super) fn text(&self) -> String {
        let mut table = new_table(&["ms", "mean", "min", "max", "p50", "p75", "p95", "p99"]);
        for (name, summary) in [("first token", &self.ttft_ms), ("per token", &self.tpot_ms)] {
            let Summary { mean, min, max, p50, p75, p95, p99 } = *summary;
            let values = [mean, min, max, p50, p75, p95, p99].map(|value| number(value, 2));
            table.add_row([vec![name.to_owned()], values.to_vec()].concat());
        }
        let memory = &self.memory;
        format!(
            "\n{}, {} at once, {} requests in {:.1} s\n{table}\n\
             tokens/s: {} prompt, {} decode, {} output, {} in all; requests: {}/s, {}/min\n\
             tokens: {} prompt ({} cached), {} output; preemptions: {}\n\
             memory: {} weights, {} KV cache, {} peak\n",
            self.source,
            self.concurrency,
            self.requests,
            self.elapsed_s,
            number(self.prompt_tokens_per_s, 1),
            number(self.decode_tokens_per_s, 1),
            number(self.output_tokens_per_s, 1),
            number(self.total_tokens_per_s, 1),
            number(self.requests_per_s, 3),
            number(self.requests_per_min, 1),
            self.total_prompt_tokens,
            self.cached_tokens,
            self.total_output_tokens,
            self.preemptions,
            human_bytes(memory.weights_bytes as u64),
            human_bytes(memory.kv_cache_bytes as u64),
            memory.peak_rss_bytes.map_or("-".to_owned(), human_bytes),
        ) + &self.kernels_text()
    }

    /// A line for each kernel, with its share of the time; nothing where there are none.
    fn kernels_text(&self) -> String {
        if self.kernels.is_empty() {
            return String::new();
        }
        let mut table = new_table(&["kernel", "calls", "us", "limit us", "bound", "of time"]);
        let total: f64 = self.kernels.iter().map(|kernel| kernel.seconds).sum();
        for kernel in &self.kernels {
            let us = |seconds: f64| number(Some(seconds * 1e6 / kernel.num_calls as f64), 1);
            table.add_row([
                kernel.symbol.to_owned(),
                kernel.num_calls.to_string(),
                us(kernel.seconds),
                us(kernel.limit_seconds),
                kernel.bound.to_owned(),
                format!("{:.1} %", 100.0 * kernel.seconds / total),
            ]);
        }
        format!("{table}\n")
    }
}

/// All points, a line each.
pub(super) fn overview(points: &[Point]) -> String {
    let mut table = new_table(&[
        "lengths",
        "at once",
        "prompt/s",
        "decode/s",
        "output/s",
        "requests/s",
        "first p50 ms",
        "token p50 ms",
        "token p99 ms",
    ]);
    for point in points {
        table.add_row([
            point.source.clone(),
            point.concurrency.to_string(),
            number(point.prompt_tokens_per_s, 1),
            number(point.decode_tokens_per_s, 1),
            number(point.output_tokens_per_s, 1),
            number(point.requests_per_s, 3),
            number(point.ttft_ms.p50, 1),
            number(point.tpot_ms.p50, 2),
            number(point.tpot_ms.p99, 2),
        ]);
    }
    format!("\n{table}\n")
}

pub(super) fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header);
    table
}

pub(super) fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.decimals$}"))
}
