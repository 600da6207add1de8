//! `/v1/models`: the one model that is served.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::app::App;
use super::error::ApiError;
use super::openai::models::{Model, ModelList};
use super::sessions::Name;
use super::{Access, Route};
use crate::request::Request;

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::new("/v1/models", Access::Key).get(list_models),
        Route::new("/v1/models/{id}", Access::Key).get(get_model),
    ]
}

/// Lists the models.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "OpenAI",
    responses((status = 200, description = "The models", body = ModelList), super::openapi::Errors)
)]
pub(super) async fn list_models(State(app): State<Arc<App>>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![app.model_card()] })
}

/// Describes a model.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    tag = "OpenAI",
    params(("id" = String, Path, description = "The model's name")),
    responses(
        (status = 200, description = "The model", body = Model),
        super::openapi::Errors,
        super::openapi::NotFound,
    )
)]
pub(super) async fn get_model(
    State(app): State<Arc<App>>,
    Name(id): Name,
) -> Result<Json<Model>, ApiError> {
    app.check_model(&id)?;
    Ok(Json(app.model_card()))
}

impl App {
    fn model_card(&self) -> Model {
        Model {
            id: self.model.name.clone(),
            object: "model",
            created: self.model.created,
            owned_by: "bespoke",
            max_model_len: self.model.max_context,
        }
    }

    /// Refuses a model that is not served.
    pub(super) fn check_model(&self, name: &str) -> Result<(), ApiError> {
        match name == self.model.name {
            true => Ok(()),
            false => {
                let message =
                    format!("there is no model {name:?}; this server serves {:?}", self.model.name);
                Err(ApiError::not_found(message).with_param("model").with_code("model_not_found"))
            }
        }
    }

    /// Refuses tokens that the model does not have.
    pub(super) fn check_tokens(&self, request: &Request) -> Result<(), ApiError> {
        let vocab_size = self.model.vocab_size;
        let biased = request.sampling.logit_bias.iter().map(|(id, _)| ("logit_bias", *id));
        let stops = request.stop_token_ids.iter().map(|id| ("stop_token_ids", *id));
        match biased.chain(stops).find(|(_, id)| *id as usize >= vocab_size) {
            None => Ok(()),
            Some((param, id)) => {
                let message = format!(
                    "{param}: token id {id} is outside the vocabulary of {vocab_size} tokens"
                );
                Err(ApiError::bad_request(param.to_owned(), message))
            }
        }
    }

    /// Refuses a prompt that leaves no room for an answer.
    pub(super) fn check_prompt_len(&self, len: usize, param: &str) -> Result<(), ApiError> {
        let max_context = self.model.max_context;
        match len {
            0 => {
                let message = format!("{param}: it makes no token; say something");
                Err(ApiError::bad_request(param.to_owned(), message))
            }
            _ if len < max_context => Ok(()),
            _ => {
                let message = format!(
                    "{param}: {len} tokens; the context of {max_context} leaves no room for an \
                     answer, shorten it"
                );
                Err(ApiError::context_length(param.to_owned(), message))
            }
        }
    }
}
