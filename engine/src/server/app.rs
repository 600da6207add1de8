//! What handlers share.

use std::collections::BTreeMap;
use std::sync::Arc;

use bespoke_kernel_gen::plan::Provenance;
use tokio::sync::Semaphore;

use super::drain::Lifecycle;
use super::error::ApiError;
use super::json::Bodies;
use super::language::Language;
use super::metrics::Metrics;
use super::options::ServerOptions;
use super::sessions::Claims;
use super::unix_seconds;
use super::workers::Workers;
use crate::engine::Engine;
use crate::error::Error;
use crate::handle::EngineHandle;
use crate::tokenizer::Tokenizer;

/// Everything that a handler may need; axum's state is an `Arc` of it.
pub struct App {
    pub handle: EngineHandle,
    pub model: ServedModel,
    pub options: ServerOptions,
    pub metrics: Metrics,
    pub workers: Workers,
    pub lifecycle: Lifecycle,
    pub language: Arc<Language>,
    /// The sessions that requests work on.
    pub sessions: Claims,
    pub(super) bodies: Bodies,
    /// Threads that wait for the engine between two steps.
    calls: Arc<Semaphore>,
}

/// The model that a server serves.
#[derive(Clone)]
pub struct ServedModel {
    /// What requests call it.
    pub name: String,
    /// When it was loaded, in seconds of the Unix epoch.
    pub created: u64,
    /// Tokens of one sequence, prompt and output together.
    pub max_context: usize,
    /// Tokens of a page of the KV cache.
    pub page_size: usize,
    /// Pages of the KV cache.
    pub num_pages: usize,
    /// Width of the logits.
    pub vocab_size: usize,
    pub tokenizer: Arc<Tokenizer>,
    /// What the tokenizer and the chat template say.
    pub language: Arc<Language>,
    /// Equal fingerprints and seeds give equal tokens.
    pub fingerprint: String,
    pub backend: &'static str,
    /// Intervals of row counts by where the choices of their kernels come from.
    pub provenances: BTreeMap<Provenance, usize>,
}

/// Calls of the engine that wait at once; more are refused.
const CALLS_MAX: usize = 32;

impl ServedModel {
    /// What `engine` serves under `name`. The end tokens of the language become the engine's, which
    /// then ends answers at them and at stop strings.
    pub fn of(engine: &mut Engine, name: &str, language: Arc<Language>) -> ServedModel {
        let tokenizer = Arc::clone(&language.tokenizer);
        engine.set_tokenizer(Arc::clone(&tokenizer));
        engine.add_eos_ids(tokenizer.eos_ids());
        let pages = engine.status().pages;
        ServedModel {
            name: name.to_owned(),
            created: unix_seconds(),
            max_context: engine.max_context(),
            page_size: engine.shape().page_size,
            num_pages: pages.free + pages.active + pages.cached,
            vocab_size: engine.shape().vocab_size,
            tokenizer,
            language,
            fingerprint: engine.fingerprint(),
            backend: engine.backend_name(),
            provenances: engine.provenances(),
        }
    }
}

impl App {
    pub(super) fn new(
        handle: EngineHandle,
        model: ServedModel,
        options: ServerOptions,
    ) -> Result<App, Error> {
        options.check()?;
        let limits = options.limits;
        let metrics = Metrics::new(&handle, &model);
        let workers = Workers::new(
            limits.worker_threads,
            limits.worker_queue_max,
            options.timeouts.worker,
            metrics.clone(),
        )?;
        Ok(App {
            handle,
            metrics,
            workers,
            lifecycle: Lifecycle::default(),
            language: Arc::clone(&model.language),
            sessions: Claims::default(),
            model,
            bodies: Bodies::new(limits.body_bytes_max, limits.all_bodies_bytes_max),
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
            options,
        })
    }

    /// Runs `work` on the engine between two steps, without holding up a thread of the sockets.
    pub async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = Arc::clone(&self.calls).try_acquire_owned();
        let Ok(permit) = permit else {
            return Err(ApiError::overloaded(std::time::Duration::from_secs(1)));
        };
        let handle = self.handle.clone();
        let call = tokio::task::spawn_blocking(move || {
            let result = handle.call(work);
            drop(permit);
            result
        });
        match call.await {
            Ok(result) => result.map_err(ApiError::from),
            Err(_) => Err(ApiError::internal()),
        }
    }
}
