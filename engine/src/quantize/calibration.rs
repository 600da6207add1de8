//! Calibration text: a text file or JSON lines → samples of token ids, and what is held out.
//!
//! A line of JSON is a string, `{"text": …}`, or `{"messages": […]}`, which the chat template
//! renders.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::{Map, Value as Json};

use crate::error::Error;
use crate::tokenizer::chat::{self, ChatOptions};
use crate::tokenizer::{SpecialTokens, Tokenizer};

/// The text that is taken where none is given: an excerpt of WikiText-2, see
/// `calibration.LICENSE.md`.
pub const SHIPPED_TEXT: &str = include_str!("calibration.txt");

/// What reports call [`SHIPPED_TEXT`].
const SHIPPED_NAME: &str = "an excerpt of WikiText-2, shipped with the program";

/// Largest text file that is read.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// A text is encoded in pieces of this size, because its tokens take many times its own memory.
const PIECE_BYTES: usize = 1 << 20;

/// Pieces that are taken of a long text.
const NUM_PIECES_MAX: usize = 8;

/// Samples times their length, at most.
const SAMPLE_TOKENS_MAX: usize = 1 << 24;

/// Fewest tokens of a sample.
const SAMPLE_LEN_MIN: usize = 8;

/// Chunks that are held out, at most: enough to see a change, few enough to be measured soon.
const NUM_HELD_OUT_MAX: usize = 8;

/// Where a text comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TextSource {
    #[default]
    Shipped,
    File(PathBuf),
}

/// Which samples are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrationOptions {
    pub text: TextSource,
    /// Fewer are taken where the text has no more.
    pub num_samples: usize,
    /// Tokens of a sample.
    pub sample_len: usize,
}

impl Default for CalibrationOptions {
    fn default() -> CalibrationOptions {
        CalibrationOptions { text: TextSource::Shipped, num_samples: 24, sample_len: 512 }
    }
}

/// A text in tokens, cut into chunks of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// Chunks that are spread evenly over the text.
    pub samples: Vec<Vec<u32>>,
    /// Other chunks of it, one after the other; empty where there are none.
    pub held_out: Vec<u32>,
    /// Tokens of the text.
    pub num_tokens: usize,
}

impl TextSource {
    /// What reports call the text: without its folder, so that the same text has the same name.
    pub fn name(&self) -> String {
        match self {
            TextSource::Shipped => SHIPPED_NAME.to_owned(),
            TextSource::File(path) => {
                path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned())
            }
        }
    }

    /// The tokens of the text, or of parts that are spread over it where it is long.
    pub fn token_ids(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        match self {
            TextSource::Shipped => text_ids(SHIPPED_TEXT, tokenizer),
            TextSource::File(path) => {
                let text = read(path)?;
                match is_json_lines(path, &text) {
                    true => json_lines_ids(path, &text, tokenizer),
                    false => text_ids(&text, tokenizer),
                }
            }
        }
    }
}

impl Calibration {
    /// Reads the text, which must have one sample at least. The same text, tokenizer and options
    /// give the same samples.
    pub fn read(
        options: &CalibrationOptions,
        tokenizer: &Tokenizer,
        max_context: usize,
    ) -> Result<Calibration, Error> {
        let CalibrationOptions { num_samples, sample_len, .. } = *options;
        if sample_len < SAMPLE_LEN_MIN || sample_len > max_context {
            return Err(Error::Request(format!(
                "a sample has {sample_len} tokens; it must have {SAMPLE_LEN_MIN} to the model's \
                 context of {max_context}"
            )));
        }
        let num_samples_max = SAMPLE_TOKENS_MAX / sample_len;
        if num_samples == 0 || num_samples > num_samples_max {
            return Err(Error::Request(format!(
                "{num_samples} samples of {sample_len} tokens; there must be 1 to \
                 {num_samples_max}"
            )));
        }
        let ids = options.text.token_ids(tokenizer)?;
        if ids.len() < sample_len {
            return Err(Error::Request(format!(
                "the calibration text ({}) has {} tokens, fewer than one sample of {sample_len}; \
                 give more text or a smaller --seqlen",
                options.text.name(),
                ids.len()
            )));
        }
        Ok(Calibration::cut(&ids, num_samples, sample_len))
    }

