//! Sampling: what is kept, what is drawn, and that any input gives an answer.

use bespoke::Error;
use bespoke::kernels::abi::LogitStats;
use bespoke::sampling::{Sample, Sampler, SamplingParams};
use proptest::prelude::*;

fn stats(logits: &[f32]) -> LogitStats {
    let mut best = 0;
    for (idx, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = idx;
        }
    }
    let max = logits[best];
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    LogitStats { max, argmax: best as u32, log_sum_exp: max + sum.ln() as f32 }
}

fn sample_after(params: &SamplingParams, tokens: &[u32], logits: &[f32]) -> Option<Sample> {
    params.check().unwrap();
    Sampler::new(logits.len()).sample(params, tokens, logits, &stats(logits))
}

/// Tokens drawn at many places of a sequence, counted.
fn counts(params: &SamplingParams, logits: &[f32], num_draws: usize) -> Vec<usize> {
    let mut counts = vec![0; logits.len()];
    let tokens = vec![0; num_draws];
    for len in 0..num_draws {
        counts[sample_after(params, &tokens[..len], logits).unwrap().token as usize] += 1;
    }
    counts
}

/// Sampling from everything.
fn warm() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 3, ..SamplingParams::default() }
}

/// Tokens 0.. with these probabilities.
fn logits_of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

#[test]
fn greedy_takes_the_first_maximum() {
    let sample = sample_after(&SamplingParams::default(), &[], &[1.0, 3.0, 3.0, -2.0]).unwrap();
    assert_eq!(sample.token, 1);
    let sum = 1f32.exp() + 2.0 * 3f32.exp() + (-2f32).exp();
    assert!((sample.logprob - (3.0 - sum.ln())).abs() < 1e-5);
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = logits_of(&[0.5, 0.25, 0.125, 0.125]);
    let counts = counts(&warm(), &logits, 8000);
    for (count, expected) in counts.iter().zip([4000.0, 2000.0, 1000.0, 1000.0]) {
        // Five standard deviations of a binomial count.
        let deviation = 5.0 * f64::sqrt(expected * (1.0 - expected / 8000.0));
        assert!((*count as f64 - expected).abs() < deviation, "{counts:?}");
    }
}

#[test]
fn temperature_sharpens_and_flattens() {
    let logits = logits_of(&[0.6, 0.4]);
    let first = |temperature| counts(&SamplingParams { temperature, ..warm() }, &logits, 2000)[0];
    let (cold, middle, hot) = (first(0.2), first(1.0), first(100.0));
    assert!(cold > 1700 && middle > 1100 && middle < 1300, "{cold} {middle}");
    assert!(hot > 900 && hot < 1100, "{hot}");
    assert_eq!(first(f32::MIN_POSITIVE), 2000);
}

