//! `/v1/chat/completions`.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::number::{
    MaxTokens, MinP, MinTokens, NumChoices, Penalty, RepetitionPenalty, Seed, Temperature, TopK,
    TopLogprobs, TopP,
};
use super::sampling::{LogitBias, StopTokens};
use super::text::{Content, Stop};
use super::{StreamOptions, Usage, tagged};

/// Most messages of a request.
pub const MESSAGES_MAX: usize = 2048;
/// Most tools of a request.
pub const TOOLS_MAX: usize = 128;

/// A conversation to be continued. Fields that are null are absent.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatRequest {
    /// The name of the model, as in `/v1/models`.
    pub model: String,
    #[schema(min_items = 1, max_items = 2048)]
    pub messages: Vec<Message>,
    pub max_completion_tokens: Option<MaxTokens>,
    /// The older name of `max_completion_tokens`; not looked at where both are there.
    pub max_tokens: Option<MaxTokens>,
    /// 1 where it is absent.
    pub temperature: Option<Temperature>,
    pub top_p: Option<TopP>,
    pub n: Option<NumChoices>,
    pub stop: Option<Stop>,
    pub stream: Option<bool>,
    /// For streams alone.
    pub stream_options: Option<StreamOptions>,
    /// Random where it is absent.
    pub seed: Option<Seed>,
    pub logprobs: Option<bool>,
    /// Wants `logprobs`.
    pub top_logprobs: Option<TopLogprobs>,
    pub logit_bias: Option<LogitBias>,
    pub presence_penalty: Option<Penalty>,
    pub frequency_penalty: Option<Penalty>,
    /// What the answer is held to.
    pub response_format: Option<ResponseFormat>,
    #[schema(max_items = 128)]
    pub tools: Option<Vec<Tool>>,
    /// `auto` where there are tools, `none` where there are none.
    pub tool_choice: Option<ToolChoice>,
    /// Whether one answer may call several tools; true where it is absent.
    pub parallel_tool_calls: Option<bool>,
    /// Not looked at.
    pub user: Option<String>,
    /// Not looked at.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Nothing is stored: true is refused.
    pub store: Option<Never>,
    pub top_k: Option<TopK>,
    pub min_p: Option<MinP>,
    pub repetition_penalty: Option<RepetitionPenalty>,
    /// Goes on behind the model's end tokens.
    pub ignore_eos: Option<bool>,
    pub min_tokens: Option<MinTokens>,
    pub stop_token_ids: Option<StopTokens>,
    /// Variables of the chat template, such as `enable_thinking`.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// False.
#[derive(Clone, Copy, Debug)]
pub struct Never;

impl<'de> Deserialize<'de> for Never {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Never, D::Error> {
        match bool::deserialize(deserializer)? {
            false => Ok(Never),
            true => Err(serde::de::Error::custom("true is not supported; leave it out")),
        }
    }
}

impl utoipa::PartialSchema for Never {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::SchemaType::new(
                utoipa::openapi::schema::Type::Boolean,
            ))
            .enum_values(Some([false]))
            .into()
    }
}

impl ToSchema for Never {}

/// A turn of the conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self", tag = "role", rename_all = "lowercase", deny_unknown_fields)]
pub enum Message {
    System {
        content: Content,
        name: Option<String>,
    },
    /// What newer models call the system's message; templates get it as `system`.
    Developer {
        content: Content,
        name: Option<String>,
    },
    User {
        content: Content,
        name: Option<String>,
    },
    Assistant {
        content: Option<Content>,
        name: Option<String>,
        refusal: Option<String>,
        reasoning_content: Option<String>,
        #[schema(max_items = 128)]
        tool_calls: Option<Vec<GivenToolCall>>,
    },
    /// What a tool said.
    Tool {
        content: Content,
        tool_call_id: String,
    },
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Message, D::Error> {
        Message::deserialize(tagged(deserializer, "role")?).map_err(D::Error::custom)
    }
}

/// A call that an earlier answer made.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GivenToolCall {
    pub id: String,
    #[serde(rename = "type")]
    #[schema(value_type = FunctionKind)]
    pub kind: FunctionKind,
    pub function: GivenFunctionCall,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GivenFunctionCall {
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// The only kind of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FunctionKind {
    Function,
}

