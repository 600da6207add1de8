//! `/v1/completions`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::number::{
    MaxTokens, MinP, MinTokens, NumChoices, NumLogprobs, Penalty, RepetitionPenalty, Seed,
    Temperature, TopK, TopP,
};
use super::sampling::{LogitBias, StopTokens};
use super::text::{Prompt, Stop};
use super::{StreamOptions, Usage};

/// Texts to be continued. Fields that are null are absent.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompletionRequest {
    /// The name of the model, as in `/v1/models`.
    pub model: String,
    pub prompt: Prompt,
    /// 16 where it is absent.
    pub max_tokens: Option<MaxTokens>,
    /// 1 where it is absent.
    pub temperature: Option<Temperature>,
    pub top_p: Option<TopP>,
    /// Answers to each prompt.
    pub n: Option<NumChoices>,
    /// How many answers are generated, of which the `n` likeliest are given; `n` where it is
    /// absent, and in streams.
    pub best_of: Option<NumChoices>,
    /// Puts the prompt before the answer.
    pub echo: Option<bool>,
    pub stop: Option<Stop>,
    pub stream: Option<bool>,
    /// For streams alone.
    pub stream_options: Option<StreamOptions>,
    /// Random where it is absent.
    pub seed: Option<Seed>,
    /// How many of the likeliest tokens are listed at each place.
    pub logprobs: Option<NumLogprobs>,
    pub logit_bias: Option<LogitBias>,
    pub presence_penalty: Option<Penalty>,
    pub frequency_penalty: Option<Penalty>,
    /// Not looked at.
    pub user: Option<String>,
    pub top_k: Option<TopK>,
    pub min_p: Option<MinP>,
    pub repetition_penalty: Option<RepetitionPenalty>,
    /// Goes on behind the model's end tokens.
    pub ignore_eos: Option<bool>,
    pub min_tokens: Option<MinTokens>,
    pub stop_token_ids: Option<StopTokens>,
}

/// Answers, or an event of a stream of them.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionResponse<'a> {
    pub id: &'a str,
    /// `text_completion`
    pub object: &'static str,
    /// Seconds of the Unix epoch.
    pub created: u64,
    pub model: &'a str,
    /// Equal fingerprints and seeds give equal answers.
    pub system_fingerprint: &'a str,
    pub choices: Vec<CompletionChoice>,
    /// In streams only where it was asked for: null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Answers of the first prompt come first.
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null while the answer goes on.
    pub finish_reason: Option<&'static str>,
}

/// One entry for each token of the text.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for tokens of the prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens and the token itself, by their text; null for tokens of the prompt.
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<serde_json::Map<String, serde_json::Value>>>,
    /// Where the token begins in the text, in characters.
    pub text_offset: Vec<usize>,
}
