//! One integration test binary.

mod cli;
mod golden;
mod ops;
mod tokenizer;
