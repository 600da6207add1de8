//! One integration test binary.

mod golden;
mod ops;
mod tokenizer;

