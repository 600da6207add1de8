//! Sampling straight from the definitions: float64, and everything sorted.

use std::collections::BTreeMap;

use bespoke::sampling::{History, SamplingParams};

/// How far from a bound of top-p or min-p, as a share, a token must be to be judged.
const MARGIN: f64 = 2e-5;

/// What the definitions leave: tokens with their probabilities, likeliest first. `None` where
/// rounding decides about a token.
pub(super) fn naive(
    params: &SamplingParams,
    history: &History<'_>,
    logits: &[f32],
) -> Option<Vec<(u32, f64)>> {
    let mut tokens: Vec<(u32, f64)> = naive_logits(params, history, logits);
    tokens.retain(|(_, logit)| *logit > f64::NEG_INFINITY);
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    // Penalties are rounded to float32.
    let is_close = |a: f64, b: f64| a != b && (a - b).abs() < MARGIN;
    let top_k = if params.temperature == 0.0 { 1 } else { params.top_k };
    if top_k > 0 && top_k < tokens.len() {
        if is_close(tokens[top_k - 1].1, tokens[top_k].1) {
            return None;
        }
        tokens.truncate(top_k);
    }
    let Some((_, max)) = tokens.first().copied() else { return Some(tokens) };
    let temperature = f64::from(params.temperature);
    for (_, value) in &mut tokens {
        *value = ((*value - max) / if temperature == 0.0 { 1.0 } else { temperature }).exp();
    }
    if params.top_p < 1.0 {
        let sum: f64 = tokens.iter().map(|(_, weight)| weight).sum();
        let shares: Vec<f64> = tokens
            .iter()
            .scan(0.0, |before, (_, weight)| {
                *before += weight / sum;
                Some(*before)
            })
            .collect();
        let top_p = f64::from(params.top_p);
        if shares.iter().any(|share| (share - top_p).abs() < MARGIN) {
            return None;
        }
        let num_kept = shares.iter().filter(|share| **share < top_p).count() + 1;
        tokens.truncate(num_kept);
    }
    let min_p = f64::from(params.min_p);
    if tokens.iter().any(|(_, weight)| *weight < 1.0 && (weight - min_p).abs() < MARGIN) {
        return None;
    }
    tokens.retain(|(_, weight)| *weight >= min_p);
    let sum: f64 = tokens.iter().map(|(_, weight)| weight).sum();
    tokens.iter_mut().for_each(|(_, weight)| *weight /= sum);
    Some(tokens)
}

/// Bias, bans and penalties.
pub(super) fn naive_logits(
    params: &SamplingParams,
    history: &History<'_>,
    logits: &[f32],
) -> Vec<(u32, f64)> {
    let output = &history.tokens[history.num_prompt..];
    let is_banned = |token: u32| {
        let is_early_stop =
            output.len() < params.min_tokens && history.stop_token_ids.contains(&token);
        let continued = [output, &[token]].concat();
        is_early_stop || params.bad_words.iter().any(|word| continued.ends_with(word))
    };
    let mut counts = BTreeMap::<u32, f64>::new();
    output.iter().for_each(|token| *counts.entry(*token).or_default() += 1.0);
    let adjust = |(token, logit): (usize, &f32)| {
        let token = token as u32;
        let mut logit = if logit.is_nan() { f64::NEG_INFINITY } else { f64::from(*logit) };
        let biases = params.logit_bias.iter().filter(|(id, _)| *id == token);
        logit += biases.map(|(_, bias)| f64::from(*bias)).sum::<f64>();
        if is_banned(token) {
            logit = f64::NEG_INFINITY;
        }
        if history.tokens.contains(&token) {
            let penalty = f64::from(params.repetition_penalty);
            logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
        }
        if let Some(count) = counts.get(&token) {
            logit -= f64::from(params.frequency_penalty) * count;
            logit -= f64::from(params.presence_penalty);
        }
        (token, logit)
    };
    logits.iter().enumerate().map(adjust).collect()
}
