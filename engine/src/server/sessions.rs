//! `/v1/sessions`: the caller's conversations that the engine keeps.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::{Extension, Json};

use super::app::App;
use super::auth::Caller;
use super::error::ApiError;
use super::json::ApiJson;
use super::openai::number::NumTokens;
use super::openai::sampling::random_id;
use super::openai::sessions::{BranchRequest, RewindRequest, Session, SessionDeleted, SessionList};
use super::{Access, Route};
use crate::engine::Engine;
use crate::handle::Cancellation;
use crate::session::SessionId;

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::new("/v1/sessions", Access::Key).get(list_sessions),
        Route::new("/v1/sessions/{id}", Access::Key).get(get_session).delete(delete_session),
        Route::new("/v1/sessions/{id}/rewind", Access::Key).post(rewind_session),
        Route::new("/v1/sessions/{id}/branch", Access::Key).post(branch_session),
    ]
}

/// The sessions that a request works on: each has one at a time.
#[derive(Clone, Default)]
pub struct Claims {
    claims: Arc<Mutex<BTreeMap<SessionId, Option<Cancellation>>>>,
}

/// A session of which nobody else may change anything. Dropping it lets the next one.
pub struct Claim {
    claims: Claims,
    id: SessionId,
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SessionId, Option<Cancellation>>> {
        // NOTE: nothing panics while it holds the lock, so a poisoned one is whole too.
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims a session, or says that it is in use.
    pub fn claim(&self, id: SessionId) -> Result<Claim, ApiError> {
        let mut claims = self.lock();
        if claims.contains_key(&id) {
            let message =
                format!("session {id} has a request running; wait for its end or cancel it");
            return Err(ApiError::conflict(message).with_param("session_id"));
        }
        claims.insert(id.clone(), None);
        Ok(Claim { claims: self.clone(), id })
    }

    /// Calls off what runs on a session; false where nothing does.
    pub fn cancel(&self, id: &SessionId) -> bool {
        match self.lock().get(id) {
            Some(Some(cancellation)) => {
                cancellation.cancel();
                true
            }
            Some(None) | None => false,
        }
    }
}

impl Claim {
    /// Says what calls off the request that runs.
    pub fn set_running(&self, cancellation: Option<Cancellation>) {
        self.claims.lock().insert(self.id.clone(), cancellation);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.lock().remove(&self.id);
    }
}

/// The name in a path.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Name, ApiError> {
        let name = Path::<String>::from_request_parts(parts, state).await;
        name.map(|Path(name)| Name(name)).map_err(|_| {
            ApiError::not_found("the name in the path is no UTF-8, so that nothing has it")
        })
    }
}

/// Lists the caller's sessions by name.
#[utoipa::path(
    get,
    path = "/v1/sessions",
    tag = "Sessions",
    responses((status = 200, description = "The sessions", body = SessionList),
        super::openapi::Errors)
)]
pub(super) async fn list_sessions(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<SessionList>, ApiError> {
    let infos = app.call(|engine| engine.sessions()).await?;
    let own = infos.into_iter().filter(|info| info.id.namespace() == caller.namespace);
    let data = own.map(|info| describe(&info.id, info.num_tokens, info.is_running)).collect();
    Ok(Json(SessionList { object: "list", data }))
}

/// Describes a session.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}",
    tag = "Sessions",
    params(("id" = String, Path, description = "The session's name")),
    responses((status = 200, description = "The session", body = Session),
        super::openapi::Errors, super::openapi::NotFound)
)]
pub(super) async fn get_session(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Name(id): Name,
) -> Result<Json<Session>, ApiError> {
    let id = session_id(&caller, &id)?;
    app.call(move |engine| find(engine, &id)).await?.map(Json)
}

/// Ends a session, and the request that runs on it.
#[utoipa::path(
    delete,
    path = "/v1/sessions/{id}",
    tag = "Sessions",
    params(("id" = String, Path, description = "The session's name")),
    responses((status = 200, description = "It is gone", body = SessionDeleted),
        super::openapi::Errors, super::openapi::NotFoundOrBusy)
)]
pub(super) async fn delete_session(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Name(id): Name,
) -> Result<Json<SessionDeleted>, ApiError> {
    let id = session_id(&caller, &id)?;
    app.sessions.cancel(&id);
    // A cancel takes effect between two steps, behind the calls that wait there.
    for _ in 0..CANCEL_STEPS {
        let ended = id.clone();
        let ending = move |engine: &mut Engine| match find(engine, &ended)?.is_running {
            true => Ok(false),
            false => engine.end_session(&ended).map(|()| true).map_err(ApiError::from),
        };
        if app.call(ending).await?? {
            let (id, object) = (id.name().to_owned(), "session.deleted");
            return Ok(Json(SessionDeleted { id, object, deleted: true }));
        }
    }
    Err(ApiError::conflict(format!("session {id} has a request running; cancel it first")))
}

