//! What transformers computed for a tiny model, and an engine's answers beside it.

use std::ops::ControlFlow;
use std::path::PathBuf;

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke::request::Request;
use bespoke_kernel_gen::spec::{ActivationType, KvDType};
use safetensors::SafeTensors;

use super::golden_dir;

/// Largest difference of a logit: the reference was computed in float32 in another order.
const ABSOLUTE: f32 = 2e-3;
/// Largest difference relative to the largest logit of the sequence.
const RELATIVE: f32 = 1e-3;
pub(crate) const NUM_SEQUENCES: usize = 4;

/// One reference sequence.
pub(crate) struct Expected {
    pub(crate) ids: Vec<u32>,
    /// `[rows, vocab]` of the last `rows` positions
    logits: Vec<f32>,
    greedy: Vec<u32>,
}

/// The folder of a tiny model.
pub(crate) fn case_dir(case: &str) -> PathBuf {
    golden_dir().join("tiny").join(case)
}

pub(crate) fn read_expected(case: &str) -> Vec<Expected> {
    let bytes = std::fs::read(case_dir(case).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: String| -> Vec<[u8; 4]> {
        let data = file.tensor(&name).unwrap().data();
        data.chunks_exact(4).map(|bytes| bytes.try_into().unwrap()).collect()
    };
    let ids = |name| words(name).into_iter().map(u32::from_le_bytes).collect();
    (0..NUM_SEQUENCES)
        .map(|i| Expected {
            ids: ids(format!("input_ids.{i}")),
            logits: words(format!("logits.{i}")).into_iter().map(f32::from_le_bytes).collect(),
            greedy: ids(format!("greedy.{i}")),
        })
        .collect()
}

/// Options under which a backend computes in float32 throughout.
pub(crate) fn float_options(backend: BackendChoice, kernels: KernelTable) -> EngineOptions {
    EngineOptions {
        backend,
        kv_dtype: KvDType::F32,
        activation: ActivationType::Float,
        max_context: Some(96),
        ..EngineOptions::new(kernels)
    }
}

/// Logits within what another order of sums makes of them, and the same greedy tokens.
pub(crate) fn check(case: &str, options: &EngineOptions) {
    let mut engine = Engine::load(&case_dir(case), options, &mut |_| {}).unwrap();
    let vocab_size = engine.shape().vocab_size;
    for expected in read_expected(case) {
        let len = expected.ids.len();
        let largest = expected.logits.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
        let allowed = ABSOLUTE.min(RELATIVE * largest);
        let first = len - expected.logits.len() / vocab_size;
        let mut next = first;
        engine
            .logits_of(&expected.ids, first..len, &mut |position, logits| {
                assert_eq!(position, next);
                next += 1;
                let expected = &expected.logits[(position - first) * vocab_size..][..vocab_size];
                for (token, (found, expected)) in logits.iter().zip(expected).enumerate() {
                    assert!(
                        (found - expected).abs() <= allowed,
                        "{case}, length {len}, position {position}, token {token}: found {found}, \
                         expected {expected} within {allowed}"
                    );
                }
            })
            .unwrap();
        assert_eq!(next, len);
        if case == "llama-rope-dynamic" {
            // The reference changes the base with every token, a KV cache cannot.
            continue;
        }
        let request = Request {
            prompt_ids: expected.ids,
            max_tokens: expected.greedy.len(),
            ignore_eos: true,
            ..Request::default()
        };
        let generation = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(generation.output_ids, expected.greedy, "{case}, length {len}");
    }
    assert!(engine.is_idle());
}