    /// `ids` has one sample at least.
    fn cut(ids: &[u32], num_samples: usize, sample_len: usize) -> Calibration {
        let chunks: Vec<&[u32]> = ids.chunks_exact(sample_len).collect();
        let sampled = spread(num_samples.min(chunks.len()), chunks.len());
        let others: Vec<usize> =
            (0..chunks.len()).filter(|idx| sampled.binary_search(idx).is_err()).collect();
        let held_out = spread(others.len().min(NUM_HELD_OUT_MAX), others.len());
        Calibration {
            samples: sampled.iter().map(|&idx| chunks[idx].to_vec()).collect(),
            held_out: held_out.iter().flat_map(|&idx| chunks[others[idx]]).copied().collect(),
            num_tokens: ids.len(),
        }
    }
}

/// `count` different numbers below `total`, evenly spread, ascending.
fn spread(count: usize, total: usize) -> Vec<usize> {
    (0..count).map(|i| i * total / count).collect()
}

/// The text of a file that has some.
fn read(path: &Path) -> Result<String, Error> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    let refuse = |what: String| Err(Error::Request(format!("{}: {what}", path.display())));
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return refuse(format!("more than {FILE_BYTES_MAX} bytes; give a part of the text"));
    }
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return refuse(format!("a binary file: byte {at} is zero; give UTF-8 text or JSON lines"));
    }
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            return refuse(format!("not UTF-8 text: byte {at} belongs to no character"));
        }
    };
    match text.trim().is_empty() {
        true => refuse("the file is empty; give a text".to_owned()),
        false => Ok(text),
    }
}

/// Told by the first line that is not blank, or by the file's name.
fn is_json_lines(path: &Path, text: &str) -> bool {
    let is_named = path.extension().is_some_and(|e| e == "jsonl" || e == "ndjson");
    let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let parsed: Result<Json, _> = serde_json::from_str(first);
    is_named || parsed.is_ok_and(|json| json.is_object() || json.is_string())
}

/// Tokens of a plain text, without a BOS.
fn text_ids(text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
    let pieces = pieces(text);
    let mut ids = Vec::new();
    for idx in spread(pieces.len().min(NUM_PIECES_MAX), pieces.len()) {
        ids.extend(tokenizer.encode(pieces[idx], SpecialTokens::Omit)?);
    }
    Ok(ids)
}

/// Cuts a text into pieces of at most [`PIECE_BYTES`], behind a line's end where there is one.
fn pieces(mut text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    while text.len() > PIECE_BYTES {
        let mut limit = PIECE_BYTES;
        while !text.is_char_boundary(limit) {
            limit -= 1;
        }
        let end = text[..limit].rfind('\n').map_or(limit, |at| at + 1);
        let (piece, rest) = text.split_at(end);
        pieces.push(piece);
        text = rest;
    }
    pieces.push(text);
    pieces
}

/// Tokens of the lines, an end token behind each text. Every line must be sound; of many, those
/// that are taken are spread over the file.
fn json_lines_ids(path: &Path, text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
    let end = tokenizer.eos_ids().first();
    let stride = text.len().div_ceil(PIECE_BYTES * NUM_PIECES_MAX);
    let mut ids = Vec::new();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (idx, (line_idx, line)) in lines.enumerate() {
        let fail = |what: String| {
            Error::Request(format!("{}: line {}: {what}", path.display(), line_idx + 1))
        };
        let document = Document::parse(line).map_err(fail)?;
        if idx % stride != 0 {
            continue;
        }
        match document {
            Document::Text(text) => {
                ids.extend(tokenizer.encode(&text, SpecialTokens::Omit)?);
                ids.extend(end);
            }
            Document::Chat(messages) => {
                let prompt = tokenizer
                    .render_chat(&messages, &chat_options())
                    .map_err(|error| fail(error.to_string()))?;
                ids.extend(tokenizer.encode_prompt(&prompt)?);
            }
        }
    }
    Ok(ids)
}

