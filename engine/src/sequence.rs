//! The state of one request in the engine.

use crate::kv_cache::Page;
use crate::request::{FinishReason, Request, RequestId};
use crate::sampling::{History, SamplingParams};

/// Tokens of a request and how many of them are in the KV cache.
///
/// ```text
/// tokens      0 ........ num_computed ........ tokens.len()
///             in the KV cache   pending
///             prompt ........ num_prompt ...... output
/// ```
#[derive(Debug)]
pub struct Sequence {
    pub id: RequestId,
    /// Prompt, then output.
    pub tokens: Vec<u32>,
    pub num_prompt: usize,
    /// Leading tokens whose keys and values are in the cache.
    pub num_computed: usize,
    /// Pages of the sequence in the order of its tokens.
    pub pages: Vec<Page>,
    pub sampling: SamplingParams,
    /// Length at which the output ends.
    pub len_max: usize,
    stop_token_ids: Vec<u32>,
    pub finish_reason: Option<FinishReason>,
}

impl Sequence {
    /// A sequence for a request that [`Request::check`] accepted.
    pub fn new(id: RequestId, request: Request, eos_ids: &[u32], max_context: usize) -> Sequence {
        let num_prompt = request.prompt_ids.len();
        let len_max = num_prompt.saturating_add(request.max_tokens).min(max_context);
        let mut tokens = request.prompt_ids;
        tokens.reserve_exact(len_max.saturating_sub(num_prompt));
        let mut stop_token_ids = request.stop_token_ids;
        if !request.ignore_eos {
            stop_token_ids.extend_from_slice(eos_ids);
        }
        Sequence {
            id,
            tokens,
            num_prompt,
            num_computed: 0,
            pages: Vec::new(),
            sampling: request.sampling,
            len_max,
            stop_token_ids,
            finish_reason: None,
        }
    }

    /// Tokens that are not in the KV cache yet.
    pub fn num_pending(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// Whether the prompt is done and tokens follow one by one.
    pub fn is_decoding(&self) -> bool {
        self.tokens.len() > self.num_prompt
    }

    /// Tokens that the KV cache holds at most: the last one is never computed.
    pub fn num_cached_max(&self) -> usize {
        self.len_max - 1
    }

    /// What sampling sees of the sequence.
    pub fn history(&self) -> History<'_> {
        History {
            tokens: &self.tokens,
            num_prompt: self.num_prompt,
            stop_token_ids: &self.stop_token_ids,
        }
    }

    /// Appends a sampled token, or ends the sequence where there is none.
    pub fn push(&mut self, token: Option<u32>) {
        let Some(token) = token else {
            self.finish_reason = Some(FinishReason::Failed);
            return;
        };
        self.tokens.push(token);
        if self.stop_token_ids.contains(&token) {
            self.finish_reason = Some(FinishReason::Stop);
        } else if self.tokens.len() >= self.len_max {
            self.finish_reason = Some(FinishReason::Length);
        }
    }
}
