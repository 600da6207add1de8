//! One integration test binary: a module an area.

mod golden;
mod ops;
mod tidy;
