//! `/v1/models`.

use serde::Serialize;
use utoipa::ToSchema;

/// A model that can be asked for.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Model {
    pub id: String,
    /// `model`
    pub object: &'static str,
    /// When it was loaded, in seconds of the Unix epoch.
    pub created: u64,
    /// `bespoke`
    pub owned_by: &'static str,
    /// Tokens of one sequence, prompt and answer together.
    pub max_model_len: usize,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`
    pub object: &'static str,
    pub data: Vec<Model>,
}
