//! `tokenizer.json` and `tokenizer_config.json` from the tokens, merges and types of a GGUF file.

use std::collections::HashMap;
use std::io::{Read, Seek};

use serde_json::{Map, Value as Json, json};

use super::reader::{Gguf, Value};
use super::split::{SPLITS, Split, byte_level};
use crate::error::Error;

/// Token types of GGUF.
pub(crate) const TYPE_NORMAL: i64 = 1;
pub(crate) const TYPE_CONTROL: i64 = 3;
pub(crate) const TYPE_USER_DEFINED: i64 = 4;
/// Fills the vocabulary up to the rows of the embedding.
pub(crate) const TYPE_UNUSED: i64 = 5;

/// What the file says about its tokenizer, checked.
pub(super) struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
    merges: &'a [String],
    split: Split,
    ignore_merges: bool,
    pub(super) bos: Option<u32>,
    /// The end of a text, of a turn and of a message, without repetition.
    pub(super) eos: Vec<u32>,
    pub(super) pad: Option<u32>,
    unknown: Option<u32>,
    add_bos: bool,
    chat_template: Option<&'a str>,
}

impl<'a> Vocabulary<'a> {
    /// Reads the tokenizer's metadata; `vocab` is the number of rows of the embedding.
    pub(super) fn read<R: Read + Seek>(
        gguf: &'a Gguf<R>,
        vocab: usize,
    ) -> Result<Vocabulary<'a>, Error> {
        let get = |key: &str| gguf.metadata.get(&format!("tokenizer.{key}"));
        check_kind(gguf)?;
        let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
        if tokens.len() > vocab {
            return Err(
                gguf.error(format!("{} tokens, but the embedding has {vocab} rows", tokens.len()))
            );
        }
        let types = match get("ggml.token_type") {
            Some(Value::Integers(types)) if types.len() == tokens.len() => types.clone(),
            None => vec![TYPE_NORMAL; tokens.len()],
            Some(_) => {
                return Err(gguf.error(format!(
                    "tokenizer.ggml.token_type is not a list of {} integers",
                    tokens.len()
                )));
            }
        };
        let tokens = &tokens[..num_known(tokens, &types)];
        let merges = strings(gguf, "tokenizer.ggml.merges")?;
        let (split, ignore_merges) = split(gguf)?;
        let special = |key: &str| token_id(gguf, &format!("tokenizer.ggml.{key}"), tokens.len());
        let mut eos = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            eos.extend(special(key)?.filter(|id| !eos.contains(id)));
        }
        let add_bos = match get("ggml.add_bos_token") {
            Some(Value::Bool(add)) => *add,
            _ => split == Split::Llama3 && ignore_merges,
        };
        let chat_template = match get("chat_template") {
            Some(Value::String(text)) => Some(text.as_str()),
            _ => None,
        };
        Ok(Vocabulary {
            tokens,
            types,
            merges,
            split,
            ignore_merges,
            bos: special("bos_token_id")?,
            eos,
            pad: special("padding_token_id")?,
            unknown: special("unknown_token_id")?,
            add_bos,
            chat_template,
        })
    }

    /// The content of `tokenizer.json`. Merges are checked here: a merge whose parts or result
    /// are no tokens would make the file unusable.
    pub(super) fn tokenizer_json<R: Read + Seek>(&self, gguf: &Gguf<R>) -> Result<Json, Error> {
        let mut ids = HashMap::new();
        let mut vocab = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.as_str(), id) {
                return Err(gguf.error(format!("tokens {first} and {id} are both {token:?}")));
            }
            vocab.insert(token.clone(), json!(id));
        }
        let mut merges = Vec::new();
        for (rank, merge) in self.merges.iter().enumerate() {
            let pair = merge.split_once(' ').filter(|(left, right)| {
                let joined = format!("{left}{right}");
                [*left, *right, &joined].iter().all(|part| ids.contains_key(part))
            });
            let Some((left, right)) = pair else {
                return Err(gguf.error(format!(
                    "merge {rank} is {merge:?}, not two tokens whose junction is a token"
                )));
            };
            merges.push(json!([left, right]));
        }
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": self.split.normalizer(),
            "pre_tokenizer": self.split.pre_tokenizer(),
            "post_processor": self.post_processor(),
            "decoder": byte_level(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.ignore_merges,
                "vocab": vocab,
                "merges": merges,
            },
        }))
    }

    /// The content of `tokenizer_config.json`; `context` is the model's longest sequence.
    pub(super) fn config_json(&self, context: usize) -> Json {
        let content = |id: u32| json!(self.tokens[id as usize]);
        let added: Map<String, Json> = self
            .added_tokens()
            .into_iter()
            .map(|mut token| {
                let id = token["id"].to_string();
                if let Some(fields) = token.as_object_mut() {
                    fields.remove("id");
                }
                (id, token)
            })
            .collect();
        let mut config = json!({
            "add_bos_token": self.add_bos,
            "add_prefix_space": false,
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": false,
            "model_max_length": context,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        let special = [
            ("bos_token", self.bos),
            ("eos_token", self.eos.first().copied()),
            ("pad_token", self.pad),
            ("unk_token", self.unknown),
        ];
        for (name, id) in special {
            config[name] = id.map_or(Json::Null, content);
        }
        if let Some(template) = self.chat_template {
            config["chat_template"] = json!(template);
        }
        config
    }

    /// Control tokens are special; user-defined ones are ordinary text that is never split.
    fn added_tokens(&self) -> Vec<Json> {
        let is_added = |kind: i64| kind == TYPE_CONTROL || kind == TYPE_USER_DEFINED;
        self.tokens
            .iter()
            .zip(&self.types)
            .enumerate()
            .filter(|(_, (token, kind))| is_added(**kind) && !token.is_empty())
            .map(|(id, (token, kind))| {
                json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": *kind == TYPE_CONTROL,
                })
            })
            .collect()
    }

    fn post_processor(&self) -> Json {
        let Some(id) = self.bos.filter(|_| self.add_bos) else { return Json::Null };
        let token = &self.tokens[id as usize];
        let bos = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = |which: &str| json!({"Sequence": {"id": which, "type_id": 0}});
        json!({
            "type": "TemplateProcessing",
            "single": [bos, text("A")],
            "pair": [bos, text("A"), bos, text("B")],
            "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
        })
    }
}

