//! `bespoke serve`: a model behind an HTTP server.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::panic;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, bail};
use bespoke_kernel_gen::plan::Provenance;
use clap::ValueEnum;

use super::console::Console;
use super::model::{self, ModelArgs, ModelFiles};
use super::probation::Probation;
use super::startup::StartupReport;
use crate::config::EngineOptions;
use crate::engine::Engine;
use crate::handle::{EngineHandle, HandleLimits};
use crate::server::{
    Ended, Keys, Language, ServedModel, Server, ServerLimits, ServerOptions, Timeouts,
};

/// Serve a model over HTTP, as OpenAI's API
///
/// Listens on this machine only, unless told otherwise. SIGTERM and SIGINT end the server when its
/// requests have ended; a second one ends it at once.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on; one that other machines reach needs --api-key-file
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = ServerOptions::PORT)]
    port: u16,
    /// File with one key a line, as `name:key` or alone
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Let everybody in who reaches the address
    #[arg(long, conflicts_with = "api_key_file")]
    insecure_no_auth: bool,
    /// Name of the model in requests [default: as given to --model]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Sequences that run at once
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_sequences: usize,
    /// Tokens of one sequence, prompt and output together [default: as many as the model has]
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    /// Requests that wait at most; more are answered 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_waiting: usize,
    /// Sessions that are kept at once
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_sessions: usize,
    /// Seconds after which a session that nobody uses is ended
    #[arg(long, value_name = "SECONDS", default_value = "900", value_parser = parse_seconds)]
    session_ttl: Duration,
    /// Folder that keeps sessions while the server does not run
    #[arg(long, value_name = "DIR")]
    session_dir: Option<PathBuf>,
    /// Seconds that running requests have after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_seconds)]
    drain_timeout: Duration,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = ServerLimits::default().connections_max)]
    max_connections: usize,
    /// Connections of one client address at once
    #[arg(
        long,
        value_name = "N",
        default_value_t = ServerLimits::default().connections_per_client_max
    )]
    max_connections_per_client: usize,
    /// Origin whose pages may use the server from a browser; may be repeated
    #[arg(long, value_name = "ORIGIN")]
    allow_origin: Vec<String>,
    /// Name by which a server on 127.0.0.1 may be called besides localhost; may be repeated
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// Second address, for /metrics alone and without a key
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_address: Option<SocketAddr>,
    /// File that tells, at the end, how many steps had how many rows, for `kernel-gen select
    /// --from-trace`
    #[arg(long, value_name = "FILE")]
    trace_shapes: Option<PathBuf>,
    /// Form of the log on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

const EXAMPLES: &str = "\
Examples:
  bespoke serve --model smollm2-135m
  bespoke serve --model smollm2-int4 --host 0.0.0.0 --api-key-file keys.txt
  bespoke serve --model smollm2-135m --port 0 --backend null";

#[derive(ValueEnum, Clone, Copy, Debug)]
enum LogFormat {
    Text,
    Json,
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=1e9).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected a number of seconds".to_owned()),
    }
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let options = server_options(args)?;
    options.check()?;
    start_log(args.log_format);
    let (handle, model) = load(args, console)?;
    let rows = handle.call(|engine| engine.row_histogram())?;
    console.report(&format!("kernels: {}\n", provenances_text(&model.provenances)));
    let server = Server::start(handle, model, options)?;
    server.drain_on_signals()?;
    console.report(&format!("listening on http://{}\n", server.address()));
    if let Some(address) = server.metrics_address() {
        console.report(&format!("metrics on http://{address}/metrics\n"));
    }
    let ended = server.wait();
    if let Some(path) = &args.trace_shapes {
        rows.write(path)?;
    }
    end(ended)
}

/// `14 measured, 3 default`, by intervals of row counts.
fn provenances_text(provenances: &BTreeMap<Provenance, usize>) -> String {
    let counts = provenances.iter().map(|(from, num)| format!("{num} {}", from.name()));
    let counts: Vec<String> = counts.collect();
    if counts.is_empty() { "no choice".to_owned() } else { counts.join(", ") }
}

/// The engine, and what it serves. Weights and tokenizer are read at once.
fn load(args: &Args, console: &mut Console<'_>) -> anyhow::Result<(EngineHandle, ServedModel)> {
    let source = console.source(&args.model.model)?;
    let config = ModelFiles::read_config(&source.files)?;
    let probation = Probation::start(&source.files, console.program.as_deref())?;
    let vocab_size = config.vocab_size;
    let of_language = source.clone();
    let language = thread::spawn(move || {
        let files = ModelFiles::read(of_language)?;
        anyhow::Ok(Arc::new(Language::new(files.tokenizer()?, vocab_size)))
    });
    let engine_options = EngineOptions {
        max_sequences: args.max_sequences,
        max_context: args.max_context,
        max_sessions: args.max_sessions,
        max_batch_tokens: args.max_sequences.max(512),
        ..model::options(&config, &args.model.run, 0, console)
    };
    let limits = HandleLimits { waiting_requests_max: args.max_waiting, ..HandleLimits::default() };
    let load = move || Engine::load_from(&source, &engine_options, &mut |_| {});
    let handle = EngineHandle::start(load, limits)?;
    let startup = handle.call(|engine| engine.startup().clone())?;
    model::warn(&startup, console);
    let language =
        language.join().map_err(|_| anyhow!("reading the tokenizer panicked; this is a bug"))??;
    let name = args.served_model_name.clone().unwrap_or_else(|| args.model.model.clone());
    let model = handle.call(move |engine| ServedModel::of(engine, &name, language))?;
    probation.finish()?;
    if args.model.run.startup_report {
        console.report(&StartupReport::new(&[&startup], console).text());
    }
    Ok((handle, model))
}

/// The end of the process: an engine that hangs, or an impatient user, is not waited for.
fn end(ended: Ended) -> anyhow::Result<()> {
    match ended {
        Ended::Drained => Ok(()),
        Ended::EngineDied(reason) => bail!("the engine died: {reason}"),
        Ended::EngineStalled(age) => {
            tracing::error!(seconds = age.as_secs_f64(), "the engine hangs; giving up");
            std::process::exit(1);
        }
        Ended::Interrupted => std::process::exit(130),
    }
}

fn server_options(args: &Args) -> anyhow::Result<ServerOptions> {
    Ok(ServerOptions {
        address: SocketAddr::new(args.host, args.port),
        metrics_address: args.metrics_address,
        keys: match &args.api_key_file {
            Some(path) => Keys::read(path)?,
            None => Keys::default(),
        },
        allows_anyone: args.insecure_no_auth,
        allowed_origins: args.allow_origin.clone(),
        allowed_hosts: args.allow_host.clone(),
        session_dir: args.session_dir.clone(),
        session_ttl: args.session_ttl,
        limits: ServerLimits {
            connections_max: args.max_connections,
            connections_per_client_max: args.max_connections_per_client,
            ..ServerLimits::default()
        },
        timeouts: Timeouts { drain: args.drain_timeout, ..Timeouts::default() },
    })
}

/// Lines of the log go to standard error. A panic is one of them, without its message, which may
/// hold a prompt.
fn start_log(format: LogFormat) {
    let log = tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false);
    // NOTE: a log that somebody else has set up stays.
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    panic::set_hook(Box::new(|info| {
        if !crate::tokenizer::is_contained() {
            let place = info.location().map(ToString::to_string).unwrap_or_default();
            tracing::error!(place, "panic");
        }
    }));
}
