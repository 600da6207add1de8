//! One integration test binary; each module carries one area.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

/// The generator's stages, from `config.json` to emitted text.
mod codegen;
/// Tiny models and SmolLM2 against reference results computed elsewhere.
mod golden;
/// Declarations of kernels, as the compiler takes or refuses them.
mod macros;
/// Kernel templates against naive loops, instantiated for every instruction set of this machine.
mod ops;
/// Style, names and directions of dependency.
mod tidy;
