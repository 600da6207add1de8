//! `bespoke bench --mode serving`: what a server gives under load, measured by a client.

mod body;
mod client;
mod events;
mod load;
mod report;
mod url;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use hyper::header::HeaderValue;
use serde::Deserialize;

use super::workload::{Lengths, Source, Workload};
use super::{Args, CONCURRENCY_MAX, COUNT_MAX, count};
use crate::cli::console::Console;
use crate::cli::progress::Meter;
use crate::cli::prompt::read_text;
use body::{Bodies, Endpoint};
use client::{Client, Failure};
use load::{Goodput, Measurement, Pace, Plan};
use report::{Point, Report, Setting, overview};
use url::ServerUrl;

/// Options that only this mode has.
#[derive(clap::Args)]
pub(super) struct ServingArgs {
    /// serving: address of the server, such as http://127.0.0.1:23333
    #[arg(long, value_name = "URL")]
    url: Option<ServerUrl>,
    /// serving: file with API keys, of which the first is sent [default: none]
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// serving: requests a second; inf sends all at once; a list measures each
    #[arg(long, value_name = "R,…", value_delimiter = ',', value_parser = parse_rate)]
    request_rate: Vec<f64>,
    /// serving: where requests go [default: completions]
    #[arg(long, value_enum)]
    endpoint: Option<Endpoint>,
    /// serving: prompts are of token ids below N [default: what the server says, or 256]
    #[arg(long, value_name = "N", value_parser = count(COUNT_MAX))]
    vocab_size: Option<usize>,
    /// serving: seconds without any byte after which a request has failed [default: 120]
    #[arg(long, value_name = "S", value_parser = parse_timeout)]
    timeout: Option<Duration>,
    /// serving: also count the requests within these milliseconds, of ttft, tpot (its mean in one
    /// request) and e2e, such as ttft=500,tpot=50
    #[arg(long, value_name = "NAME=MS,…", value_parser = Goodput::from_str)]
    goodput: Option<Goodput>,
}

const TIMEOUT: Duration = Duration::from_secs(120);

/// Every vocabulary has so many tokens.
const VOCAB_SIZE: usize = 256;

/// A request to see that the server answers.
const WARM_UP: Lengths = Lengths { prompt_tokens: 4, max_tokens: 4 };

impl ServingArgs {
    /// The options and whether they were given.
    pub(super) fn given(&self) -> [(&'static str, bool); 7] {
        [
            ("--url", self.url.is_some()),
            ("--api-key-file", self.api_key_file.is_some()),
            ("--request-rate", !self.request_rate.is_empty()),
            ("--endpoint", self.endpoint.is_some()),
            ("--vocab-size", self.vocab_size.is_some()),
            ("--timeout", self.timeout.is_some()),
            ("--goodput", self.goodput.is_some()),
        ]
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate >= 0.001 => Ok(rate),
        _ => Err("expected a number of at least 0.001, or inf".to_owned()),
    }
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) if (0.001..=86_400.0).contains(&seconds) => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err("expected seconds from 0.001 to 86400".to_owned()),
    }
}

impl FromStr for Goodput {
    type Err = String;

    fn from_str(text: &str) -> Result<Goodput, String> {
        let mut goodput = Goodput::default();
        for part in text.split(',') {
            let bound = part.split_once('=').and_then(|(name, bound)| {
                let bound = bound.trim().parse().ok().filter(|bound: &f64| *bound > 0.0)?;
                Some((name.trim(), bound))
            });
            match bound {
                Some(("ttft", bound)) => goodput.ttft = Some(bound),
                Some(("tpot", bound)) => goodput.tpot = Some(bound),
                Some(("e2e", bound)) => goodput.e2e = Some(bound),
                _ => return Err(format!("'{part}' is not ttft, tpot or e2e=MILLISECONDS")),
            }
        }
        Ok(goodput)
    }
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let Some(url) = args.serving.url.clone() else {
        bail!("--mode serving needs --url, such as --url http://127.0.0.1:23333");
    };
    let authorization = args.serving.api_key_file.as_deref().map(authorization).transpose()?;
    let timeout = args.serving.timeout.unwrap_or(TIMEOUT);
    let client = Arc::new(Client::new(url, authorization, timeout));
    // NOTE: one thread: a client with more would take cores from a server on the same machine.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start the client")?;
    runtime.block_on(async {
        let server = Server::ask(args, &client).await?;
        Bench { args, client, server }.run(console).await
    })
}

