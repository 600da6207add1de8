//! `/v1/encode` and `/v1/decode`: text to tokens and back. `/v1/embeddings` says that it is not
//! there.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::Value;

use super::app::App;
use super::chat::check_len;
use super::error::ApiError;
use super::json::ApiJson;
use super::language::{Language, chat_options};
use super::openai::text::PROMPTS_MAX;
use super::openai::tokens::{
    DecodeRequest, DecodeResponse, EmbeddingsRequest, EncodeRequest, EncodeResponse, Lengths,
    Texts, TokenLists,
};
use super::workers::Work;
use super::{Access, Route};
use crate::tokenizer::SpecialTokens;
use crate::tokenizer::chat::Message;

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::new("/v1/encode", Access::Key).post(encode),
        Route::new("/v1/decode", Access::Key).post(decode),
        Route::new("/v1/embeddings", Access::Key).post(embed),
    ]
}

/// Turns text into tokens.
#[utoipa::path(
    post,
    path = "/v1/encode",
    tag = "Tokens",
    request_body = EncodeRequest,
    responses((status = 200, description = "The tokens", body = EncodeResponse),
        super::openapi::BodyErrors)
)]
pub(super) async fn encode(
    State(app): State<Arc<App>>,
    ApiJson(request): ApiJson<EncodeRequest>,
) -> Result<Json<EncodeResponse>, ApiError> {
    let EncodeRequest { input, do_preprocess, add_bos } = request;
    if let Texts::Several(texts) = &input {
        check_len("input", texts.len(), 1..=PROMPTS_MAX)?;
    }
    let is_chat = do_preprocess.unwrap_or(false);
    let special = match add_bos.unwrap_or(true) {
        true => SpecialTokens::Add,
        false => SpecialTokens::Omit,
    };
    let language = Arc::clone(&app.language);
    let encode = move |text: String| encode_text(&language, text, is_chat, special);
    let encoding = move || match input {
        Texts::One(text) => {
            let ids = encode(text)?;
            Ok(EncodeResponse { length: Lengths::One(ids.len()), input_ids: TokenLists::One(ids) })
        }
        Texts::Several(texts) => {
            let lists: Vec<Vec<u32>> = texts.into_iter().map(encode).collect::<Result<_, _>>()?;
            let lens = lists.iter().map(Vec::len).collect();
            let length = Lengths::Several(lens);
            Ok(EncodeResponse { length, input_ids: TokenLists::Several(lists) })
        }
    };
    app.workers.run(Work::Tokenize, encoding).await.map(Json)
}

fn encode_text(
    language: &Language,
    text: String,
    is_chat: bool,
    special: SpecialTokens,
) -> Result<Vec<u32>, ApiError> {
    match is_chat {
        true => Ok(language.render(&[Message::new("user", text)], &chat_options())?.ids),
        false => Ok(language.tokenizer.encode(&text, special)?),
    }
}

/// Turns tokens into text.
#[utoipa::path(
    post,
    path = "/v1/decode",
    tag = "Tokens",
    request_body = DecodeRequest,
    responses((status = 200, description = "The text", body = DecodeResponse),
        super::openapi::BodyErrors)
)]
pub(super) async fn decode(
    State(app): State<Arc<App>>,
    ApiJson(DecodeRequest { ids }): ApiJson<DecodeRequest>,
) -> Result<Json<DecodeResponse>, ApiError> {
    let ids: Vec<u32> = ids.into_iter().map(|id| id.get() as u32).collect();
    let vocab_size = app.model.vocab_size;
    if let Some(idx) = ids.iter().position(|id| *id as usize >= vocab_size) {
        let message =
            format!("ids: token id {} is outside the vocabulary of {vocab_size} tokens", ids[idx]);
        return Err(ApiError::bad_request(format!("ids[{idx}]"), message));
    }
    let tokenizer = Arc::clone(&app.language.tokenizer);
    let decoding = move || Ok(DecodeResponse { text: tokenizer.decode(&ids)? });
    app.workers.run(Work::Tokenize, decoding).await.map(Json)
}

/// Is not supported: this server has models that write text.
#[utoipa::path(
    post,
    path = "/v1/embeddings",
    tag = "OpenAI",
    request_body = EmbeddingsRequest,
    responses(super::openapi::BodyErrors)
)]
pub(super) async fn embed(_request: ApiJson<EmbeddingsRequest>) -> Result<Json<Value>, ApiError> {
    let message = "embeddings are not supported; this server has models that write text";
    Err(ApiError::bad_request(None, message).with_code("unsupported_endpoint"))
}
