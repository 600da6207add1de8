//! Models from GGUF files, from the Hub and from packages.

mod gguf;
mod gguf_file;
mod hub_server;
mod pull;
