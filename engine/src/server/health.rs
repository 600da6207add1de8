//! Whether the process lives, and whether it is of use.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::app::App;
use super::error::ApiError;
use super::{Access, Route};
use crate::handle::EngineState;

/// What `/health` and `/ready` say.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ready`.
    pub status: &'static str,
}

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::new("/live", Access::Public).get(live),
        Route::new("/ready", Access::Public).get(ready),
        Route::new("/health", Access::Public).get(ready),
    ]
}

/// The process answers.
async fn live() -> Json<Health> {
    Json(Health { status: "live" })
}

/// Requests would be served.
async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.check_ready() {
        Ok(()) => (StatusCode::OK, Json(Health { status: "ready" })).into_response(),
        Err(error) => error.into_response(),
    }
}

impl App {
    /// Whether a request would be served now, or why not.
    pub fn check_ready(&self) -> Result<(), ApiError> {
        if self.lifecycle.is_draining() {
            return Err(ApiError::draining());
        }
        match self.handle.state() {
            EngineState::Running => {}
            EngineState::Draining => return Err(ApiError::draining()),
            EngineState::Stopped | EngineState::Dead(_) => {
                let message = "the engine does not run any more";
                return Err(ApiError::unavailable("engine_unavailable", message));
            }
        }
        // NOTE: the watchdog ends the server after a whole time-out; routers should look elsewhere
        // before that.
        let age = self.step_age();
        if age > self.options.timeouts.step / 2 {
            let message = format!("a step of the engine takes {} s so far", age.as_secs());
            return Err(ApiError::unavailable("engine_stalled", message));
        }
        Ok(())
    }

    /// How long the step at hand has taken; zero while the engine has nothing to do.
    pub(super) fn step_age(&self) -> std::time::Duration {
        let stats = self.handle.stats();
        match stats.num_waiting + stats.num_running {
            0 => std::time::Duration::ZERO,
            _ => Instant::now().saturating_duration_since(stats.last_beat),
        }
    }
}
