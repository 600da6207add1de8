//! What a program's bytes are for.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde::Serialize;

use crate::bundle::Bundle;
use crate::files::human_bytes;

/// Bytes of a program by part.
#[derive(Serialize)]
pub(super) struct Sizes {
    pub(super) bytes: u64,
    /// Machine code of CPU kernels, by op.
    kernels: BTreeMap<String, u64>,
    /// All else that is not the model's.
    program: u64,
    /// Deflated.
    tokenizer: u64,
    /// The model's other small files, deflated.
    files: u64,
    weights: u64,
    /// Up to the next page, and the list of contents.
    frame: u64,
}

/// A kernel as `bespoke kernels --json` tells it.
#[derive(serde::Deserialize)]
struct Kernel {
    op: String,
    bytes: Option<u64>,
}

/// Bytes of machine code by op, as the program tells that has its symbols.
pub(super) fn kernels(program: &Path) -> anyhow::Result<BTreeMap<String, u64>> {
    let output = Command::new(program).args(["kernels", "--json"]).output();
    let output = output.with_context(|| program.display().to_string())?;
    ensure!(output.status.success(), "{}: the program does not run", program.display());
    let kernels: Vec<Kernel> = serde_json::from_slice(&output.stdout)?;
    let mut bytes = BTreeMap::new();
    for kernel in kernels {
        *bytes.entry(kernel.op).or_default() += kernel.bytes.unwrap_or(0);
    }
    Ok(bytes)
}

impl Sizes {
    /// Of a program that has `program` bytes without its model, and `bytes` with it.
    pub(super) fn new(
        kernels: BTreeMap<String, u64>,
        program: u64,
        bundle: &Bundle,
        bytes: u64,
    ) -> Sizes {
        let all: u64 = bundle.files().map(|(_, bytes)| bytes).sum();
        let tokenizer = bundle.files().find(|(name, _)| *name == "tokenizer.json");
        let tokenizer = tokenizer.map_or(0, |(_, bytes)| bytes);
        let weights = bundle.weights_len().unwrap_or(0);
        Sizes {
            bytes,
            program: program.saturating_sub(kernels.values().sum()),
            kernels,
            tokenizer,
            files: all - tokenizer,
            weights,
            frame: bytes - program - all - weights,
        }
    }

    pub(super) fn text(&self, path: &Path) -> String {
        let mut text = String::new();
        let mut line = |bytes: u64, what: &str| {
            if bytes > 0 {
                text.push_str(&format!("{:>10}  {what}\n", human_bytes(bytes)));
            }
        };
        for (op, bytes) in &self.kernels {
            line(*bytes, &format!("kernels: {op}"));
        }
        line(self.program, "program without kernels");
        line(self.tokenizer, "tokenizer.json, deflated");
        line(self.files, "other files of the model, deflated");
        line(self.weights, "weights");
        line(self.frame, "alignment and list of contents");
        line(self.bytes, &path.display().to_string());
        text
    }
}
