//! Reads an answer while it is generated.

use super::call::{CallReader, Fit};
use super::{
    AnswerDelta, AnswerFormat, AnswerOptions, PYTHON_TAG, THINK, THINK_END, TOOL_CALL,
    TOOL_CALL_END, ToolFormat,
};

/// White space that is held back, in bytes: it is dropped before marks, and given out otherwise.
const SPACE_BYTES_MAX: usize = 1024;

/// Turns an answer's text into deltas. How the text is cut into pieces does not matter: the deltas
/// make the same texts.
///
/// Nothing is lost but marks and the white space next to them. Text that begins like a call and
/// turns out to be none comes as content, with its marks; a call that was announced already keeps
/// the arguments it has, and what does not fit them comes as content.
#[derive(Debug)]
pub struct AnswerParser {
    format: AnswerFormat,
    options: AnswerOptions,
    state: State,
    /// Text that is not given out yet.
    held: String,
    num_calls: usize,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space so far; reasoning may begin.
    BeforeReasoning,
    /// Whether any of it was given out.
    Reasoning {
        is_blank: bool,
    },
    Content(Before),
    /// Nothing but white space since the answer began, or since a call and its separator.
    LlamaStart,
    Call(Call),
    /// Behind the object of a call, before its closing mark.
    CallEnd,
}

/// What comes directly before the content at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Nothing,
    /// White space at the beginning is dropped.
    Reasoning,
    /// White space is dropped where nothing follows.
    Call,
}

#[derive(Debug, Default)]
struct Call {
    reader: CallReader,
    is_announced: bool,
    /// Bytes of the arguments that were given out.
    num_given: usize,
}

impl AnswerParser {
    pub(super) fn new(format: AnswerFormat, options: AnswerOptions) -> AnswerParser {
        let mut parser = AnswerParser {
            format,
            options,
            state: State::BeforeReasoning,
            held: String::new(),
            num_calls: 0,
        };
        parser.state = match format.has_reasoning {
            true if parser.options.starts_in_reasoning => State::Reasoning { is_blank: true },
            true => State::BeforeReasoning,
            false => parser.content(Before::Nothing),
        };
        parser
    }

    /// Reads on; appends to `out` what is certain.
    pub fn push(&mut self, text: &str, out: &mut Vec<AnswerDelta>) {
        text.chars().for_each(|char| self.push_char(char, out));
    }