#[test]
fn filters_keep_what_they_say() {
    let logits = logits_of(&[0.1, 0.4, 0.2, 0.3]);
    let kept = |params: SamplingParams| -> Vec<usize> {
        let counts = counts(&params, &logits, 400);
        (0..4).filter(|token| counts[*token] > 0).collect()
    };
    assert_eq!(kept(warm()), [0, 1, 2, 3]);
    assert_eq!(kept(SamplingParams { top_k: 2, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplingParams { top_k: 9, ..warm() }), [0, 1, 2, 3]);
    assert_eq!(kept(SamplingParams { top_p: 0.69, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplingParams { top_p: 0.71, ..warm() }), [1, 2, 3]);
    assert_eq!(kept(SamplingParams { top_p: 1e-9, ..warm() }), [1]);
    assert_eq!(kept(SamplingParams { min_p: 0.6, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplingParams { min_p: 1.0, ..warm() }), [1]);
    // Among three of four, 0.4 of 0.9 is enough for a share of 0.4.
    assert_eq!(kept(SamplingParams { top_k: 3, top_p: 0.4, ..warm() }), [1]);
}

#[test]
fn top_p_finds_its_share_among_many_tokens() {
    // Equal tokens: a share of one half is half of them, those with the lowest ids.
    let logits = vec![0.0; 3000];
    let params = SamplingParams { top_p: 0.5, ..warm() };
    let tokens = vec![0; 500];
    for len in 0..tokens.len() {
        let token = sample_after(&params, &tokens[..len], &logits).unwrap().token;
        assert!(token < 1500, "{token}");
    }
}

#[test]
fn repetition_penalty_acts_on_tokens_seen() {
    let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    let logits = [4.0, 3.0, -1.0];
    assert_eq!(sample_after(&params, &[], &logits).unwrap().token, 0);
    assert_eq!(sample_after(&params, &[0, 2, 0], &logits).unwrap().token, 1);
    let negative = [-1.0, -1.5, -3.0];
    let sample = sample_after(&params, &[0], &negative).unwrap();
    assert_eq!(sample.token, 1);
    // The log-probability is the model's own, without the penalty.
    assert!((sample.logprob - (-1.5 - stats(&negative).log_sum_exp)).abs() < 1e-6);
}

#[test]
fn the_seed_and_the_place_decide() {
    let logits = vec![0.0; 512];
    let tokens = vec![0; 200];
    let draw = |seed: u64| -> Vec<u32> {
        let params = SamplingParams { seed, ..warm() };
        (0..200).map(|len| sample_after(&params, &tokens[..len], &logits).unwrap().token).collect()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let mut distinct = draw(1);
    distinct.sort_unstable();
    distinct.dedup();
    assert!(distinct.len() > 140, "{} distinct of 200", distinct.len());
}

#[test]
fn broken_logits_have_an_answer() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    let both = [SamplingParams::default(), SamplingParams { top_p: 0.5, min_p: 0.1, ..warm() }];
    for params in both {
        let token = |logits: &[f32]| sample_after(&params, &[], logits).map(|s| s.token);
        assert_eq!(token(&[NAN, 1.0, NAN]), Some(1));
        assert_eq!(token(&[1.0, INF, INF]), Some(1));
        assert_eq!(token(&[-INF, -INF, 0.0]), Some(2));
        assert_eq!(token(&[-INF, NAN]), None);
        assert_eq!(token(&[NAN]), None);
        let sure = sample_after(&params, &[], &[1.0, INF]).unwrap();
        assert_eq!(sure, Sample { token: 1, logprob: 0.0 });
        let beside_nan = sample_after(&params, &[], &[NAN, 1.0]).unwrap();
        assert_eq!(beside_nan, Sample { token: 1, logprob: 0.0 });
    }
}

#[test]
fn impossible_parameters_are_refused() {
    let refused = [
        ("temperature", SamplingParams { temperature: f32::NAN, ..warm() }),
        ("temperature", SamplingParams { temperature: f32::INFINITY, ..warm() }),
        ("top_p", SamplingParams { top_p: 0.0, ..warm() }),
        ("top_p", SamplingParams { top_p: 1.1, ..warm() }),
        ("min_p", SamplingParams { min_p: -0.1, ..warm() }),
        ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..warm() }),
    ];
    for (name, params) in refused {
        let Err(Error::Request(message)) = params.check() else { panic!("{params:?}") };
        assert!(message.starts_with(name), "{message}");
    }
}

proptest! {
    #[test]
    fn any_logits_and_parameters_give_a_token_above_minus_infinity(
        bits in prop::collection::vec(any::<u32>(), 1..200),
        temperature in 0f32..1e6,
        top_k in 0usize..300,
        top_p in 1e-9f32..=1.0,
        min_p in 0f32..=1.0,
        repetition_penalty in 1e-3f32..1e3,
        seed in any::<u64>(),
    ) {
        let params =
            SamplingParams { temperature, top_k, top_p, min_p, repetition_penalty, seed };
        let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let usable = logits.iter().any(|logit| *logit > f32::NEG_INFINITY);
        let sample = sample_after(&params, &[0], &logits);
        // A penalty may turn a finite logit into an infinite one, so that nothing is left.
        if let Some(sample) = sample {
            prop_assert!(logits[sample.token as usize] > f32::NEG_INFINITY);
        } else {
            prop_assert!(!usable || logits.len() == 1 || logits[0] < -1e35);
        }
    }
}
