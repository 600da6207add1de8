//! Published results that the engine must reproduce: logits and greedy tokens of small models.

mod expected;
pub(crate) mod smollm2;
pub(crate) mod tiny;

use std::path::PathBuf;

/// The folder of golden files.
pub(crate) fn golden_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden")
}
