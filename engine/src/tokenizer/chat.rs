//! Chat templates: Jinja as Hugging Face tokenizers render it, from strangers' files, with limits.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::{json, read_object, strftime};
use crate::answer::AnswerFormat;
use crate::error::Error;
use crate::source::ModelFolder;

/// Largest template that is read; the largest in common use take 30 KiB.
pub const TEMPLATE_BYTES_MAX: usize = 256 << 10;

/// Largest text that a template may write.
pub const OUTPUT_BYTES_MAX: usize = 16 << 20;

/// Template instructions of a render: a fixed part and a part per message. Usual templates take
/// about 17 per message.
const FUEL: u64 = 100_000;
const FUEL_PER_MESSAGE: u64 = 1_000;

const RECURSION_MAX: usize = 128;
const MESSAGES_MAX: usize = 1 << 16;

/// Most variables that a request may set.
const KWARGS_MAX: usize = 64;

/// Variables and functions that a request cannot set, and arguments of Hugging Face's function that
/// are no variables.
const RESERVED: [&str; 13] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "chat_template",
    "tokenize",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
];

/// A message of a chat. Fields beyond role and content reach the template as they are.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    #[serde(flatten)]
    pub rest: Map<String, Json>,
}

/// What a render needs besides the messages.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// Ends the text with the start of an assistant's turn.
    pub add_generation_prompt: bool,
    /// Tool descriptions, or null.
    pub tools: Json,
    /// The time that `strftime_now` tells, in UTC.
    pub now: SystemTime,
    /// Further variables of the template, such as `enable_thinking`.
    pub kwargs: Map<String, Json>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the other named tokens.
    tokens: Map<String, Json>,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into(), rest: Map::new() }
    }
}

/// Reads messages from JSON: an array of messages, or an object that has one as `messages`. A
/// message's content is a string, a list of text parts (they are joined), or null.
pub fn parse_messages(text: &str) -> Result<Vec<Message>, Error> {
    let json: Json = serde_json::from_str(text)
        .map_err(|error| Error::Request(format!("messages: not valid JSON: {error}")))?;
    let array = match &json {
        Json::Array(array) => array,
        Json::Object(object) => {
            object.get("messages").and_then(Json::as_array).ok_or_else(|| {
                Error::Request("messages: expected an array, or an object with \"messages\"".into())
            })?
        }
        _ => return Err(Error::Request("messages: expected an array of messages".into())),
    };
    if array.is_empty() || array.len() > MESSAGES_MAX {
        return Err(Error::Request(format!(
            "messages: {} messages; there must be 1 to {MESSAGES_MAX}",
            array.len()
        )));
    }
    array.iter().enumerate().map(|(idx, value)| parse_message(idx, value)).collect()
}

fn parse_message(idx: usize, value: &Json) -> Result<Message, Error> {
    let fail = |what: &str| Error::Request(format!("messages[{idx}]: {what}, got {value}"));
    let mut rest = value.as_object().ok_or_else(|| fail("expected an object"))?.clone();
    let role = match rest.shift_remove("role") {
        Some(Json::String(role)) => role,
        _ => return Err(fail("\"role\" must be a string")),
    };
    let content = match rest.shift_remove("content") {
        Some(Json::String(text)) => text,
        // An assistant's message that only calls tools has no content.
        Some(Json::Null) => String::new(),
        None if rest.contains_key("tool_calls") => String::new(),
        Some(Json::Array(parts)) => {
            let texts = parts.iter().map(|part| match part.get("type").and_then(Json::as_str) {
                Some("text") => part.get("text").and_then(Json::as_str),
                _ => None,
            });
            let texts: Option<String> = texts.collect();
            texts.ok_or_else(|| {
                fail("\"content\" parts must be {\"type\": \"text\", \"text\": \"…\"}")
            })?
        }
        _ => return Err(fail("\"content\" must be a string or a list of text parts")),
    };
    Ok(Message { role, content, rest })
}

impl ChatTemplate {
    /// The template of a model, where it has one.
    pub fn read(folder: &ModelFolder) -> Result<Option<ChatTemplate>, Error> {
        let config = read_object(folder, "tokenizer_config.json")?;
        ChatTemplate::load(folder, config.as_ref())
    }

