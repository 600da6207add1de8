//! Models from elsewhere: GGUF files, the Hub, the model cache.

pub mod gguf;
