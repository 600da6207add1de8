//! `/v1/chat/interactive`: conversations that the engine keeps, as LMDeploy's.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::chat::{MESSAGES_MAX, Message};
use super::number::{MaxTokens, MinP, RepetitionPenalty, Seed, Temperature, TopK, TopP};
use super::text::{Stop, one_of, string};

/// The next turn of a conversation. Fields that are null are absent.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InteractiveRequest {
    /// What the user says, or the messages of the turn. It is not looked at where `cancel` is true.
    pub prompt: TurnPrompt,
    /// The conversation; -1 begins one, and so does a name that is not known.
    pub session_id: Option<SessionName>,
    /// Keeps the conversation for the next turn; false where it is absent.
    pub interactive_mode: Option<bool>,
    pub stream: Option<bool>,
    pub stop: Option<Stop>,
    /// 512 where it is absent.
    pub request_output_len: Option<MaxTokens>,
    /// 0.8 where it is absent.
    pub top_p: Option<TopP>,
    /// 40 where it is absent.
    pub top_k: Option<TopK>,
    pub min_p: Option<MinP>,
    /// 0.8 where it is absent.
    pub temperature: Option<Temperature>,
    pub repetition_penalty: Option<RepetitionPenalty>,
    /// Random where it is absent.
    pub seed: Option<Seed>,
    /// Goes on behind the model's end tokens.
    pub ignore_eos: Option<bool>,
    /// Stops the answer that runs in this conversation, and does nothing else.
    pub cancel: Option<bool>,
}

/// What a turn says.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of messages")]
pub enum TurnPrompt {
    Text(String),
    Messages(Vec<Message>),
}

impl PartialSchema for TurnPrompt {
    fn schema() -> RefOr<Schema> {
        let messages = ArrayBuilder::new()
            .items(Ref::from_schema_name("Message"))
            .min_items(Some(1))
            .max_items(Some(MESSAGES_MAX));
        one_of("What a turn says.").item(string()).item(messages).into()
    }
}

impl ToSchema for TurnPrompt {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push(("Message".to_owned(), Message::schema()));
        Message::schemas(schemas);
    }
}

/// A conversation's name: a number of at least 0, or 1 to 64 letters, digits, `-`, `_` and `.`,
/// the first one no `.`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionName {
    /// -1
    New,
    Named(String),
}

impl<'de> Deserialize<'de> for SessionName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SessionName, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = SessionName;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(
                    "-1, a whole number of at least 0, or a name of 1 to 64 letters, digits, '-', \
                     '_' and '.', the first one no '.'",
                )
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<SessionName, E> {
                match value {
                    -1 => Ok(SessionName::New),
                    0.. => Ok(SessionName::Named(value.to_string())),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Signed(value), &self)),
                }
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<SessionName, E> {
                match i64::try_from(value) {
                    Ok(value) => self.visit_i64(value),
                    Err(_) => Err(E::invalid_value(serde::de::Unexpected::Unsigned(value), &self)),
                }
            }

            /// JSON does not tell 1.0 from 1.
            fn visit_f64<E: Error>(self, value: f64) -> Result<SessionName, E> {
                // NOTE: as for other numbers.
                let limit = 9_007_199_254_740_992.0;
                match value.fract() == 0.0 && (-1.0..=limit).contains(&value) {
                    true => self.visit_i64(value as i64),
                    false => Err(E::invalid_value(serde::de::Unexpected::Float(value), &self)),
                }
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<SessionName, E> {
                let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
                let is_sound = (1..=64).contains(&value.len())
                    && value.chars().all(is_allowed)
                    && !value.starts_with('.');
                match is_sound {
                    true => Ok(SessionName::Named(value.to_owned())),
                    false => Err(E::invalid_value(serde::de::Unexpected::Str(value), &self)),
                }
            }
        }

        deserializer.deserialize_any(Name)
    }
}

impl PartialSchema for SessionName {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new()
            .schema_type(SchemaType::new(Type::Integer))
            .minimum(Some(-1))
            .maximum(Some(i64::MAX));
        let name = string().pattern(Some("^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$"));
        one_of("A conversation's name; -1 begins one.").item(number).item(name).into()
    }
}

impl ToSchema for SessionName {}

/// An answer, or an event of a stream of them.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct InteractiveResponse {
    /// In a stream: what is new.
    pub text: String,
    /// Tokens of the answer so far.
    pub tokens: usize,
    /// Tokens of the turn's prompt.
    pub input_tokens: usize,
    /// Tokens of the conversation before the turn.
    pub history_tokens: usize,
    /// `stop` or `length`; null while the answer goes on.
    pub finish_reason: Option<&'static str>,
    pub session_id: String,
}
