//! The only parser of `config.json`.

mod fields;
mod parse;
mod quantization;
mod rope;
mod shape;
#[cfg(test)]
mod tests;

use std::path::Path;

use crate::error::Error;
use crate::spec::DType;

/// Largest context a `config.json` may name.
pub const CONTEXT_MAX: usize = 1 << 24;

/// Scaling of the rotary embedding's frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    Default,
    Linear {
        factor: f64,
    },
    /// NTK-aware scaling whose base follows from the sequence's length when it starts.
    Dynamic {
        factor: f64,
        original_max_position: usize,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position: usize,
    },
    Yarn {
        factor: f64,
        original_max_position: usize,
        beta_fast: f64,
        beta_slow: f64,
        /// Multiplies cos and sin; follows from `factor` and the mscale fields where not given.
        attention_factor: f64,
        truncate: bool,
    },
}

/// A decoder-only model, as its `config.json` describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub rotary_dim: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub max_position: usize,
    pub sliding_window: Option<usize>,
    pub qk_norm: bool,
    /// Bias on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub tie_word_embeddings: bool,
    pub dtype: DType,
    pub quantization: Option<AwqConfig>,
    pub bos_token_id: Option<u32>,
    /// One or several end tokens.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// Errors name the field, its value and what is expected; no input makes it panic.
    pub fn parse(json: &str) -> Result<ModelConfig, Error> {
        parse::parse(json)
    }

    /// Reads a `config.json` file of at most 4 MiB.
    pub fn from_file(path: &Path) -> Result<ModelConfig, Error> {
        ModelConfig::parse(&parse::read(path)?)
    }
}

/// Families that differ in tensor names or fusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1, 2, 3.x and SmolLM2.
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    InternLm2,
    Phi3,
}

/// `quantization_config` of a checkpoint with 4-bit weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwqConfig {
    pub group_size: crate::spec::GroupSize,
    /// False: symmetric, every zero is 8 and the checkpoint need not say so.
    pub zero_point: bool,
    pub modules_to_not_convert: Vec<String>,
    pub packing: Packing,
}

/// How a checkpoint holds 4-bit weights `(q − zero) · scale`, by the programs that write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// AWQ "gemm".
    Awq,
    /// AutoGPTQ and GPTQModel.
    Gptq {
        /// What must be added to zeros as they are stored.
        zero_offset: u8,
        /// Inputs may belong to groups out of order; `g_idx` says to which.
        act_order: bool,
    },
    /// compressed-tensors, format pack-quantized.
    CompressedTensors {
        /// As that of GPTQ; the tensor is `weight_g_idx`.
        act_order: bool,
    },
}
