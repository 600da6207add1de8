//! One integration test binary.
mod ops;
mod tokenizer;

