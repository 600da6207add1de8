//! Whole pages of the KV cache, copied within it and carried out of it and back.

use std::path::PathBuf;

use bespoke::backend::Backend;
use bespoke::backend::cpu::{CpuBackend, CpuOptions};
use bespoke::backend::reference::ReferenceBackend;
use bespoke::batch::{Batch, BatchLimits, PageCopy};
use bespoke::kernels::abi::SequenceSpan;
use bespoke::kernels::choice::DeviceChoice;
use bespoke::model::decoder::{Decoder, DecoderLimits};
use bespoke::model::rope::Rope;
use bespoke::model::weights::Weights;
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{ActivationType, KvDType, ModelShape};

/// Tokens before the fork: a whole page and part of the next.
const NUM_SHARED: usize = 40;
const NUM_PAGES: usize = 6;
/// Where the original lies, and where the copies of its second page go.
const PAGES: [u32; 2] = [4, 1];
const COPIES: [u32; 2] = [2, 5];

fn config_and_shape() -> (PathBuf, ModelConfig, ModelShape) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/tiny/llama-gqa2");
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let shape = config.shape("llama-gqa2").unwrap();
    (dir, config, shape)
}

/// A step of `tokens` from `position` on, of a sequence on `pages`.
fn batch(
    config: &ModelConfig,
    page_size: usize,
    tokens: &[u32],
    position: usize,
    pages: &[u32],
) -> Batch {
    let positions = position..position + tokens.len();
    let slot = |at: usize| pages[at / page_size] * page_size as u32 + (at % page_size) as u32;
    let mut batch = Batch {
        tokens: tokens.to_vec(),
        positions: positions.clone().map(|at| at as u32).collect(),
        slots: positions.map(slot).collect(),
        spans: vec![SequenceSpan {
            first_row: 0,
            num_rows: tokens.len() as u32,
            context_len: (position + tokens.len()) as u32,
            first_page: 0,
        }],
        page_table: pages.to_vec(),
        logit_rows: vec![tokens.len() as u32 - 1],
        ..Batch::default()
    };
    Rope::new(config).fill(&mut batch, &[position]);
    batch
}

/// The same next tokens give the same logits on the original, on a copy of its half-full page, on a
/// copy of the copy that was made in the same step, and on a page that was carried out and back.
fn check<B: Backend>(backend: B) {
    let (dir, config, shape) = config_and_shape();
    let page_size = shape.page_size;
    let weights = Weights::open(&dir, &config, &shape).unwrap();
    let batch_limits =
        BatchLimits { rows_max: 64, sequences_max: 1, context_max: 128, logit_rows_max: 1 };
    let limits = DecoderLimits { batch: batch_limits, num_pages: Some(NUM_PAGES) };
    let mut decoder = Decoder::load(backend, &weights, &shape, limits, &mut |_| {}).unwrap();
    let [first, second] = PAGES;
    let shared: Vec<u32> = (0..NUM_SHARED as u32).map(|token| token * 7 % 50).collect();
    decoder.forward(&batch(&config, page_size, &shared, 0, &PAGES));

    // The step that forks writes other tokens into the original, so the copies must come first.
    let mut fork = batch(&config, page_size, &[9, 8, 7], NUM_SHARED, &PAGES);
    let copy = |from, to| PageCopy { from, to };
    let [middle, last] = COPIES;
    fork.copies = vec![copy(second, middle), copy(middle, last), copy(first, middle)];
    let of_fork = decoder.forward(&fork).to_vec();
    let mut carried = vec![1];
    decoder.read_page(last, &mut carried);
    assert_eq!(carried.len(), 1 + decoder.page_bytes());
    decoder.write_page(3, &carried[1..]);
    let mut again = Vec::new();
    decoder.read_page(3, &mut again);
    assert_eq!(again, carried[1..]);

    for pages in [[first, last], [middle, 3]] {
        let found = decoder.forward(&batch(&config, page_size, &[9, 8, 7], NUM_SHARED, &pages));
        assert_eq!(found, of_fork, "pages {pages:?}");
    }
}

#[test]
fn reference_pages_are_copied() {
    let (_, config, shape) = config_and_shape();
    check(ReferenceBackend::new(&config, &shape));
}

#[test]
fn cpu_pages_are_copied() {
    let (_, config, shape) = config_and_shape();
    for kv_dtype in KvDType::ALL {
        let options = CpuOptions {
            kv_dtype,
            activation: ActivationType::Float,
            num_threads: Some(2),
            target: None,
            device: DeviceChoice::This,
        };
        let kernels = bespoke_tests::tiny_kernels();
        check(CpuBackend::new(&kernels, &config, &shape, &options).unwrap());
    }
}