/// Tokens before the fillers at the end, which are in GGUF because it wants one for every row of
/// the embedding.
fn num_known(tokens: &[String], types: &[i64]) -> usize {
    let fillers = tokens.iter().zip(types).enumerate().rev();
    let num_fillers = fillers
        .take_while(|(id, (token, kind))| **kind == TYPE_UNUSED && **token == filler(*id))
        .count();
    tokens.len() - num_fillers
}

/// The text of the unused token `id`.
pub(crate) fn filler(id: usize) -> String {
    format!("[PAD{id}]")
}

/// Only byte-level byte-pair tokenizers can be rebuilt.
fn check_kind<R: Read + Seek>(gguf: &Gguf<R>) -> Result<(), Error> {
    match gguf.metadata.get("tokenizer.ggml.model") {
        Some(Value::String(kind)) if kind == "gpt2" => Ok(()),
        Some(Value::String(kind)) => Err(Error::Unsupported(format!(
            "{}: tokenizer.ggml.model is '{kind:.60}'; only byte-level BPE ('gpt2') can be \
             imported. Use the model's original folder, which has a tokenizer.json",
            gguf.path.display()
        ))),
        _ => Err(gguf.error("metadata key 'tokenizer.ggml.model' is missing")),
    }
}

fn strings<'a, R: Read + Seek>(gguf: &'a Gguf<R>, key: &str) -> Result<&'a [String], Error> {
    match gguf.metadata.get(key) {
        Some(Value::Strings(strings)) => Ok(strings),
        // An empty array may have been written with any element type.
        Some(Value::Integers(none)) if none.is_empty() => Ok(&[]),
        Some(_) => Err(gguf.error(format!("{key} is not a list of strings"))),
        None => Err(gguf.error(format!("metadata key '{key}' is missing"))),
    }
}

fn split<R: Read + Seek>(gguf: &Gguf<R>) -> Result<(Split, bool), Error> {
    let name = match gguf.metadata.get("tokenizer.ggml.pre") {
        Some(Value::String(name)) => name.as_str(),
        _ => "default",
    };
    match SPLITS.iter().find(|row| row.0 == name) {
        Some(row) => Ok((row.1, row.2)),
        None => {
            let known: Vec<_> = SPLITS.iter().map(|row| row.0).collect();
            Err(Error::Unsupported(format!(
                "{}: tokenizer.ggml.pre '{name:.60}' is not known; known are {}. Use the model's \
                 original folder, which has a tokenizer.json",
                gguf.path.display(),
                known.join(", ")
            )))
        }
    }
}

fn token_id<R: Read + Seek>(
    gguf: &Gguf<R>,
    key: &str,
    num_tokens: usize,
) -> Result<Option<u32>, Error> {
    match gguf.metadata.get(key) {
        None => Ok(None),
        Some(Value::Integer(id)) if (0..num_tokens as i128).contains(id) => Ok(Some(*id as u32)),
        // Some writers put the largest value where there is no such token.
        Some(Value::Integer(id)) if *id == -1 || *id == i128::from(u32::MAX) => Ok(None),
        Some(other) => {
            let text = format!("{other:?}");
            Err(gguf.error(format!("{key} is {text:.60}, not a token from 0 to {num_tokens}")))
        }
    }
}
