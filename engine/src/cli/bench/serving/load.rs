//! Requests to a server in time: so many at once, or so many a second.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout_at};

use super::body::Bodies;
use super::client::{Client, Exchange, Failure};
use crate::cli::bench::samples::Samples;
use crate::sampling::uniform;

/// When requests start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Pace {
    /// When another one has ended.
    Closed,
    /// So many a second, at random times; infinity: all at once.
    Open { rate: f64 },
}

/// How a measurement runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) pace: Pace,
    /// Requests that are under way at once, at most.
    pub(super) concurrency: usize,
    pub(super) num_requests: usize,
    pub(super) seed: u64,
}

/// Failures of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Failures {
    pub(super) count: usize,
    /// The first one.
    pub(super) example: String,
}

/// Bounds on the times of one request, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Goodput {
    pub(super) ttft: Option<f64>,
    /// The mean behind the first token.
    pub(super) tpot: Option<f64>,
    pub(super) e2e: Option<f64>,
}

/// What was measured.
#[derive(Default)]
pub(super) struct Measurement {
    pub(super) elapsed: Duration,
    /// Requests that were sent.
    pub(super) num_sent: usize,
    pub(super) num_completed: usize,
    /// Completed requests within the bounds that were asked for.
    pub(super) num_good: usize,
    pub(super) num_prompt: usize,
    pub(super) num_cached: usize,
    pub(super) num_output: usize,
    /// By kind.
    pub(super) failures: BTreeMap<String, Failures>,
    /// Nobody listens any longer.
    pub(super) is_gone: bool,
    /// How late the latest request started, because too many were under way.
    pub(super) lag_max: Duration,
    /// All in milliseconds.
    pub(super) ttft: Samples,
    pub(super) tpot: Samples,
    pub(super) request_tpot: Samples,
    pub(super) e2e: Samples,
}

/// Sends the requests of `plan`; `on_end` hears how many have ended.
pub(super) async fn run(
    client: &Arc<Client>,
    bodies: &Arc<Bodies>,
    plan: &Plan,
    goodput: &Goodput,
    on_end: &mut dyn FnMut(usize),
) -> Measurement {
    let mut measurement = Measurement::default();
    let mut live = JoinSet::new();
    let mut num_ended = 0;
    let start = Instant::now();
    let mut due = Duration::ZERO;
    loop {
        let is_over = measurement.num_sent == plan.num_requests || measurement.is_gone;
        let now = start.elapsed();
        if !is_over && live.len() < plan.concurrency && due <= now {
            if matches!(plan.pace, Pace::Open { .. }) {
                measurement.lag_max = measurement.lag_max.max(now - due);
            }
            let idx = measurement.num_sent;
            let (client, bodies) = (Arc::clone(client), Arc::clone(bodies));
            live.spawn(async move {
                let (body, max_tokens) = bodies.body(idx);
                client.exchange(bodies.endpoint(), body, max_tokens).await
            });
            measurement.num_sent += 1;
            due += plan.gap(measurement.num_sent);
            continue;
        }
        let next = if is_over || live.len() == plan.concurrency {
            live.join_next().await
        } else {
            let at = (start + due).into();
            match timeout_at(at, live.join_next()).await {
                Ok(None) => {
                    sleep_until(at).await;
                    continue;
                }
                Ok(next) => next,
                Err(_) => continue,
            }
        };
        match next {
            None => break,
            Some(ended) => {
                let result = ended.unwrap_or_else(|error| {
                    Err(Failure::Stream(format!("the client failed: {error}")))
                });
                measurement.record(result, goodput);
                num_ended += 1;
                on_end(num_ended);
            }
        }
    }
    measurement.elapsed = start.elapsed();
    measurement
}

impl Plan {
    /// Time between the starts of request `idx` and of the one before.
    fn gap(&self, idx: usize) -> Duration {
        match self.pace {
            Pace::Open { rate } if rate.is_finite() => {
                // Exponential, so that arrivals are a Poisson process.
                let seconds = -(1.0 - uniform(!self.seed, idx as u64)).ln() / rate;
                // NOTE: no rate that is accepted leads to more than a day.
                Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(86_400))
            }
            _ => Duration::ZERO,
        }
    }
}

