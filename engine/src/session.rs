//! Conversations that the engine keeps between requests, as TurboMind's stateful inference does.
//!
//! A session owns its tokens. Their keys and values stay in the cache as long as nobody else needs
//! the pages, and are computed again, unnoticed, where they are gone.
//!
//! ```
//! use std::ops::ControlFlow;
//!
//! use bespoke::backend::null::NullOptions;
//! use bespoke::config::EngineOptions;
//! use bespoke::engine::Engine;
//! use bespoke::kernels::generated;
//! use bespoke::kv_cache::Namespace;
//! use bespoke::request::Request;
//! use bespoke::session::{SessionId, SessionTurn};
//!
//! let options = EngineOptions::new(generated::table());
//! let mut engine = Engine::null(&NullOptions::default(), &options)?;
//! let id = SessionId::new(Namespace::default(), "story")?;
//! for (prompt_ids, start) in [(vec![1, 2, 3], true), (vec![4, 5], false)] {
//!     let session = Some(SessionTurn { start, ..SessionTurn::of(id.clone()) });
//!     let request = Request { prompt_ids, max_tokens: 4, session, ..Request::default() };
//!     engine.generate(request, &mut |_| ControlFlow::Continue(()))?;
//! }
//! assert_eq!(engine.session_tokens(&id)?.len(), 3 + 4 + 2 + 4);
//! # Ok::<(), bespoke::Error>(())
//! ```

use std::collections::BTreeMap;
use std::fmt;

use crate::error::Error;
use crate::kv_cache::{Namespace, PagePool};
use crate::request::RequestId;
use crate::sequence::{KeptPages, Sequence};

/// Names a session within its namespace: 1 to 64 letters, digits, `-`, `_` and `.`, the first one
/// no `.`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionId {
    namespace: Namespace,
    name: String,
}

/// How a request takes part in a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionTurn {
    pub id: SessionId,
    /// Starts the session anew; one of this name is dropped.
    pub start: bool,
    /// Ends the session with this request.
    pub end: bool,
    /// Cuts the history to so many tokens before the prompt is appended.
    pub step: Option<usize>,
}

/// A conversation between two requests, or during one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Session {
    /// All tokens so far, prompts and answers.
    pub tokens: Vec<u32>,
    /// Seed of the last request.
    pub seed: u64,
    /// The request that runs on it.
    pub running: Option<RequestId>,
    /// What the keys and values depend on besides the tokens, see `Rope::variant`.
    pub(crate) variant: u64,
    pub(crate) kept: KeptPages,
    /// Number of its last use among all uses of sessions.
    pub(crate) last_use: u64,
    /// Whether the session ends with the request that runs.
    pub(crate) ends: bool,
}

/// What is told of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionInfo {
    pub id: SessionId,
    pub num_tokens: usize,
    pub is_running: bool,
    pub seed: u64,
    /// Another one after every use, and no other session's.
    pub last_use: u64,
}

/// The sessions of one engine.
#[derive(Debug)]
pub struct Sessions {
    sessions_max: usize,
    sessions: BTreeMap<SessionId, Session>,
    /// Uses of any session so far.
    num_uses: u64,
}

