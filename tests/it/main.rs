//! One integration test binary.

mod golden;
mod ops;
