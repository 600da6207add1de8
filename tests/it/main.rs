//! One integration test binary.

mod ops;
