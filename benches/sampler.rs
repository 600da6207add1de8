//! Group `sampler`: from a row of logits to a token, on one core, after a thousand tokens.

use bespoke::kernels::abi::LogitStats;
use bespoke::sampling::{History, Sampler, SamplingParams};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

/// SmolLM2 and Qwen2.5.
const VOCAB_SIZES: [u32; 2] = [49_152, 152_064];

fn cases() -> [(&'static str, SamplingParams); 7] {
    let greedy = SamplingParams::default();
    let warm = SamplingParams { temperature: 0.8, ..greedy.clone() };
    let penalties = SamplingParams {
        repetition_penalty: 1.1,
        presence_penalty: 0.5,
        frequency_penalty: 0.2,
        ..greedy.clone()
    };
    [
        ("greedy", greedy.clone()),
        ("greedy, 20 top logprobs", SamplingParams { num_top_logprobs: 20, ..greedy }),
        ("greedy, penalties", penalties.clone()),
        ("temperature 0.8", warm.clone()),
        ("top-p 0.9", SamplingParams { top_p: 0.9, ..warm.clone() }),
        ("min-p 0.05", SamplingParams { min_p: 0.05, ..warm }),
        ("top-k 40, penalties", SamplingParams { top_k: 40, temperature: 0.8, ..penalties }),
    ]
}

/// Probabilities that fall as a power of the rank, as in text, in no order: about sixty tokens are
/// 90 % of them.
fn logits(vocab_size: u32) -> Vec<f32> {
    let rank = |token: u32| (token * 7919 + 17) % vocab_size;
    (0..vocab_size).map(|token| -1.5 * ((rank(token) + 1) as f32).ln()).collect()
}

fn stats(logits: &[f32]) -> LogitStats {
    let argmax = logits.iter().position(|logit| *logit == 0.0).expect("rank 0 has a token");
    let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
    LogitStats { max: 0.0, argmax: argmax as u32, log_sum_exp: sum.ln() }
}

fn bench_sampler(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sampler");
    for vocab_size in VOCAB_SIZES {
        let logits = logits(vocab_size);
        let stats = stats(&logits);
        let tokens: Vec<u32> = (0..1000).map(|i| i * 31 % 500).collect();
        let history = History { tokens: &tokens, num_prompt: 500, stop_token_ids: &[], mask: None };
        let mut sampler = Sampler::new(vocab_size as usize);
        for (name, mut params) in cases() {
            group.bench_function(BenchmarkId::new(name, vocab_size), |bencher| {
                bencher.iter(|| {
                    params.seed += 1;
                    sampler.sample(&params, &history, &logits, &stats)
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, bench_sampler);
criterion_main!(benches);
