//! What the dashboard shows: the engine's state and counters as one JSON object.
//!
//! Most of it is what the engine's thread has published after its last step. The kernels have to be
//! asked for: any number of dashboards cost the engine one short call at a time, and while it is
//! busy with a step, they get what it said last.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::app::App;
use super::{Access, Route};
use crate::backend::KernelUsage;
use crate::engine::Engine;
use crate::handle::EngineState;

/// How long an answer waits for a step to end.
const CALL_TIME: Duration = Duration::from_millis(500);

/// Name of a latency here, and of its histogram among the metrics.
const LATENCIES: [(&str, &str); 4] = [
    ("first_token", "bespoke_time_to_first_token_seconds"),
    ("between_tokens", "bespoke_inter_token_seconds"),
    ("request", "bespoke_request_time_seconds"),
    ("step", "bespoke_step_time_seconds"),
];

/// `/dashboard/data`.
#[derive(Debug, Serialize)]
struct Data {
    model: String,
    version: &'static str,
    backend: &'static str,
    state: &'static str,
    uptime_s: f64,
    max_context: usize,
    requests: Requests,
    pages: Pages,
    preemptions: u64,
    sessions: usize,
    steps: u64,
    /// As the engine makes them.
    output_tokens: u64,
    /// Of requests that have ended.
    prompt_tokens: u64,
    /// Of those, the ones that the KV cache had.
    cached_tokens: u64,
    latencies: BTreeMap<&'static str, Buckets>,
    /// `null` before the engine has first been asked, and when it has ended.
    engine: Option<EngineData>,
}

#[derive(Debug, Serialize)]
struct Requests {
    running: usize,
    waiting: usize,
    /// Tokens of their prompts.
    waiting_tokens: usize,
    accepted: u64,
    finished: u64,
    cancelled: u64,
    refused: u64,
}

/// A histogram: `counts` has one bucket more than `bounds_s`, for what is above all of them.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Buckets {
    bounds_s: Vec<f64>,
    counts: Vec<u64>,
}

/// What only the engine's thread knows.
#[derive(Clone, Debug, Serialize)]
struct EngineData {
    /// Tokens of a page.
    page_size: usize,
    weights_bytes: usize,
    kv_cache_bytes: usize,
    kernels: Vec<KernelUsage>,
}

#[derive(Debug, Serialize)]
struct Pages {
    total: usize,
    free: usize,
    active: usize,
    cached: usize,
}

/// The engine's last answer.
struct Recent {
    data: Mutex<Option<EngineData>>,
    /// Taken by whoever asks the engine.
    asking: Arc<Semaphore>,
    start: Instant,
}

pub(super) fn routes() -> Vec<Route> {
    let recent = Arc::new(Recent {
        data: Mutex::new(None),
        asking: Arc::new(Semaphore::new(1)),
        start: Instant::now(),
    });
    let data = move |State(app): State<Arc<App>>| async move { data(&app, recent).await };
    vec![Route::new("/dashboard/data", Access::Key).get(data)]
}

async fn data(app: &Arc<App>, recent: Arc<Recent>) -> Json<Data> {
    let uptime_s = recent.start.elapsed().as_secs_f64();
    let engine = recent.ask(app).await;
    let stats = app.handle.stats();
    let (status, pages) = (stats.status, stats.status.pages);
    let metrics = app.metrics.encode();
    let counter = |name: &str| samples(&metrics, name).next().map_or(0, |(_, count)| count);
    let latency = |(name, of_metric)| (name, Buckets::read(&metrics, of_metric));
    Json(Data {
        model: app.model.name.clone(),
        version: env!("CARGO_PKG_VERSION"),
        backend: app.model.backend,
        state: state_name(app),
        uptime_s,
        max_context: app.model.max_context,
        requests: Requests {
            running: stats.num_running,
            waiting: stats.num_waiting,
            waiting_tokens: stats.num_waiting_tokens,
            accepted: stats.num_accepted,
            finished: stats.counts.num_finished,
            cancelled: stats.counts.num_cancelled,
            refused: stats.counts.num_refused,
        },
        pages: Pages {
            total: pages.free + pages.active + pages.cached,
            free: pages.free,
            active: pages.active,
            cached: pages.cached,
        },
        preemptions: status.num_preemptions,
        sessions: status.num_sessions,
        steps: stats.counts.num_steps,
        output_tokens: stats.counts.num_tokens,
        prompt_tokens: counter("bespoke_prompt_tokens_total"),
        cached_tokens: counter("bespoke_prefix_cache_hit_tokens_total"),
        latencies: LATENCIES.into_iter().map(latency).collect(),
        engine,
    })
}

