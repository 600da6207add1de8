//! The prompt of a chat, in which the text of users never becomes control tokens.
//!
//! A template mixes its own special tokens with text from outside, and the tokenizer cannot tell
//! them apart. So text that spells a special token, or ends with the beginning of one, is marked
//! before it is rendered: a character that no text has stands in the spelling, and goes only when
//! the special tokens of the template have been found.

use serde_json::{Map, Value};

use super::chat::{ChatOptions, Message};
use super::{SpecialTokens, Tokenizer, contain};
use crate::error::Error;

/// The noncharacters U+FDD0 to U+FDEF: Unicode keeps them for uses such as this one.
pub(super) const MARKS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

/// Longest role, in bytes.
const ROLE_BYTES_MAX: usize = 64;

/// A rendered chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The text with its marks.
    marked: String,
    /// The mark, where the text has any.
    mark: Option<char>,
}

/// A special token as the tokenizer looks for it.
pub(super) struct SpecialToken {
    pub(super) id: u32,
    text: String,
    /// Takes the white space before it too.
    lstrip: bool,
    /// Takes the white space behind it too.
    rstrip: bool,
}

impl Prompt {
    /// The text as the model sees it.
    pub fn text(&self) -> String {
        self.unmark(&self.marked)
    }

    fn unmark(&self, text: &str) -> String {
        match self.mark {
            Some(mark) => text.replace(mark, ""),
            None => text.to_owned(),
        }
    }

    /// What follows the first `text`, which spells no special token.
    pub fn behind(&self, text: &str) -> Option<Prompt> {
        let (_, rest) = self.marked.split_once(text)?;
        Some(Prompt { marked: rest.to_owned(), mark: self.mark })
    }
}

impl Tokenizer {
    /// Renders a chat with the model's template. What messages, tools and options say is text,
    /// even where it spells special tokens. [`Error::Request`] where there is no template, or
    /// where it refuses the chat.
    pub fn render_chat(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Prompt, Error> {
        let template = self.chat_template().ok_or_else(|| {
            Error::Request("the model has no chat template; give it a plain prompt".to_owned())
        })?;
        messages.iter().try_for_each(check_role)?;
        let mut marked = Marked { specials: &self.specials, mark: None, is_marked: false };
        let texts = || texts_of(messages, options);
        marked.mark = MARKS.into_iter().find(|mark| !texts().any(|text| text.contains(*mark)));
        let messages: Vec<Message> =
            messages.iter().map(|message| marked.message(message)).collect::<Result<_, _>>()?;
        let options = ChatOptions {
            tools: marked.value(&options.tools)?,
            kwargs: marked.object(&options.kwargs)?,
            ..options.clone()
        };
        let text = template.render(&messages, &options)?;
        let mark = marked.mark.filter(|_| marked.is_marked);
        Ok(Prompt { marked: text, mark })
    }

    /// The token ids of a rendered chat. Templates write the special tokens themselves, a BOS
    /// included, so that none is added.
    pub fn encode_prompt(&self, prompt: &Prompt) -> Result<Vec<u32>, Error> {
        if prompt.mark.is_none() {
            let ids = self.encode(&prompt.marked, SpecialTokens::Omit)?;
            // A normalizer may have made special tokens of what spells none.
            if !self.normalizes_specials || self.num_special(&ids) == self.num_spelled(prompt) {
                return Ok(ids);
            }
        }
        // NOTE: in pieces, as the tokenizer itself goes about it around special tokens.
        let mut ids = Vec::new();
        let mut rest = prompt.marked.as_str();
        while let Some((start, special)) = self.next_special(rest) {
            let before = &rest[..start];
            let before = if special.lstrip { before.trim_end() } else { before };
            self.encode_text(&prompt.unmark(before), &mut ids)?;
            ids.push(special.id);
            rest = &rest[start + special.text.len()..];
            rest = if special.rstrip { rest.trim_start() } else { rest };
        }
        self.encode_text(&prompt.unmark(rest), &mut ids)?;
        Ok(ids)
    }

    fn num_special(&self, ids: &[u32]) -> usize {
        ids.iter().filter(|id| self.specials.iter().any(|special| special.id == **id)).count()
    }

    fn num_spelled(&self, prompt: &Prompt) -> usize {
        let mut rest = prompt.marked.as_str();
        let mut num = 0;
        while let Some((start, special)) = self.next_special(rest) {
            rest = &rest[start + special.text.len()..];
            num += 1;
        }
        num
    }

    /// The first special token in `text`, the longest of several.
    fn next_special(&self, text: &str) -> Option<(usize, &SpecialToken)> {
        let found = self
            .specials
            .iter()
            .filter_map(|special| text.find(special.text.as_str()).map(|start| (start, special)));
        found.min_by_key(|(start, special)| (*start, usize::MAX - special.text.len()))
    }

    /// Appends the ids of `text`, in which special tokens are text.
    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if text.is_empty() {
            return Ok(());
        }
        let plain = self.plain.get_or_init(|| {
            let mut plain = tokenizers::Tokenizer::clone(&self.inner);
            plain.set_encode_special_tokens(true);
            plain
        });
        let encoding = self.contain("encode this text", || plain.encode_fast(text, false))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// Whether special tokens are looked for in normalized text too.
pub(super) fn normalizes_specials(inner: &tokenizers::Tokenizer) -> bool {
    let added = inner.get_added_tokens_decoder();
    let is_normalized = added.values().any(|token| token.special && token.normalized);
    is_normalized && inner.get_normalizer().is_some()
}

/// The special tokens of a tokenizer, by id.
pub(super) fn special_tokens(inner: &tokenizers::Tokenizer) -> Result<Vec<SpecialToken>, String> {
    let added = contain(|| Ok(inner.get_added_tokens_decoder()))?;
    let mut specials: Vec<SpecialToken> = added
        .into_iter()
        .filter(|(_, token)| token.special && !token.content.is_empty())
        .map(|(id, token)| SpecialToken {
            id,
            text: token.content,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
        })
        .collect();
    specials.sort_by_key(|special| special.id);
    Ok(specials)
}

/// Roles are a part of special tokens in some templates.
fn check_role(message: &Message) -> Result<(), Error> {
    let is_allowed = |c: char| c.is_alphanumeric() || "-_ ".contains(c);
    let role = &message.role;
    match (1..=ROLE_BYTES_MAX).contains(&role.len()) && role.chars().all(is_allowed) {
        true => Ok(()),
        false => Err(Error::Request(format!(
            "messages: the role {role:?} is none; use 1 to {ROLE_BYTES_MAX} letters, digits, '-', \
             '_' and spaces"
        ))),
    }
}

/// Every text that comes from outside.
fn texts_of<'a>(
    messages: &'a [Message],
    options: &'a ChatOptions,
) -> impl Iterator<Item = &'a str> {
    let mut texts: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
    let mut open: Vec<&Value> = vec![&options.tools];
    let objects = messages.iter().map(|message| &message.rest).chain([&options.kwargs]);
    for (key, value) in objects.flatten() {
        texts.push(key);
        open.push(value);
    }
    while let Some(value) = open.pop() {
        match value {
            Value::String(text) => texts.push(text),
            Value::Array(items) => open.extend(items),
            Value::Object(object) => {
                texts.extend(object.keys().map(String::as_str));
                open.extend(object.values());
            }
            _ => {}
        }
    }
    texts.into_iter()
}

