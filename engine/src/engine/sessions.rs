//! The engine's sessions: what a request may ask of them is in [`crate::session`].

use std::path::{Path, PathBuf};

use super::{Engine, Model};
use crate::error::Error;
use crate::kv_cache::{Keep, num_pages};
use crate::request::{Request, RequestId};
use crate::sequence::{KeptPages, Sequence};
use crate::session::{Session, SessionId, SessionInfo};
use crate::session_file::{Header, SessionFile};

impl Engine {
    /// All sessions by name.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        self.sessions.infos()
    }

    /// One session; `None` where there is none of this name.
    pub fn session_info(&self, id: &SessionId) -> Option<SessionInfo> {
        self.sessions.info(id)
    }

    /// Whether there may be one session more.
    pub fn has_session_room(&self) -> bool {
        self.sessions.has_room()
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

    /// Writes an idle session to a file in the folder `dir`, over an older one: its tokens, its
    /// seed, and its keys and values as far as they are in the cache.
    pub fn save_session(&mut self, id: &SessionId, dir: &Path) -> Result<(), Error> {
        let session = self.sessions.idle(id)?.clone();
        let page_size = self.shape.page_size;
        let revived = session.kept.stamps.iter().map_while(|stamp| self.pool.revive(*stamp));
        let pages: Vec<_> = revived.collect();
        let mut kv = Vec::new();
        for page in &pages {
            on_decoder!(&mut self.model, decoder => decoder.read_page(page.id(), &mut kv));
        }
        let num_kept = session.kept.num_tokens.min(pages.len() * page_size);
        // NOTE: the last token's page goes first, so that it is evicted first.
        pages.into_iter().rev().for_each(|page| self.pool.release(page, Keep::Content));
        let header = Header {
            seed: session.seed,
            variant: session.variant,
            num_kept,
            ..Header::new(id, self.identity.clone())
        };
        let file = SessionFile { header, tokens: session.tokens, kv };
        file.write(&SessionFile::path(dir, id))
    }

    /// Writes all idle sessions to the folder `dir`.
    pub fn save_sessions(&mut self, dir: &Path) -> Result<(), Error> {
        let idle = self.sessions.infos().into_iter().filter(|info| !info.is_running);
        idle.map(|info| info.id).try_for_each(|id| self.save_session(&id, dir))
    }

    /// Takes up a session from a file that [`Engine::save_session`] wrote. Its keys and values are
    /// used where they were computed by the same kernels, and as far as the cache has room.
    pub fn load_session(&mut self, path: &Path) -> Result<SessionId, Error> {
        let page_bytes = on_decoder!(&self.model, decoder => decoder.page_bytes());
        let num_pages_max = num_pages(self.max_context, self.shape.page_size);
        let file = SessionFile::read(path, (num_pages_max * page_bytes) as u64)?;
        let id = file.id().map_err(|error| Error::model(path, error.to_string()))?;
        self.check_file(&file, page_bytes).map_err(|message| Error::model(path, message))?;
        let SessionFile { header, tokens, kv } = file;
        self.sessions
            .insert(id.clone(), Session { tokens, seed: header.seed, ..Session::default() })?;
        if header.identity.layout == self.identity.layout {
            let kept = self.load_pages(header.num_kept, kv.chunks_exact(page_bytes));
            let session = self.sessions.idle(&id)?;
            session.kept = kept;
            session.variant = header.variant;
        }
        Ok(id)
    }

    /// Takes up every session of a folder; returns those that were refused, with the reasons.
    pub fn load_sessions(&mut self, dir: &Path) -> Result<Vec<(PathBuf, Error)>, Error> {
        let mut refused = Vec::new();
        for path in SessionFile::list(dir)? {
            if let Err(error) = self.load_session(&path) {
                refused.push((path, error));
            }
        }
        Ok(refused)
    }

    fn check_file(&self, file: &SessionFile, page_bytes: usize) -> Result<(), String> {
        let SessionFile { header, tokens, kv } = file;
        if header.identity.model != self.identity.model {
            return Err("the session is one of another model".to_owned());
        }
        let vocab_size = self.shape.vocab_size;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
            return Err(format!("token {token} is outside the vocabulary of {vocab_size} tokens"));
        }
        if tokens.len() > self.max_context {
            let num_tokens = tokens.len();
            return Err(format!("{num_tokens} tokens exceed the context of {}", self.max_context));
        }
        let num_kept = header.num_kept;
        if num_kept > tokens.len() {
            return Err(format!("keys and values of {num_kept} of {} tokens", tokens.len()));
        }
        let is_foreign = header.identity.layout != self.identity.layout;
        if !is_foreign && kv.len() != num_pages(num_kept, self.shape.page_size) * page_bytes {
            return Err(format!("{} bytes of keys and values for {num_kept} tokens", kv.len()));
        }
        Ok(())
    }

    /// Puts pages of the first `num_tokens` tokens of a session into the cache, as far as there is
    /// room.
    fn load_pages<'a>(
        &mut self,
        num_tokens: usize,
        bytes: impl Iterator<Item = &'a [u8]>,
    ) -> KeptPages {
        // A sequence that never runs knows how pages are given back.
        let mut owner = Sequence::new(RequestId(0), Vec::new(), 1);
        for page_bytes in bytes {
            let Some(page) = self.pool.allocate() else { break };
            on_decoder!(&mut self.model, decoder => decoder.write_page(page.id(), page_bytes));
            owner.pages.push(page);
        }
        owner.num_computed = num_tokens.min(owner.pages.len() * self.shape.page_size);
        owner.release_pages(&mut self.pool, Keep::Content);
        owner.kept
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
