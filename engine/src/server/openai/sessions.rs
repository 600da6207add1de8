//! `/v1/sessions`: what the engine keeps of conversations between requests.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::number::NumTokens;

/// A conversation whose tokens the engine keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Session {
    pub id: String,
    /// `session`
    pub object: &'static str,
    /// Tokens of its history, prompts and answers.
    pub num_tokens: usize,
    /// A request runs on it.
    pub is_running: bool,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SessionList {
    /// `list`
    pub object: &'static str,
    pub data: Vec<Session>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SessionDeleted {
    pub id: String,
    /// `session.deleted`
    pub object: &'static str,
    pub deleted: bool,
}

/// Cuts the history of a session.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RewindRequest {
    /// What is left of it. A turn that follows begins with the end of the answer before it, so cut
    /// behind an answer.
    pub num_tokens: NumTokens,
}

/// Makes a session that goes on from another one.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BranchRequest {
    /// The name of the new session; a random one where it is absent.
    #[schema(pattern = "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$")]
    pub to: Option<String>,
    /// How much of the history it has; all where it is absent.
    pub num_tokens: Option<NumTokens>,
}
