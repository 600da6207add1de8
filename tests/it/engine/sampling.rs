//! Sampling: what each parameter does, its bounds, and that broken logits have an answer.

mod naive;
mod random;

use std::collections::BTreeSet;

use bespoke::Error;
use bespoke::kernels::abi::LogitStats;
use bespoke::sampling::{History, Sample, Sampler, SamplingParams, TokenLogprob, choice_seed};

use naive::naive;

/// NaN counts as −∞, as in the kernels.
fn stats(logits: &[f32]) -> LogitStats {
    let mut best = (f32::NEG_INFINITY, 0);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.0 {
            best = (*logit, token as u32);
        }
    }
    let (max, argmax) = best;
    let numbers = logits.iter().filter(|logit| !logit.is_nan());
    let sum: f64 = numbers.map(|logit| (f64::from(*logit) - f64::from(max)).exp()).sum();
    let log_sum_exp = if max.is_finite() { max + sum.ln() as f32 } else { max };
    LogitStats { max, argmax, log_sum_exp }
}

/// A prompt of `tokens`, no output yet.
fn prompt(tokens: &[u32]) -> History<'_> {
    History { tokens, num_prompt: tokens.len(), stop_token_ids: &[], mask: None }
}

/// Output alone.
fn output(tokens: &[u32]) -> History<'_> {
    History { tokens, num_prompt: 0, stop_token_ids: &[], mask: None }
}

fn sample_after(params: &SamplingParams, history: &History<'_>, logits: &[f32]) -> Option<Sample> {
    params.check(logits.len()).unwrap();
    Sampler::new(logits.len()).sample(params, history, logits, &stats(logits))
}

fn token_after(params: &SamplingParams, history: &History<'_>, logits: &[f32]) -> Option<u32> {
    sample_after(params, history, logits).map(|sample| sample.token)
}

