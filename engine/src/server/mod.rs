//! The HTTP server: OpenAI's API over an [`EngineHandle`](crate::handle::EngineHandle), safe to
//! expose by default.
//!
//! A request passes [`guard`], the access of its [`Route`], its handler; sockets are watched by
//! [`listener`]. Nothing here blocks a thread of the sockets: text is prepared by [`workers`], and
//! tokens come from the engine's thread as events.

pub mod app;
pub mod auth;
mod chat;
mod completions;
mod dashboard;
pub mod drain;
pub mod error;
mod generation;
mod guard;
pub mod health;
mod interactive;
pub mod json;
pub mod language;
mod listener;
mod log;
mod messages;
pub mod metrics;
mod models;
#[allow(unused_qualifications, reason = "utoipa writes whole paths")]
pub mod openai;
mod openapi;
pub mod options;
pub mod page;
mod session_store;
mod sessions;
mod stream;
mod tokens;
pub mod workers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::handler::Handler;
use axum::http::Method;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{MethodRouter, delete, get, post};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use self::drain::{Ending, Phase};
use self::listener::Connections;
use crate::error::Error;
use crate::handle::{EngineHandle, EngineState};

pub use app::{App, ServedModel};
pub use auth::{Caller, Keys};
pub use drain::Ended;
pub use error::ApiError;
pub use json::ApiJson;
pub use language::Language;
pub use metrics::Metrics;
pub use options::{ServerLimits, ServerOptions, Timeouts};
pub use workers::{Work, Workers};

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everybody: it tells nothing.
    Public,
    /// Everybody: it is a file of the web page, which asks for a key itself.
    Page,
    /// Those with a key, where there are keys. Handlers get a [`Caller`] as extension.
    Key,
}

/// A path, who may use it, and what answers.
pub struct Route {
    pub path: &'static str,
    pub access: Access,
    pub methods: Vec<Method>,
    handlers: MethodRouter<Arc<App>>,
}

/// A server that runs. Dropping it ends it at once.
pub struct Server {
    app: Arc<App>,
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    ending: Arc<Ending>,
    runtime: Option<Runtime>,
}

/// After the engine's end, how long connections may take to say what is left.
const CLOSE_TIME: Duration = Duration::from_millis(1500);

impl Route {
    pub fn new(path: &'static str, access: Access) -> Route {
        Route { path, access, methods: Vec::new(), handlers: MethodRouter::new() }
    }

    pub fn get<H: Handler<T, Arc<App>>, T: 'static>(self, handler: H) -> Route {
        self.with(Method::GET, get(handler))
    }

    pub fn post<H: Handler<T, Arc<App>>, T: 'static>(self, handler: H) -> Route {
        self.with(Method::POST, post(handler))
    }

    pub fn delete<H: Handler<T, Arc<App>>, T: 'static>(self, handler: H) -> Route {
        self.with(Method::DELETE, delete(handler))
    }

    fn with(mut self, method: Method, handler: MethodRouter<Arc<App>>) -> Route {
        self.methods.push(method);
        self.handlers = self.handlers.merge(handler);
        self
    }
}

/// Every route of the server.
pub fn routes() -> Vec<Route> {
    let all = [
        chat::routes(),
        completions::routes(),
        dashboard::routes(),
        health::routes(),
        interactive::routes(),
        metrics::routes(),
        models::routes(),
        openapi::routes(),
        page::routes(),
        sessions::routes(),
        tokens::routes(),
    ];
    all.into_iter().flatten().collect()
}

/// Seconds of the Unix epoch.
fn unix_seconds() -> u64 {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since_epoch.map_or(0, |time| time.as_secs())
}

/// The server's routes behind their guards, without sockets.
pub fn router(app: &Arc<App>) -> Router {
    router_of(routes(), app)
}

/// As [`router`] for other routes.
pub fn router_of(routes: Vec<Route>, app: &Arc<App>) -> Router {
    let mut router = Router::new();
    for route in routes {
        let handlers = route.handlers.fallback(guard::no_method);
        let handlers = match route.access {
            Access::Public => handlers,
            Access::Page => handlers.layer(from_fn(guard::page_headers)),
            Access::Key => handlers.layer(from_fn_with_state(Arc::clone(app), auth::require_key)),
        };
        router = router.route(route.path, handlers);
    }
    router
        .fallback(guard::no_route)
        .layer(from_fn_with_state(Arc::clone(app), guard::guard))
        .with_state(Arc::clone(app))
}

impl Server {
    /// Listens and serves. `model` is [`ServedModel::of`] the engine behind `handle`.
    pub fn start(
        handle: EngineHandle,
        model: ServedModel,
        options: ServerOptions,
    ) -> Result<Server, Error> {
        Server::start_with(handle, model, options, routes())
    }

