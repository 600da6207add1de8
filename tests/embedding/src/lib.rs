//! The model that this crate brings kernels for.

bespoke::bind! {
    /// A random model with two layers and 4-bit weights.
    pub mod model {
        hidden_size: 128,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 32,
        vocab_size: 160,
        group_size: 32,
        dtype: F32,
    }
}
