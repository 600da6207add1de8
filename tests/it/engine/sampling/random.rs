//! Sampling of random rows with random parameters.

use bespoke::sampling::{History, Sampler, SamplingParams, TokenLogprob};
use proptest::prelude::*;

use super::naive::{naive, naive_logits};
use super::{counts, sample_after, stats, token_after};

/// Tokens of the random tests.
const VOCAB: u32 = 12;

/// A sequence and the logits after it.
#[derive(Clone, Debug)]
struct Row {
    tokens: Vec<u32>,
    num_prompt: usize,
    stop_token_ids: Vec<u32>,
    logits: Vec<f32>,
}

impl Row {
    fn history(&self) -> History<'_> {
        let Row { tokens, num_prompt, stop_token_ids, .. } = self;
        History { tokens, num_prompt: *num_prompt, stop_token_ids, mask: None }
    }
}

fn row(logit: impl Strategy<Value = f32>) -> impl Strategy<Value = Row> {
    let logits = prop::collection::vec(logit, VOCAB as usize);
    // Few tokens, so that bad words and repetitions come.
    let tokens = prop::collection::vec(0..4u32, 0..12);
    let stop_token_ids = prop::collection::vec(0..VOCAB + 2, 0..3);
    (tokens, any::<prop::sample::Index>(), stop_token_ids, logits).prop_map(
        |(tokens, num_prompt, stop_token_ids, logits)| {
            let num_prompt = num_prompt.index(tokens.len() + 1);
            Row { tokens, num_prompt, stop_token_ids, logits }
        },
    )
}

/// `neutral` as often as not.
fn maybe<T: Clone + std::fmt::Debug + 'static>(
    neutral: T,
    values: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = T> {
    prop_oneof![Just(neutral), values]
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let filters = (
        maybe(0.0, 0.05f32..3.0),
        maybe(0, 0..VOCAB as usize + 3),
        maybe(1.0, 0.01f32..=1.0),
        maybe(0.0, 0.0f32..=1.0),
    );
    let penalties = (maybe(1.0, 0.5f32..2.0), maybe(0.0, -2.0f32..=2.0), maybe(0.0, -2.0f32..=2.0));
    let lists = (
        prop::collection::vec((0..VOCAB, -3.0f32..3.0), 0..4),
        prop::collection::vec(prop::collection::vec(0..4u32, 1..4), 0..5),
        0..8usize,
        0..=20usize,
    );
    (filters, penalties, lists, any::<u64>()).prop_map(|(filters, penalties, lists, seed)| {
        let (temperature, top_k, top_p, min_p) = filters;
        let (repetition_penalty, presence_penalty, frequency_penalty) = penalties;
        let (logit_bias, bad_words, min_tokens, num_top_logprobs) = lists;
        SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias,
            bad_words,
            min_tokens,
            num_top_logprobs,
            seed,
        }
    })
}

/// Bits of numbers of all kinds, the odd ones often.
fn any_logit() -> impl Strategy<Value = f32> {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, f32::MIN, f32::MAX, 1e-45];
    prop_oneof![
        any::<u32>().prop_map(f32::from_bits),
        prop::sample::select(odd.to_vec()),
        Just(f32::NEG_INFINITY),
        -3.0f32..3.0
    ]
}

proptest! {
    #[test]
    fn draws_follow_the_naive_distribution(params in params(), row in row(-4.0f32..4.0)) {
        const NUM_DRAWS: usize = 2000;
        let naive = naive(&params, &row.history(), &row.logits);
        prop_assume!(naive.is_some());
        let naive = naive.unwrap();
        if naive.is_empty() {
            prop_assert_eq!(token_after(&params, &row.history(), &row.logits), None);
            return Ok(());
        }
        let counts = counts(&params, &row.history(), &row.logits, NUM_DRAWS);
        let mut expected = vec![0.0; row.logits.len()];
        naive.iter().for_each(|(token, p)| expected[*token as usize] = *p);
        for (token, (count, p)) in counts.iter().zip(expected).enumerate() {
            if p == 0.0 {
                prop_assert_eq!(*count, 0, "token {} of {:?}", token, counts);
            }
            // Six standard deviations of a binomial count, and room for rare tokens.
            let mean = NUM_DRAWS as f64 * p;
            let bound = 6.0 * (mean * (1.0 - p)).sqrt() + 6.0;
            let difference = (*count as f64 - mean).abs();
            prop_assert!(p == 1.0 || difference < bound, "token {token}: {p}, {counts:?}");
            prop_assert!(p < 1.0 || *count == NUM_DRAWS, "token {token}: {counts:?}");
        }
    }

    #[test]
    fn any_logits_have_an_answer(
        params in params(),
        row in row(any_logit()),
        has_plain_stats in any::<bool>(),
    ) {
        let mut stats = stats(&row.logits);
        let is_odd = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
        if has_plain_stats && row.logits.iter().any(is_odd) {
            // As the reference backend has it.
            stats.log_sum_exp = f32::NAN;
        }
        let mut sampler = Sampler::new(row.logits.len());
        let sample = sampler.sample(&params, &row.history(), &row.logits, &stats);
        let open = naive_logits(&params, &row.history(), &row.logits);
        let is_open = |token: u32| open[token as usize].1 > f64::NEG_INFINITY;
        let Some(sample) = sample else {
            prop_assert!(!(0..VOCAB).any(is_open));
            return Ok(());
        };
        prop_assert!(is_open(sample.token));
        prop_assert!(sample.logprob <= 0.0);
        let top = &sample.top_logprobs;
        prop_assert!(top.len() <= params.num_top_logprobs);
        prop_assert!(top.iter().all(|top| top.logprob <= 0.0 && top.logprob.is_finite()));
        let logit = |top: &TokenLogprob| row.logits[top.token as usize];
        let is_sorted = top.is_sorted_by(|a, b| {
            logit(a) > logit(b) || (logit(a) == logit(b) && a.token < b.token)
        });
        prop_assert!(is_sorted, "{top:?}");
    }

    #[test]
    fn rows_before_leave_no_trace(
        rows in prop::collection::vec((params(), row(any_logit())), 1..6),
    ) {
        let mut sampler = Sampler::new(VOCAB as usize);
        for (params, row) in rows {
            let sample =
                sampler.sample(&params, &row.history(), &row.logits, &stats(&row.logits));
            prop_assert_eq!(sample, sample_after(&params, &row.history(), &row.logits));
        }
    }
}