/// Tokens drawn with as many seeds, counted.
fn counts(
    params: &SamplingParams,
    history: &History<'_>,
    logits: &[f32],
    num_draws: usize,
) -> Vec<usize> {
    let mut sampler = Sampler::new(logits.len());
    let (mut params, stats) = (params.clone(), stats(logits));
    let mut counts = vec![0; logits.len()];
    for seed in 0..num_draws {
        params.seed = seed as u64;
        let sample = sampler.sample(&params, history, logits, &stats).unwrap();
        counts[sample.token as usize] += 1;
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
    let greedy = SamplingParams::default();
    let sample = sample_after(&greedy, &prompt(&[]), &[1.0, 3.0, 3.0, -2.0]).unwrap();
    assert_eq!(sample.token, 1);
    let sum = 1f32.exp() + 2.0 * 3f32.exp() + (-2f32).exp();
    assert!((sample.logprob - (3.0 - sum.ln())).abs() < 1e-5);
    assert_eq!(sample.top_logprobs, []);
    // The two zeros are equal, and so are they where a ban makes the sampler look for itself.
    let banned = SamplingParams { bad_words: vec![vec![3]], ..greedy.clone() };
    for params in [&greedy, &banned] {
        assert_eq!(token_after(params, &prompt(&[]), &[-1.0, -0.0, 0.0, -1.0]), Some(1));
    }
}

#[test]
fn temperature_sharpens_and_flattens() {
    let logits = logits_of(&[0.6, 0.4]);
    let first = |temperature| {
        counts(&SamplingParams { temperature, ..warm() }, &prompt(&[]), &logits, 2000)[0]
    };
    let (cold, middle, hot) = (first(0.2), first(1.0), first(100.0));
    assert!(cold > 1700 && middle > 1100 && middle < 1300, "{cold} {middle}");
    assert!(hot > 900 && hot < 1100, "{hot}");
    assert_eq!(first(f32::MIN_POSITIVE), 2000);
    assert_eq!(first(f32::from_bits(1)), 2000);
}

#[test]
fn filters_keep_what_they_say() {
    let logits = logits_of(&[0.1, 0.4, 0.2, 0.3]);
    let kept = |params: SamplingParams| -> Vec<usize> {
        let counts = counts(&params, &prompt(&[]), &logits, 400);
        (0..4).filter(|token| counts[*token] > 0).collect()
    };
    assert_eq!(kept(warm()), [0, 1, 2, 3]);
    assert_eq!(kept(SamplingParams { top_k: 2, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplingParams { top_k: 9, ..warm() }), [0, 1, 2, 3]);
    assert_eq!(kept(SamplingParams { top_k: usize::MAX, ..warm() }), [0, 1, 2, 3]);
    assert_eq!(kept(SamplingParams { top_p: 0.69, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplingParams { top_p: 0.71, ..warm() }), [1, 2, 3]);
    assert_eq!(kept(SamplingParams { top_p: 1e-45, ..warm() }), [1]);
    assert_eq!(kept(SamplingParams { min_p: 0.6, ..warm() }), [1, 3]);
    assert_eq!(kept(SamplingParams { min_p: 1.0, ..warm() }), [1]);
    // Among three of four, 0.4 of 0.9 is enough for a share of 0.4.
    assert_eq!(kept(SamplingParams { top_k: 3, top_p: 0.4, ..warm() }), [1]);
}

/// Where no token is much likelier than another, enough draws show all that are kept.
#[test]
fn filters_keep_exactly_that_of_many_tokens() {
    let logits: Vec<f32> = (0..600u32).map(|i| (i * 7919 % 601) as f32 * 7.5e-4).collect();
    let cases = [
        warm(),
        SamplingParams { top_k: 1, ..warm() },
        SamplingParams { top_k: 80, ..warm() },
        SamplingParams { top_k: 560, ..warm() },
        SamplingParams { top_p: 0.01, ..warm() },
        SamplingParams { top_p: 0.5, ..warm() },
        SamplingParams { top_p: 0.97, ..warm() },
        SamplingParams { min_p: 0.9, ..warm() },
        SamplingParams { top_k: 360, top_p: 0.5, min_p: 0.9, ..warm() },
        SamplingParams { temperature: 0.5, top_p: 0.7, min_p: 0.5, ..warm() },
    ];
    for params in cases {
        let counts = counts(&params, &prompt(&[]), &logits, 20_000);
        let drawn = (0..600).filter(|token| counts[*token as usize] > 0);
        let kept = naive(&params, &prompt(&[]), &logits).expect("no token at a bound");
        let kept: BTreeSet<u32> = kept.into_iter().map(|(token, _)| token).collect();
        assert_eq!(drawn.collect::<BTreeSet<u32>>(), kept, "{params:?}");
    }
}

#[test]
fn equal_tokens_are_kept_by_id() {
    let logits = vec![0.0; 3000];
    for params in [
        SamplingParams { top_p: 0.5, ..warm() },
        SamplingParams { top_k: 1500, ..warm() },
        SamplingParams { top_k: 3, top_p: 0.99, ..warm() },
    ] {
        let end = if params.top_k == 3 { 3 } else { 1500 };
        let counts = counts(&params, &prompt(&[]), &logits, 500);
        assert_eq!(counts[..end].iter().sum::<usize>(), 500, "{params:?}");
    }
}

#[test]
fn repetition_penalty_acts_on_tokens_seen() {
    let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    let logits = [4.0, 3.0, -1.0];
    assert_eq!(token_after(&params, &prompt(&[]), &logits), Some(0));
    assert_eq!(token_after(&params, &prompt(&[0, 2, 0]), &logits), Some(1));
    assert_eq!(token_after(&params, &output(&[0, 2, 0]), &logits), Some(1));
    let negative = [-1.0, -1.5, -3.0];
    let sample = sample_after(&params, &prompt(&[0]), &negative).unwrap();
    assert_eq!(sample.token, 1);
    // The log-probability is the model's own, without the penalty.
    assert!((sample.logprob - (-1.5 - stats(&negative).log_sum_exp)).abs() < 1e-6);
}

#[test]
fn output_penalties_pass_over_the_prompt() {
    let presence = SamplingParams { presence_penalty: 1.5, ..SamplingParams::default() };
    let frequency = SamplingParams { frequency_penalty: 0.6, ..SamplingParams::default() };
    let logits = [2.0, 1.0, -1.0];
    for params in [&presence, &frequency] {
        assert_eq!(token_after(params, &prompt(&[0, 0, 0]), &logits), Some(0));
        assert_eq!(token_after(params, &output(&[0, 0, 0]), &logits), Some(1));
    }
    // Presence counts once, frequency each time.
    assert_eq!(token_after(&frequency, &output(&[0]), &logits), Some(0));
    assert_eq!(token_after(&presence, &output(&[0, 1]), &logits), Some(0));
    let reward = SamplingParams { presence_penalty: -2.0, ..SamplingParams::default() };
    assert_eq!(token_after(&reward, &output(&[1]), &logits), Some(1));
}

#[test]
fn bias_adds_up_and_lifts_no_ban() {
    let bias = |entries: &[(u32, f32)]| SamplingParams {
        logit_bias: entries.to_vec(),
        ..SamplingParams::default()
    };
    let logits = [2.0, 1.0, -1.0];
    assert_eq!(token_after(&bias(&[(2, 3.5)]), &prompt(&[]), &logits), Some(2));
    assert_eq!(token_after(&bias(&[(2, 1.8), (2, 1.8)]), &prompt(&[]), &logits), Some(2));
    assert_eq!(token_after(&bias(&[(0, -100.0), (1, -100.0)]), &prompt(&[]), &logits), Some(2));
    let banned = SamplingParams { bad_words: vec![vec![2]], ..bias(&[(2, 100.0)]) };
    assert_eq!(token_after(&banned, &prompt(&[]), &logits), Some(0));
    // What the model itself excludes stays so.
    assert_eq!(token_after(&bias(&[(0, 100.0)]), &prompt(&[]), &[f32::NAN, 1.0]), Some(1));
}

#[test]
fn bad_words_do_not_occur() {
    let bad_words = vec![vec![0], vec![1, 2], vec![3, 3, 3], vec![2, 1, 3, 1]];
    let params = SamplingParams { bad_words, ..warm() };
    let logits = [1.0, 0.5, 0.7, 0.9, -1.0];
    // The prompt ends like a bad word, which is not the output's.
    let (mut tokens, num_prompt) = (vec![3, 3, 1], 3);
    assert_eq!(counts(&params, &prompt(&tokens), &logits, 200)[0], 0);
    assert!(counts(&params, &prompt(&tokens), &logits, 200)[2] > 0);
    let mut sampler = Sampler::new(logits.len());
    for _ in 0..5000 {
        let history = History { tokens: &tokens, num_prompt, stop_token_ids: &[], mask: None };
        let sample = sampler.sample(&params, &history, &logits, &stats(&logits)).unwrap();
        tokens.push(sample.token);
    }
    let output = &tokens[num_prompt..];
    let occurs = |word: &[u32]| output.windows(word.len()).any(|window| window == word);
    for word in &params.bad_words {
        assert!(!occurs(word), "{word:?}");
        // What leads to it does, and so does its end elsewhere.
        let (last, before) = word.split_last().unwrap();
        assert!(before.is_empty() || (occurs(before) && occurs(&[*last])), "{word:?}");
    }
}

#[test]
fn min_tokens_holds_off_stop_tokens() {
    let logits = [5.0, 4.0, 3.0];
    let params = SamplingParams { min_tokens: 2, ..SamplingParams::default() };
    let token = |num_prompt, tokens: &[u32], stop_token_ids: &[u32]| {
        token_after(&params, &History { tokens, num_prompt, stop_token_ids, mask: None }, &logits)
    };
    assert_eq!(token(3, &[2, 2, 2], &[0]), Some(1));
    assert_eq!(token(3, &[2, 2, 2, 2], &[1, 0]), Some(2));
    assert_eq!(token(3, &[2, 2, 2, 2, 2], &[1, 0]), Some(0));
    assert_eq!(token(0, &[2], &[]), Some(0));
    assert_eq!(token(0, &[2], &[99]), Some(0));
    assert_eq!(token(0, &[2], &[0, 1, 2]), None);
}

#[test]
fn top_logprobs_are_the_models_own() {
    let logits = [2.0, f32::NAN, 4.0, 4.0, f32::NEG_INFINITY, -3.0];
    let list = |num_top_logprobs| {
        let edits = SamplingParams { bad_words: vec![vec![2]], temperature: 0.3, ..warm() };
        let params = SamplingParams { num_top_logprobs, ..edits };
        let sample = sample_after(&params, &prompt(&[]), &logits).unwrap();
        assert_eq!(sample.token, 3);
        sample.top_logprobs
    };
    let log_sum_exp = stats(&logits).log_sum_exp;
    let expected: Vec<TokenLogprob> = [2, 3, 0, 5]
        .map(|token| TokenLogprob { token, logprob: logits[token as usize] - log_sum_exp })
        .to_vec();
    for num_top in [0, 1, 2, 3, 4, 20] {
        assert_eq!(list(num_top), expected[..num_top.min(4)]);
    }
}

#[test]
fn the_seed_and_the_place_decide() {
    let logits = vec![0.0; 512];
    let tokens = vec![0; 200];
    let draw = |seed: u64| -> Vec<u32> {
        let params = SamplingParams { seed, ..warm() };
        let token = |len| token_after(&params, &prompt(&tokens[..len]), &logits).unwrap();
        (0..200).map(token).collect()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let distinct: BTreeSet<u32> = draw(1).into_iter().collect();
    assert!(distinct.len() > 140, "{} distinct of 200", distinct.len());

    assert_eq!(choice_seed(7, 0), 7);
    let seeds: BTreeSet<u64> =
        (0..3).flat_map(|seed| (0..100).map(move |choice| choice_seed(seed, choice))).collect();
    assert_eq!(seeds.len(), 300);
    assert_ne!(draw(choice_seed(1, 1)), draw(1));
    assert_ne!(draw(choice_seed(1, 1))[1..], draw(1)[..199]);
}

#[test]
fn broken_logits_have_an_answer() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    let both = [SamplingParams::default(), SamplingParams { top_p: 0.5, min_p: 0.1, ..warm() }];
    for params in both {
        let token = |logits: &[f32]| token_after(&params, &prompt(&[]), logits);
        assert_eq!(token(&[NAN, 1.0, NAN]), Some(1));
        assert_eq!(token(&[1.0, INF, INF]), Some(1));
        assert_eq!(token(&[-INF, -INF, 0.0]), Some(2));
        assert_eq!(token(&[-INF, NAN]), None);
        assert_eq!(token(&[NAN]), None);
        let sure = sample_after(&params, &prompt(&[]), &[1.0, INF]).unwrap();
        assert_eq!((sure.token, sure.logprob), (1, 0.0));
        // With the certain token banned, the model gives the other one no chance.
        let banned = SamplingParams { bad_words: vec![vec![1]], ..params.clone() };
        let sample = sample_after(&banned, &prompt(&[]), &[1.0, INF]).unwrap();
        assert_eq!((sample.token, sample.logprob), (0, f32::NEG_INFINITY));
        let banned = SamplingParams { bad_words: vec![vec![0], vec![1]], ..params.clone() };
        assert_eq!(token_after(&banned, &prompt(&[]), &[1.0, INF]), None);
    }
}

#[test]
fn bounds_are_refused() {
    const NAN: f32 = f32::NAN;
    type Params = SamplingParams;
    #[track_caller]
    fn check(params: Params, words: &str) {
        let Err(error) = params.check(1000) else { panic!("accepted: {params:?}") };
        assert!(matches!(error, Error::Request(_)), "{error:?}");
        assert!(error.to_string().contains(words), "'{words}' is missing in: {error}");
    }
    let default = Params::default;
    check(Params { temperature: -1.0, ..default() }, "temperature is -1");
    check(Params { temperature: NAN, ..default() }, "temperature is NaN");
    check(Params { temperature: f32::INFINITY, ..default() }, "temperature is inf");
    check(Params { top_p: 0.0, ..default() }, "top_p is 0");
    check(Params { top_p: 1.1, ..default() }, "top_p is 1.1");
    check(Params { min_p: -0.1, ..default() }, "min_p is -0.1");
    check(Params { min_p: NAN, ..default() }, "min_p is NaN");
    check(Params { repetition_penalty: 0.0, ..default() }, "repetition_penalty is 0");
    check(Params { repetition_penalty: f32::INFINITY, ..default() }, "repetition_penalty is inf");
    check(Params { presence_penalty: 2.1, ..default() }, "presence_penalty is 2.1");
    check(Params { frequency_penalty: -2.5, ..default() }, "frequency_penalty is -2.5");
    check(Params { frequency_penalty: NAN, ..default() }, "frequency_penalty is NaN");
    check(Params { num_top_logprobs: 21, ..default() }, "num_top_logprobs is 21");
    let bias = |logit_bias| Params { logit_bias, ..default() };
    check(bias(vec![(0, 1.0); 1025]), "logit_bias has 1025 entries");
    check(bias(vec![(1000, 1.0)]), "logit_bias: token id 1000 is outside");
    check(bias(vec![(0, 1.0), (7, 100.5)]), "logit_bias of token 7 is 100.5");
    check(bias(vec![(7, NAN)]), "logit_bias of token 7 is NaN");
    let words = |bad_words| Params { bad_words, ..default() };
    check(words(vec![vec![0]; 257]), "bad_words has 257 token sequences");
    check(words(vec![vec![1], vec![]]), "sequence 1 has 0 tokens");
    check(words(vec![vec![1; 65]]), "sequence 0 has 65 tokens");
    check(words(vec![vec![1, 1000]]), "bad_words: token id 1000 is outside");

    let limits = Params {
        logit_bias: vec![(999, -100.0); 1024],
        bad_words: vec![vec![999; 64]; 256],
        presence_penalty: -2.0,
        frequency_penalty: 2.0,
        num_top_logprobs: 20,
        top_k: usize::MAX,
        min_tokens: usize::MAX,
        ..default()
    };
    limits.check(1000).unwrap();
}
