//! The state of one answer in the engine.

use std::fmt;

use crate::batch::PageCopy;
use crate::fault::{Fault, is_planted};
use crate::grammar::GrammarState;
use crate::kv_cache::{Keep, Page, PageHash, PagePool, PageStamp, num_pages};
use crate::request::{Failure, FinishReason, RequestId};
use crate::sampling::{History, Sample, SamplingParams};
use crate::session::SessionId;

/// Called with each token of an answer; true ends the answer there.
pub type StopCheck = Box<dyn FnMut(u32) -> bool + Send>;

/// Tokens of an answer and how many of them are in the KV cache.
///
/// ```text
/// tokens      0 ........ num_computed ........ tokens.len()
///             in the KV cache   pending
///             prompt ........ num_prompt ...... output
/// ```
pub struct Sequence {
    pub id: RequestId,
    pub choice_idx: usize,
    /// Prompt, with the history of the session before it, then output.
    pub tokens: Vec<u32>,
    pub num_prompt: usize,
    /// Leading tokens whose keys and values are in the cache.
    pub num_computed: usize,
    /// Leading tokens that were found in the cache when the sequence first ran.
    pub num_cached: usize,
    pub sampling: SamplingParams,
    /// Tokens that end the output.
    pub stop_token_ids: Vec<u32>,
    /// Length at which the output ends.
    pub len_max: usize,
    pub session: Option<SessionId>,
    pub finish_reason: Option<FinishReason>,
    /// What an earlier run left in the cache.
    pub kept: KeptPages,
    /// Pages in the order of the tokens, while the sequence runs.
    pub(crate) pages: Vec<Page>,
    pub(crate) prefix: Option<PrefixHashes>,
    pub(crate) stop_check: Option<StopCheck>,
    /// Follows the output; what it allows next is worked out by [`Sequence::fill_mask`].
    pub(crate) grammar: Option<GrammarState>,
    pub(crate) has_run: bool,
}

/// The content of pages that nobody may own any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeptPages {
    /// In the order of the tokens.
    pub stamps: Vec<PageStamp>,
    /// Leading tokens that the pages hold.
    pub num_tokens: usize,
}

/// Hashes of a sequence's full pages, as far as they were asked for.
#[derive(Clone, Debug)]
pub(crate) struct PrefixHashes {
    root: PageHash,
    hashes: Vec<PageHash>,
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sequence")
            .field("id", &self.id)
            .field("choice_idx", &self.choice_idx)
            .field("num_tokens", &self.tokens.len())
            .field("num_computed", &self.num_computed)
            .field("finish_reason", &self.finish_reason)
            .finish_non_exhaustive()
    }
}

impl Sequence {
    /// A sequence that goes on from `tokens`, with defaults for everything else.
    pub fn new(id: RequestId, tokens: Vec<u32>, len_max: usize) -> Sequence {
        Sequence {
            id,
            choice_idx: 0,
            num_prompt: tokens.len(),
            tokens,
            num_computed: 0,
            num_cached: 0,
            sampling: SamplingParams::default(),
            stop_token_ids: Vec::new(),
            len_max,
            session: None,
            finish_reason: None,
            kept: KeptPages::default(),
            pages: Vec::new(),
            prefix: None,
            stop_check: None,
            grammar: None,
            has_run: false,
        }
    }

    /// Lets the sequence find its tokens in the prefix index behind `root`, and be found there.
    pub fn find_in(&mut self, root: PageHash) {
        self.prefix = Some(PrefixHashes { root, hashes: Vec::new() });
    }

    /// Place in the order in which sequences are served.
    pub fn arrival(&self) -> (RequestId, usize) {
        (self.id, self.choice_idx)
    }

    /// Tokens that are not in the KV cache yet.
    pub fn num_pending(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// Whether there is no page for the next token.
    pub(crate) fn needs_page(&self, page_size: usize) -> bool {
        self.pages.len() * page_size == self.num_computed
    }

    /// What sampling sees of the sequence.
    pub fn history(&self) -> History<'_> {
        History {
            tokens: &self.tokens,
            num_prompt: self.num_prompt,
            stop_token_ids: &self.stop_token_ids,
            mask: self.grammar.as_ref().map(GrammarState::mask),
        }
    }

    /// Lets the grammar go on behind `token`; returns how the answer ends, if it does.
    fn advance_grammar(&mut self, token: u32) -> Option<FinishReason> {
        if is_planted(Fault::GrammarMissesToken) && token % 8 == 7 {
            return None;
        }
        self.grammar.as_mut()?.push(token)
    }

