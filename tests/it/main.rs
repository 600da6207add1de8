//! One integration test binary.
mod tokenizer;