    /// The template of a model folder: `chat_template.jinja`, else the `chat_template` of
    /// `tokenizer_config.json`.
    pub(super) fn load(
        folder: &ModelFolder,
        config: Option<&Map<String, Json>>,
    ) -> Result<Option<ChatTemplate>, Error> {
        let tokens = config.map(named_tokens).unwrap_or_default();
        match ChatTemplate::source(folder, config)? {
            Some((path, source)) => ChatTemplate::new(&path, &source, tokens).map(Some),
            None => Ok(None),
        }
    }

    /// The text of that template, and the file it stands in.
    pub(crate) fn source(
        folder: &ModelFolder,
        config: Option<&Map<String, Json>>,
    ) -> Result<Option<(PathBuf, String)>, Error> {
        let path = folder.path("chat_template.jinja");
        if let Some(bytes) = folder.read("chat_template.jinja", TEMPLATE_BYTES_MAX as u64)? {
            let source = String::from_utf8(bytes.into_owned())
                .map_err(|_| Error::model(&path, "the template is not valid UTF-8"))?;
            return Ok(Some((path, source)));
        }
        let path = folder.path("tokenizer_config.json");
        let Some(value) = config.and_then(|object| object.get("chat_template")) else {
            return Ok(None);
        };
        let source = select(value).map_err(|message| Error::model(&path, message))?;
        Ok(source.map(|source| (path, source.to_owned())))
    }

    /// Compiles `source`, which came from the file `path`. `tokens` are variables of the template,
    /// such as `bos_token`.
    pub fn new(path: &Path, source: &str, tokens: Map<String, Json>) -> Result<Self, Error> {
        if source.len() > TEMPLATE_BYTES_MAX {
            return Err(Error::model(
                path,
                format!(
                    "chat template of {} bytes; the limit is {TEMPLATE_BYTES_MAX}",
                    source.len()
                ),
            ));
        }
        let mut environment = environment();
        environment
            .add_template_owned("chat", strip_generation_tags(source))
            .map_err(|error| Error::model(path, describe(&error)))?;
        Ok(ChatTemplate { environment, tokens })
    }

    /// How answers to prompts of this template write tool calls and reasoning.
    pub fn answer_format(&self) -> AnswerFormat {
        let template = self.environment.get_template("chat");
        template.map(|template| AnswerFormat::detect(template.source())).unwrap_or_default()
    }

