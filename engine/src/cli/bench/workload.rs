//! The requests of a measurement. A seed decides everything.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

use crate::cli::prompt::read_text;
use crate::request::Request;
use crate::sampling::{choice_seed, uniform};

/// How long one request is; one line of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Lengths {
    pub(super) prompt_tokens: usize,
    pub(super) max_tokens: usize,
}

impl Lengths {
    /// Tokens at the end; at most `usize::MAX`.
    pub(super) fn total(self) -> usize {
        self.prompt_tokens.saturating_add(self.max_tokens)
    }

    /// Refuses empty requests and those that a model with this context cannot serve.
    pub(super) fn check(self, context_max: usize) -> anyhow::Result<()> {
        let Lengths { prompt_tokens, max_tokens } = self;
        ensure!(
            prompt_tokens > 0 && max_tokens > 0,
            "{prompt_tokens} prompt tokens and {max_tokens} generated ones; both must be at least 1"
        );
        ensure!(
            self.total() <= context_max,
            "{prompt_tokens} prompt tokens and {max_tokens} generated ones do not fit the model's \
             context of {context_max}; ask for fewer"
        );
        Ok(())
    }
}

/// Where the lengths of requests come from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// All are alike.
    Fixed(Lengths),
    /// Drawn as in chats, see [`Source::lengths`].
    Chat,
    /// As in a file, again from its start where that is too short.
    Trace(Vec<Lengths>),
}

/// Logarithms of lengths are normal: median, σ. Cut to these bounds, the means come near 200 and
/// 225 tokens, as in the chats that serving systems are usually measured with.
const CHAT_PROMPT: (f64, f64) = (100.0, 1.35);
const CHAT_ANSWER: (f64, f64) = (150.0, 0.95);
const CHAT_TOKENS_MIN: usize = 4;
const CHAT_TOKENS_MAX: usize = 1024;

impl Source {
    /// Reads a trace of JSON lines.
    pub(super) fn trace(path: &Path, context_max: usize) -> anyhow::Result<Source> {
        let text = read_text(path)?;
        let mut trace = Vec::new();
        for (idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = || format!("{}, line {}", path.display(), idx + 1);
            let lengths: Lengths = serde_json::from_str(line).with_context(place)?;
            lengths.check(context_max).with_context(place)?;
            trace.push(lengths);
        }
        if trace.is_empty() {
            bail!(
                "{}: no requests; a line is {{\"prompt_tokens\": 100, \"max_tokens\": 20}}",
                path.display()
            );
        }
        Ok(Source::Trace(trace))
    }

    /// The lengths of `num_requests` requests. Chats take at most half of the context each for
    /// prompt and answer.
    pub(super) fn lengths(
        &self,
        num_requests: usize,
        seed: u64,
        context_max: usize,
    ) -> Vec<Lengths> {
        let tokens_max = CHAT_TOKENS_MAX.min(context_max / 2).max(1);
        let draw = |(median, sigma): (f64, f64), counter: usize| {
            let tokens = median * (sigma * normal(!seed, counter as u64)).exp();
            (tokens as usize).clamp(CHAT_TOKENS_MIN.min(tokens_max), tokens_max)
        };
        let chat = |idx| Lengths {
            prompt_tokens: draw(CHAT_PROMPT, 2 * idx),
            max_tokens: draw(CHAT_ANSWER, 2 * idx + 1),
        };
        match self {
            Source::Fixed(lengths) => vec![*lengths; num_requests],
            Source::Chat => (0..num_requests).map(chat).collect(),
            Source::Trace(trace) => trace.iter().copied().cycle().take(num_requests).collect(),
        }
    }

    /// What a heading says.
    pub(super) fn name(&self) -> String {
        match self {
            Source::Fixed(Lengths { prompt_tokens, max_tokens }) => {
                format!("{prompt_tokens} → {max_tokens} tokens")
            }
            Source::Chat => "chats".to_owned(),
            Source::Trace(_) => "trace".to_owned(),
        }
    }
}

/// A number with the standard normal distribution (Box and Muller 1958).
fn normal(seed: u64, counter: u64) -> f64 {
    let radius = (-2.0 * (1.0 - uniform(seed, 2 * counter)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(seed, 2 * counter + 1)).cos()
}

/// Requests, made one by one when they are asked for.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    /// Of each request.
    pub(super) lengths: Vec<Lengths>,
    pub(super) vocab_size: usize,
    pub(super) seed: u64,
    /// Leading tokens that all prompts have in common, as far as they are as long.
    pub(super) num_shared: usize,
}

impl Workload {
    /// Request `idx`: pseudo-random tokens, and as many more as its lengths say.
    pub(super) fn request(&self, idx: usize) -> Request {
        let Lengths { prompt_tokens, max_tokens } = self.lengths[idx];
        let token = |place: usize| {
            // Stream 0 is the shared beginning's.
            let stream = if place < self.num_shared { 0 } else { idx + 1 };
            let value = uniform(choice_seed(self.seed, stream), place as u64);
            (value * self.vocab_size as f64) as u32
        };
        Request {
            prompt_ids: (0..prompt_tokens).map(token).collect(),
            max_tokens,
            ignore_eos: true,
            ..Request::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(seed: u64, num_shared: usize) -> Workload {
        let lengths = Source::Chat.lengths(20, seed, 4096);
        Workload { lengths, vocab_size: 50, seed, num_shared }
    }

    fn prompts(workload: &Workload) -> Vec<Vec<u32>> {
        (0..workload.lengths.len()).map(|idx| workload.request(idx).prompt_ids).collect()
    }

    #[test]
    fn a_seed_decides_all() {
        assert_eq!(workload(1, 0).lengths, workload(1, 0).lengths);
        assert_eq!(prompts(&workload(1, 0)), prompts(&workload(1, 0)));
        assert_ne!(workload(1, 0).lengths, workload(2, 0).lengths);
        assert_ne!(prompts(&workload(1, 0)), prompts(&workload(2, 0)));
    }

    #[test]
    fn prompts_share_their_beginning_only() {
        let workload = workload(3, 8);
        let prompts = prompts(&workload);
        assert!(prompts.iter().flatten().all(|id| (*id as usize) < workload.vocab_size));
        let long: Vec<_> = prompts.iter().filter(|prompt| prompt.len() > 30).collect();
        assert!(long.len() > 10, "{}", long.len());
        for pair in long.windows(2) {
            assert_eq!(pair[0][..8], pair[1][..8]);
            assert_ne!(pair[0][8..30], pair[1][8..30]);
        }
    }

    #[test]
    fn chats_have_their_means() {
        let lengths = Source::Chat.lengths(20_000, 7, 4096);
        let mean =
            |part: fn(&Lengths) -> usize| lengths.iter().map(part).sum::<usize>() / lengths.len();
        let means = (mean(|lengths| lengths.prompt_tokens), mean(|lengths| lengths.max_tokens));
        assert!((190..260).contains(&means.0) && (190..260).contains(&means.1), "{means:?}");
        // Any context holds them.
        for context_max in [2, 7, 100] {
            let lengths = Source::Chat.lengths(500, 7, context_max);
            assert!(lengths.iter().all(|lengths| lengths.check(context_max).is_ok()));
        }
    }
}
