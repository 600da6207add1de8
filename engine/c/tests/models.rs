//! Small models for the programs, and what the Rust engine makes of them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use bespoke_server_tests::tokenizer;
use engine::config::{BackendChoice, EngineOptions};
use engine::engine::Engine;
use engine::kernels::generated;
use engine::request::{FinishReason, Request};
use engine::tokenizer::stream::TextStream;
use engine::tokenizer::{SpecialTokens, Tokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A model with a context of 256 tokens, whose tokens are bytes.
pub(crate) fn tiny() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden().join(name), dir.path().join(name)).unwrap();
    }
    tokenizer::write(dir.path());
    dir
}

/// A model for the null backend, whose answers may take longer than any test.
pub(crate) fn null() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(golden().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["max_position_embeddings"] = json!(1 << 17);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    tokenizer::write(dir.path());
    dir
}

/// The engine's own way from a prompt to its answer.
pub(crate) struct Oracle {
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
}

impl Oracle {
    pub(crate) fn new(dir: &Path, backend: BackendChoice) -> Oracle {
        let options = EngineOptions { backend, ..EngineOptions::new(generated::table()) };
        let mut engine = Engine::load(dir, &options, &mut |_| {}).unwrap();
        let tokenizer = Arc::new(Tokenizer::load(dir).unwrap());
        engine.set_tokenizer(Arc::clone(&tokenizer));
        engine.add_eos_ids(tokenizer.eos_ids());
        Oracle { engine, tokenizer }
    }

    pub(crate) fn ids_of(&self, text: &str, special: SpecialTokens) -> Vec<u32> {
        self.tokenizer.encode(text, special).unwrap()
    }

    /// The answer's tokens, and its text.
    pub(crate) fn answer(&mut self, request: Request) -> (Vec<u32>, String) {
        let mut on_output = |_: &_| std::ops::ControlFlow::Continue(());
        let generation = self.engine.generate(request, &mut on_output).unwrap();
        let mut stream = TextStream::new(Arc::clone(&self.tokenizer));
        let has_end = generation.finish_reason == Some(FinishReason::Stop);
        let num_shown = generation.output_ids.len() - usize::from(has_end);
        let shown = &generation.output_ids[..num_shown];
        let mut text: String = shown.iter().map(|id| stream.push(*id).unwrap()).collect();
        text.push_str(&stream.flush().unwrap());
        (generation.output_ids, text)
    }
}

fn golden() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tiny/llama-gqa2"))
}
