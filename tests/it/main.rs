//! One integration test binary; each module carries one area.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

/// The command line, run inside the test's process.
mod cli;
/// The generator's stages, from `config.json` to emitted text.
mod codegen;
/// Requests, scheduling and sampling.
mod engine;
/// Multiple-choice questions.
mod eval;
/// GGUF files that are written.
mod export;
/// Tiny models and SmolLM2 against reference results computed elsewhere.
mod golden;
/// GGUF files, the Hub, packages and the model cache.
mod import;
/// Layers of tiny models from calibration tokens to 4 bits.
mod layer_pass;
/// Declarations of kernels, as the compiler takes or refuses them.
mod macros;
/// Model folders, sound and hostile.
mod model;
/// Kernel templates against naive loops, instantiated for every instruction set of this machine.
mod ops;
/// Weights in files as kernels read them, and programs that bring them.
mod packed;
/// Quantized checkpoints, and how they are made.
mod quantize;
/// Style, names and directions of dependency.
mod tidy;
/// Tokenizer, incremental text and chat templates.
mod tokenizer;
/// Every kernel against the reference backend.
mod verify;
