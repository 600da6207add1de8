//! Logits with bias, bans and penalties applied.

use super::{History, SamplingParams};

/// Scratch memory for one row; what it held before never shows.
#[derive(Clone, Debug)]
pub(super) struct AdjustedLogits {
    /// `[vocab]`
    logits: Vec<f32>,
    /// `[vocab]`: all 0 between calls.
    counts: Vec<u32>,
}

/// Which of the parameters act on a row.
struct Changes {
    has_mask: bool,
    is_too_short: bool,
    has_repetition: bool,
    has_frequency: bool,
    has_lists: bool,
}

impl Changes {
    fn of(params: &SamplingParams, history: &History<'_>) -> Changes {
        let output = output(history);
        let has_penalty = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        Changes {
            has_mask: history.mask.is_some(),
            is_too_short: output.len() < params.min_tokens && !history.stop_token_ids.is_empty(),
            has_repetition: params.repetition_penalty != 1.0 && !history.tokens.is_empty(),
            has_frequency: has_penalty && !output.is_empty(),
            has_lists: !params.logit_bias.is_empty() || !params.bad_words.is_empty(),
        }
    }
}

/// Whether `params` change any logit after `history`.
pub(super) fn is_changed(params: &SamplingParams, history: &History<'_>) -> bool {
    let changes = Changes::of(params, history);
    changes.has_mask
        || changes.is_too_short
        || changes.has_repetition
        || changes.has_frequency
        || changes.has_lists
}

fn output<'a>(history: &History<'a>) -> &'a [u32] {
    &history.tokens[history.num_prompt.min(history.tokens.len())..]
}

impl AdjustedLogits {
    pub(super) fn new(vocab_size: usize) -> AdjustedLogits {
        AdjustedLogits { logits: Vec::with_capacity(vocab_size), counts: vec![0; vocab_size] }
    }

    /// `logits` as `params` want them after `history`; `None` where they stay as they are.
    pub(super) fn fill(
        &mut self,
        params: &SamplingParams,
        history: &History<'_>,
        logits: &[f32],
    ) -> Option<&[f32]> {
        let Changes { is_too_short, has_repetition, has_frequency, .. } =
            Changes::of(params, history);
        if !is_changed(params, history) {
            return None;
        }
        let output = output(history);
        self.logits.clear();
        match history.mask {
            None => self.logits.extend_from_slice(logits),
            Some(mask) => mask.extend(&mut self.logits, logits),
        }
        for (token, bias) in &params.logit_bias {
            self.change(*token, |logit| logit + bias);
        }
        if is_too_short {
            history.stop_token_ids.iter().for_each(|token| self.ban(*token));
        }
        for word in &params.bad_words {
            if let Some((last, before)) = word.split_last()
                && output.ends_with(before)
            {
                self.ban(*last);
            }
        }
        if has_repetition {
            self.penalize(history.tokens, |logit, _| match logit > 0.0 {
                true => logit / params.repetition_penalty,
                false => logit * params.repetition_penalty,
            });
        }
        if has_frequency {
            self.penalize(output, |logit, count| {
                logit - params.frequency_penalty * count as f32 - params.presence_penalty
            });
        }
        Some(&self.logits)
    }

    /// Applies `penalty` once to each token that occurs in `tokens`, with how often it does.
    fn penalize(&mut self, tokens: &[u32], penalty: impl Fn(f32, u32) -> f32) {
        for token in tokens {
            if let Some(count) = self.counts.get_mut(*token as usize) {
                *count += 1;
            }
        }
        for token in tokens {
            let count = self.counts.get_mut(*token as usize).map_or(0, std::mem::take);
            if count > 0 {
                self.change(*token, |logit| penalty(logit, count));
            }
        }
    }

    fn ban(&mut self, token: u32) {
        if let Some(logit) = self.logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }

    /// A finite logit stays finite: only a ban takes a token away for certain.
    fn change(&mut self, token: u32, change: impl Fn(f32) -> f32) {
        if let Some(logit) = self.logits.get_mut(token as usize)
            && logit.is_finite()
        {
            *logit = change(*logit).clamp(f32::MIN, f32::MAX);
        }
    }
}