impl SessionId {
    /// Checks a name.
    pub fn new(namespace: Namespace, name: &str) -> Result<SessionId, Error> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let is_sound = (1..=64).contains(&name.len())
            && name.chars().all(is_allowed)
            && !name.starts_with('.');
        match is_sound {
            true => Ok(SessionId { namespace, name: name.to_owned() }),
            false => Err(Error::Request(format!(
                "{name:?} cannot name a session; use 1 to 64 letters, digits, '-', '_' and '.', \
                 the first one no '.'"
            ))),
        }
    }

    /// Whose session it is.
    pub fn namespace(&self) -> Namespace {
        self.namespace
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl SessionTurn {
    /// The next request of the session `id`.
    pub fn of(id: SessionId) -> SessionTurn {
        SessionTurn { id, start: false, end: false, step: None }
    }
}

impl Sessions {
    pub fn new(sessions_max: usize) -> Sessions {
        Sessions { sessions_max, sessions: BTreeMap::new(), num_uses: 0 }
    }

    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// The session `id`.
    pub fn get(&self, id: &SessionId) -> Result<&Session, Error> {
        self.sessions.get(id).ok_or_else(|| unknown(id))
    }

    /// All sessions by name.
    pub fn iter(&self) -> impl Iterator<Item = (&SessionId, &Session)> {
        self.sessions.iter()
    }

    pub fn infos(&self) -> Vec<SessionInfo> {
        self.sessions.iter().map(|(id, session)| session.info(id)).collect()
    }

    /// One session; `None` where there is none of this name.
    pub fn info(&self, id: &SessionId) -> Option<SessionInfo> {
        Some(self.sessions.get(id)?.info(id))
    }

    /// Whether there may be one session more.
    pub fn has_room(&self) -> bool {
        self.sessions.len() < self.sessions_max
    }

    /// Tokens of the history that `turn` continues. Refuses a session that is unknown, busy or
    /// shorter than the turn's step, and a new one where there are too many.
    pub fn history_len(&self, turn: &SessionTurn) -> Result<usize, Error> {
        match self.sessions.get(&turn.id) {
            Some(session) if session.running.is_some() => Err(busy(&turn.id)),
            Some(session) if !turn.start => step_of(&turn.id, session, turn.step),
            None if !turn.start => Err(unknown(&turn.id)),
            // A new session has no history, so that it cannot step back either.
            _ => {
                self.check_room(&turn.id)?;
                step_of(&turn.id, &Session::default(), turn.step)
            }
        }
    }

    /// Starts or continues a session with the request `id`; [`Sessions::history_len`] has accepted
    /// the turn. Returns the session cut to the turn's step.
    pub(crate) fn begin(
        &mut self,
        turn: &SessionTurn,
        id: RequestId,
        pool: &mut PagePool,
    ) -> &mut Session {
        self.num_uses += 1;
        let session = self.sessions.entry(turn.id.clone()).or_default();
        session.last_use = self.num_uses;
        let step = if turn.start { Some(0) } else { turn.step };
        session.rewind(step.unwrap_or(session.tokens.len()), pool);
        session.running = Some(id);
        session.ends = turn.end;
        session
    }

    /// Takes back what a sequence that ended has added to its session.
    pub(crate) fn settle(&mut self, sequence: Sequence, pool: &mut PagePool) {
        let Some(id) = &sequence.session else { return };
        let Some(session) = self.sessions.get_mut(id) else { return };
        if session.running != Some(sequence.id) {
            return;
        }
        session.running = None;
        session.tokens = sequence.tokens;
        session.kept = sequence.kept;
        if session.ends {
            self.remove(&sequence.session.expect("seen above"), pool);
        }
    }

    /// Cuts the history of an idle session to `num_tokens`.
    pub fn rewind(
        &mut self,
        id: &SessionId,
        num_tokens: usize,
        pool: &mut PagePool,
    ) -> Result<(), Error> {
        let last_use = self.num_uses + 1;
        let session = self.idle(id)?;
        let num_tokens = step_of(id, session, Some(num_tokens))?;
        session.last_use = last_use;
        session.rewind(num_tokens, pool);
        self.num_uses = last_use;
        Ok(())
    }

    /// A new session `to` with the first `num_tokens` of `from`, all where `None`. The history's
    /// pages serve both.
    pub fn branch(
        &mut self,
        from: &SessionId,
        to: &SessionId,
        num_tokens: Option<usize>,
        page_size: usize,
    ) -> Result<(), Error> {
        if self.sessions.contains_key(to) {
            return Err(Error::Request(format!("there is a session {to} already; end it first")));
        }
        self.check_room(to)?;
        let session = self.idle(from)?;
        let num_tokens = step_of(from, session, num_tokens)?;
        let mut branch = session.clone();
        branch.tokens.truncate(num_tokens);
        branch.kept.truncate(num_tokens, page_size);
        self.num_uses += 1;
        branch.last_use = self.num_uses;
        self.sessions.insert(to.clone(), branch);
        Ok(())
    }

    /// Enters a session that was kept elsewhere.
    pub(crate) fn insert(&mut self, id: SessionId, session: Session) -> Result<(), Error> {
        if self.sessions.contains_key(&id) {
            return Err(Error::Request(format!("there is a session {id} already; end it first")));
        }
        self.check_room(&id)?;
        self.num_uses += 1;
        self.sessions.insert(id, Session { last_use: self.num_uses, ..session });
        Ok(())
    }

    /// Forgets a session that has no running request.
    pub(crate) fn remove(&mut self, id: &SessionId, pool: &mut PagePool) {
        if let Some(mut session) = self.sessions.remove(id) {
            session.kept.forget(pool);
        }
    }

    /// A session that no request runs on.
    pub(crate) fn idle(&mut self, id: &SessionId) -> Result<&mut Session, Error> {
        match self.sessions.get_mut(id) {
            Some(session) if session.running.is_some() => Err(busy(id)),
            Some(session) => Ok(session),
            None => Err(unknown(id)),
        }
    }

    fn check_room(&self, id: &SessionId) -> Result<(), Error> {
        if self.has_room() || self.sessions.contains_key(id) {
            return Ok(());
        }
        Err(Error::Request(format!(
            "there are {} sessions, as many as are allowed; end one before {id} starts",
            self.sessions_max
        )))
    }
}

impl Session {
    fn info(&self, id: &SessionId) -> SessionInfo {
        SessionInfo {
            id: id.clone(),
            num_tokens: self.tokens.len(),
            is_running: self.running.is_some(),
            seed: self.seed,
            last_use: self.last_use,
        }
    }

    fn rewind(&mut self, num_tokens: usize, pool: &mut PagePool) {
        self.tokens.truncate(num_tokens);
        match num_tokens {
            0 => self.kept.forget(pool),
            _ => self.kept.truncate(num_tokens, pool.page_size()),
        }
    }
}

fn step_of(id: &SessionId, session: &Session, step: Option<usize>) -> Result<usize, Error> {
    let num_tokens = session.tokens.len();
    match step {
        None => Ok(num_tokens),
        Some(step) if step <= num_tokens => Ok(step),
        Some(step) => Err(Error::Request(format!(
            "session {id} has {num_tokens} tokens, it cannot be cut to {step}"
        ))),
    }
}

fn busy(id: &SessionId) -> Error {
    Error::Busy(format!("session {id} has a request running; wait for its end or stop it"))
}

fn unknown(id: &SessionId) -> Error {
    Error::Request(format!("there is no session {id}; start it first"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_as_file_names() {
        for name in ["a", "user-1_b.c", &"x".repeat(64)] {
            assert_eq!(SessionId::new(Namespace(1), name).unwrap().name(), name);
        }
        for name in ["", ".", "..", ".x", "a/b", "a b", "ä", "a\0", &"x".repeat(65)] {
            let error = SessionId::new(Namespace(1), name).unwrap_err().to_string();
            assert!(error.contains("cannot name a session"), "{error}");
        }
    }
}
