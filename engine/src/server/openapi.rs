//! `/openapi.json`: the description of the API that its types give. The page `/docs` shows it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{IntoResponses, Modify, OpenApi};

use super::app::App;
use super::error::ErrorResponse;
use super::{Access, Route};

pub(super) fn routes() -> Vec<Route> {
    vec![Route::new("/openapi.json", Access::Key).get(serve)]
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Bespoke",
        description = "OpenAI's API for text, LMDeploy's conversations, and tokens.",
    ),
    paths(
        super::chat::chat,
        super::completions::complete,
        super::models::list_models,
        super::models::get_model,
        super::interactive::converse,
        super::sessions::list_sessions,
        super::sessions::get_session,
        super::sessions::delete_session,
        super::sessions::rewind_session,
        super::sessions::branch_session,
        super::tokens::encode,
        super::tokens::decode,
        super::tokens::embed,
    ),
    components(schemas(ErrorResponse)),
    security(("key" = [])),
    modifiers(&Key),
)]
struct Api;

struct Key;

impl Modify for Key {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let key = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components = api.components.get_or_insert_default();
        components.add_security_scheme("key", key);
    }
}

macro_rules! errors {
    ($(#[doc = $doc:literal])* $name:ident {
        $($variant:ident = $status:literal: $description:literal,)*
    }) => {
        $(#[doc = $doc])*
        #[derive(IntoResponses)]
        #[allow(dead_code, reason = "a list for the description of the API")]
        pub(super) enum $name {
            $(
                #[response(status = $status, description = $description)]
                $variant(ErrorResponse),
            )*
        }
    };
}

errors!(
    /// Of every route.
    Errors {
        Invalid = 400: "The request is wrong; `param` names the field",
        Unauthorized = 401: "No valid key",
        Misdirected = 421: "The server does not go by this name",
        Overloaded = 429: "Too much waits already; see `Retry-After`",
        HeadTooLarge = 431: "The head of the request is too large",
        Internal = 500: "A bug",
        Unavailable = 503: "The server ends, or is short of something; see `Retry-After`",
    }
);

errors!(
    /// Of routes that read a body.
    BodyErrors {
        Invalid = 400: "The request is wrong; `param` names the field",
        Unauthorized = 401: "No valid key",
        TimedOut = 408: "The body did not arrive in time",
        TooLarge = 413: "The body is too large",
        NotJson = 415: "The body is no JSON",
        Misdirected = 421: "The server does not go by this name",
        Overloaded = 429: "Too much waits already; see `Retry-After`",
        HeadTooLarge = 431: "The head of the request is too large",
        Internal = 500: "A bug",
        Unavailable = 503: "The server ends, or is short of something; see `Retry-After`",
    }
);

errors!(
    /// Of routes that generate.
    GenerationErrors {
        Invalid = 400: "The request is wrong; `param` names the field",
        Unauthorized = 401: "No valid key",
        NotFound = 404: "There is no such model",
        TimedOut = 408: "The body did not arrive in time",
        Conflict = 409: "The session has a request running",
        TooLarge = 413: "The body is too large",
        NotJson = 415: "The body is no JSON",
        Misdirected = 421: "The server does not go by this name",
        Overloaded = 429: "Too much waits already; see `Retry-After`",
        HeadTooLarge = 431: "The head of the request is too large",
        Internal = 500: "A bug, or a model whose logits are not finite",
        Unavailable = 503: "The server ends, or is short of something; see `Retry-After`",
    }
);

errors!(
    NotFound {
        NotFound = 404: "There is none of this name",
    }
);

errors!(
    NotFoundOrBusy {
        NotFound = 404: "There is no such session",
        Conflict = 409: "The session has a request running, or its name is taken",
    }
);

/// The description of the API of a server of this model.
pub(super) fn description(app: &App) -> Value {
    let mut api = serde_json::to_value(Api::openapi()).unwrap_or_default();
    let schemas = &mut api["components"]["schemas"];
    schemas["TokenId"]["maximum"] = json!(app.model.vocab_size.saturating_sub(1));
    for request in ["ChatRequest", "CompletionRequest"] {
        schemas[request]["properties"]["model"]["enum"] = json!([app.model.name]);
    }
    // NOTE: utoipa does not say of variants that they deny unknown fields.
    for tagged in ["Message", "ResponseFormat"] {
        for variant in schemas[tagged]["oneOf"].as_array_mut().into_iter().flatten() {
            variant["additionalProperties"] = json!(false);
        }
    }
    api
}

/// Describes the API.
async fn serve(State(app): State<Arc<App>>) -> Json<Value> {
    Json(description(&app))
}
