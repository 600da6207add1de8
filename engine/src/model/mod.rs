//! Decoder-only models: weights and the forward pass.

pub mod linear;