/// Puts marks into texts.
struct Marked<'a> {
    specials: &'a [SpecialToken],
    /// A character that no text has.
    mark: Option<char>,
    is_marked: bool,
}

impl Marked<'_> {
    fn message(&mut self, message: &Message) -> Result<Message, Error> {
        Ok(Message {
            role: message.role.clone(),
            content: self.text(&message.content)?,
            rest: self.object(&message.rest)?,
        })
    }

    fn value(&mut self, value: &Value) -> Result<Value, Error> {
        Ok(match value {
            Value::String(text) => Value::String(self.text(text)?),
            Value::Array(items) => {
                Value::Array(items.iter().map(|item| self.value(item)).collect::<Result<_, _>>()?)
            }
            Value::Object(object) => Value::Object(self.object(object)?),
            other => other.clone(),
        })
    }

    fn object(&mut self, object: &Map<String, Value>) -> Result<Map<String, Value>, Error> {
        let entries = object.iter().map(|(key, value)| Ok((self.text(key)?, self.value(value)?)));
        entries.collect()
    }

    /// `text` with a mark behind the first character of every special token in it, and of a
    /// beginning of one at its end, which what follows could complete.
    fn text(&mut self, text: &str) -> Result<String, Error> {
        let mut places: Vec<usize> = Vec::new();
        for special in self.specials {
            let first_len = special.text.chars().next().map_or(0, char::len_utf8);
            let mut start = 0;
            while let Some(found) = text[start..].find(special.text.as_str()) {
                start += found + first_len;
                places.push(start);
            }
            let beginnings = special.text.char_indices().skip(1).map(|(len, _)| len);
            let ends = beginnings.filter(|len| text.ends_with(&special.text[..*len]));
            places.extend(ends.map(|len| text.len() - len + first_len));
        }
        if places.is_empty() {
            return Ok(text.to_owned());
        }
        let Some(mark) = self.mark else {
            return Err(Error::Request(
                "messages: they spell special tokens and have all of the characters U+FDD0 to \
                 U+FDEF; leave out one of those"
                    .to_owned(),
            ));
        };
        self.is_marked = true;
        places.sort_unstable();
        places.dedup();
        let mut marked = text.to_owned();
        places.iter().rev().for_each(|place| marked.insert(*place, mark));
        Ok(marked)
    }
}
