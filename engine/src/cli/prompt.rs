//! Prompts as arguments: text, token ids, or a file of chat messages.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;

use anyhow::{Context as _, bail};

use super::model::ModelFiles;
use crate::error::Error;
use crate::tokenizer::SpecialTokens;
use crate::tokenizer::chat::{self, ChatOptions, Message};

/// Largest text or message file that is read; its tokens take about forty times that.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// What the model goes on from.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub(super) struct PromptArgs {
    /// Text to continue, as it is: no chat template is applied
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Token ids to continue, such as 1,2,3
    #[arg(long, value_name = "IDS", allow_hyphen_values = true)]
    prompt_ids: Option<TokenIds>,
    /// JSON file with chat messages, rendered with the model's chat template
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
}

/// Token ids as they were typed; any of them may be outside the vocabulary.
#[derive(Clone, Debug)]
pub(super) struct TokenIds(Vec<i128>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(text: &str) -> Result<TokenIds, String> {
        if text.trim().is_empty() {
            return Ok(TokenIds(Vec::new()));
        }
        let parse = |id: &str| {
            let id = id.trim();
            id.parse().map_err(|_| format!("'{id}' is not a token id"))
        };
        text.split(',').map(parse).collect::<Result<_, _>>().map(TokenIds)
    }
}

impl TokenIds {
    /// The ids, each below `vocab_size`.
    pub(super) fn check(&self, vocab_size: usize) -> Result<Vec<u32>, Error> {
        let check = |(idx, id): (usize, &i128)| match u32::try_from(*id) {
            Ok(id) if (id as usize) < vocab_size => Ok(id),
            _ => Err(Error::Request(format!(
                "token id {id} at place {idx} of the prompt is outside the vocabulary of \
                 {vocab_size} tokens"
            ))),
        };
        self.0.iter().enumerate().map(check).collect()
    }
}

impl PromptArgs {
    /// The token ids of the prompt.
    pub(super) fn ids(&self, files: &ModelFiles) -> anyhow::Result<Vec<u32>> {
        let ids = if let Some(ids) = &self.prompt_ids {
            ids.check(files.config.vocab_size)?
        } else if let Some(path) = &self.messages {
            let text = read_text(path)?;
            let messages =
                chat::parse_messages(&text).with_context(|| path.display().to_string())?;
            chat_ids(files, &messages)?
        } else {
            let text = self.prompt.as_deref().unwrap_or("");
            files.tokenizer()?.encode(text, SpecialTokens::Add)?
        };
        if ids.is_empty() {
            bail!("the prompt is empty; give it at least one token");
        }
        Ok(ids)
    }
}

/// The prompt of a chat, ready for the assistant's answer.
pub(super) fn chat_ids(files: &ModelFiles, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
    let tokenizer = files.tokenizer()?;
    tokenizer.chat_template().with_context(|| {
        format!(
            "{}: the model has no chat template; use --prompt",
            files.source.files.root().display()
        )
    })?;
    let options = ChatOptions {
        add_generation_prompt: true,
        tools: serde_json::Value::Null,
        now: SystemTime::now(),
        kwargs: serde_json::Map::new(),
    };
    Ok(tokenizer.encode_prompt(&tokenizer.render_chat(messages, &options)?)?)
}

/// The text of a file.
pub(super) fn read_text(path: &Path) -> anyhow::Result<String> {
    let name = || path.display().to_string();
    let file = File::open(path).with_context(name)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).with_context(name)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        bail!("{}: more than {FILE_BYTES_MAX} bytes; give a part of the text", path.display());
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{}: not UTF-8 text: byte {at} belongs to no character", path.display())
    })
}
