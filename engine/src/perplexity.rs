//! Perplexity of a model on a text, after llama.cpp's protocol, so that numbers compare.

use crate::engine::Engine;
use crate::error::Error;

/// Smallest chunk: one that has a prediction to score.
pub const CTX_MIN: usize = 4;

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// `exp(nll_sum / tokens_scored)`
    pub ppl: f64,
    pub tokens_scored: usize,
    pub chunks: usize,
    /// Sum of the negative natural logarithms of the scored tokens' probabilities.
    pub nll_sum: f64,
}

/// Cuts `ids`, a whole text without BOS, into chunks of `ctx` tokens (the rest is dropped), runs
/// each alone and scores the predictions made at its positions `ctx / 2 ..= ctx - 2`. `progress`
/// hears the number of chunks that are done, their number, and the perplexity so far.
pub fn measure(
    engine: &mut Engine,
    ids: &[u32],
    ctx: usize,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<Perplexity, Error> {
    check(ids.len(), ctx, engine.max_context())?;
    let num_chunks = ids.len() / ctx;
    let mut nll_sum = 0.0;
    let mut tokens_scored = 0;
    for (idx, chunk) in ids.chunks_exact(ctx).enumerate() {
        engine.logits_of(chunk, ctx / 2..ctx - 1, &mut |position, logits| {
            nll_sum += negative_log_likelihood(logits, chunk[position + 1]);
            tokens_scored += 1;
        })?;
        progress(idx + 1, num_chunks, perplexity(nll_sum, tokens_scored));
    }
    if !nll_sum.is_finite() {
        return Err(Error::Unsupported(format!(
            "the model's logits are not finite in one of {num_chunks} chunks; its weights are \
             damaged or too large for this arithmetic"
        )));
    }
    let ppl = perplexity(nll_sum, tokens_scored);
    Ok(Perplexity { ppl, tokens_scored, chunks: num_chunks, nll_sum })
}

fn perplexity(nll_sum: f64, tokens_scored: usize) -> f64 {
    (nll_sum / tokens_scored as f64).exp()
}

fn check(num_tokens: usize, ctx: usize, max_context: usize) -> Result<(), Error> {
    if ctx < CTX_MIN || ctx > max_context {
        return Err(Error::Request(format!(
            "the chunk size is {ctx} tokens, it must be {CTX_MIN} to the context of {max_context}"
        )));
    }
    if num_tokens < ctx {
        return Err(Error::Request(format!(
            "the text has {num_tokens} tokens, fewer than one chunk of {ctx}; give more text or a \
             smaller chunk size"
        )));
    }
    Ok(())
}

/// `−ln softmax(logits)[token]`
pub(crate) fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
    f64::from(max) + sum.ln() - f64::from(logits[token as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_one_token() {
        let nll = negative_log_likelihood(&[1.0, 1.0, 1.0, 1.0], 2);
        assert!((nll - 4f64.ln()).abs() < 1e-6, "{nll}");
        let nll = negative_log_likelihood(&[500.0, 0.0], 1);
        assert!((nll - 500.0).abs() < 1e-3, "{nll}");
        assert!(negative_log_likelihood(&[f32::NAN, 0.0], 1).is_nan());
    }

    #[test]
    fn refuses_impossible_chunks() {
        assert!(check(512, 512, 512).is_ok());
        let message = |tokens, ctx| check(tokens, ctx, 1024).unwrap_err().to_string();
        assert!(message(511, 512).contains("511 tokens, fewer than one chunk of 512"));
        assert!(message(9999, 3).contains("chunk size is 3"));
        assert!(message(9999, 1025).contains("4 to the context of 1024"));
    }
}