/// Steps after which a cancelled request has surely ended.
pub(super) const CANCEL_STEPS: usize = 4;

/// Cuts the history of a session.
#[utoipa::path(
    post,
    path = "/v1/sessions/{id}/rewind",
    tag = "Sessions",
    params(("id" = String, Path, description = "The session's name")),
    request_body = RewindRequest,
    responses((status = 200, description = "The session", body = Session),
        super::openapi::BodyErrors, super::openapi::NotFoundOrBusy)
)]
pub(super) async fn rewind_session(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Name(id): Name,
    ApiJson(request): ApiJson<RewindRequest>,
) -> Result<Json<Session>, ApiError> {
    let id = session_id(&caller, &id)?;
    let _claim = app.sessions.claim(id.clone())?;
    let rewinding = move |engine: &mut Engine| {
        let session = find(engine, &id)?;
        let num_tokens = part(&session, Some(request.num_tokens))?;
        engine.rewind_session(&id, num_tokens)?;
        find(engine, &id)
    };
    app.call(rewinding).await?.map(Json)
}

/// Makes a session that goes on from another one.
#[utoipa::path(
    post,
    path = "/v1/sessions/{id}/branch",
    tag = "Sessions",
    params(("id" = String, Path, description = "The name of the session to go on from")),
    request_body = BranchRequest,
    responses((status = 200, description = "The new session", body = Session),
        super::openapi::BodyErrors, super::openapi::NotFoundOrBusy)
)]
pub(super) async fn branch_session(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Name(id): Name,
    ApiJson(request): ApiJson<BranchRequest>,
) -> Result<Json<Session>, ApiError> {
    let from = session_id(&caller, &id)?;
    let name = match request.to {
        Some(name) => name,
        None => random_id("")?,
    };
    let to = SessionId::new(caller.namespace, &name)
        .map_err(|error| ApiError::bad_request("to".to_owned(), error.to_string()))?;
    let _claim = app.sessions.claim(from.clone())?;
    let branching = move |engine: &mut Engine| {
        let session = find(engine, &from)?;
        let num_tokens = part(&session, request.num_tokens)?;
        if engine.session_tokens(&to).is_ok() {
            let message = format!("there is a session {to} already; end it first");
            return Err(ApiError::conflict(message).with_param("to"));
        }
        // NOTE: what is left to be refused is one session too many.
        engine
            .branch_session(&from, &to, Some(num_tokens))
            .map_err(|error| ApiError::conflict(error.to_string()))?;
        find(engine, &to)
    };
    app.call(branching).await?.map(Json)
}

/// The caller's session of this name: what cannot be a name is not there.
fn session_id(caller: &Caller, name: &str) -> Result<SessionId, ApiError> {
    SessionId::new(caller.namespace, name).map_err(|error| ApiError::not_found(error.to_string()))
}

fn describe(id: &SessionId, num_tokens: usize, is_running: bool) -> Session {
    Session { id: id.name().to_owned(), object: "session", num_tokens, is_running }
}

fn find(engine: &Engine, id: &SessionId) -> Result<Session, ApiError> {
    let info = engine.session_info(id).ok_or_else(|| {
        ApiError::not_found(format!("there is no session {id}")).with_code("session_not_found")
    })?;
    Ok(describe(id, info.num_tokens, info.is_running))
}

/// How many tokens of a session are asked for, where it has as many.
fn part(session: &Session, num_tokens: Option<NumTokens>) -> Result<usize, ApiError> {
    let num_tokens = num_tokens.map_or(session.num_tokens, |num| num.get() as usize);
    match num_tokens <= session.num_tokens {
        true => Ok(num_tokens),
        false => {
            let message = format!(
                "num_tokens is {num_tokens}, session {} has {}",
                session.id, session.num_tokens
            );
            Err(ApiError::bad_request("num_tokens".to_owned(), message))
        }
    }
}