/// The header that carries the first key of a file, which may be the server's own.
fn authorization(path: &Path) -> anyhow::Result<HeaderValue> {
    let text = read_text(path)?;
    let mut lines = text.lines().map(str::trim);
    let line = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
    let line = line.with_context(|| format!("{}: no key in it", path.display()))?;
    let key = line.split_once(':').map_or(line, |(_name, key)| key.trim());
    let mut value = HeaderValue::try_from(format!("Bearer {key}"))
        .map_err(|_| anyhow!("{}: the key has characters that no key has", path.display()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// What the server says of its model.
struct Server {
    model: String,
    vocab_size: usize,
    max_context: usize,
}

/// `/v1/models`, with what some servers tell beyond the standard.
#[derive(Deserialize)]
struct Models {
    data: Vec<ModelCard>,
}

#[derive(Deserialize)]
struct ModelCard {
    id: String,
    vocab_size: Option<usize>,
    max_model_len: Option<usize>,
}

impl Server {
    async fn ask(args: &Args, client: &Client) -> anyhow::Result<Server> {
        let authority = &client.url.authority;
        let models: Result<Models, Failure> = client.get("/v1/models").await;
        let cards = models.map_err(|failure| anyhow!("http://{authority}/v1/models: {failure}"))?;
        let ids: Vec<&str> = cards.data.iter().map(|card| card.id.as_str()).collect();
        let card = match &args.model {
            Some(model) => cards.data.iter().find(|card| card.id == *model).with_context(|| {
                format!("the server has no model '{model}', but {}", ids.join(", "))
            })?,
            None => cards.data.first().context("the server lists no models")?,
        };
        let vocab_size = args.serving.vocab_size.or(card.vocab_size).unwrap_or(VOCAB_SIZE);
        ensure!(vocab_size > 0, "the server says that its vocabulary is empty");
        let max_context = card.max_model_len.unwrap_or(usize::MAX);
        Ok(Server { model: card.id.clone(), vocab_size, max_context })
    }
}

/// A server, and what is asked of it.
struct Bench<'a> {
    args: &'a Args,
    client: Arc<Client>,
    server: Server,
}

impl Bench<'_> {
    async fn run(&self, console: &mut Console<'_>) -> anyhow::Result<()> {
        let sources = self.args.sources(self.server.max_context, console)?;
        let paces = self.paces();
        let plans: Vec<_> = sources
            .iter()
            .flat_map(|source| paces.iter().map(move |pace| (source, *pace)))
            .collect();
        self.warm_up().await?;
        let (mut points, mut failure) = (Vec::new(), None);
        for (source, (pace, concurrency)) in plans {
            let (measurement, point) = self.measure(source, pace, concurrency, console).await;
            if !self.args.json {
                console.print(&point.text())?;
            }
            points.push(point);
            failure = self.judge(&measurement).await.err();
            if failure.is_some() {
                break;
            }
        }
        if let Some(last) = points.last() {
            if self.args.json {
                let (url, seed) = (format!("http://{}", self.client.url.authority), self.args.seed);
                let model = &self.server.model;
                console.print_json(&Report { model, url, seed, last, points: &points })?;
            } else if points.len() > 1 {
                console.print(&overview(&points))?;
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Each pace with how many requests may be under way.
    fn paces(&self) -> Vec<(Pace, usize)> {
        let rates = &self.args.serving.request_rate;
        match self.args.concurrency.as_slice() {
            _ if rates.is_empty() => {
                let concurrencies = self.args.concurrencies().iter();
                concurrencies.map(|concurrency| (Pace::Closed, *concurrency)).collect()
            }
            [] => rates
                .iter()
                .map(|rate| (Pace::Open { rate: *rate }, CONCURRENCY_MAX as usize))
                .collect(),
            bounds => {
                let of = |bound: &usize| {
                    let bound = *bound;
                    rates.iter().map(move |rate| (Pace::Open { rate: *rate }, bound))
                };
                bounds.iter().flat_map(of).collect()
            }
        }
    }

    fn bodies(&self, lengths: Vec<Lengths>, num_shared: usize) -> Bodies {
        Bodies {
            endpoint: self.args.serving.endpoint.unwrap_or(Endpoint::Completions),
            model: self.server.model.clone(),
            workload: Workload {
                lengths,
                vocab_size: self.server.vocab_size,
                seed: self.args.seed,
                num_shared,
            },
        }
    }

    /// One small request: a server that cannot answer it is not measured.
    async fn warm_up(&self) -> anyhow::Result<()> {
        let bodies = self.bodies(vec![WARM_UP], 0);
        let (body, max_tokens) = bodies.body(0);
        let exchange = self.client.exchange(bodies.endpoint(), body, max_tokens).await;
        exchange.map(|_| ()).map_err(|failure| anyhow!("the first request failed: {failure}"))
    }

    async fn measure(
        &self,
        source: &Source,
        pace: Pace,
        concurrency: usize,
        console: &mut Console<'_>,
    ) -> (Measurement, Point) {
        let num_requests = self.args.num_requests(source, concurrency);
        let lengths = source.lengths(num_requests, self.args.seed, self.server.max_context);
        let num_shared = self.args.shared_prefix_tokens.unwrap_or(0);
        let bodies = Arc::new(self.bodies(lengths, num_shared));
        let plan = Plan { pace, concurrency, num_requests, seed: self.args.seed };
        let goodput = self.args.serving.goodput;
        let setting = Setting { source: source.name(), plan, has_goodput: goodput.is_some() };
        let mut meter = Meter::new(console);
        let stage = setting.name();
        let on_end = &mut |num_ended: usize| {
            let template = "{msg} {wide_bar} {pos}/{len} requests, {eta} left";
            meter.set(&stage, template, num_ended as u64, num_requests as u64);
        };
        let bounds = goodput.unwrap_or_default();
        let measurement = load::run(&self.client, &bodies, &plan, &bounds, on_end).await;
        let point = Point::new(setting, &measurement, &bodies.workload.lengths);
        (measurement, point)
    }

    /// Whether the server is still there, and has answered anything.
    async fn judge(&self, measurement: &Measurement) -> anyhow::Result<()> {
        if measurement.failures.is_empty() {
            return Ok(());
        }
        let models: Result<Models, Failure> = self.client.get("/v1/models").await;
        if measurement.is_gone || models.is_err_and(|failure| failure == Failure::Refused) {
            bail!(
                "the server at http://{} went away; {} of {} requests that were sent have failed",
                self.client.url.authority,
                measurement.num_failed(),
                measurement.num_sent
            );
        }
        ensure!(measurement.num_completed > 0, "no request succeeded");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        assert_eq!(parse_rate("inf"), Ok(f64::INFINITY));
        assert_eq!(parse_rate("0.5"), Ok(0.5));
        for rate in ["0", "-1", "nan", "x"] {
            assert!(parse_rate(rate).is_err(), "{rate}");
        }
        assert_eq!(parse_timeout("1.5"), Ok(Duration::from_millis(1500)));
        assert!(["0", "-1", "nan", "inf"].iter().all(|text| parse_timeout(text).is_err()));
        let goodput = "ttft=500,tpot=50".parse::<Goodput>().unwrap();
        assert_eq!(goodput, Goodput { ttft: Some(500.0), tpot: Some(50.0), e2e: None });
        for text in ["", "ttft", "ttft=0", "itl=3"] {
            assert!(text.parse::<Goodput>().unwrap_err().contains("is not ttft"), "{text}");
        }
    }

    #[test]
    fn the_first_key_of_a_file_counts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let header = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            authorization(file.path())
        };
        for text in ["key-1", "# keys\n\n key-1 \nb:key-2\n", "a: key-1"] {
            assert_eq!(header(text).unwrap(), "Bearer key-1", "{text:?}");
        }
        for text in ["", "# key-1\n", "a\u{7f}b"] {
            assert!(header(text).is_err(), "{text:?}");
        }
    }
}
