//! Contradictions in a `tokenizer.json` on which the tokenizers crate would panic.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::BytePairs;

#[derive(Deserialize)]
struct Description {
    model: Option<Model>,
    #[serde(default)]
    pre_tokenizer: Value,
}

#[derive(Deserialize)]
struct Model {
    /// A map in most models, a list of pairs in Unigram.
    vocab: Option<Vocab>,
    merges: Option<Vec<Merge>>,
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Vocab {
    Map(HashMap<String, u32>),
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    /// Old files: both halves with a space between.
    Line(String),
}

/// Says what is wrong with the `tokenizer.json` in `bytes`, as far as loading it would not.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let description: Description =
        serde_json::from_slice(bytes).map_err(|error| format!("not a tokenizer: {error}"))?;
    let model = description.model.ok_or("not a tokenizer: it has no \"model\"")?;
    if let (Some(Vocab::Map(vocab)), Some(merges)) = (&model.vocab, &model.merges) {
        let prefix = model.continuing_subword_prefix.as_deref().unwrap_or("");
        for merge in merges {
            check_merge(vocab, merge, prefix)?;
        }
    }
    check_pre_tokenizer(&description.pre_tokenizer)
}

/// The same for a tokenizer of byte pairs that was loaded: its merges are sound.
pub(super) fn check_steps(tokenizer: &BytePairs) -> Result<(), String> {
    let steps = serde_json::to_value(tokenizer.get_pre_tokenizer());
    check_pre_tokenizer(&steps.map_err(|error| format!("not a tokenizer: {error}"))?)
}

fn check_merge(vocab: &HashMap<String, u32>, merge: &Merge, prefix: &str) -> Result<(), String> {
    let (a, b) = match merge {
        Merge::Pair(a, b) => (a.as_str(), b.as_str()),
        Merge::Line(line) if line.starts_with("#version") => return Ok(()),
        Merge::Line(line) => line
            .split_once(' ')
            .ok_or_else(|| format!("merge {line:?} is not two tokens with a space between"))?,
    };
    let rest = b
        .strip_prefix(prefix)
        .ok_or_else(|| format!("merge ({a:?}, {b:?}): {b:?} does not start with {prefix:?}"))?;
    let merged = format!("{a}{rest}");
    for token in [a, b, &merged] {
        if !vocab.contains_key(token) {
            return Err(format!("merge ({a:?}, {b:?}): {token:?} is not in the vocabulary"));
        }
    }
    Ok(())
}

/// A `FixedLength` step of length 0 would split without end.
fn check_pre_tokenizer(step: &Value) -> Result<(), String> {
    let is_fixed = step.get("type").and_then(Value::as_str) == Some("FixedLength");
    if is_fixed && step.get("length").and_then(Value::as_u64) == Some(0) {
        return Err("pre_tokenizer: FixedLength with length 0; it must be at least 1".to_owned());
    }
    let steps = step.get("pretokenizers").and_then(Value::as_array);
    steps.into_iter().flatten().try_for_each(check_pre_tokenizer)
}
