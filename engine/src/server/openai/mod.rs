//! Requests and answers as OpenAI's and LMDeploy's clients write and read them.
//!
//! A request that parses is within all bounds that its schema shows: numbers are types with bounds
//! ([`number`]), texts are checked while they are read ([`text`]), unknown fields are refused.

pub mod chat;
pub mod completions;
pub mod interactive;
pub mod models;
pub mod number;
pub mod sampling;
pub mod sessions;
pub mod text;
pub mod tokens;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::error::ApiError;

/// What a stream tells besides its tokens.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// The last chunk has the counts of tokens and no choices.
    pub include_usage: Option<bool>,
}

impl StreamOptions {
    /// Whether the stream ends with the counts of tokens; refused where there is no stream.
    pub(super) fn includes_usage(
        options: Option<StreamOptions>,
        is_stream: bool,
    ) -> Result<bool, ApiError> {
        match options {
            Some(_) if !is_stream => Err(ApiError::bad_request(
                "stream_options".to_owned(),
                "stream_options needs stream to be true",
            )),
            options => Ok(options.and_then(|options| options.include_usage).unwrap_or(false)),
        }
    }
}

/// An object that its field `tag` gives a type. That is a text: serde would take the number of a
/// variant as well.
fn tagged<'de, D: Deserializer<'de>>(deserializer: D, tag: &str) -> Result<Value, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match value.get(tag) {
        Some(kind) if !kind.is_string() => {
            Err(D::Error::custom(format!("{tag} is {kind}, it must be a string")))
        }
        _ => Ok(value),
    }
}

/// Counts of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Of all choices.
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens of the prompt that were found in the KV cache.
    pub cached_tokens: usize,
}

impl Usage {
    pub fn new(num_prompt: usize, num_cached: usize, num_output: usize) -> Usage {
        Usage {
            prompt_tokens: num_prompt,
            completion_tokens: num_output,
            total_tokens: num_prompt + num_output,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: num_cached },
        }
    }
}
