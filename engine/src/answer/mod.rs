//! What an answer's text means: reasoning, content and tool calls, in the formats that models were
//! trained on.
//!
//! The format follows from the model's chat template, which shows how earlier calls and reasoning
//! are written into the prompt.

mod call;
mod parser;
mod tool_grammar;

#[cfg(test)]
mod tests;

pub use parser::AnswerParser;
pub use tool_grammar::{ToolChoice, ToolSpec};

/// How a model writes what is no plain text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AnswerFormat {
    /// `None`: its answers call no tools.
    pub tools: Option<ToolFormat>,
    /// Whether it thinks between `<think>` and `</think>` before it answers.
    pub has_reasoning: bool,
}

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several
    /// one after the other, behind text or none.
    Hermes,
    /// Llama 3.1 and later: the whole answer is `{"name": …, "parameters": {…}}`, with or without
    /// `<|python_tag|>` before it; several are separated by `;`.
    Llama,
}

/// What one answer is read with.
#[derive(Clone, Debug, Default)]
pub struct AnswerOptions {
    /// The tools that may be called: text in the form of a call of another one is content.
    pub tool_names: Vec<String>,
    /// The prompt ends within reasoning, see [`AnswerFormat::opens_reasoning`].
    pub starts_in_reasoning: bool,
    /// Random bits, from which the ids of this answer's calls are made.
    pub call_id_seed: u128,
}

/// A piece of an answer. Pieces of one kind that follow each other make one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerDelta {
    Reasoning(String),
    Content(String),
    /// The call `idx` of the answer begins; its arguments follow.
    ToolCallStart {
        idx: usize,
        id: String,
        name: String,
    },
    /// JSON text, as the model wrote it. It is an object unless the answer broke off within it.
    ToolCallArguments {
        idx: usize,
        text: String,
    },
}

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const TOOL_CALL: &str = "<tool_call>";
const TOOL_CALL_END: &str = "</tool_call>";
const PYTHON_TAG: &str = "<|python_tag|>";

impl AnswerFormat {
    /// The format of a model with this chat template.
    pub fn detect(chat_template_source: &str) -> AnswerFormat {
        let has = |text: &str| chat_template_source.contains(text);
        let tools = if has(TOOL_CALL) {
            // Other models put other things than JSON between these tags.
            (!has("<function=") && !has("<arg_key>")).then_some(ToolFormat::Hermes)
        } else if has("<|start_header_id|>") && has("\"parameters\": ") {
            Some(ToolFormat::Llama)
        } else {
            None
        };
        AnswerFormat { tools, has_reasoning: has(THINK) || has(THINK_END) }
    }

    /// Whether the answer to this prompt begins within reasoning, because the prompt opened it.
    pub fn opens_reasoning(&self, prompt: &str) -> bool {
        self.has_reasoning && prompt.trim_end().ends_with(THINK)
    }

    /// The marks of the format. Where a tokenizer has one of them as a special token, the text for
    /// [`AnswerParser::push`] must show it, see `TextStream::showing`.
    pub fn markers(&self) -> Vec<&'static str> {
        let reasoning: &[_] = if self.has_reasoning { &[THINK, THINK_END] } else { &[] };
        let tools: &[_] = match self.tools {
            Some(ToolFormat::Hermes) => &[TOOL_CALL, TOOL_CALL_END],
            Some(ToolFormat::Llama) => &[PYTHON_TAG],
            None => &[],
        };
        [reasoning, tools].concat()
    }

    /// Reads one answer.
    pub fn parser(&self, options: AnswerOptions) -> AnswerParser {
        AnswerParser::new(*self, options)
    }
}
