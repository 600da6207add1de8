//! Published results that the engine must reproduce: logits and greedy tokens of small models.

mod smollm2;
mod tiny;

use std::path::PathBuf;

/// The folder of golden files.
fn golden_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden")
}
