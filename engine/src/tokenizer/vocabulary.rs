//! The bytes that each token stands for.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::{Tokenizer, contain};
use crate::error::Error;

/// The tokens of a tokenizer, to be listed when they are wanted.
#[derive(Clone)]
pub struct Vocabulary {
    inner: Arc<tokenizers::Tokenizer>,
    path: PathBuf,
    spelling: Spelling,
}

/// What a token is in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    /// Bytes of text, which may be a part of a character only.
    Text(Vec<u8>),
    /// A control token of this name, which is no text.
    Special(String),
    /// An id without a token, or with one that no text contains.
    Unused,
}

/// How the vocabulary writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// A printable character for each byte, after GPT-2.
    ByteLevel,
    /// Text as it is, this character for a space, and `<0x0A>` for single bytes.
    Plain { space: char },
}

impl Tokenizer {
    /// The vocabulary. [`Error::Unsupported`] where it writes text in a way that is not known.
    pub fn vocabulary(&self) -> Result<Vocabulary, Error> {
        let decoder = serde_json::to_value(self.inner.get_decoder()).unwrap_or_default();
        let spelling = Spelling::of(&decoder).ok_or_else(|| {
            Error::Unsupported(format!(
                "{}: the bytes of its tokens are not known, because the decoder {} is neither \
                 ByteLevel nor ByteFallback nor Metaspace; answers cannot be held to a grammar",
                self.path.display(),
                decoder.get("type").unwrap_or(&Value::Null)
            ))
        })?;
        Ok(Vocabulary { inner: self.inner.clone(), path: self.path.clone(), spelling })
    }
}

impl Vocabulary {
    /// All tokens by id.
    pub fn tokens(&self) -> Result<Vec<Token>, Error> {
        let (vocab, added) =
            contain(|| Ok((self.inner.get_vocab(true), self.inner.get_added_tokens_decoder())))
                .map_err(|reason| Error::model(&self.path, reason))?;
        let num_ids = vocab.values().max().map_or(0, |id| *id as usize + 1);
        let mut tokens = vec![Token::Unused; num_ids];
        let bytes = byte_level();
        for (text, id) in vocab {
            tokens[id as usize] = match self.spelling {
                Spelling::ByteLevel => spell_byte_level(&text, &bytes),
                Spelling::Plain { space } => spell_plain(&text, space),
            };
        }
        for (id, token) in added {
            if let Some(entry) = tokens.get_mut(id as usize) {
                *entry = match token.special {
                    true => Token::Special(token.content),
                    false => Token::Text(token.content.into_bytes()),
                };
            }
        }
        Ok(tokens)
    }
}

impl Spelling {
    /// Of a vocabulary whose `decoder` this is, as in `tokenizer.json`.
    fn of(decoder: &Value) -> Option<Spelling> {
        let steps = match decoder.get("type")?.as_str()? {
            "Sequence" => decoder.get("decoders")?.as_array()?.as_slice(),
            _ => std::slice::from_ref(decoder),
        };
        let step = |name: &str| steps.iter().find(|step| step["type"] == name);
        if step("ByteLevel").is_some() {
            return Some(Spelling::ByteLevel);
        }
        if let Some(metaspace) = step("Metaspace") {
            let mut space = metaspace["replacement"].as_str()?.chars();
            return Some(Spelling::Plain { space: space.next()? });
        }
        step("ByteFallback")?;
        let spaces = steps.iter().filter(|step| step["type"] == "Replace");
        let mut spaces = spaces.filter(|step| step["content"] == " ");
        let space = spaces.find_map(|step| step["pattern"]["String"].as_str()?.chars().next());
        Some(Spelling::Plain { space: space.unwrap_or(' ') })
    }
}

/// The bytes of GPT-2's printable characters: printable Latin-1 stands for itself, the other bytes
/// for what follows U+0100, in their order.
fn byte_level() -> HashMap<char, u8> {
    let is_itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let (printable, other): (Vec<u8>, Vec<u8>) = (0..=255).partition(is_itself);
    let other = ('\u{100}'..).zip(other);
    printable.into_iter().map(|byte| (char::from(byte), byte)).chain(other).collect()
}

fn spell_byte_level(text: &str, bytes: &HashMap<char, u8>) -> Token {
    let spelled: Option<Vec<u8>> = text.chars().map(|char| bytes.get(&char).copied()).collect();
    // A character that no byte is written with: no text encodes to this token.
    spelled.map_or(Token::Unused, Token::Text)
}

fn spell_plain(text: &str, space: char) -> Token {
    let byte = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    let byte = byte.filter(|digits| digits.len() == 2);
    match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => Token::Text(vec![byte]),
        None => Token::Text(text.replace(space, " ").into_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn decoders_tell_how_bytes_are_written() {
        let check = |decoder: Value, expect| assert_eq!(Spelling::of(&decoder), expect);
        let steps = json!([
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        ]);
        check(json!({"type": "ByteLevel"}), Some(Spelling::ByteLevel));
        check(
            json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}),
            Some(Spelling::ByteLevel),
        );
        check(json!({"type": "Sequence", "decoders": steps}), Some(Spelling::Plain { space: '▁' }));
        check(
            json!({"type": "Metaspace", "replacement": "▁"}),
            Some(Spelling::Plain { space: '▁' }),
        );
        check(json!({"type": "WordPiece", "prefix": "##"}), None);
        check(Value::Null, None);
    }

    #[test]
    fn tokens_are_spelled_in_bytes() {
        let bytes = byte_level();
        assert_eq!(bytes.len(), 256);
        let text = |bytes: &[u8]| Token::Text(bytes.to_vec());
        assert_eq!(spell_byte_level("Ġaé", &bytes), text(b" a\xe9"));
        assert_eq!(spell_byte_level("Ċ", &bytes), text(b"\n"));
        assert_eq!(spell_byte_level("日", &bytes), Token::Unused);
        assert_eq!(spell_plain("▁a日", '▁'), text(" a日".as_bytes()));
        assert_eq!(spell_plain("<0x0A>", '▁'), text(b"\n"));
        assert_eq!(spell_plain("<0x0G>", '▁'), text(b"<0x0G>"));
    }
}
