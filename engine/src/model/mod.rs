//! Decoder-only models: weights and the forward pass.

pub mod decoder;
pub mod linear;
pub mod rope;
pub mod safetensors;
pub mod weights;