/// A function that the answer may call.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    #[serde(rename = "type")]
    #[schema(value_type = FunctionKind)]
    pub kind: FunctionKind,
    pub function: Function,
}

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Function {
    #[schema(pattern = "^[A-Za-z0-9_-]{1,64}$")]
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The JSON schema of the arguments.
    #[schema(value_type = Option<Object>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Map<String, Value>>,
    /// Holds the arguments to the schema where the call is required.
    #[serde(skip_serializing)]
    pub strict: Option<bool>,
}

/// Whether the answer calls tools.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected none, auto, required or a function by its name")]
pub enum ToolChoice {
    Mode(ToolMode),
    Named(NamedTool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ToolMode {
    None,
    Auto,
    Required,
}

/// The one tool that the answer calls.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NamedTool {
    #[serde(rename = "type")]
    #[schema(value_type = FunctionKind)]
    pub _kind: FunctionKind,
    pub function: FunctionName,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FunctionName {
    pub name: String,
}

/// What an answer is held to.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self", tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    // NOTE: of a variant without braces serde would ignore unknown fields.
    Text {},
    /// Any JSON object.
    JsonObject {},
    /// JSON that a schema accepts.
    JsonSchema {
        json_schema: JsonSchema,
    },
    /// Text that a regular expression matches as a whole.
    Regex {
        regex: String,
    },
    /// Text that the rule `start` of a Lark grammar derives.
    Grammar {
        grammar: String,
    },
}

impl<'de> Deserialize<'de> for ResponseFormat {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ResponseFormat, D::Error> {
        ResponseFormat::deserialize(tagged(deserializer, "type")?).map_err(D::Error::custom)
    }
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JsonSchema {
    /// Not looked at.
    pub name: String,
    /// Not looked at.
    pub description: Option<String>,
    /// Any JSON object where it is absent.
    #[schema(value_type = Option<Object>)]
    pub schema: Option<Map<String, Value>>,
    /// Not looked at: answers are always held to the schema.
    pub strict: Option<bool>,
}

/// Answers to a conversation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatResponse {
    pub id: String,
    /// `chat.completion`
    pub object: &'static str,
    /// Seconds of the Unix epoch.
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    /// Equal fingerprints and seeds give equal answers.
    pub system_fingerprint: String,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: Answer,
    pub logprobs: Option<Logprobs>,
    pub finish_reason: ChatFinish,
}

/// The message that the model wrote.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Answer {
    /// `assistant`
    pub role: &'static str,
    pub content: Option<String>,
    pub refusal: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning_content: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ToolCall {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: FunctionKind,
    pub function: FunctionCall,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct FunctionCall {
    pub name: String,
    /// JSON text, as the model wrote it.
    pub arguments: String,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChatFinish {
    /// An end token, a stop string or the end of what the answer is held to.
    Stop,
    /// As many tokens as were asked for, or the end of the context.
    Length,
    /// The answer calls tools.
    ToolCalls,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Logprobs {
    pub content: Vec<ChatLogprob>,
    /// Models here do not mark refusals.
    pub refusal: Option<Vec<ChatLogprob>>,
}

/// A token of the answer, and those that could have come in its place.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatLogprob {
    #[serde(flatten)]
    pub token: TokenLogprob,
    pub top_logprobs: Vec<TokenLogprob>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// The token's text; U+FFFD where it is a part of a character.
    pub token: String,
    /// Under the model's own distribution; -9999 for what it excludes.
    pub logprob: f32,
    /// The token's bytes; null for special tokens.
    pub bytes: Option<Vec<u8>>,
}

/// An event of a stream.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChunk<'a> {
    pub id: &'a str,
    /// `chat.completion.chunk`
    pub object: &'static str,
    /// Seconds of the Unix epoch.
    pub created: u64,
    pub model: &'a str,
    pub system_fingerprint: &'a str,
    /// None in the last chunk, where it has the usage.
    pub choices: Vec<ChunkChoice>,
    /// Where it was asked for: null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChunkChoice {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<Logprobs>,
    pub finish_reason: Option<ChatFinish>,
}

/// What is new of a message.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
}

/// What is new of a call. Its id, kind and name come first and once.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ToolCallDelta {
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<FunctionKind>,
    pub function: FunctionCallDelta,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct FunctionCallDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub arguments: String,
}
