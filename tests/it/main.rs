//! One integration test binary; each module carries one area.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

/// The command line, run inside the test's process.
mod cli;
/// Requests, scheduling and sampling.
mod engine;
/// Tiny models and SmolLM2 against reference results computed elsewhere.
mod golden;
/// GGUF files, the Hub, packages and the model cache.
mod import;
/// Model folders, sound and hostile.
mod model;
/// Kernel templates against naive loops, instantiated for every instruction set of this machine.
mod ops;
/// Round-to-nearest checkpoints.
mod quantize;
/// Style, names and directions of dependency.
mod tidy;
/// Tokenizer, incremental text and chat templates.
mod tokenizer;