/// One line of JSON.
enum Document {
    Text(String),
    Chat(Vec<chat::Message>),
}

impl Document {
    fn parse(line: &str) -> Result<Document, String> {
        let json: Json = serde_json::from_str(line).map_err(|e| format!("not valid JSON: {e}"))?;
        match json {
            Json::String(text) => Ok(Document::Text(text)),
            Json::Object(mut object) => match (object.remove("text"), object.get("messages")) {
                (Some(Json::String(text)), None) => Ok(Document::Text(text)),
                (None, Some(messages)) => chat::parse_messages(&messages.to_string())
                    .map(Document::Chat)
                    .map_err(|error| error.to_string()),
                _ => Err("expected \"text\" with a string, or \"messages\" with a list".to_owned()),
            },
            _ => Err("expected a string or an object with \"text\" or \"messages\"".to_owned()),
        }
    }
}

/// A whole conversation. The date that some templates write is a fixed one: the same text gives
/// the same tokens tomorrow.
fn chat_options() -> ChatOptions {
    ChatOptions {
        add_generation_prompt: false,
        tools: Json::Null,
        now: UNIX_EPOCH,
        kwargs: Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_and_the_rest_is_held_out() {
        let ids: Vec<u32> = (0..105).collect();
        let cut = Calibration::cut(&ids, 4, 10);
        let starts: Vec<u32> = cut.samples.iter().map(|sample| sample[0]).collect();
        assert_eq!(starts, [0, 20, 50, 70]);
        assert!(cut.samples.iter().all(|sample| sample.len() == 10));
        let held_out: Vec<u32> = cut.held_out.iter().step_by(10).copied().collect();
        assert_eq!(held_out, [10, 30, 40, 60, 80, 90]);
        assert_eq!(cut.num_tokens, 105);

        let all = Calibration::cut(&ids, 99, 10);
        assert_eq!((all.samples.len(), all.held_out.len()), (10, 0));
        let many = Calibration::cut(&ids, 2, 5);
        assert_eq!(many.held_out.len(), 5 * NUM_HELD_OUT_MAX);
    }

    #[test]
    fn long_texts_are_cut_behind_lines() {
        let line = format!("{}é\n", "x".repeat(996));
        let text = line.repeat(3000);
        let pieces = pieces(&text);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.len() == 3 && pieces.iter().all(|piece| piece.ends_with('\n')));
        let unbroken = "é".repeat(PIECE_BYTES);
        assert_eq!(super::pieces(&unbroken).len(), 2);
    }

    #[test]
    fn json_lines_are_told_by_their_content() {
        let told = |name: &str, text: &str| is_json_lines(Path::new(name), text);
        assert!(told("a.txt", "\n{\"text\": \"a\"}\nrest"));
        assert!(told("a", "\"a string\"\n"));
        assert!(told("a.jsonl", "not JSON"));
        assert!(!told("a.txt", "12\n"));
        assert!(!told("a.txt", "{ not JSON\n"));
        assert!(!told("a.txt", "\"Quoted\", he said.\n"));
    }

    #[test]
    fn lines_say_what_they_are() {
        let message = |line: &str| Document::parse(line).err().unwrap_or_default();
        assert!(matches!(Document::parse("\"a\""), Ok(Document::Text(text)) if text == "a"));
        assert!(matches!(Document::parse("{\"text\": \"b\", \"id\": 1}"), Ok(Document::Text(_))));
        let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}";
        assert!(matches!(Document::parse(chat), Ok(Document::Chat(chat)) if chat.len() == 1));
        assert!(message("{\"text\": 1}").contains("\"text\" with a string"));
        assert!(message("[1]").contains("expected a string or an object"));
        assert!(message("{\"messages\": []}").contains("0 messages"));
        assert!(message("{").contains("not valid JSON"));
    }
}