impl Measurement {
    fn record(&mut self, result: Result<Exchange, Failure>, goodput: &Goodput) {
        let exchange = match result {
            Ok(exchange) => exchange,
            Err(failure) => {
                self.is_gone |= failure == Failure::Refused;
                let example = failure.to_string();
                let failures = self.failures.entry(failure.kind());
                failures.or_insert(Failures { count: 0, example }).count += 1;
                return;
            }
        };
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let Exchange { usage, .. } = exchange;
        self.num_completed += 1;
        self.num_prompt += usage.prompt_tokens;
        self.num_output += usage.completion_tokens;
        self.num_cached += usage.prompt_tokens_details.unwrap_or_default().cached_tokens;
        let (ttft, e2e) = (milliseconds(exchange.ttft), milliseconds(exchange.total));
        self.ttft.push(ttft);
        self.e2e.push(e2e);
        exchange.gaps.iter().for_each(|gap| self.tpot.push(milliseconds(*gap)));
        let tpot = (usage.completion_tokens > 1)
            .then(|| milliseconds(exchange.text_time) / (usage.completion_tokens - 1) as f64);
        tpot.into_iter().for_each(|tpot| self.request_tpot.push(tpot));
        let is_within = |value: f64, bound: Option<f64>| bound.is_none_or(|bound| value <= bound);
        let is_good = is_within(ttft, goodput.ttft)
            && is_within(tpot.unwrap_or(0.0), goodput.tpot)
            && is_within(e2e, goodput.e2e);
        self.num_good += usize::from(is_good);
    }

    pub(super) fn num_failed(&self) -> usize {
        self.failures.values().map(|failures| failures.count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rate: f64, seed: u64) -> Plan {
        Plan { pace: Pace::Open { rate }, concurrency: 1, num_requests: 1, seed }
    }

    #[test]
    fn arrivals_are_exponential_and_a_seed_decides_them() {
        let gaps = |rate, seed| -> Vec<f64> {
            (0..20_000).map(|idx| plan(rate, seed).gap(idx).as_secs_f64()).collect()
        };
        let found = gaps(50.0, 1);
        assert_eq!(found, gaps(50.0, 1));
        assert_ne!(found, gaps(50.0, 2));
        // The mean of n gaps is 1/rate ± 1/(rate·√n); four times that is never exceeded.
        let mean = found.iter().sum::<f64>() / found.len() as f64;
        assert!((mean - 0.02).abs() < 4.0 * 0.02 / (found.len() as f64).sqrt(), "{mean}");
        // 1/e of them are longer than the mean.
        let share = found.iter().filter(|gap| **gap > 0.02).count() as f64 / found.len() as f64;
        assert!((share - (-1.0f64).exp()).abs() < 0.02, "{share}");
        assert_eq!(plan(f64::INFINITY, 1).gap(3), Duration::ZERO);
    }

    #[test]
    fn requests_and_failures_are_counted() {
        let mut measurement = Measurement::default();
        let usage = |completion_tokens| super::super::events::Usage {
            prompt_tokens: 5,
            completion_tokens,
            prompt_tokens_details: None,
        };
        let exchange = |ttft, num_tokens| Exchange {
            ttft: Duration::from_millis(ttft),
            gaps: vec![Duration::from_millis(2); num_tokens - 1],
            text_time: Duration::from_millis(2 * (num_tokens as u64 - 1)),
            total: Duration::from_millis(ttft + 10),
            usage: usage(num_tokens),
        };
        let goodput = Goodput { ttft: Some(20.0), ..Goodput::default() };
        measurement.record(Ok(exchange(10, 3)), &goodput);
        measurement.record(Ok(exchange(30, 1)), &goodput);
        for message in ["first", "second"] {
            let failure = Failure::Status { status: 429, message: message.to_owned() };
            measurement.record(Err(failure), &goodput);
        }
        assert!(!measurement.is_gone);
        measurement.record(Err(Failure::Refused), &goodput);
        assert!(measurement.is_gone);
        assert_eq!((measurement.num_completed, measurement.num_good), (2, 1));
        assert_eq!((measurement.num_prompt, measurement.num_output), (10, 4));
        assert_eq!(measurement.num_failed(), 3);
        let expected = Failures { count: 2, example: "status 429: first".to_owned() };
        assert_eq!(measurement.failures["status 429"], expected);
        assert_eq!(measurement.tpot.summary().mean, Some(2.0));
        assert_eq!(measurement.request_tpot.summary().max, Some(2.0));
    }
}
