//! The null backend: it computes what its oracle says, and shows what a real model would hide.

use std::ops::{ControlFlow, Range};

use bespoke::Error;
use bespoke::backend::null::{KvCache, NullBackend, NullOptions, Rows, next_token};
use bespoke::backend::{Backend, RowsKind};
use bespoke::batch::{Batch, PageCopy};
use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke::kernels::abi::SequenceSpan;
use bespoke::request::Request;
use bespoke::sampling::SamplingParams;
use bespoke_kernel_gen::spec::LinearRole;

const VOCAB: usize = 100;
const PAGE: usize = 4;

fn null_options() -> NullOptions {
    NullOptions { vocab_size: VOCAB, page_size: PAGE, ..NullOptions::default() }
}

fn options() -> EngineOptions {
    EngineOptions { max_context: Some(64), ..EngineOptions::new(KernelTable::default()) }
}

fn prompt(len: usize, seed: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 37 + seed * 11) % VOCAB) as u32).collect()
}

/// What greedy decoding gives, by the oracle.
fn expected(mut history: Vec<u32>, num_tokens: usize) -> Vec<u32> {
    let num_prompt = history.len();
    (0..num_tokens).for_each(|_| history.push(next_token(&history, VOCAB)));
    history.split_off(num_prompt)
}

#[test]
fn an_engine_gives_the_oracles_tokens() {
    for (page_size, max_batch_tokens) in [(1, 1), (2, 3), (4, 8), (32, 512)] {
        let options =
            EngineOptions { max_batch_tokens, max_sequences: 1, num_pages: None, ..options() };
        let null = NullOptions { page_size, ..null_options() };
        let mut engine = Engine::null(&null, &options).unwrap();
        assert_eq!(engine.backend_name(), "null");
        for len in [1, 2, 3, 4, 5, 31, 50] {
            let prompt_ids = prompt(len, page_size);
            let expected = expected(prompt_ids.clone(), 12);
            let request = Request { prompt_ids, max_tokens: 12, ..Request::default() };
            let found = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(found.output_ids, expected, "pages of {page_size}, a prompt of {len}");
            assert!(found.logprobs.iter().all(|logprob| *logprob < 0.0 && *logprob > -2.0));
        }
    }
}

#[test]
fn temperature_chooses_among_a_few() {
    let mut engine = Engine::null(&null_options(), &options()).unwrap();
    let mut found = Vec::new();
    for seed in 0..200 {
        let sampling = SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() };
        let request =
            Request { prompt_ids: prompt(9, 0), max_tokens: 1, sampling, ..Request::default() };
        let tokens = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
        found.extend(tokens.output_ids);
    }
    found.sort_unstable();
    found.dedup();
    assert!(found.len() == 4 && found.contains(&next_token(&prompt(9, 0), VOCAB)), "{found:?}");
}

#[test]
fn statistics_are_those_of_the_logits() {
    let mut engine = Engine::null(&null_options(), &options()).unwrap();
    let request = Request { prompt_ids: prompt(9, 0), max_tokens: 1, ..Request::default() };
    let found = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
    let sink = &mut |_: usize, logits: &[f32]| {
        let max = logits[found.output_ids[0] as usize];
        assert_eq!(logits.iter().filter(|logit| **logit >= max).count(), 1);
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit - max).exp()).sum();
        assert!((f64::from(found.logprobs[0]) + sum.ln()).abs() < 1e-5);
    };
    engine.logits_of(&prompt(9, 0), 8..9, sink).unwrap();
}

#[test]
fn impossible_sizes_are_refused() {
    for null in [
        NullOptions { vocab_size: 3, ..null_options() },
        NullOptions { page_size: 0, ..null_options() },
        NullOptions { max_position: 10, ..null_options() },
    ] {
        let result = Engine::null(&null, &options());
        assert!(matches!(result, Err(Error::Request(_))), "{null:?}");
    }
}

