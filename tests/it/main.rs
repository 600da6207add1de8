//! One integration test binary; each module carries one area.

/// Style, names and directions of dependency.
mod tidy;
