//! Conversations as files, and the folder of those that have a name.

use std::fs::{self, DirBuilder};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::conversation::{Conversation, Generated};
use crate::cli::model::ModelFiles;
use crate::cli::prompt::read_text;
use crate::files::{self, IfExists, SidecarLock};
use crate::session::SessionId;
use crate::tokenizer::SpecialTokens;
use crate::tokenizer::chat::{Message, parse_messages};

/// What is written; `generate --messages` reads the messages of it.
#[derive(Serialize)]
struct Written {
    messages: Vec<Message>,
    generated: Vec<Option<Generated>>,
    num_dropped: usize,
}

/// What is read besides the messages, where it is there.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Read {
    generated: Vec<Option<Generated>>,
    num_dropped: usize,
}

/// The folder of history and named conversations, which nobody else can read.
pub(super) struct ChatFolder {
    dir: PathBuf,
}

/// A conversation with a name, which no other program has open.
pub(super) struct NamedChat {
    pub(super) dir: PathBuf,
    transcript: PathBuf,
    _lock: SidecarLock,
}

impl ChatFolder {
    /// The folder `dir`, made where it is missing.
    pub(super) fn open(dir: PathBuf) -> anyhow::Result<ChatFolder> {
        let mut builder = DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&dir).with_context(|| dir.display().to_string())?;
        Ok(ChatFolder { dir })
    }

    pub(super) fn history(&self) -> PathBuf {
        self.dir.join("history")
    }

    /// Takes the conversation `id` for this program alone.
    pub(super) fn take(&self, id: &SessionId) -> anyhow::Result<NamedChat> {
        let lock = SidecarLock::try_acquire(&self.dir.join(format!("{id}.lock")))?;
        let Some(lock) = lock else {
            bail!("the session {id} is open in another chat; end that one, or choose another name");
        };
        let transcript = self.dir.join(format!("{id}.json"));
        Ok(NamedChat { dir: self.dir.clone(), transcript, _lock: lock })
    }
}

impl NamedChat {
    /// The conversation as it was left; `None` where it is new.
    pub(super) fn load(&self, files: &ModelFiles) -> anyhow::Result<Option<Conversation>> {
        match fs::exists(&self.transcript) {
            Ok(false) => Ok(None),
            _ => load(&self.transcript, files).map(Some),
        }
    }

    /// Keeps the conversation, over what was kept before.
    pub(super) fn save(&self, conversation: &Conversation) -> anyhow::Result<()> {
        save(&self.transcript, conversation)
    }
}

/// Writes a conversation whole or not at all.
pub(super) fn save(path: &Path, conversation: &Conversation) -> anyhow::Result<()> {
    let written = Written {
        messages: conversation.messages(),
        generated: conversation.generated(),
        num_dropped: conversation.num_dropped(),
    };
    let mut text = serde_json::to_string_pretty(&written)?;
    text.push('\n');
    Ok(files::write_file(path, text.as_bytes(), IfExists::Replace)?)
}

/// Reads a conversation: what [`save`] wrote, or any list of messages.
pub(super) fn load(path: &Path, files: &ModelFiles) -> anyhow::Result<Conversation> {
    let text = read_text(path)?;
    let name = || path.display().to_string();
    let (messages, read) = match serde_json::from_str(&text).with_context(name)? {
        // Nothing was said yet.
        serde_json::Value::Object(object) if is_empty(&object) => (Vec::new(), Read::default()),
        value @ serde_json::Value::Object(_) => (
            parse_messages(&text).with_context(name)?,
            Read::deserialize(value).with_context(name)?,
        ),
        _ => (parse_messages(&text).with_context(name)?, Read::default()),
    };
    let Read { generated, num_dropped } = read;
    let conversation =
        Conversation::restore(messages, generated, num_dropped).with_context(name)?;
    Ok(conversation.checked(|text, generated| is_sound(text, generated, files)))
}

fn is_empty(object: &serde_json::Map<String, serde_json::Value>) -> bool {
    object.get("messages").and_then(|messages| messages.as_array()).is_some_and(Vec::is_empty)
}

/// Whether tokens that a file tells are those of the answer's text, in this model.
fn is_sound(text: &str, generated: &Generated, files: &ModelFiles) -> bool {
    let Ok(tokenizer) = files.tokenizer() else { return false };
    let Generated { text_ids, output_ids, .. } = generated;
    let is_known = |id: &u32| (*id as usize) < files.config.vocab_size;
    output_ids.iter().all(is_known)
        && tokenizer.encode(text, SpecialTokens::Omit).is_ok_and(|ids| ids == *text_ids)
        && tokenizer.decode(output_ids).is_ok_and(|decoded| decoded == text)
}
