//! The events of a streamed answer: lines of `data:`, and what the JSON in them says.

use serde::Deserialize;

/// Largest line of a stream; a token's takes about 300 bytes.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Bytes to the data of events. Comments and other fields are left out.
#[derive(Default)]
pub(super) struct EventLines {
    /// Of a line that has not ended, or of lines that were not looked at.
    bytes: Vec<u8>,
    /// Bytes that were.
    num_done: usize,
    /// Bytes behind those that hold no line end.
    num_searched: usize,
}

impl EventLines {
    /// Takes what has come; an error where a line would be too long.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.bytes.drain(..self.num_done);
        self.num_done = 0;
        if self.bytes.len() + bytes.len() > 2 * LINE_BYTES_MAX {
            return Err(format!("a line of the stream has more than {LINE_BYTES_MAX} bytes"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// The data of the next event; `None` where it has not ended yet.
    pub(super) fn next(&mut self) -> Option<&[u8]> {
        loop {
            let start = self.num_done;
            let open = &self.bytes[start..];
            let end = open[self.num_searched..].iter().position(|byte| *byte == b'\n');
            let Some(end) = end else {
                self.num_searched = open.len();
                return None;
            };
            let len = self.num_searched + end;
            (self.num_done, self.num_searched) = (start + len + 1, 0);
            if self.bytes[start..start + len].starts_with(b"data:") {
                return Some(self.bytes[start + b"data:".len()..start + len].trim_ascii());
            }
        }
    }
}

/// One event of `/v1/completions` or `/v1/chat/completions`, as far as it is measured.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    pub(super) usage: Option<Usage>,
    pub(super) error: Option<ApiFailure>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
}

/// Tokens as the server has counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    #[serde(default)]
    pub(super) prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct PromptDetails {
    #[serde(default)]
    pub(super) cached_tokens: usize,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct ApiFailure {
    #[serde(default)]
    pub(super) message: String,
}

impl Chunk {
    pub(super) fn parse(data: &[u8]) -> Result<Chunk, String> {
        serde_json::from_slice(data).map_err(|error| {
            let text: String = String::from_utf8_lossy(data).chars().take(80).collect();
            format!("an event is not what was expected: {error}: {text}")
        })
    }

    /// Whether it carries a part of the answer.
    pub(super) fn has_text(&self) -> bool {
        let is_text = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        self.choices.iter().any(|choice| {
            let delta = choice.delta.as_ref();
            is_text(&choice.text)
                || delta.is_some_and(|d| is_text(&d.content) || is_text(&d.reasoning_content))
        })
    }

    /// Whether it ends the answer.
    pub(super) fn has_end(&self) -> bool {
        self.choices.iter().any(|choice| choice.finish_reason.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_may_come_in_any_parts() {
        let text = ": comment\r\ndata: {\"a\": 1}\r\n\r\nevent: x\ndata:[DONE]\n\ndata: open";
        for part in 1..=text.len() {
            let (mut lines, mut found) = (EventLines::default(), Vec::new());
            for bytes in text.as_bytes().chunks(part) {
                lines.push(bytes).unwrap();
                while let Some(data) = lines.next() {
                    found.push(String::from_utf8(data.to_vec()).unwrap());
                }
            }
            assert_eq!(found, ["{\"a\": 1}", "[DONE]"], "parts of {part}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut lines = EventLines::default();
        let mut last = Ok(());
        for _ in 0..40 {
            last = lines.push(&[b'x'; 1 << 16]);
            assert_eq!(lines.next(), None);
        }
        assert!(last.unwrap_err().contains("more than 1048576 bytes"));
    }

    #[test]
    fn chunks_tell_text_end_and_usage() {
        let check = |json: &str, has_text, has_end| {
            let chunk = Chunk::parse(json.as_bytes()).unwrap();
            assert_eq!((chunk.has_text(), chunk.has_end()), (has_text, has_end), "{json}");
            chunk
        };
        check(r#"{"choices": [{"text": "a", "finish_reason": null}], "id": 1}"#, true, false);
        check(r#"{"choices": [{"text": "", "finish_reason": "length"}]}"#, false, true);
        check(r#"{"choices": [{"delta": {"role": "assistant", "content": ""}}]}"#, false, false);
        check(r#"{"choices": [{"delta": {"reasoning_content": "a"}}]}"#, true, false);
        let usage = r#"{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2,
            "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1}}}"#;
        let usage = check(usage, false, false).usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 2));
        assert_eq!(usage.prompt_tokens_details.unwrap().cached_tokens, 1);
        let failed = check(r#"{"error": {"message": "no", "type": "server_error"}}"#, false, false);
        assert_eq!(failed.error.unwrap().message, "no");
        assert!(Chunk::parse(b"{oops").unwrap_err().contains("{oops"));
    }
}
