//! What the tests of the server share: an engine that hashes instead of computing, served.

pub mod client;
pub mod metrics;
pub mod process;
pub mod tokenizer;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bespoke::backend::null::NullOptions;
use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::handle::{EngineHandle, HandleLimits};
use bespoke::kernels::KernelTable;
use bespoke::server::{Language, Route, ServedModel, Server, ServerOptions, routes};

pub use client::{Answer, Client, Reader};
pub use tokenizer::{END, VOCAB, tokenizer};

/// The name of the model of [`Setup`].
pub const MODEL: &str = "null";

/// Longer than anything takes that does not hang.
pub const LONG: Duration = Duration::from_secs(60);

/// What is served, and how. The default is small and listens on a free port.
pub struct Setup {
    pub null: NullOptions,
    pub engine: EngineOptions,
    pub limits: HandleLimits,
    pub server: ServerOptions,
    /// Served besides the server's own.
    pub routes: Vec<Route>,
}

impl Default for Setup {
    fn default() -> Setup {
        let mut server = ServerOptions::default();
        server.address.set_port(0);
        Setup {
            null: NullOptions { vocab_size: VOCAB, ..NullOptions::default() },
            engine: EngineOptions {
                max_context: Some(4096),
                num_pages: Some(2048),
                max_sequences: 64,
                ..EngineOptions::new(KernelTable::default())
            },
            limits: HandleLimits::default(),
            server,
            routes: Vec::new(),
        }
    }
}

impl Setup {
    /// The engine on a thread of its own, and what is told of it.
    pub fn engine(&self) -> (EngineHandle, ServedModel) {
        let (null, options) = (self.null, self.engine);
        let handle = EngineHandle::start(move || Engine::null(&null, &options), self.limits)
            .expect("the null engine starts");
        let language = Arc::new(Language::new(&tokenizer(), null.vocab_size));
        let model = handle
            .call(|engine| ServedModel::of(engine, MODEL, language))
            .expect("the engine runs");
        (handle, model)
    }

    /// A server that listens.
    pub fn start(self) -> Server {
        let (handle, model) = self.engine();
        let mut all = routes();
        all.extend(self.routes);
        Server::start_with(handle, model, self.server, all).expect("the server starts")
    }
}

/// Waits until `holds`, which must come true.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A client of `server`.
pub fn client(server: &Server) -> Client {
    Client::new(server.address())
}