    /// As [`Server::start`] with other routes.
    pub fn start_with(
        handle: EngineHandle,
        model: ServedModel,
        options: ServerOptions,
        routes: Vec<Route>,
    ) -> Result<Server, Error> {
        let app = Arc::new(App::new(handle, model, options)?);
        if let Some(dir) = &app.options.session_dir {
            session_store::keep(&app, dir)?;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(app.options.limits.io_threads)
            .thread_name("server")
            .enable_all()
            .build()
            .map_err(|error| Error::Resources(format!("no threads for the server: {error}")))?;
        let connections = Arc::new(Connections::default());
        let entered = runtime.enter();
        let listen = |address: SocketAddr, router: Router| {
            let listener = listener::bind(address)?;
            let address = listener.local_addr().map_err(|error| {
                Error::Resources(format!("the address of {address} is not known: {error}"))
            })?;
            let (app, connections) = (Arc::clone(&app), Arc::clone(&connections));
            tokio::spawn(listener::serve(listener, router, app, connections));
            Ok::<_, Error>(address)
        };
        let address = listen(app.options.address, router_of(routes, &app))?;
        let metrics_address = match app.options.metrics_address {
            None => None,
            Some(address) => Some(listen(address, metrics_router(&app))?),
        };
        drop(entered);
        let ending = Arc::new(Ending::default());
        supervise(&app, &ending, connections)?;
        runtime.spawn(session_store::expire(Arc::clone(&app)));
        runtime.spawn(watch_steps(Arc::clone(&app), Arc::clone(&ending)));
        Ok(Server { app, address, metrics_address, ending, runtime: Some(runtime) })
    }

    /// Where the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it serves `/metrics` alone.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    pub fn app(&self) -> &Arc<App> {
        &self.app
    }

    /// Takes no new requests from now on, lets those that run go on for a while, then ends.
    pub fn start_drain(&self) {
        start_drain(&self.app, &self.ending);
    }

    /// Drains at SIGTERM, SIGINT and SIGHUP, and ends at once at a second one.
    pub fn drain_on_signals(&self) -> Result<(), Error> {
        let Some(runtime) = &self.runtime else { return Ok(()) };
        let _entered = runtime.enter();
        for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()] {
            let mut signals = signal(kind).map_err(|error| {
                Error::Resources(format!("cannot wait for the signals that end a server: {error}"))
            })?;
            let (app, ending) = (Arc::clone(&self.app), Arc::clone(&self.ending));
            runtime.spawn(async move {
                while signals.recv().await.is_some() {
                    match app.lifecycle.is_draining() {
                        false => start_drain(&app, &ending),
                        true => ending.set(Ended::Interrupted),
                    }
                }
            });
        }
        Ok(())
    }

    /// Waits for the end.
    pub fn wait(&self) -> Ended {
        self.ending.wait()
    }

    /// As [`Server::wait`], for `timeout` at most.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Ended> {
        self.ending.wait_timeout(timeout)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.app.lifecycle.advance(Phase::Closing);
        self.app.handle.start_drain(Duration::ZERO);
        if let Some(runtime) = self.runtime.take() {
            // NOTE: a server may be dropped within another runtime, which must not block.
            runtime.shutdown_background();
        }
    }
}

fn metrics_router(app: &Arc<App>) -> Router {
    let route = Route::new("/metrics", Access::Public).get(metrics::scrape);
    router_of(vec![route], app)
}

fn start_drain(app: &Arc<App>, ending: &Arc<Ending>) {
    let time = app.options.timeouts.drain;
    if app.lifecycle.advance(Phase::Draining) {
        tracing::info!(seconds = time.as_secs(), "draining");
        app.handle.start_drain(time);
        let ending = Arc::clone(ending);
        let limit = time + CLOSE_TIME;
        // A step that never ends must not hold up the end of the server.
        let overdue = thread::Builder::new().name("drain".to_owned()).spawn(move || {
            if ending.wait_timeout(limit).is_none() {
                ending.set(Ended::EngineStalled(limit));
            }
        });
        if let Err(error) = overdue {
            tracing::warn!(%error, "no thread to watch over the drain");
        }
    }
}

/// Ends the server when its engine has ended.
fn supervise(
    app: &Arc<App>,
    ending: &Arc<Ending>,
    connections: Arc<Connections>,
) -> Result<(), Error> {
    let (app, ending) = (Arc::downgrade(app), Arc::clone(ending));
    let handle = match app.upgrade() {
        Some(app) => app.handle.clone(),
        None => return Ok(()),
    };
    let end = move || {
        let ended = match handle.wait() {
            EngineState::Dead(reason) => Ended::EngineDied(reason),
            _ => Ended::Drained,
        };
        if let Some(app) = app.upgrade() {
            app.lifecycle.advance(Phase::Closing);
        }
        let start = std::time::Instant::now();
        while connections.num() > 0 && start.elapsed() < CLOSE_TIME {
            thread::sleep(Duration::from_millis(5));
        }
        ending.set(ended);
    };
    let thread = thread::Builder::new().name("supervisor".to_owned()).spawn(end);
    thread
        .map(drop)
        .map_err(|error| Error::Resources(format!("no thread for the supervisor: {error}")))
}

/// Gives up when a step takes too long.
async fn watch_steps(app: Arc<App>, ending: Arc<Ending>) {
    let step_max = app.options.timeouts.step;
    let mut ticks = tokio::time::interval(step_max.div_f32(20.0).max(Duration::from_millis(10)));
    loop {
        ticks.tick().await;
        let age = app.step_age();
        if age > step_max {
            ending.set(Ended::EngineStalled(age));
            return;
        }
    }
}
