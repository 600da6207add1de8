//! One integration test binary; each module carries one area.

mod cli;
mod golden;
mod ops;
mod tidy;
mod tokenizer;
#![allow(clippy::print_stdout, reason = "tests say what they skip")]

/// Tiny models and SmolLM2 against reference results computed elsewhere.
/// Kernel templates against naive loops, instantiated for every instruction set of this machine.
/// Style, names and directions of dependency.
