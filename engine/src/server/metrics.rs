//! What a server counts, for Prometheus. Labels come from fixed sets, never from a client.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bespoke_kernel_gen::plan::Provenance;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
    NoLabelSet, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::app::{App, ServedModel};
use super::listener::Activity;
use super::workers::Work;
use super::{Access, Route};
use crate::handle::{EngineHandle, StepTimes};

/// Counters, gauges and histograms of one server. Clones count into the same ones.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    http_requests: Family<HttpLabels, Counter>,
    requests: Family<OutcomeLabels, Counter>,
    requests_open: Gauge,
    rejections: Family<RejectionLabels, Counter>,
    worker_failures: Family<WorkerLabels, Counter>,
    connections: Gauge,
    connection_ends: Family<ConnectionLabels, Counter>,
    panics: Counter,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    output_tokens: Counter,
    sessions_expired: Counter,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
}

/// Names a value of a label.
trait LabelName: Copy {
    fn name(self) -> &'static str;
}

macro_rules! labels {
    (
        $(#[$doc:meta])*
        $kind:ident { $($(#[$variant_doc:meta])* $variant:ident => $name:literal,)* }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $kind { $($(#[$variant_doc])* $variant,)* }

        impl LabelName for $kind {
            fn name(self) -> &'static str {
                match self { $($kind::$variant => $name,)* }
            }
        }

        impl EncodeLabelValue for $kind {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
                encoder.write_str(self.name())
            }
        }
    };
}

labels! {
    /// Which route generates.
    Endpoint {
        Chat => "chat",
        Completions => "completions",
        Interactive => "interactive",
    }
}

labels! {
    /// How a request that generates ended. Every one ends in exactly one of these ways.
    Outcome {
        /// Every choice has its end.
        Finished => "finished",
        /// The client went away.
        Disconnected => "disconnected",
        /// The client took no data for too long.
        SlowReader => "slow_reader",
        /// The client asked for its end.
        Cancelled => "cancelled",
        /// The server stopped before the end.
        Drained => "drained",
        /// It took longer than a request may.
        TimedOut => "timed_out",
        /// It cannot be served at all.
        Refused => "refused",
        /// Its session was in use.
        Busy => "busy",
        /// Too much waited.
        Overloaded => "overloaded",
        /// The model gave no finite logits.
        Failed => "failed",
        /// The engine died.
        Died => "died",
    }
}

labels! {
    /// Why a request was turned away before its body was read.
    Rejection {
        Unauthorized => "unauthorized",
        WrongHost => "wrong_host",
        TooLarge => "too_large",
        Draining => "draining",
    }
}

labels! {
    /// Why a task of a worker has no result.
    WorkerFailure {
        /// The request is wrong.
        Refused => "refused",
        Panic => "panic",
        Timeout => "timeout",
        /// Too many tasks waited.
        Full => "full",
    }
}

labels! {
    /// Why the server ended a connection, or did not take it.
    ConnectionEnd {
        HeaderTimeout => "header_timeout",
        KeepAliveTimeout => "keep_alive_timeout",
        WriteTimeout => "write_timeout",
        TooMany => "too_many",
        TooManyOfClient => "too_many_of_client",
        /// The system had no file descriptor or memory for another one.
        NoResources => "no_resources",
        /// What came was no HTTP/1.1.
        Malformed => "malformed",
    }
}

labels! {
    /// What a worker did.
    WorkLabel {
        Tokenize => "tokenize",
        Template => "template",
        Grammar => "grammar",
    }
}

impl From<Work> for WorkLabel {
    fn from(work: Work) -> WorkLabel {
        match work {
            Work::Tokenize => WorkLabel::Tokenize,
            Work::Template => WorkLabel::Template,
            Work::Grammar => WorkLabel::Grammar,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpLabels {
    /// The pattern of the route, or `none`.
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    endpoint: Endpoint,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectionLabels {
    reason: Rejection,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabels {
    work: WorkLabel,
    reason: WorkerFailure,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProvenanceLabels {
    provenance: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    reason: ConnectionEnd,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenCounts {
    pub prompt: usize,
    /// Of the prompt, those found in the KV cache.
    pub cached: usize,
    pub output: usize,
}

/// One request that generates, from its acceptance as HTTP to its one outcome. Dropped without
/// [`RequestMeter::end`], it counts as disconnected.
pub struct RequestMeter {
    metrics: Metrics,
    endpoint: Endpoint,
    start: Instant,
    /// When the last token of each choice came.
    last_tokens: Vec<Option<Instant>>,
    has_token: bool,
    counts: TokenCounts,
    outcome: Outcome,
    /// What the answer is sent on.
    connection: Option<Arc<Activity>>,
}

/// Upper bounds of buckets, in seconds.
const FIRST_TOKEN_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
const INTER_TOKEN_BUCKETS: [f64; 14] =
    [2e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5];
const END_TO_END_BUCKETS: [f64; 13] =
    [0.005, 0.01, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];

impl Metrics {
    /// Metrics of a server of `model`, with those of its engine.
    pub fn new(handle: &EngineHandle, model: &ServedModel) -> Metrics {
        let mut inner = Inner {
            registry: Registry::default(),
            http_requests: Family::default(),
            requests: Family::default(),
            requests_open: Gauge::default(),
            rejections: Family::default(),
            worker_failures: Family::default(),
            connections: Gauge::default(),
            connection_ends: Family::default(),
            panics: Counter::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            output_tokens: Counter::default(),
            sessions_expired: Counter::default(),
            time_to_first_token: Histogram::new(FIRST_TOKEN_BUCKETS),
            inter_token: Histogram::new(INTER_TOKEN_BUCKETS),
            end_to_end: Histogram::new(END_TO_END_BUCKETS),
        };
        inner.register();
        inner.register_info(model);
        inner.registry.register_collector(Box::new(EngineCollector { handle: handle.clone() }));
        Metrics { inner: Arc::new(inner) }
    }

    /// A request that generates has come.
    pub fn start_request(&self, endpoint: Endpoint) -> RequestMeter {
        self.inner.requests_open.inc();
        RequestMeter {
            metrics: self.clone(),
            endpoint,
            start: Instant::now(),
            last_tokens: Vec::new(),
            has_token: false,
            counts: TokenCounts::default(),
            outcome: Outcome::Disconnected,
            connection: Activity::current(),
        }
    }

    pub(super) fn http_request(&self, route: &str, status: u16) {
        let labels = HttpLabels { route: route.to_owned(), status };
        self.inner.http_requests.get_or_create(&labels).inc();
    }

    pub(super) fn rejected(&self, reason: Rejection) {
        self.inner.rejections.get_or_create(&RejectionLabels { reason }).inc();
    }

    pub(super) fn worker_failed(&self, work: Work, reason: WorkerFailure) {
        let labels = WorkerLabels { work: work.into(), reason };
        self.inner.worker_failures.get_or_create(&labels).inc();
    }

    pub(super) fn connection_opened(&self) {
        self.inner.connections.inc();
    }

    pub(super) fn connection_closed(&self) {
        self.inner.connections.dec();
    }

    pub(super) fn connection_ended(&self, reason: ConnectionEnd) {
        self.inner.connection_ends.get_or_create(&ConnectionLabels { reason }).inc();
    }

    pub(super) fn handler_panicked(&self) {
        self.inner.panics.inc();
    }

    pub(super) fn sessions_expired(&self, num: usize) {
        self.inner.sessions_expired.inc_by(num as u64);
    }

    /// All metrics as OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        // NOTE: writing to a string cannot fail.
        let _ = text::encode(&mut out, &self.inner.registry);
        out
    }
}

impl Inner {
    fn register(&mut self) {
        let registry = self.registry.sub_registry_with_prefix("bespoke");
        let mut add = |name, help, metric: Box<dyn RegisterInto>| {
            metric.register(registry, name, help);
        };
        add("http_requests", "Requests by route and status", boxed(&self.http_requests));
        add("requests", "Requests that generate, by how they ended", boxed(&self.requests));
        add(
            "requests_open",
            "Requests that generate and have not ended",
            boxed(&self.requests_open),
        );
        add("rejections", "Requests turned away unread", boxed(&self.rejections));
        add(
            "worker_failures",
            "Tasks of tokenizer, template and grammar that failed",
            boxed(&self.worker_failures),
        );
        add("connections", "Open connections", boxed(&self.connections));
        add("connection_ends", "Connections the server ended", boxed(&self.connection_ends));
        add("handler_panics", "Requests over which a handler panicked", boxed(&self.panics));
        add("prompt_tokens", "Tokens of prompts", boxed(&self.prompt_tokens));
        add(
            "prefix_cache_hit_tokens",
            "Tokens of prompts that were found in the KV cache",
            boxed(&self.cached_tokens),
        );
        add("output_tokens", "Generated tokens", boxed(&self.output_tokens));
        add("sessions_expired", "Sessions ended after idle time", boxed(&self.sessions_expired));
        let seconds = [
            ("time_to_first_token", "From request to first token", &self.time_to_first_token),
            ("inter_token", "Between two tokens of a choice", &self.inter_token),
            ("request_time", "From request to its end", &self.end_to_end),
        ];
        for (name, help, histogram) in seconds {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
    }

    fn register_info(&mut self, model: &ServedModel) {
        let info = Info::new(vec![
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("backend", model.backend.to_owned()),
            ("fingerprint", model.fingerprint.clone()),
        ]);
        self.registry.register("bespoke_build", "What is served", info);
        let cache = Info::new(vec![
            ("block_size", model.page_size.to_string()),
            ("num_gpu_blocks", model.num_pages.to_string()),
        ]);
        self.registry.register("vllm:cache_config", "As in vLLM", cache);
        let choices: Family<ProvenanceLabels, Gauge> = Family::default();
        for provenance in Provenance::ALL {
            let num = model.provenances.get(&provenance).copied().unwrap_or(0);
            let labels = ProvenanceLabels { provenance: provenance.name().to_owned() };
            choices.get_or_create(&labels).set(num as i64);
        }
        let help = "Row counts' kernels, by where the choice comes from";
        self.registry.register("bespoke_kernel_choices", help, choices);
    }
}

/// A metric that a registry takes.
trait RegisterInto {
    fn register(self: Box<Self>, registry: &mut Registry, name: &str, help: &str);
}

impl<M: prometheus_client::registry::Metric> RegisterInto for M {
    fn register(self: Box<Self>, registry: &mut Registry, name: &str, help: &str) {
        registry.register(name, help, *self);
    }
}

fn boxed<M: prometheus_client::registry::Metric + Clone>(metric: &M) -> Box<dyn RegisterInto> {
    Box::new(metric.clone())
}

impl RequestMeter {
    /// A token of the choice `choice_idx` has come.
    pub fn token(&mut self, choice_idx: usize) {
        let now = Instant::now();
        let inner = &self.metrics.inner;
        if !std::mem::replace(&mut self.has_token, true) {
            let time = now.duration_since(self.start);
            inner.time_to_first_token.observe(time.as_secs_f64());
        }
        if self.last_tokens.len() <= choice_idx {
            self.last_tokens.resize(choice_idx + 1, None);
        }
        if let Some(last) = self.last_tokens[choice_idx].replace(now) {
            inner.inter_token.observe(now.duration_since(last).as_secs_f64());
        }
        self.counts.output += 1;
    }

    /// Tokens of the prompt, and those of them that the cache had.
    pub fn prompt(&mut self, num_tokens: usize, num_cached: usize) {
        self.counts.prompt = num_tokens;
        self.counts.cached = num_cached;
    }

    /// What was counted so far.
    pub fn counts(&self) -> TokenCounts {
        self.counts
    }

    /// Time since the request came.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// The request has ended.
    pub fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for RequestMeter {
    fn drop(&mut self) {
        let inner = &self.metrics.inner;
        let has_stalled = self.connection.as_ref().is_some_and(|of| of.has_stalled());
        let outcome = match self.outcome {
            Outcome::Disconnected if has_stalled => Outcome::SlowReader,
            outcome => outcome,
        };
        let labels = OutcomeLabels { endpoint: self.endpoint, outcome };
        inner.requests.get_or_create(&labels).inc();
        inner.requests_open.dec();
        inner.prompt_tokens.inc_by(self.counts.prompt as u64);
        inner.cached_tokens.inc_by(self.counts.cached as u64);
        inner.output_tokens.inc_by(self.counts.output as u64);
        inner.end_to_end.observe(self.start.elapsed().as_secs_f64());
    }
}

/// What the engine counts, as of its last step: scraping waits for nothing.
struct EngineCollector {
    handle: EngineHandle,
}

impl fmt::Debug for EngineCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EngineCollector")
    }
}

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stats = self.handle.stats();
        let (counts, pages) = (stats.counts, stats.status.pages);
        let num_pages = pages.free + pages.active + pages.cached;
        let gauges: &[(&str, &str, i64)] = &[
            ("bespoke_engine_running", "Requests with a first token", stats.num_running as i64),
            ("bespoke_engine_waiting", "Requests without one", stats.num_waiting as i64),
            ("bespoke_queue_tokens", "Tokens of prompts", stats.num_waiting_tokens as i64),
            ("bespoke_sessions", "Sessions", stats.status.num_sessions as i64),
            ("bespoke_pages_free", "Pages without content", pages.free as i64),
            ("bespoke_pages_used", "Pages of running requests", pages.active as i64),
            ("bespoke_pages_cached", "Pages that may be used again", pages.cached as i64),
            ("bespoke_pages_total", "Pages of the KV cache", num_pages as i64),
            ("vllm:num_requests_running", "As in vLLM", stats.num_running as i64),
            ("vllm:num_requests_waiting", "As in vLLM", stats.num_waiting as i64),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(*value);
            let kind = gauge.metric_type();
            gauge.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        let counters: &[(&str, &str, u64)] = &[
            ("bespoke_engine_accepted", "Requests taken", stats.num_accepted),
            ("bespoke_engine_finished", "Requests that ended by themselves", counts.num_finished),
            ("bespoke_engine_cancelled", "Requests called off", counts.num_cancelled),
            ("bespoke_engine_refused", "Requests not possible", counts.num_refused),
            ("bespoke_engine_died", "Requests lost with the engine", counts.num_died),
            ("bespoke_engine_steps", "Forward passes", counts.num_steps),
            ("bespoke_preemptions", "Answers that gave way", stats.status.num_preemptions),
            ("bespoke_nan_rows", "Answers without finite logits", counts.num_failed),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(*value);
            let kind = counter.metric_type();
            counter.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        // NOTE: the second is vLLM's older name, which some routers still read.
        for name in ["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"] {
            let usage = ConstGauge::new(pages.active as f64 / num_pages.max(1) as f64);
            let kind = usage.metric_type();
            usage.encode(encoder.encode_descriptor(name, "As in vLLM, 0 to 1", None, kind)?)?;
        }
        encode_steps(&mut encoder, &stats.step_times)
    }
}

/// Step times as a histogram.
fn encode_steps(encoder: &mut DescriptorEncoder<'_>, times: &StepTimes) -> Result<(), fmt::Error> {
    let bounds = StepTimes::BOUNDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(times.nums).collect();
    let (name, help) = ("bespoke_step_time", "Forward passes");
    let kind = MetricType::Histogram;
    let mut metric = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), kind)?;
    let num = times.nums.iter().sum();
    metric.encode_histogram::<NoLabelSet>(times.total.as_secs_f64(), num, &buckets, None)
}

/// `/metrics`.
pub(super) fn routes() -> Vec<Route> {
    vec![Route::new("/metrics", Access::Key).get(scrape)]
}

pub(super) async fn scrape(State(app): State<Arc<App>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.metrics.encode()).into_response()
}
