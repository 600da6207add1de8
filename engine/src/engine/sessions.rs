//! The engine's sessions: what a request may ask of them is in [`crate::session`].

use super::Engine;
use crate::error::Error;
use crate::request::Request;
use crate::sequence::Sequence;
use crate::session::{SessionId, SessionInfo};

impl Engine {
    /// All sessions by name.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        self.sessions.infos()
    }

    /// The tokens of a session: prompts and answers.
    pub fn session_tokens(&self, id: &SessionId) -> Result<&[u32], Error> {
        Ok(&self.sessions.get(id)?.tokens)
    }

    /// Interrupts the request that runs on a session, which keeps what was generated; false where
    /// there was none.
    pub fn stop_session(&mut self, id: &SessionId) -> Result<bool, Error> {
        let running = self.sessions.get(id)?.running;
        Ok(running.is_some_and(|request| self.cancel(request)))
    }

    /// Ends a session, interrupting the request that runs on it.
    pub fn end_session(&mut self, id: &SessionId) -> Result<(), Error> {
        self.stop_session(id)?;
        self.sessions.remove(id, &mut self.pool);
        Ok(())
    }

    /// Cuts the history of an idle session to `num_tokens`.
    pub fn rewind_session(&mut self, id: &SessionId, num_tokens: usize) -> Result<(), Error> {
        self.sessions.rewind(id, num_tokens, &mut self.pool)
    }

    /// A new session `to` that goes on from the first `num_tokens` of the idle session `from`, from
    /// all of them where `None`.
    pub fn branch_session(
        &mut self,
        from: &SessionId,
        to: &SessionId,
        num_tokens: Option<usize>,
    ) -> Result<(), Error> {
        self.sessions.branch(from, to, num_tokens, self.shape.page_size)
    }

    /// Puts the history of the request's session into `sequence`.
    pub(super) fn continue_session(&mut self, request: &Request, sequence: &mut Sequence) {
        let Some(turn) = &request.session else { return };
        let session = self.sessions.begin(turn, sequence.id, &mut self.pool);
        let variant = self.rope.variant(session.tokens.len() + request.prompt_ids.len());
        if session.variant != variant {
            session.kept.forget(&mut self.pool);
        }
        session.variant = variant;
        session.seed = request.sampling.seed;
        sequence.session = Some(turn.id.clone());
        sequence.tokens.extend_from_slice(&session.tokens);
        sequence.kept = session.kept.clone();
    }

    /// Gives sessions back what their ended sequences added.
    pub(super) fn settle_sessions(&mut self) {
        while let Some(sequence) = self.ended.pop() {
            self.sessions.settle(sequence, &mut self.pool);
        }
    }
}
