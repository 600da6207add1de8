//! Small models for the programs, and what the Rust engine makes of them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use engine::config::{BackendChoice, EngineOptions};
use engine::engine::Engine;
use engine::kernels::generated;
use engine::request::{FinishReason, Request};
use engine::tokenizer::stream::TextStream;
use engine::tokenizer::{SpecialTokens, Tokenizer};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const SPECIAL: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + \
    '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A model with a context of 256 tokens, whose tokens are bytes.
pub(crate) fn tiny() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden().join(name), dir.path().join(name)).unwrap();
    }
    write_tokenizer(dir.path());
    dir
}

/// A model for the null backend, whose answers may take longer than any test.
pub(crate) fn null() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(golden().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["max_position_embeddings"] = json!(1 << 17);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    write_tokenizer(dir.path());
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

/// Tokens are the 256 bytes, then the special ones of ChatML.
fn write_tokenizer(dir: &Path) {
    let added = |(idx, content): (usize, &&str)| {
        json!({
            "id": 256 + idx, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    };
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let vocab: Map<String, Value> =
        byte_chars().enumerate().map(|(id, c)| (c.to_string(), Value::from(id))).collect();
    let description = json!({
        "version": "1.0",
        "added_tokens": SPECIAL.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": [],
        },
    });
    let config = json!({ "eos_token": SPECIAL[1], "chat_template": CHAT_TEMPLATE });
    fs::write(dir.join("tokenizer.json"), description.to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// How byte-level BPE spells the bytes 0 to 255: printable ones by themselves, the others by the
/// characters from U+0100 on.
fn byte_chars() -> impl Iterator<Item = char> {
    let mut next = 0x100;
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap()
        }
    })
}