    /// Works out which tokens the grammar allows next.
    pub(crate) fn fill_mask(&mut self) {
        if let Some(grammar) = &mut self.grammar {
            grammar.fill_mask(&self.stop_token_ids);
        }
    }

    /// Appends a sampled token, or ends the sequence where there is none.
    pub fn push(&mut self, sample: Option<&Sample>) {
        let Some(Sample { token, .. }) = sample else {
            self.finish_reason = Some(match &self.grammar {
                None => FinishReason::Failed(Failure::NoFiniteLogit),
                Some(grammar) => grammar.end_without_token(),
            });
            return;
        };
        self.tokens.push(*token);
        let is_stopped = self.stop_check.as_mut().is_some_and(|check| check(*token));
        if is_stopped || self.stop_token_ids.contains(token) {
            self.finish_reason = Some(FinishReason::Stop);
        } else if let Some(reason) = self.advance_grammar(*token) {
            self.finish_reason = Some(reason);
        } else if self.tokens.len() >= self.len_max {
            self.finish_reason = Some(FinishReason::Length);
        }
    }

    /// Takes over every page that still holds this sequence's tokens: first those an earlier run
    /// left, then those the prefix index knows.
    pub(crate) fn find_pages(&mut self, pool: &mut PagePool) {
        assert!(self.pages.is_empty() && self.num_computed == 0, "the sequence does not run");
        let revived = self.kept.stamps.iter().map_while(|stamp| pool.revive(*stamp));
        self.pages.extend(revived);
        let page_size = pool.page_size();
        let mut num_found = self.kept.num_tokens.min(self.pages.len() * page_size);
        let num_full = num_found / page_size;
        if let Some(prefix) = &mut self.prefix {
            let found = prefix.find(pool, &self.tokens, num_full);
            if !found.is_empty() {
                let surplus: Vec<Page> = self.pages.drain(num_full..).collect();
                surplus.into_iter().for_each(|page| pool.release(page, Keep::Nothing));
                self.pages.extend(found);
                num_found = self.pages.len() * page_size;
            }
        }
        self.start_at(num_found, pool);
    }

    /// Takes over the prompt that `parent`, an answer to the same prompt, has computed.
    pub(crate) fn fork_pages(&mut self, parent: &Sequence, pool: &mut PagePool) {
        let num_shared = num_pages(self.num_prompt, pool.page_size());
        self.pages.extend(parent.pages[..num_shared].iter().map(|page| pool.share(page)));
        self.start_at(self.num_prompt, pool);
    }

    /// Starts behind `num_found` tokens, but always with a token left to compute: its row gives
    /// the first logits.
    fn start_at(&mut self, num_found: usize, pool: &mut PagePool) {
        let num_left = if is_planted(Fault::NothingLeftToCompute) { 0 } else { 1 };
        self.num_computed = num_found.min(self.tokens.len() - num_left);
        let num_used = num_pages(self.num_computed, pool.page_size());
        while self.pages.len() > num_used
            && let Some(page) = self.pages.pop()
        {
            pool.release(page, Keep::Nothing);
        }
    }

    /// Makes the sequence ready to run with the pages it found: pages for all its tokens, with
    /// `num_spare` to be left to others, and the right to append behind the computed tokens, for
    /// which the last page may have to be copied. Gives everything back where there is no room.
    pub(crate) fn reserve_pages(
        &mut self,
        num_spare: usize,
        pool: &mut PagePool,
        copies: &mut Vec<PageCopy>,
    ) -> bool {
        let num_needed = num_pages(self.tokens.len(), pool.page_size());
        let mut copies_last = !self.is_last_page_open(pool);
        // NOTE: a page to copy is held beside its copy; without it there may be room.
        if copies_last && num_needed - self.pages.len() + 1 + num_spare > pool.num_available() {
            self.start_at(self.num_computed - self.num_computed % pool.page_size(), pool);
            copies_last = false;
        }
        let num_missing = num_needed - self.pages.len() + usize::from(copies_last);
        if num_missing + num_spare > pool.num_available() {
            self.give_pages_back(pool);
            return false;
        }
        if copies_last && let Some(from) = self.pages.pop() {
            let to = pool.allocate().expect("room was counted");
            copies.push(PageCopy { from: from.id(), to: to.id() });
            pool.release(from, Keep::Nothing);
            self.pages.push(to);
        } else if let Some(page) = self.pages.last() {
            pool.open(page);
        }
        while self.pages.len() < num_needed {
            self.pages.push(pool.allocate().expect("room was counted"));
        }
        true
    }

