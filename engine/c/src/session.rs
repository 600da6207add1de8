//! Sessions: conversations that an engine keeps between requests.

use std::ffi::c_char;

use ::engine::Error;
use ::engine::engine::Engine;
use ::engine::kv_cache::Namespace;
use ::engine::session::SessionId;

use crate::border::guard;
use crate::engine::BespokeEngine;
use crate::handles;
use crate::input;
use crate::output;
use crate::status::{BespokeStatus, Failure};

/// More than a name may have; what is longer is refused with the reason.
pub(crate) const NAME_BYTES_MAX: usize = 256;

/// Ends a session. A request that runs on it has to be cancelled first, and to have had its last
/// event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_session_end(
    engine: BespokeEngine,
    session: *const c_char,
) -> BespokeStatus {
    guard(|| {
        // SAFETY: the caller's promise.
        let id = unsafe { session_id(session) }?;
        let engine = handles::engine(engine)?;
        engine.handle.call(move |engine| end(engine, &id))??;
        Ok(BespokeStatus::Ok)
    })
}

/// Writes the tokens that a session has, prompts and answers, to `num_tokens`. While a request runs
/// on it, they are those before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_session_len(
    engine: BespokeEngine,
    session: *const c_char,
    num_tokens: *mut usize,
) -> BespokeStatus {
    guard(|| {
        // SAFETY: the caller's promise.
        let id = unsafe { session_id(session) }?;
        let engine = handles::engine(engine)?;
        let len =
            engine.handle.call(move |engine| engine.session_tokens(&id).map(<[u32]>::len))??;
        // SAFETY: as above.
        unsafe { output::write(num_tokens, len, "num_tokens") }?;
        Ok(BespokeStatus::Ok)
    })
}

/// Cuts a session that no request runs on to its first `num_tokens` tokens.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_session_rewind(
    engine: BespokeEngine,
    session: *const c_char,
    num_tokens: usize,
) -> BespokeStatus {
    guard(|| {
        // SAFETY: the caller's promise.
        let id = unsafe { session_id(session) }?;
        let engine = handles::engine(engine)?;
        engine.handle.call(move |engine| engine.rewind_session(&id, num_tokens))??;
        Ok(BespokeStatus::Ok)
    })
}

/// NOTE: a running request is not the engine's to end, as its stream would have no last event.
fn end(engine: &mut Engine, id: &SessionId) -> Result<(), Error> {
    if engine.session_info(id).is_some_and(|info| info.is_running) {
        let message = format!("session {id} has a request running; cancel it first");
        return Err(Error::Busy(message));
    }
    engine.end_session(id)
}

unsafe fn session_id(name: *const c_char) -> Result<SessionId, Failure> {
    // SAFETY: the caller's promise.
    let name = unsafe { input::text(name, NAME_BYTES_MAX, "session") }?;
    Ok(SessionId::new(Namespace::default(), name)?)
}
