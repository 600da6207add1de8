//! The C library from outside: its header, and programs in C, C++ and Python that use it.

#![allow(clippy::print_stdout, reason = "a test that is skipped says so")]

mod compiler;
mod header;
mod models;
mod programs;