fn state_name(app: &App) -> &'static str {
    match app.handle.state() {
        EngineState::Running if app.lifecycle.is_draining() => "draining",
        EngineState::Running => "running",
        EngineState::Draining => "draining",
        EngineState::Stopped => "stopped",
        EngineState::Dead(_) => "dead",
    }
}

impl Recent {
    /// Asks the engine, unless that has been done and it has not answered yet; what it said last.
    async fn ask(self: Arc<Recent>, app: &Arc<App>) -> Option<EngineData> {
        if let Ok(permit) = Arc::clone(&self.asking).try_acquire_owned() {
            let (recent, app) = (Arc::clone(&self), Arc::clone(app));
            let asking = tokio::spawn(async move {
                let data = app.call(EngineData::of).await;
                recent.set(data.ok());
                drop(permit);
            });
            // NOTE: a step that takes longer goes on; its answer is the next one's.
            let _ = tokio::time::timeout(CALL_TIME, asking).await;
        }
        self.data.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, data: Option<EngineData>) {
        *self.data.lock().unwrap_or_else(PoisonError::into_inner) = data;
    }
}

impl EngineData {
    /// The first time, measuring the machine's limits takes the engine some tenths of a second.
    fn of(engine: &mut Engine) -> EngineData {
        // NOTE: limits that cannot be measured leave the list empty; all else is still true.
        let mut kernels = engine.kernel_usage().unwrap_or_default();
        kernels.sort_by(|left, right| right.seconds.total_cmp(&left.seconds));
        let memory = engine.memory();
        EngineData {
            page_size: engine.shape().page_size,
            weights_bytes: memory.weights_bytes,
            kv_cache_bytes: memory.kv_cache_bytes,
            kernels,
        }
    }
}

impl Buckets {
    /// The histogram `name` of a metrics text, whose buckets count all below them, too.
    fn read(metrics: &str, name: &str) -> Buckets {
        let mut buckets = Buckets::default();
        let mut below = 0;
        for (label, count) in samples(metrics, &format!("{name}_bucket{{le=")) {
            let bound: f64 = label.trim_matches(['"', '}']).parse().unwrap_or(f64::INFINITY);
            if bound.is_finite() {
                buckets.bounds_s.push(bound);
            }
            buckets.counts.push(count.saturating_sub(below));
            below = count;
        }
        buckets
    }
}

/// Lines of a metrics text that begin with `start`: what follows it up to a space, and the number.
/// The text is the only place that can be asked: the counters themselves are write-only.
fn samples<'a>(metrics: &'a str, start: &'a str) -> impl Iterator<Item = (&'a str, u64)> {
    metrics.lines().filter_map(move |line| {
        let (label, count) = line.strip_prefix(start)?.split_once(' ')?;
        Some((label, count.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_their_own() {
        let text = "# TYPE a_seconds histogram\n\
                    a_seconds_sum 1.5\na_seconds_count 6\n\
                    a_seconds_bucket{le=\"0.5\"} 1\na_seconds_bucket{le=\"2.0\"} 1\n\
                    a_seconds_bucket{le=\"+Inf\"} 6\nab_seconds_bucket{le=\"1.0\"} 9\n\
                    a_total 7\n";
        let expected = Buckets { bounds_s: vec![0.5, 2.0], counts: vec![1, 0, 5] };
        assert_eq!(Buckets::read(text, "a_seconds"), expected);
        assert_eq!(Buckets::read(text, "b_seconds"), Buckets::default());
        assert_eq!(samples(text, "a_total").next(), Some(("", 7)));
        assert_eq!(samples(text, "a_tot").next(), Some(("al", 7)));
    }
}
