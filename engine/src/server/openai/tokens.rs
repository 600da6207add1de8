//! `/v1/encode`, `/v1/decode`, and `/v1/embeddings`, which is not there.

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::ArrayBuilder;
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::number::{Dimensions, TokenId};
use super::text::{PROMPTS_MAX, Prompt, one_of, string};

/// Text to tokens.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EncodeRequest {
    pub input: Texts,
    /// Puts the text into the chat template, as a user's message.
    pub do_preprocess: Option<bool>,
    /// Adds the tokens that the tokenizer puts around a text, such as a BOS; true where it is
    /// absent. The chat template has its own.
    pub add_bos: Option<bool>,
}

/// A text or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum Texts {
    One(String),
    Several(Vec<String>),
}

impl PartialSchema for Texts {
    fn schema() -> RefOr<Schema> {
        let several = ArrayBuilder::new().items(string());
        let several = several.min_items(Some(1)).max_items(Some(PROMPTS_MAX));
        one_of("A text or several.").item(string()).item(several).into()
    }
}

impl ToSchema for Texts {}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EncodeResponse {
    pub input_ids: TokenLists,
    pub length: Lengths,
}

/// The tokens of a text, or of several.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum TokenLists {
    One(Vec<u32>),
    Several(Vec<Vec<u32>>),
}

impl PartialSchema for TokenLists {
    fn schema() -> RefOr<Schema> {
        let one = || ArrayBuilder::new().items(u32::schema());
        // NOTE: an empty list would be both.
        let several = ArrayBuilder::new().items(one()).min_items(Some(1));
        one_of("The tokens of a text, or of several.").item(one()).item(several).into()
    }
}

impl ToSchema for TokenLists {}

/// The number of tokens of a text, or of several.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Lengths {
    One(usize),
    Several(Vec<usize>),
}

/// Tokens to text.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DecodeRequest {
    /// Special tokens are no text. Bytes that are no UTF-8 become U+FFFD.
    pub ids: Vec<TokenId>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DecodeResponse {
    pub text: String,
}

/// A request that this server cannot serve; its fields are those of OpenAI's API.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "read to be refused")]
pub struct EmbeddingsRequest {
    pub model: String,
    pub input: Prompt,
    pub encoding_format: Option<String>,
    pub dimensions: Option<Dimensions>,
    pub user: Option<String>,
}
