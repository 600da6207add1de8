//! Metrics as a scraper reads them, and what has moved between two scrapes.

use std::collections::BTreeMap;

/// Samples by name and labels, as `name{label="value"}`.
pub type Samples = BTreeMap<String, f64>;

/// The samples of an OpenMetrics text.
pub fn parse(text: &str) -> Samples {
    assert!(text.ends_with("# EOF\n"), "the text is cut off: {text}");
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            (name.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}

/// Counters of what went wrong, or that somebody went away: those of these families, and requests
/// by every outcome but the good one.
const FAMILIES: [&str; 11] = [
    "bespoke_requests_total",
    "bespoke_rejections_total",
    "bespoke_worker_failures_total",
    "bespoke_connection_ends_total",
    "bespoke_handler_panics_total",
    "bespoke_sessions_expired_total",
    "bespoke_engine_cancelled_total",
    "bespoke_engine_refused_total",
    "bespoke_engine_died_total",
    "bespoke_nan_rows_total",
    "bespoke_engine_preemptions_total",
];

/// The counters of trouble that differ, with by how much.
pub fn moved(before: &Samples, after: &Samples) -> Samples {
    let is_trouble = |sample: &str| {
        let family = sample.split('{').next().unwrap_or(sample);
        FAMILIES.contains(&family) && !sample.contains("outcome=\"finished\"")
    };
    let change = |(sample, value): (&String, &f64)| {
        let change = value - before.get(sample).copied().unwrap_or(0.0);
        (is_trouble(sample) && change != 0.0).then(|| (sample.clone(), change))
    };
    after.iter().filter_map(change).collect()
}
