//! The keys of a byte-level byte-pair tokenizer, from `tokenizer.json` and the files beside it.

use std::path::Path;

use bespoke_kernel_gen::model::ModelConfig;
use serde_json::Value as Json;

use super::writer::{Entry, Meta};
use crate::error::Error;
use crate::import::gguf::split::{SPLITS, Split};
use crate::import::gguf::tokenizer::{
    TYPE_CONTROL, TYPE_NORMAL, TYPE_UNUSED, TYPE_USER_DEFINED, filler,
};
use crate::source::{ModelFolder, read_limited};
use crate::tokenizer::chat::{self, ChatTemplate};
use crate::tokenizer::{SpecialTokens, TOKENIZER_BYTES_MAX, Tokenizer, read_object};

/// Keys of further end tokens, after that of the first.
const EOS_KEYS: [&str; 3] = ["eos_token_id", "eot_token_id", "eom_token_id"];

/// Everything below `tokenizer`, for a model with `config.vocab_size` rows of the embedding.
pub(super) fn metadata(
    dir: &Path,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<Vec<Entry>, Error> {
    let tokenizer = Tokenizer::load(dir)?;
    tokenizer.check_vocab_size(config.vocab_size)?;
    let file = TokenizerFile::read(dir)?;
    let (tokens, types) = file.tokens(config.vocab_size, notes)?;
    let folder = ModelFolder::Disk(dir.to_owned());
    let settings = read_object(&folder, "tokenizer_config.json")?.unwrap_or_default();
    let mut entries = vec![
        ("tokenizer.ggml.model".to_owned(), Meta::Text("gpt2".to_owned())),
        ("tokenizer.ggml.pre".to_owned(), Meta::Text(file.split()?.to_owned())),
        ("tokenizer.ggml.tokens".to_owned(), Meta::Texts(tokens)),
        ("tokenizer.ggml.token_type".to_owned(), Meta::I32s(types)),
        ("tokenizer.ggml.merges".to_owned(), Meta::Texts(file.merges()?)),
    ];
    let named = |name: &str| {
        settings.get(name).and_then(chat::token_text).and_then(|text| tokenizer.token_id(text))
    };
    let around = Around::of(&tokenizer)?;
    let bos = config.bos_token_id.or_else(|| named("bos_token")).or(around.before);
    if around.before.is_some() && around.before != bos {
        return Err(file.error("a token before every text that is not the BOS of config.json"));
    }
    let eos = end_tokens(named("eos_token"), &tokenizer, config, notes);
    if around.after.is_some() && around.after != eos.first().copied() {
        return Err(file.error("a token behind every text that is not the EOS token"));
    }
    let ids = [("bos_token_id", bos), ("padding_token_id", named("pad_token"))]
        .into_iter()
        .chain([("unknown_token_id", named("unk_token"))])
        .chain(EOS_KEYS.into_iter().zip(eos.iter().map(|id| Some(*id))));
    for (key, id) in ids.filter_map(|(key, id)| Some((key, id?))) {
        entries.push((format!("tokenizer.ggml.{key}"), Meta::U32(id)));
    }
    for (key, add) in
        [("add_bos_token", around.before.is_some()), ("add_eos_token", around.after.is_some())]
    {
        entries.push((format!("tokenizer.ggml.{key}"), Meta::Bool(add)));
    }
    if let Some((_, source)) = ChatTemplate::source(&folder, Some(&settings))? {
        entries.push(("tokenizer.chat_template".to_owned(), Meta::Text(source)));
    }
    Ok(entries)
}

/// The end tokens, that of `tokenizer_config.json` first. GGUF has keys for three.
fn end_tokens(
    named: Option<u32>,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Vec<u32> {
    let mut all: Vec<u32> = Vec::new();
    for id in named.iter().chain(&config.eos_token_ids).chain(tokenizer.eos_ids()) {
        if !all.contains(id) {
            all.push(*id);
        }
    }
    if all.len() > EOS_KEYS.len() {
        notes.push(format!(
            "{} tokens end a text, and GGUF names {}: {:?} are left out",
            all.len(),
            EOS_KEYS.len(),
            &all[EOS_KEYS.len()..]
        ));
    }
    all.truncate(EOS_KEYS.len());
    all
}

/// The tokens that the tokenizer puts around a text.
struct Around {
    before: Option<u32>,
    after: Option<u32>,
}

impl Around {
    fn of(tokenizer: &Tokenizer) -> Result<Around, Error> {
        let text = tokenizer.encode("a", SpecialTokens::Omit)?;
        let whole = tokenizer.encode("a", SpecialTokens::Add)?;
        let start = whole.windows(text.len().max(1)).position(|window| window == text);
        let around = start.map(|start| (&whole[..start], &whole[start + text.len()..]));
        match around {
            Some((before, after)) if before.len() <= 1 && after.len() <= 1 => {
                Ok(Around { before: before.first().copied(), after: after.first().copied() })
            }
            _ => Err(Error::Unsupported(format!(
                "the tokenizer makes {whole:?} of the token {text:?}: GGUF can say one token \
                 before a text and one behind it"
            ))),
        }
    }
}

/// `tokenizer.json`
struct TokenizerFile<'a> {
    dir: &'a Path,
    json: Json,
}

impl TokenizerFile<'_> {
    fn read(dir: &Path) -> Result<TokenizerFile<'_>, Error> {
        let path = dir.join("tokenizer.json");
        let bytes = read_limited(&path, TOKENIZER_BYTES_MAX)?.unwrap_or_default();
        let json: Json =
            serde_json::from_slice(&bytes).map_err(|e| Error::model(&path, e.to_string()))?;
        let file = TokenizerFile { dir, json };
        let model = &file.json["model"];
        let is_empty = |value: &Json| value.is_null() || value == "";
        let is_plain = model["type"] == "BPE"
            && file.json["decoder"]["type"] == "ByteLevel"
            && model["byte_fallback"] != true
            && is_empty(&model["continuing_subword_prefix"])
            && is_empty(&model["end_of_word_suffix"]);
        match is_plain {
            true => Ok(file),
            false => Err(file.error("no byte-level byte-pair tokenizer")),
        }
    }

    fn error(&self, what: &str) -> Error {
        Error::Unsupported(format!(
            "{}: {what}; only byte-level BPE ('gpt2' in GGUF) can be exported",
            self.dir.join("tokenizer.json").display()
        ))
    }

    /// GGUF's name of how text is cut.
    fn split(&self) -> Result<&'static str, Error> {
        let ignores_merges = self.json["model"]["ignore_merges"] == true;
        let split = Split::of(&self.json);
        let row = SPLITS.iter().find(|row| Some(row.1) == split && row.2 == ignores_merges);
        row.map(|row| row.0).ok_or_else(|| {
            let names: Vec<_> = SPLITS.iter().map(|row| row.0).collect();
            self.error(&format!(
                "its pre_tokenizer, normalizer and ignore_merges together are none of those that \
                 GGUF calls {}",
                names.join(", ")
            ))
        })
    }

    /// Text and type of every token, with fillers where there is none.
    fn tokens(
        &self,
        vocab_size: usize,
        notes: &mut Vec<String>,
    ) -> Result<(Vec<String>, Vec<i32>), Error> {
        let vocab = self.json["model"]["vocab"].as_object().into_iter().flatten();
        let vocab = vocab.map(|(text, id)| (id, text.as_str(), TYPE_NORMAL));
        let added = || self.json["added_tokens"].as_array().into_iter().flatten();
        let specials = added().filter_map(|token| {
            let is_special = token["special"] == true;
            let kind = if is_special { TYPE_CONTROL } else { TYPE_USER_DEFINED };
            Some((&token["id"], token["content"].as_str()?, kind))
        });
        let mut all: Vec<Option<(&str, i64)>> = vec![None; vocab_size];
        for (id, text, kind) in vocab.chain(specials) {
            let place = id.as_u64().and_then(|id| all.get_mut(usize::try_from(id).ok()?));
            // NOTE: the loader has compared the largest id with the vocabulary.
            let place = place.ok_or_else(|| self.error(&format!("token {text:?} has id {id}")))?;
            *place = Some((text, kind));
        }
        let flags = ["lstrip", "rstrip", "single_word"];
        let is_choosy = |token: &&Json| flags.iter().any(|flag| token[flag] == true);
        let num_choosy = added().filter(is_choosy).count();
        if num_choosy > 0 {
            notes.push(format!(
                "{num_choosy} tokens take the spaces beside them or want to stand alone, which \
                 GGUF cannot say"
            ));
        }
        let token = |(id, token): (usize, Option<(&str, i64)>)| match token {
            Some((text, kind)) => (text.to_owned(), kind as i32),
            None => (filler(id), TYPE_UNUSED as i32),
        };
        Ok(all.into_iter().enumerate().map(token).unzip())
    }

    /// Two tokens a merge, with a space between.
    fn merges(&self) -> Result<Vec<String>, Error> {
        let merge = |merge: &Json| match merge {
            Json::String(pair) => Some(pair.clone()),
            _ => match merge.as_array()?.as_slice() {
                [Json::String(left), Json::String(right)] => Some(format!("{left} {right}")),
                _ => None,
            },
        };
        let list = self.json["model"]["merges"].as_array();
        let merges = list.and_then(|list| list.iter().map(merge).collect::<Option<Vec<_>>>());
        let merges = merges.ok_or_else(|| self.error("merges that are not pairs of tokens"))?;
        match merges.iter().find(|merge| merge.split(' ').count() != 2) {
            Some(merge) => Err(self.error(&format!("the merge {merge:?} has a space in a token"))),
            None => Ok(merges),
        }
    }
}
