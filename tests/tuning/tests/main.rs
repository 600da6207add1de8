//! Nothing wrong is ever chosen, and what is chosen is built alike everywhere.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

/// A changed template, and the build that has a lock of before.
mod build;
/// A model by the kernels of a lock against the same model by the default ones.
mod end_to_end;
/// Ctrl-C.
#[cfg(unix)]
mod interrupt;
/// Kernels with planted faults, through verification, records and selection.
#[cfg(unix)]
mod planted;
/// The same machine code from the same lock.
mod reproduce;

use std::process::Command;

/// Runs `bespoke` with the kernels of that name.
fn process(kernels: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tuning-process"));
    command.env("BESPOKE_TEST_KERNELS", kernels);
    command
}