    /// The text of a chat's prompt; `Tokenizer::render_chat` keeps special tokens in messages from
    /// becoming control tokens.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String, Error> {
        self.check_kwargs(&options.kwargs)?;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + FUEL_PER_MESSAGE * messages.len() as u64));
        let now = options.now;
        environment.add_function("strftime_now", move |format: &str| {
            let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
            strftime::format(format, seconds)
                .map_err(|message| minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let mut named = options.kwargs.clone();
        named.extend(self.tokens.clone());
        let variables = context! {
            messages => Serde(messages),
            add_generation_prompt => options.add_generation_prompt,
            tools => Serde(&options.tools),
            documents => (),
            ..Value::from(Serde(&named))
        };
        let mut output = LimitedText(Vec::new());
        let fail = |error| Error::Request(describe(&error));
        let template = environment.get_template("chat").map_err(fail)?;
        template.render_captured_to(variables, &mut output).map_err(|error| {
            let is_full = output.0.len() == OUTPUT_BYTES_MAX;
            match is_full {
                true => Error::Request(format!(
                    "chat template: the text exceeds the limit of {OUTPUT_BYTES_MAX} bytes"
                )),
                false => fail(error),
            }
        })?;
        String::from_utf8(output.0)
            .map_err(|_| Error::Request("chat template: the text is not valid UTF-8".into()))
    }
}

impl ChatTemplate {
    fn check_kwargs(&self, kwargs: &Map<String, Json>) -> Result<(), Error> {
        if kwargs.len() > KWARGS_MAX {
            return Err(Error::Request(format!(
                "chat_template_kwargs: {} variables; at most {KWARGS_MAX} are possible",
                kwargs.len()
            )));
        }
        let is_reserved = |name: &str| RESERVED.contains(&name) || self.tokens.contains_key(name);
        match kwargs.keys().find(|name| is_reserved(name)) {
            Some(name) => Err(Error::Request(format!(
                "chat_template_kwargs: {name:?} cannot be set; leave it out"
            ))),
            None => Ok(()),
        }
    }
}

/// A writer that holds at most [`OUTPUT_BYTES_MAX`].
struct LimitedText(Vec<u8>);

impl io::Write for LimitedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(OUTPUT_BYTES_MAX - self.0.len());
        self.0.extend_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The environment that Hugging Face tokenizers give to chat templates.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters do not collide"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_recursion_limit(RECURSION_MAX);
    environment.add_function("raise_exception", |message: String| {
        Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", to_json);
    environment
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=None)`, without the HTML escapes of the
/// engine's own filter.
fn to_json(
    value: &Value,
    indent: Option<Value>,
    arguments: Kwargs,
) -> Result<String, minijinja::Error> {
    let fail = |message: String| minijinja::Error::new(ErrorKind::InvalidOperation, message);
    let indent = match indent {
        Some(indent) => Some(indent),
        None => arguments.get::<Option<Value>>("indent")?,
    };
    let ensure_ascii = arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    arguments.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(value) if value.is_none() || value.is_undefined() => None,
        Some(value) => match usize::try_from(value.clone()) {
            Ok(width) if width <= json::INDENT_MAX => Some(width),
            _ => {
                return Err(fail(format!(
                    "tojson: indent {value} is not 0 to {}",
                    json::INDENT_MAX
                )));
            }
        },
    };
    let value = serde_json::to_value(value).map_err(|error| fail(format!("tojson: {error}")))?;
    Ok(json::dump(&value, json::Style { indent, ensure_ascii, sort_keys }))
}

/// The template named `default` of a `chat_template` value, or its only one.
fn select(value: &Json) -> Result<Option<&str>, String> {
    let named = match value {
        Json::Null => return Ok(None),
        Json::String(source) => return Ok(Some(source)),
        Json::Array(named) => named,
        _ => return Err("chat_template: expected a string or a list of named templates".into()),
    };
    let field = |entry: &'_ Json, key: &str| entry.get(key).and_then(Json::as_str).is_some();
    if let Some(idx) = named.iter().position(|e| !field(e, "name") || !field(e, "template")) {
        return Err(format!("chat_template[{idx}]: expected strings \"name\" and \"template\""));
    }
    let default = named.iter().find(|entry| entry["name"] == "default");
    match (default, named.as_slice()) {
        (Some(entry), _) | (None, [entry]) => Ok(entry["template"].as_str()),
        (None, []) => Ok(None),
        (None, _) => {
            let names: Vec<&str> = named.iter().filter_map(|e| e["name"].as_str()).collect();
            Err(format!("chat_template: none of {} is named \"default\"", names.join(", ")))
        }
    }
}

/// The text of a token in `tokenizer_config.json`: a string, or an object with `content`.
pub(crate) fn token_text(value: &Json) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn named_tokens(config: &Map<String, Json>) -> Map<String, Json> {
    let tokens =
        config.iter().filter(|(key, _)| key.ends_with("_token") && !key.starts_with("add_"));
    tokens.filter_map(|(key, value)| Some((key.clone(), token_text(value)?.into()))).collect()
}

/// Templates mark the assistant's tokens with `{% generation %}` for training; the tag has no
/// meaning when text is generated.
fn strip_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(len) = tag.find("%}").map(|end| end + 2) else { break };
        let inner = tag[2..len - 2].trim_start_matches(['-', '+']).trim_end_matches(['-', '+']);
        out.push_str(before);
        if matches!(inner.trim(), "generation" | "endgeneration") {
            // A comment keeps what the tag does to the white space around it.
            out.push_str(&tag[..len].replace("{%", "{#").replace("%}", "#}"));
            rest = &tag[len..];
        } else {
            // Only the opening mark: a string in the tag may hold "%}".
            out.push_str("{%");
            rest = &tag[2..];
        }
    }
    out.push_str(rest);
    out
}

/// `chat template, line 3: reason`, with the reasons behind it.
fn describe(error: &minijinja::Error) -> String {
    let mut text = "chat template".to_owned();
    if let Some(line) = error.line() {
        text.push_str(&format!(", line {line}"));
    }
    let reason = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "it takes too many steps".to_owned(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    format!("{text}: {reason}")
}