    /// Ends the answer; appends what was held back.
    pub fn finish(&mut self, out: &mut Vec<AnswerDelta>) {
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Content(Before::Nothing)) {
            State::Reasoning { .. } => give_reasoning(held.trim_end(), out),
            State::Call(call) if call.is_announced => {}
            State::CallEnd => {}
            State::Content(Before::Call) if held.trim().is_empty() => {}
            State::LlamaStart if self.num_calls > 0 => {}
            _ => give_content(&held, out),
        }
    }

    /// Whether the answer has called a tool.
    pub fn has_tool_calls(&self) -> bool {
        self.num_calls > 0
    }

    /// How content begins: with Llama's format it may be a call.
    fn content(&self, before: Before) -> State {
        let may_call = self.tools() == Some(ToolFormat::Llama);
        if may_call { State::LlamaStart } else { State::Content(before) }
    }

    /// The format of calls, where there may be any.
    fn tools(&self) -> Option<ToolFormat> {
        self.format.tools.filter(|_| !self.options.tool_names.is_empty())
    }

    fn push_char(&mut self, char: char, out: &mut Vec<AnswerDelta>) {
        self.held.push(char);
        match &self.state {
            State::BeforeReasoning => self.try_reasoning(out),
            State::Reasoning { is_blank } => self.push_reasoning(*is_blank, out),
            State::Content(before) => self.push_content(*before, out),
            State::LlamaStart => self.try_llama_call(out),
            State::Call(_) => self.push_call(char, out),
            State::CallEnd => self.push_call_end(out),
        }
    }

    /// Reads what was held back once more, in another state.
    fn reread(&mut self, state: State, out: &mut Vec<AnswerDelta>) {
        self.state = state;
        let held = std::mem::take(&mut self.held);
        self.push(&held, out);
    }

    fn try_reasoning(&mut self, out: &mut Vec<AnswerDelta>) {
        let start = self.held.trim_start();
        if start == THINK {
            self.held.clear();
            self.state = State::Reasoning { is_blank: true };
        } else if !THINK.starts_with(start) || self.held.len() > SPACE_BYTES_MAX {
            self.reread(self.content(Before::Nothing), out);
        }
    }

    fn push_reasoning(&mut self, is_blank: bool, out: &mut Vec<AnswerDelta>) {
        if let Some(text) = self.held.strip_suffix(THINK_END) {
            let text = if is_blank { text.trim_start() } else { text };
            give_reasoning(text.trim_end(), out);
            self.held.clear();
            self.state = self.content(Before::Reasoning);
            return;
        }
        let text = self.certain(THINK_END);
        let text = if is_blank { text.trim_start().to_owned() } else { text };
        if !text.is_empty() {
            self.state = State::Reasoning { is_blank: false };
            give_reasoning(&text, out);
        }
    }

    fn push_content(&mut self, before: Before, out: &mut Vec<AnswerDelta>) {
        if before == Before::Reasoning && self.held.trim_start().is_empty() {
            self.held.clear();
            return;
        }
        let has_calls = self.tools() == Some(ToolFormat::Hermes);
        if has_calls && self.held.ends_with(TOOL_CALL) {
            self.state = State::Call(Call::default());
            return;
        }
        let text = match has_calls {
            true => self.certain(TOOL_CALL),
            false => std::mem::take(&mut self.held),
        };
        if !text.is_empty() {
            self.state = State::Content(Before::Nothing);
            give_content(&text, out);
        }
    }

    /// Takes what cannot be a part of `mark`, nor of the white space before it, out of the held
    /// text.
    fn certain(&mut self, mark: &str) -> String {
        let before_mark = self.held.len() - overlap(&self.held, mark);
        let certain = match self.held.len() > SPACE_BYTES_MAX {
            true => before_mark,
            false => self.held[..before_mark].trim_end().len(),
        };
        let rest = self.held.split_off(certain);
        std::mem::replace(&mut self.held, rest)
    }

    fn try_llama_call(&mut self, out: &mut Vec<AnswerDelta>) {
        let start = self.held.trim_start();
        // Behind a call there is a separator, at the beginning there may be a tag.
        let (separator, is_needed) = match self.num_calls {
            0 => (PYTHON_TAG, false),
            _ => (";", true),
        };
        let rest = start.strip_prefix(separator);
        if rest.unwrap_or(start).trim_start() == "{" && (rest.is_some() || !is_needed) {
            let mut call = Call::default();
            // NOTE: the first character of an object, which always fits.
            call.reader.push('{');
            self.state = State::Call(call);
            return;
        }
        let is_open =
            separator.starts_with(start) || rest.is_some_and(|rest| rest.trim().is_empty());
        if !is_open || self.held.len() > SPACE_BYTES_MAX {
            // NOTE: content from here on: an answer of this format is either.
            self.state = State::Content(Before::Nothing);
            give_content(&std::mem::take(&mut self.held), out);
        }
    }

    fn push_call(&mut self, char: char, out: &mut Vec<AnswerDelta>) {
        let State::Call(call) = &mut self.state else { return };
        let mut fit = call.reader.push(char);
        let name = call.reader.name();
        let names = &self.options.tool_names;
        if name.is_some_and(|name| !names.iter().any(|known| known == name)) {
            fit = Fit::Malformed;
        }
        if fit == Fit::Malformed {
            return self.give_up_call(char, out);
        }
        self.give_arguments(out);
        if fit == Fit::End {
            self.held.clear();
            self.state = match self.tools() {
                Some(ToolFormat::Llama) => State::LlamaStart,
                _ => State::CallEnd,
            };
        }
    }

    /// Gives out the arguments that have come, behind the announcement of their call.
    fn give_arguments(&mut self, out: &mut Vec<AnswerDelta>) {
        let State::Call(call) = &mut self.state else { return };
        let (Some(name), Some(arguments)) = (call.reader.name(), call.reader.arguments()) else {
            return;
        };
        if !call.is_announced {
            call.is_announced = true;
            let bits = self.options.call_id_seed.wrapping_add(self.num_calls as u128);
            let id = format!("call_{bits:032x}");
            let idx = self.num_calls;
            self.num_calls += 1;
            out.push(AnswerDelta::ToolCallStart { idx, id, name: name.to_owned() });
        }
        let text = &arguments[call.num_given..];
        if !text.is_empty() {
            give_call(self.num_calls - 1, text, out);
            call.num_given = arguments.len();
        }
        self.held.clear();
    }

    /// What was read of a call is content, as far as it was not given out; `char` may begin the
    /// next mark.
    fn give_up_call(&mut self, char: char, out: &mut Vec<AnswerDelta>) {
        let mut text = std::mem::take(&mut self.held);
        text.truncate(text.len() - char.len_utf8());
        give_content(&text, out);
        self.state = State::Content(Before::Nothing);
        self.push_char(char, out);
    }

    fn push_call_end(&mut self, out: &mut Vec<AnswerDelta>) {
        let end = self.held.trim_start();
        if end == TOOL_CALL_END {
            self.held.clear();
            self.state = State::Content(Before::Call);
        } else if !TOOL_CALL_END.starts_with(end) || self.held.len() > SPACE_BYTES_MAX {
            self.reread(State::Content(Before::Call), out);
        }
    }
}

fn give_reasoning(text: &str, out: &mut Vec<AnswerDelta>) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(AnswerDelta::Reasoning(last)) => last.push_str(text),
        _ => out.push(AnswerDelta::Reasoning(text.to_owned())),
    }
}

fn give_content(text: &str, out: &mut Vec<AnswerDelta>) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(AnswerDelta::Content(last)) => last.push_str(text),
        _ => out.push(AnswerDelta::Content(text.to_owned())),
    }
}

fn give_call(idx: usize, text: &str, out: &mut Vec<AnswerDelta>) {
    match out.last_mut() {
        Some(AnswerDelta::ToolCallArguments { idx: last_idx, text: last }) if *last_idx == idx => {
            last.push_str(text);
        }
        _ => out.push(AnswerDelta::ToolCallArguments { idx, text: text.to_owned() }),
    }
}

/// Bytes at the end of `text` that are a beginning of `mark`, which is ASCII, but not all of it.
fn overlap(text: &str, mark: &str) -> usize {
    let len_max = text.len().min(mark.len() - 1);
    (1..=len_max).rev().find(|len| text.ends_with(&mark[..*len])).unwrap_or(0)
}
