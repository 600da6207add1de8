//! Errors as OpenAI's clients know them.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::Error;

/// What became of a request that failed. Messages are for the client: no paths, no internals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub code: Option<&'static str>,
    /// The field that is wrong, as `messages[0].role`.
    pub param: Option<String>,
    pub message: String,
    pub retry_after: Option<Duration>,
    /// What OpenAI's clients are told in `x-should-retry`; `None` leaves it to the status.
    pub should_retry: Option<bool>,
}

/// The body of every answer that is no success.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorResponse {
    pub error: ErrorDetail,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// What is wrong, which value, and what to do.
    pub message: String,
    /// The class of the error, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// A name that does not change.
    pub code: Option<String>,
}

const INVALID_REQUEST: &str = "invalid_request_error";
const SERVER_ERROR: &str = "server_error";

/// Bounds of what `Retry-After` says.
const RETRY_SECONDS: std::ops::RangeInclusive<u64> = 1..=30;

impl ApiError {
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            kind,
            code: None,
            param: None,
            message: message.into(),
            retry_after: None,
            should_retry: None,
        }
    }

    /// 400: the request is wrong, and stays wrong. `param` names the field.
    pub fn bad_request(param: impl Into<Option<String>>, message: impl Into<String>) -> ApiError {
        ApiError {
            param: param.into(),
            should_retry: Some(false),
            ..ApiError::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message)
        }
    }

    /// 400: more tokens than the model's context has.
    pub fn context_length(
        param: impl Into<Option<String>>,
        message: impl Into<String>,
    ) -> ApiError {
        ApiError { code: Some("context_length_exceeded"), ..ApiError::bad_request(param, message) }
    }

    /// 401: no key, or one that is not known.
    pub fn unauthorized() -> ApiError {
        ApiError {
            code: Some("invalid_api_key"),
            should_retry: Some(false),
            ..ApiError::new(
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "no valid API key; send one as `Authorization: Bearer KEY`",
            )
        }
    }

    pub fn not_found(message: impl Into<String>) -> ApiError {
        ApiError {
            code: Some("not_found"),
            should_retry: Some(false),
            ..ApiError::new(StatusCode::NOT_FOUND, "not_found_error", message)
        }
    }

    pub fn method_not_allowed() -> ApiError {
        let message = "this path does not answer to this method; see the header Allow";
        ApiError {
            code: Some("method_not_allowed"),
            ..ApiError::client(StatusCode::METHOD_NOT_ALLOWED, message)
        }
    }

    /// 408: the body did not come in time.
    pub fn body_timeout() -> ApiError {
        let message = "the body of the request did not arrive in time; send it faster";
        ApiError {
            code: Some("request_timeout"),
            should_retry: Some(true),
            ..ApiError::client(StatusCode::REQUEST_TIMEOUT, message)
        }
    }

    /// 409: what the request needs is in use, or exists already.
    pub fn conflict(message: impl Into<String>) -> ApiError {
        ApiError {
            code: Some("conflict"),
            should_retry: Some(false),
            ..ApiError::new(StatusCode::CONFLICT, "conflict_error", message)
        }
    }

    pub fn body_too_large(bytes_max: usize) -> ApiError {
        let message = format!("the body has more than {bytes_max} bytes; send less");
        ApiError {
            code: Some("request_too_large"),
            ..ApiError::client(StatusCode::PAYLOAD_TOO_LARGE, message)
        }
    }

    pub fn unsupported_media_type() -> ApiError {
        let message = "the body must be JSON; send it as `Content-Type: application/json`";
        ApiError {
            code: Some("unsupported_media_type"),
            ..ApiError::client(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
        }
    }

    /// 421: a name that this server does not go by.
    pub fn misdirected() -> ApiError {
        let message = "this server answers to localhost; add other names with --allow-host";
        ApiError {
            code: Some("misdirected_request"),
            ..ApiError::client(StatusCode::MISDIRECTED_REQUEST, message)
        }
    }

    /// 429: too much waits already.
    pub fn overloaded(retry_after: Duration) -> ApiError {
        ApiError {
            code: Some("overloaded"),
            retry_after: Some(retry_after),
            ..ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                "too many requests wait already; try again later",
            )
        }
    }

    /// 503: the server ends.
    pub fn draining() -> ApiError {
        let message = "the server takes no more requests, because it was told to stop";
        ApiError::unavailable("draining", message)
    }

    /// 503 for any other reason that time may mend.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            code: Some(code),
            retry_after: Some(Duration::from_secs(5)),
            ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, message)
        }
    }

    /// 500: a bug. What it was is in the log, not in the answer.
    pub fn internal() -> ApiError {
        ApiError {
            code: Some("internal_error"),
            ..ApiError::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                SERVER_ERROR,
                "the server failed over this request; this is a bug",
            )
        }
    }

    /// What the request did wrong, apart from its content.
    fn client(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { should_retry: Some(false), ..ApiError::new(status, INVALID_REQUEST, message) }
    }

    /// The same about the field `param`.
    pub fn with_param(self, param: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..self }
    }

    pub fn with_message(self, message: impl Into<String>) -> ApiError {
        ApiError { message: message.into(), ..self }
    }

    pub fn with_code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    /// The body: also what a stream ends with where it fails.
    pub fn body(&self) -> ErrorResponse {
        ErrorResponse {
            error: ErrorDetail {
                message: self.message.clone(),
                kind: self.kind.to_owned(),
                param: self.param.clone(),
                code: self.code.map(str::to_owned),
            },
        }
    }
}

/// What the engine refuses is the request's fault; of everything else the client learns no details.
impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        match error {
            Error::Request(message) | Error::Unsupported(message) => {
                ApiError::bad_request(None, message)
            }
            Error::Busy(message) => ApiError::conflict(message),
            Error::Engine(_) => {
                ApiError::unavailable("engine_unavailable", "the engine does not run any more")
            }
            Error::Resources(_) => {
                let message = "the server is short of memory or disk; try again later";
                ApiError::unavailable("out_of_resources", message)
            }
            Error::Model { .. }
            | Error::MissingKernels { .. }
            | Error::Download(_)
            | Error::Io { .. }
            | Error::KernelGen(_) => {
                tracing::error!(%error, "request failed");
                ApiError::internal()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(time) = self.retry_after {
            let seconds = time.as_secs_f64().ceil() as u64;
            let seconds = seconds.clamp(*RETRY_SECONDS.start(), *RETRY_SECONDS.end());
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(should_retry) = self.should_retry {
            let value = if should_retry { "true" } else { "false" };
            headers.insert("x-should-retry", HeaderValue::from_static(value));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
