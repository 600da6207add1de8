//! Grammars that hold an answer to calls of tools, in the model's own format.

use serde_json::{Map, Value};

use super::{AnswerFormat, THINK, THINK_END, TOOL_CALL, TOOL_CALL_END, ToolFormat};
use crate::error::Error;
use crate::grammar::{GrammarSpec, with_options};

/// A tool that an answer may call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolSpec {
    name: String,
    parameters: Map<String, Value>,
}

/// Which tools an answer has to call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// One, of any tool.
    One,
    /// One or more, of any tools.
    OneOrMore,
    /// One of the tool of this name.
    Named(String),
}

impl ToolSpec {
    /// Longest name, in characters.
    pub const NAME_LEN_MAX: usize = 64;

    /// `parameters` is the JSON schema of the arguments; null allows any object.
    pub fn new(name: &str, parameters: Value) -> Result<ToolSpec, Error> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        let is_sound =
            (1..=ToolSpec::NAME_LEN_MAX).contains(&name.len()) && name.chars().all(is_allowed);
        if !is_sound {
            return Err(Error::Request(format!(
                "{name:?} cannot name a tool; use 1 to {} letters, digits, '-' and '_'",
                ToolSpec::NAME_LEN_MAX
            )));
        }
        let parameters = match parameters {
            Value::Null => any_object(),
            Value::Object(schema) => schema,
            other => {
                return Err(Error::Request(format!(
                    "the parameters of the tool {name} are {other}; give a JSON schema of an object"
                )));
            }
        };
        Ok(ToolSpec { name: name.to_owned(), parameters })
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

impl AnswerFormat {
    /// The grammar of an answer that calls tools and says nothing else; `None` where the model has
    /// no format for calls. `starts_in_reasoning` as in `AnswerOptions`.
    pub fn tool_grammar(
        &self,
        tools: &[ToolSpec],
        choice: &ToolChoice,
        starts_in_reasoning: bool,
    ) -> Result<Option<GrammarSpec>, Error> {
        let Some(format) = self.tools else { return Ok(None) };
        let callable: Vec<&ToolSpec> = match choice {
            ToolChoice::Named(name) => tools.iter().filter(|tool| tool.name == *name).collect(),
            ToolChoice::One | ToolChoice::OneOrMore => tools.iter().collect(),
        };
        if callable.is_empty() {
            return Err(Error::Request(match choice {
                ToolChoice::Named(name) => format!("there is no tool {name:?} to be called"),
                _ => "there are no tools to be called".to_owned(),
            }));
        }
        let one = alternatives("call", callable.len());
        let (start, end, separator, arguments) = match format {
            ToolFormat::Hermes => {
                (format!("{TOOL_CALL}\n"), format!("\n{TOOL_CALL_END}"), "\n", "arguments")
            }
            ToolFormat::Llama => (String::new(), String::new(), "; ", "parameters"),
        };
        let calls = match choice {
            ToolChoice::OneOrMore => format!("({one}) ({} ({one}))*", literal(separator)),
            ToolChoice::One | ToolChoice::Named(_) => format!("({one})"),
        };
        let mut grammar = self.lark_start(&calls, starts_in_reasoning);
        for (idx, ToolSpec { name, parameters }) in callable.into_iter().enumerate() {
            let schema = with_options(parameters.clone());
            let head = literal(&format!("{start}{{\"name\": \"{name}\", \"{arguments}\": "));
            let tail = literal(&format!("}}{end}"));
            grammar.push_str(&format!(
                "call_{idx}: {head} arguments_{idx} {tail}\narguments_{idx}: %json {schema}\n"
            ));
        }
        Ok(Some(GrammarSpec::Lark(grammar)))
    }

    /// The grammar of an answer that is held to `spec` once its reasoning, if there is any, has
    /// ended.
    pub fn after_reasoning(&self, spec: GrammarSpec, starts_in_reasoning: bool) -> GrammarSpec {
        if !self.has_reasoning {
            return spec;
        }
        let body = match spec {
            GrammarSpec::JsonObject => any_object(),
            GrammarSpec::JsonSchema(Value::Object(schema)) => schema,
            // A grammar of the user's own says itself what it allows.
            other => return other,
        };
        let answer = format!("answer: %json {}\n", with_options(body));
        GrammarSpec::Lark(self.lark_start("answer", starts_in_reasoning) + &answer)
    }

    /// Rules up to `answer`, with the reasoning before it.
    fn lark_start(&self, answer: &str, starts_in_reasoning: bool) -> String {
        let think = literal(THINK);
        // NOTE: the body of reasoning ends with the first closing mark, whatever it says.
        let reasoning = format!("reasoning[suffix={}]: /(?s:.*)/\n", literal(THINK_END));
        let space = "space: /\\n{0,2}/\n";
        match (self.has_reasoning, starts_in_reasoning) {
            (false, _) => format!("start: {answer}\n"),
            (true, true) => format!("start: reasoning space {answer}\n{reasoning}{space}"),
            (true, false) => {
                format!("start: ({think} reasoning space)? {answer}\n{reasoning}{space}")
            }
        }
    }
}

fn any_object() -> Map<String, Value> {
    Map::from_iter([("type".to_owned(), Value::from("object"))])
}

/// `call_0 | call_1 | …`
fn alternatives(name: &str, count: usize) -> String {
    let names: Vec<String> = (0..count).map(|idx| format!("{name}_{idx}")).collect();
    names.join(" | ")
}

/// A Lark literal, which has the escapes of JSON.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
