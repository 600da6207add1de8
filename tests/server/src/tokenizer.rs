//! A tokenizer whose tokens are the 256 bytes, and ChatML's special tokens.

use std::fs;
use std::sync::{Arc, OnceLock};

use bespoke::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// Tokens: the bytes, then [`SPECIAL`].
pub const VOCAB: usize = 256 + SPECIAL.len();

const SPECIAL: [&str; 3] = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"];

/// `<|im_end|>`, which ends an answer.
pub const END: u32 = 257;

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + \
    '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The tokenizer, loaded once from a folder that is gone afterwards.
pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let load = || {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(dir.path());
        Arc::new(Tokenizer::load(dir.path()).expect("the tokenizer is sound"))
    };
    Arc::clone(TOKENIZER.get_or_init(load))
}

/// Writes the tokenizer's files to a folder.
pub fn write(dir: &std::path::Path) {
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
        "truncation": null,
        "padding": null,
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
    let config = json!({
        "eos_token": SPECIAL[1], "chat_template": CHAT_TEMPLATE, "model_max_length": 4096,
    });
    fs::write(dir.join("tokenizer.json"), description.to_string()).expect("a writable folder");
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).expect("a writable folder");
}

/// How byte-level BPE spells the bytes 0 to 255: printable ones by themselves, the others by the
/// characters from U+0100 on.
fn byte_chars() -> impl Iterator<Item = char> {
    let mut next = 0x100;
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("a letter of Latin Extended-A")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bespoke::tokenizer::SpecialTokens;

    #[test]
    fn every_byte_is_a_token() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("a\n\u{e9}<|im_end|>", SpecialTokens::Omit).unwrap();
        assert_eq!(ids, [97, 10, 0xc3, 0xa9, END]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "a\n\u{e9}");
        assert_eq!(tokenizer.eos_ids(), [END]);
        assert_eq!(tokenizer.num_ids(), VOCAB);
    }
}
