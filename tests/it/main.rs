//! One integration test binary.

mod golden;
