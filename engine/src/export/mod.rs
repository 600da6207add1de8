//! Models as files of other programs.

pub mod gguf;
