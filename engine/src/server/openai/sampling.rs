//! The fields of all requests that say how tokens are chosen and when an answer ends.

use std::collections::BTreeMap;

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::number::{
    Bias, MinP, MinTokens, Penalty, RepetitionPenalty, Seed, Temperature, TokenId, TopK, TopP,
};
use super::text::{Stop, string};
use crate::request::Request;
use crate::sampling::{LOGIT_BIAS_MAX, SamplingParams};
use crate::server::ApiError;

/// Most stop tokens of a request.
pub const STOP_TOKENS_MAX: usize = 64;

/// How tokens are chosen, as requests of OpenAI's API say it; what is absent has the API's default.
#[derive(Clone, Debug, Default)]
pub struct Sampling {
    pub temperature: Option<Temperature>,
    pub top_p: Option<TopP>,
    pub top_k: Option<TopK>,
    pub min_p: Option<MinP>,
    pub presence_penalty: Option<Penalty>,
    pub frequency_penalty: Option<Penalty>,
    pub repetition_penalty: Option<RepetitionPenalty>,
    pub logit_bias: Option<LogitBias>,
    pub seed: Option<Seed>,
    pub min_tokens: Option<MinTokens>,
    pub num_top_logprobs: usize,
}

impl Sampling {
    pub fn params(self) -> Result<SamplingParams, ApiError> {
        let top_p = self.top_p.map_or(1.0, TopP::get);
        Ok(SamplingParams {
            temperature: self.temperature.map_or(1.0, Temperature::get),
            top_k: self.top_k.map_or(0, |top_k| usize::try_from(top_k.get()).unwrap_or(0)),
            // NOTE: the likeliest token is kept in any case, so that 0 keeps it alone.
            top_p: top_p.max(f32::MIN_POSITIVE),
            min_p: self.min_p.map_or(0.0, MinP::get),
            repetition_penalty: self.repetition_penalty.map_or(1.0, RepetitionPenalty::get),
            presence_penalty: self.presence_penalty.map_or(0.0, Penalty::get),
            frequency_penalty: self.frequency_penalty.map_or(0.0, Penalty::get),
            logit_bias: self.logit_bias.unwrap_or_default().0,
            min_tokens: self.min_tokens.map_or(0, |num| num.get() as usize),
            num_top_logprobs: self.num_top_logprobs,
            seed: match self.seed {
                Some(seed) => seed.get() as u64,
                None => random()?,
            },
            ..SamplingParams::default()
        })
    }
}

/// Biases of tokens, by their ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogitBias(pub Vec<(u32, f32)>);

/// Ids as JSON's keys: "07" and "+7" are 7 to a parser, and would name one token twice.
const TOKEN_ID_PATTERN: &str = "^(0|[1-9][0-9]{0,8})$";

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LogitBias, D::Error> {
        let biases = BTreeMap::<String, Bias>::deserialize(deserializer)?;
        if biases.len() > LOGIT_BIAS_MAX {
            let message = format!("{} entries, at most {LOGIT_BIAS_MAX}", biases.len());
            return Err(D::Error::custom(message));
        }
        let bias = |(key, bias): (String, Bias)| match key.parse::<u32>() {
            Ok(token) if token.to_string() == key && key.len() <= 9 => Ok((token, bias.get())),
            _ => Err(D::Error::custom(format!("{key:?} is no token id"))),
        };
        biases.into_iter().map(bias).collect::<Result<_, _>>().map(LogitBias)
    }
}

impl PartialSchema for LogitBias {
    fn schema() -> RefOr<Schema> {
        let id = string().pattern(Some(TOKEN_ID_PATTERN)).build();
        ObjectBuilder::new()
            .property_names(Some(Schema::Object(id)))
            .additional_properties(Some(Ref::from_schema_name("Bias")))
            .max_properties(Some(LOGIT_BIAS_MAX))
            .description(Some("Added to the logits of tokens, by the tokens' ids."))
            .into()
    }
}

impl ToSchema for LogitBias {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push(("Bias".to_owned(), Bias::schema()));
    }
}

/// 64 random bits.
pub fn random() -> Result<u64, ApiError> {
    getrandom::u64().map_err(|error| {
        tracing::error!(%error, "the system has no random numbers");
        ApiError::internal()
    })
}

/// 128 random bits in hexadecimal behind `prefix`.
pub fn random_id(prefix: &str) -> Result<String, ApiError> {
    Ok(format!("{prefix}{:016x}{:016x}", random()?, random()?))
}

/// When an answer ends.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<StopTokens>,
    pub ignore_eos: Option<bool>,
}

/// Tokens that end the answer, which does not have them.
#[derive(Clone, Debug, Default)]
pub struct StopTokens(pub Vec<u32>);

impl<'de> Deserialize<'de> for StopTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<StopTokens, D::Error> {
        let ids = Vec::<TokenId>::deserialize(deserializer)?;
        match ids.len() > STOP_TOKENS_MAX {
            true => Err(D::Error::custom(format!(
                "{} stop tokens, at most {STOP_TOKENS_MAX}",
                ids.len()
            ))),
            false => Ok(StopTokens(ids.into_iter().map(|id| id.get() as u32).collect())),
        }
    }
}

impl PartialSchema for StopTokens {
    fn schema() -> RefOr<Schema> {
        ArrayBuilder::new()
            .items(Ref::from_schema_name("TokenId"))
            .max_items(Some(STOP_TOKENS_MAX))
            .description(Some("Tokens that end the answer, which does not have them."))
            .into()
    }
}

impl ToSchema for StopTokens {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push(("TokenId".to_owned(), TokenId::schema()));
    }
}

impl Ending {
    /// Puts the conditions into a request.
    pub fn apply(self, request: &mut Request) {
        request.stop_strings = self.stop.unwrap_or_default().0;
        request.stop_token_ids = self.stop_token_ids.unwrap_or_default().0;
        request.ignore_eos = self.ignore_eos.unwrap_or(false);
    }
}
