//! LLM inference with kernels made to measure, at build time, for one model.
//!
//! - [`Engine`](engine::Engine) loads a model and answers [`Request`](request::Request)s, on the
//!   thread that calls it. It also keeps [sessions](session).
//! - [`EngineHandle`](handle::EngineHandle) gives an engine a thread of its own and many callers:
//!   streams of events that block or can be awaited, callbacks, cancellation.
//! - [`bind!`] makes a module of the model that a crate's build script has made kernels for, with
//!   its sizes as constants.
//! - [`slices`] has the kernels of matmuls and of attention alone.
//!
//! # A program with a model's kernels
//!
//! The `main` of a crate's build script names the model (`bespoke-kernel-gen` is a
//! build-dependency):
//!
//! ```ignore
//! bespoke_kernel_gen::cargo::build_model("path/to/model");
//! ```
//!
//! and the crate, which has no other use for this one's own kernels (`bespoke = { version = "…",
//! default-features = false }`), binds what was made:
//!
//! ```ignore
//! bespoke::bind! {
//!     mod model {
//!         // Optional. Where the model has another size, this does not compile.
//!         hidden_size: 576,
//!         group_size: 64,
//!     }
//! }
//!
//! let options = model::Kernels::options();
//! let engine = Engine::load(&dir, &options, &mut |_| {})?;
//! ```
//!
//! `tests/embedding` in the repository is such a crate.
//!
//! # A first answer
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::path::Path;
//!
//! use bespoke::config::EngineOptions;
//! use bespoke::engine::Engine;
//! use bespoke::kernels::generated;
//! use bespoke::request::Request;
//! use bespoke::tokenizer::{SpecialTokens, Tokenizer};
//!
//! let dir = Path::new("path/to/model");
//! let tokenizer = Tokenizer::load(dir)?;
//! let mut engine = Engine::load(dir, &EngineOptions::new(generated::table()), &mut |_| {})?;
//! let request = Request {
//!     prompt_ids: tokenizer.encode("Once upon a time", SpecialTokens::Add)?,
//!     max_tokens: 50,
//!     ..Request::default()
//! };
//! let answer = engine.generate(request, &mut |_| ControlFlow::Continue(()))?;
//! println!("{}", tokenizer.decode(&answer.output_ids)?);
//! # Ok::<(), bespoke::Error>(())
//! ```
//!
//! # Many callers
//!
//! ```
//! use bespoke::backend::null::NullOptions;
//! use bespoke::config::EngineOptions;
//! use bespoke::engine::Engine;
//! use bespoke::handle::{EngineHandle, Event, HandleLimits, Submission};
//! use bespoke::kernels::generated;
//! use bespoke::request::Request;
//!
//! // Hashes in the place of a model; `Engine::load` makes an engine of a real one.
//! let load = || Engine::null(&NullOptions::default(), &EngineOptions::new(generated::table()));
//! let engine = EngineHandle::start(load, HandleLimits::default())?;
//!
//! // A clone of the handle for each caller; all requests run in the same steps.
//! let request = Request { prompt_ids: vec![1, 2, 3], max_tokens: 8, ..Request::default() };
//! let Submission::Accepted(stream) = engine.clone().submit(request)? else {
//!     panic!("too much waits already; try again later");
//! };
//! let (mut tokens, mut last) = (Vec::new(), None);
//! for event in stream {
//!     match event {
//!         Event::Output(output) => tokens.extend(output.token),
//!         event => last = Some(event),
//!     }
//! }
//! assert_eq!(tokens.len(), 8);
//! assert!(matches!(last, Some(Event::Finished)));
//! # Ok::<(), bespoke::Error>(())
//! ```

// NOTE: generated code names this crate `bespoke`, inside it as outside.
extern crate self as bespoke;

pub mod answer;
pub mod backend;
pub mod batch;
pub mod binding;
pub mod bundle;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod eval;
pub mod export;
mod fault;
pub mod files;
pub mod grammar;
pub mod handle;
pub mod import;
pub mod kernels;
pub mod kv_cache;
pub mod memory;
pub mod model;
pub mod packed;
pub mod perplexity;
mod plot;
pub mod progress;
pub mod quantize;
pub mod request;
pub mod row_histogram;
pub mod safetensors_writer;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
#[cfg(feature = "server")]
pub mod server;
pub mod session;
mod session_file;
pub mod source;
pub mod startup;
pub mod tokenizer;
pub mod tune;
pub mod verify;

pub use backend::cpu::slices;
/// Macros that generated code calls, and that bind it in other crates.
pub use bespoke_macros::{bind, kernels};

/// The generator, whose specs, targets and model shapes the engine shares.
pub use bespoke_kernel_gen as kernel_gen;
pub use error::Error;