    /// Whether the next token can be written behind the computed ones.
    fn is_last_page_open(&self, pool: &PagePool) -> bool {
        let num_in_last = self.num_computed % pool.page_size();
        let last = self.pages.last().filter(|_| num_in_last > 0);
        last.is_none_or(|page| pool.is_open(page, num_in_last))
    }

    /// Gives back the pages that were found, as if nobody had looked.
    fn give_pages_back(&mut self, pool: &mut PagePool) {
        self.num_computed = 0;
        while let Some(page) = self.pages.pop() {
            pool.release(page, Keep::Nothing);
        }
    }

    /// Gives all pages back, those of the last tokens first, so that they are evicted first.
    pub(crate) fn release_pages(&mut self, pool: &mut PagePool, keep: Keep) {
        let page_size = pool.page_size();
        let num_used = num_pages(self.num_computed, page_size);
        self.kept = KeptPages::default();
        if keep == Keep::Content {
            let num_tokens = self.num_computed;
            let stamps = self.pages[..num_used].iter().map(|page| pool.stamp(page)).collect();
            self.kept = KeptPages { stamps, num_tokens };
        }
        let num_in_last = self.num_computed % page_size;
        while let Some(page) = self.pages.pop() {
            let page_idx = self.pages.len();
            if page_idx + 1 == num_used && num_in_last > 0 {
                pool.close(&page, num_in_last);
            }
            pool.release(page, if page_idx < num_used { keep } else { Keep::Nothing });
        }
        self.num_computed = 0;
    }

    /// Enters the pages that `num_computed` has filled since `num_before` into the prefix index.
    pub(crate) fn register_pages(&mut self, num_before: usize, pool: &mut PagePool) {
        let page_size = pool.page_size();
        let Some(prefix) = &mut self.prefix else { return };
        let num_early = if is_planted(Fault::PageFullTooEarly) { 1 } else { 0 };
        let num_full = (self.num_computed + num_early).min(self.tokens.len()) / page_size;
        for page_idx in num_before / page_size..num_full {
            let (hash, parent) = prefix.hash(pool, &self.tokens, page_idx);
            let tokens = &self.tokens[page_idx * page_size..][..page_size];
            pool.register(&self.pages[page_idx], hash, parent, tokens);
        }
    }
}

impl KeptPages {
    /// Leaves the first `num_tokens` tokens.
    pub(crate) fn truncate(&mut self, num_tokens: usize, page_size: usize) {
        if is_planted(Fault::RewindKeepsPages) {
            return;
        }
        self.num_tokens = self.num_tokens.min(num_tokens);
        self.stamps.truncate(num_pages(self.num_tokens, page_size));
    }

    /// Frees what only the holder of these stamps could have used again.
    pub(crate) fn forget(&mut self, pool: &mut PagePool) {
        self.num_tokens = 0;
        self.stamps.drain(..).rev().for_each(|stamp| pool.forget(stamp));
    }
}

impl PrefixHashes {
    /// Hash of page `page_idx` of `tokens`, and of the page before it.
    fn hash(&mut self, pool: &PagePool, tokens: &[u32], page_idx: usize) -> (PageHash, PageHash) {
        let page_size = pool.page_size();
        while self.hashes.len() <= page_idx {
            let parent = self.hashes.last().unwrap_or(&self.root);
            let page_tokens = &tokens[self.hashes.len() * page_size..][..page_size];
            let hash = pool.page_hash(parent, page_tokens);
            self.hashes.push(hash);
        }
        let parent = if page_idx == 0 { self.root } else { self.hashes[page_idx - 1] };
        (self.hashes[page_idx], parent)
    }

    /// The pages that the index has of `tokens`, one after the other from page `first` on.
    fn find(&mut self, pool: &mut PagePool, tokens: &[u32], first: usize) -> Vec<Page> {
        let page_size = pool.page_size();
        let mut pages = Vec::new();
        for page_idx in first..tokens.len() / page_size {
            let (hash, parent) = self.hash(pool, tokens, page_idx);
            let page_tokens = &tokens[page_idx * page_size..][..page_size];
            match pool.find(&hash, &parent, page_tokens) {
                Some(page) => pages.push(page),
                None => break,
            }
        }
        pages
    }
}
