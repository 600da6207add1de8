//! Text to token ids and back, and the chat template, of one model folder.

pub mod chat;
mod check;
mod json;
pub mod prompt;
pub mod stream;
mod strftime;
pub mod vocabulary;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use crate::error::Error;
use crate::source::ModelFolder;
use chat::ChatTemplate;
use prompt::SpecialToken;

/// Largest `tokenizer.json` that is read. The largest in common use, of vocabularies with a quarter
/// of a million tokens, take 35 MiB.
pub const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// Largest `tokenizer_config.json` or `generation_config.json` that is read.
pub const CONFIG_BYTES_MAX: u64 = 8 << 20;

/// Whether the tokens that the tokenizer puts around a text (such as a BOS) are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    Add,
    Omit,
}

/// A model's tokenizer: `tokenizer.json` with what `tokenizer_config.json`, `chat_template.jinja`
/// and `generation_config.json` add to it.
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// The same, for which special tokens are text; made when it is first needed.
    plain: OnceLock<tokenizers::Tokenizer>,
    specials: Vec<SpecialToken>,
    normalizes_specials: bool,
    path: PathBuf,
    /// One more than the largest token id.
    num_ids: usize,
    eos_ids: Vec<u32>,
    chat_template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads the tokenizer of the model folder `dir`.
    pub fn load(dir: &Path) -> Result<Tokenizer, Error> {
        Tokenizer::of(&ModelFolder::Disk(dir.to_owned()))
    }

    /// Reads the tokenizer of a model.
    pub fn of(folder: &ModelFolder) -> Result<Tokenizer, Error> {
        let path = folder.path("tokenizer.json");
        let bytes = folder.read("tokenizer.json", TOKENIZER_BYTES_MAX)?.ok_or_else(|| {
            Error::model(&path, "the file is missing; the model has no tokenizer")
        })?;
        let inner = Arc::new(parse(&path, &bytes)?);
        let specials =
            prompt::special_tokens(&inner).map_err(|reason| Error::model(&path, reason))?;
        let config = read_object(folder, "tokenizer_config.json")?;
        let generation = read_object(folder, "generation_config.json")?;
        let num_ids = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let mut eos_ids = BTreeSet::new();
        if let Some(value) = generation.as_ref().and_then(|object| object.get("eos_token_id")) {
            collect_ids(&folder.path("generation_config.json"), value, &mut eos_ids)?;
        }
        if let Some(id) = config
            .as_ref()
            .and_then(|object| chat::token_text(object.get("eos_token")?))
            .and_then(|text| inner.token_to_id(text))
        {
            eos_ids.insert(id);
        }
        let eos_ids = eos_ids.into_iter().collect();
        let chat_template = ChatTemplate::load(folder, config.as_ref())?;
        let normalizes_specials = prompt::normalizes_specials(&inner);
        let plain = OnceLock::new();
        Ok(Tokenizer {
            inner,
            plain,
            specials,
            normalizes_specials,
            path,
            num_ids,
            eos_ids,
            chat_template,
        })
    }

    /// Reads the tokenizer of `dir`, or `None` where the folder has no `tokenizer.json`.
    pub fn load_optional(dir: &Path) -> Result<Option<Tokenizer>, Error> {
        Tokenizer::of_optional(&ModelFolder::Disk(dir.to_owned()))
    }

    /// Reads a model's tokenizer, or `None` where it has no `tokenizer.json`.
    pub fn of_optional(folder: &ModelFolder) -> Result<Option<Tokenizer>, Error> {
        match folder.has("tokenizer.json") {
            true => Tokenizer::of(folder).map(Some),
            false => Ok(None),
        }
    }

    /// Refuses a tokenizer whose ids do not fit a model with `vocab_size` tokens.
    pub fn check_vocab_size(&self, vocab_size: usize) -> Result<(), Error> {
        if self.num_ids <= vocab_size {
            return Ok(());
        }
        Err(Error::model(
            &self.path,
            format!(
                "token id {} is outside the model's vocabulary of {vocab_size} (vocab_size of \
                 config.json); take tokenizer and weights from the same model",
                self.num_ids - 1
            ),
        ))
    }

    /// One more than the largest token id.
    pub fn num_ids(&self) -> usize {
        self.num_ids
    }

    /// Ids that end a generation, ascending. `config.json` may name more of them.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The chat template, where the model has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The id of the token spelled `text`.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// The token ids of `text`. Special tokens spelled out in the text become their ids; chats are
    /// for [`Tokenizer::encode_prompt`].
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, Error> {
        let add = special == SpecialTokens::Add;
        let encoding = self.contain("encode this text", || self.inner.encode_fast(text, add))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids` without special tokens. Bytes that are no UTF-8 become U+FFFD, ids that
    /// the tokenizer does not know become nothing.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.contain("decode these tokens", || self.inner.decode(ids, true))
    }

    /// The tokenizers crate panics on some descriptions that it loads without complaint.
    fn contain<T>(
        &self,
        what: &str,
        call: impl FnOnce() -> tokenizers::Result<T>,
    ) -> Result<T, Error> {
        contain(call).map_err(|reason| Error::model(&self.path, format!("cannot {what}: {reason}")))
    }
}

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread, now, would be caught and reported as an error: a panic hook can
/// stay silent then.
pub fn is_contained() -> bool {
    CONTAINED.get()
}

/// Runs `call`, with its panics turned into errors.
fn contain<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    CONTAINED.set(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CONTAINED.set(false);
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the description is contradictory; get the file anew".to_owned()),
    }
}

/// A tokenizer whose model is byte pair encoding, read without a detour.
type BytePairs = tokenizers::TokenizerImpl<
    tokenizers::models::bpe::BPE,
    tokenizers::NormalizerWrapper,
    tokenizers::PreTokenizerWrapper,
    tokenizers::PostProcessorWrapper,
    tokenizers::DecoderWrapper,
>;

fn parse(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer, Error> {
    // NOTE: nearly all models have byte pairs. The crate reads a model of unknown kind into a tree
    // of values first and looks at it afterwards, which takes three times as long. What is not
    // read this way is looked at once more, to say why.
    let mut inner = match contain(|| Ok(serde_json::from_slice::<BytePairs>(bytes)?)) {
        Ok(inner) => {
            check::check_steps(&inner).map_err(|message| Error::model(path, message))?;
            inner.into()
        }
        Err(_) => parse_any(path, bytes)?,
    };
    // Training leftovers: a stored truncation would cut prompts without a word.
    contain(|| inner.with_truncation(None).map(|_| ()))
        .map_err(|reason| Error::model(path, reason))?;
    inner.with_padding(None);
    Ok(inner)
}

fn parse_any(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer, Error> {
    check::check(bytes).map_err(|message| Error::model(path, message))?;
    contain(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(|reason| {
        Error::model(path, format!("no usable tokenizer: {reason}; get the file anew"))
    })
}

/// A JSON file that holds one object, or `None` where there is no such file.
pub(crate) fn read_object(
    folder: &ModelFolder,
    name: &str,
) -> Result<Option<serde_json::Map<String, Value>>, Error> {
    let Some(bytes) = folder.read(name, CONFIG_BYTES_MAX)? else { return Ok(None) };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(Error::model(folder.path(name), "expected a JSON object at the top")),
        Err(error) => Err(Error::model(folder.path(name), format!("not valid JSON: {error}"))),
    }
}

/// Adds the ids of an `eos_token_id` value (a number, a list of numbers, or null) to `ids`.
fn collect_ids(path: &Path, value: &Value, ids: &mut BTreeSet<u32>) -> Result<(), Error> {
    let values = match value {
        Value::Null => return Ok(()),
        Value::Array(values) => values.as_slice(),
        other => std::slice::from_ref(other),
    };
    for value in values {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            Error::model(path, format!("eos_token_id: {value} is not a token id"))
        })?;
        ids.insert(id);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read without a detour, a tokenizer is what the crate itself makes of it.
    #[test]
    fn both_ways_of_reading_agree() {
        let file = |model: &str| {
            format!(
                r#"{{"version": "1.0", "truncation": {{"max_length": 4, "strategy": "LongestFirst",
                "stride": 0, "direction": "Right"}}, "padding": null, "added_tokens": [{{"id": 5,
                "content": "<end>", "single_word": false, "lstrip": true, "rstrip": false,
                "normalized": false, "special": true}}], "normalizer": {{"type": "NFC"}},
                "pre_tokenizer": {{"type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": true}}, "post_processor": null,
                "decoder": {{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true}}, "model": {model}}}"#
            )
        };
        let vocab = r#""vocab": {"a": 0, "b": 1, "ab": 2, "\u0120": 3, "\u0120ab": 4}"#;
        let models = [
            format!(
                r#"{{"type": "BPE", "dropout": null, "unk_token": "a", "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": true, {vocab},
                "merges": [["a", "b"], ["\u0120", "ab"]]}}"#
            ),
            format!(r#"{{"type": "BPE", {vocab}, "merges": ["a b", "\u0120 ab"]}}"#),
            format!(r#"{{{vocab}, "merges": []}}"#),
            format!(r#"{{"type": "WordLevel", "unk_token": "a", {vocab}}}"#),
        ];
        for model in models {
            let text = file(&model);
            let found = parse(Path::new("tokenizer.json"), text.as_bytes()).unwrap();
            let mut expected = tokenizers::Tokenizer::from_bytes(&text).unwrap();
            expected.with_truncation(None).unwrap();
            let json = |tokenizer: &tokenizers::Tokenizer| tokenizer.to_string(true).unwrap();
            assert_eq!(json(&found), json(&expected));
            let ids = |tokenizer: &tokenizers::Tokenizer| {
                tokenizer.encode("ab<end> abab", true).unwrap().get_ids().to_vec()
            };
            assert_eq!(ids(&found), ids(&expected), "{model}");
        }
        let broken = file(&format!(r#"{{"type": "BPE", {vocab}, "merges": [["a", "c"]]}}"#));
        let error = parse(Path::new("tokenizer.json"), broken.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("\"c\" is not in the vocabulary"), "{error}");
    }
}
