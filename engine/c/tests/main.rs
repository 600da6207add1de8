//! The C library from outside: its header, and programs in C, C++ and Python that use it.

mod compiler;
mod header;
mod models;
mod programs;
