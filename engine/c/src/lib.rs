//! The C library of Bespoke; `include/bespoke.h` is generated from it and documents it.
//!
//! Callers hold numbers, not pointers: a table ([`handles`]) says what a number stands for, so that
//! one that is null, freed or of another kind is an error and nothing worse. Every function runs
//! inside [`border::guard`], which lets no panic out; [`input`] and [`output`] are all that reads
//! and writes the caller's memory.

#![allow(
    clippy::missing_safety_doc,
    reason = "the header says once, at its top, what pointers have to be"
)]

mod border;
mod engine;
mod handles;
mod input;
mod output;
mod params;
mod request;
mod session;
mod status;
mod text;
mod version;

pub use self::border::bespoke_last_error;
pub use self::engine::{
    BespokeActivations, BespokeBackend, BespokeEngine, BespokeEngineInfo, BespokeEngineOptions,
    BespokeKvType, bespoke_engine_close, bespoke_engine_info, bespoke_engine_open,
};
pub use self::output::{BespokeCallback, BespokeEvent, BespokeFinishReason};
pub use self::params::{BespokeParams, BespokeSessionFlags};
pub use self::request::{
    BespokeRequest, bespoke_cancel, bespoke_generate, bespoke_next, bespoke_request_free,
    bespoke_start,
};
pub use self::session::{bespoke_session_end, bespoke_session_len, bespoke_session_rewind};
pub use self::status::{BespokeStatus, bespoke_status_name};
pub use self::text::{bespoke_detokenize, bespoke_tokenize};
pub use self::version::{BESPOKE_ABI_VERSION, bespoke_abi_version, bespoke_version};