/// A backend and its cache, without a decoder between.
struct Bare {
    backend: NullBackend,
    kv_cache: KvCache,
    rows: Rows,
    logits: Rows,
}

impl Bare {
    fn new() -> Bare {
        let mut backend = NullBackend::new(&null_options());
        Bare {
            kv_cache: backend.new_kv_cache(8).unwrap(),
            rows: backend.new_rows(64, 1, RowsKind::Linear).unwrap(),
            logits: backend.new_rows(1, VOCAB, RowsKind::Logits).unwrap(),
            backend,
        }
    }

    /// Computes `tokens[positions]` on `pages` and gives the token that follows.
    fn next_token(&mut self, tokens: &[u32], positions: Range<usize>, pages: &[u32]) -> u32 {
        let slot =
            |position: usize| pages[position / PAGE] * PAGE as u32 + (position % PAGE) as u32;
        let batch = Batch {
            tokens: tokens[positions.clone()].to_vec(),
            positions: positions.clone().map(|position| position as u32).collect(),
            slots: positions.clone().map(slot).collect(),
            spans: vec![SequenceSpan {
                first_row: 0,
                num_rows: positions.len() as u32,
                context_len: positions.end as u32,
                first_page: 0,
            }],
            page_table: pages.to_vec(),
            ..Batch::default()
        };
        let Bare { backend, kv_cache, rows, logits } = self;
        backend.embed(&(), &batch.tokens, rows);
        backend.rope(&batch, 0, rows, None, kv_cache);
        let mut out = backend.new_rows(64, 1, RowsKind::Linear).unwrap();
        backend.paged_attention(&batch, 0, rows, kv_cache, &mut out);
        let mut last = backend.new_rows(1, 1, RowsKind::Linear).unwrap();
        backend.rms_norm_select(&[positions.len() as u32 - 1], &mut out, None, &(), &mut last);
        backend.linear(1, &LinearRole::Head, &last, logits);
        let logits = backend.read(0..1, logits);
        (0..VOCAB as u32)
            .max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize]))
            .unwrap()
    }
}

#[test]
fn every_page_of_the_context_counts() {
    let tokens = prompt(13, 1);
    let expected = next_token(&tokens, VOCAB);
    for wrong in 0..3 {
        let mut bare = Bare::new();
        let mut pages = [6, 2, 7, 0];
        assert_eq!(bare.next_token(&tokens[..12], 0..12, &pages), next_token(&tokens[..12], VOCAB));
        assert_eq!(bare.next_token(&tokens, 12..13, &pages), expected);
        // A page that was never written, then one that another sequence overwrote.
        let right = std::mem::replace(&mut pages[wrong], 5);
        assert_ne!(bare.next_token(&tokens, 12..13, &pages), expected);
        bare.next_token(&prompt(1, 9), 0..1, &[right]);
        pages[wrong] = right;
        assert_ne!(bare.next_token(&tokens, 12..13, &pages), expected);
    }
}

#[test]
fn pages_are_copied_read_and_written() {
    let tokens = prompt(9, 3);
    let expected = next_token(&tokens, VOCAB);
    let mut bare = Bare::new();
    bare.next_token(&tokens[..8], 0..8, &[0, 1]);
    // The second copy reads what the first wrote.
    let copies = [PageCopy { from: 0, to: 4 }, PageCopy { from: 4, to: 5 }];
    bare.backend.copy_pages(&copies, &mut bare.kv_cache);
    assert_eq!(bare.next_token(&tokens, 8..9, &[5, 1, 2]), expected);

    let mut bytes = vec![1];
    bare.backend.read_page(1, &bare.kv_cache, &mut bytes);
    assert_eq!(bytes.len(), 1 + bare.backend.page_bytes());
    assert_ne!(bare.next_token(&tokens, 8..9, &[5, 6, 2]), expected);
    bare.backend.write_page(6, &bytes[1..], &mut bare.kv_cache);
    assert_eq!(bare.next_token(&tokens, 8..9, &[5, 6, 2]), expected);
}
