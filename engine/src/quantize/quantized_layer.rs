//! What becomes of one layer of a model, and how that is told.

use std::collections::BTreeMap;

use bespoke_kernel_gen::spec::GroupSize;
use serde::{Deserialize, Serialize};

use super::awq_format::PackedLinear;

/// How 4-bit values are chosen with the help of calibration rows.
#[derive(Clone, Debug, PartialEq)]
pub struct AwqOptions {
    pub group_size: GroupSize,
    /// Every zero is 8, and levels lie evenly around it.
    pub symmetric: bool,
    /// Rounds one input after the other, and lets the later ones make up for the errors of the
    /// earlier ones.
    pub compensate: bool,
    /// Parts of module names that stay as they are; see `modules_to_not_convert`.
    pub skip: Vec<String>,
}

impl AwqOptions {
    /// Whether the weights of a module stay as they are.
    pub fn skips(&self, module: &str) -> bool {
        self.skip.iter().any(|pattern| is_named(pattern, module))
    }
}

/// Whether the dotted parts of `pattern` appear in the module's name, side by side.
pub fn is_named(pattern: &str, module: &str) -> bool {
    let pattern: Vec<&str> = pattern.split('.').collect();
    let module: Vec<&str> = module.split('.').collect();
    module.windows(pattern.len()).any(|parts| parts == pattern)
}

/// One layer with 4-bit weights.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedLayer {
    pub layer_idx: usize,
    /// By the name of their module in the checkpoint.
    pub linears: BTreeMap<String, PackedLinear>,
    /// Norms and biases that changed, by the name of their tensor: each number as the checkpoint's
    /// element type holds it.
    pub floats: BTreeMap<String, Vec<f32>>,
    /// By the name of their module, for every linear of the layer.
    pub factors: BTreeMap<String, Factors>,
    pub report: LayerReport,
}

/// What a module's float weights are multiplied with to fit the layer's changed norms and
/// neighbours: `weight[n][k] · input[k] · output[n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// `[k]`
    pub input: Vec<f32>,
    /// `[n]`
    pub output: Vec<f32>,
}

/// What quantizing did to one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    pub layer_idx: usize,
    pub groups: Vec<GroupReport>,
    pub seconds: f64,
}

/// The linears that share an input, and with it the factors on that input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// `qkv`, `o`, `gate_up` or `down`.
    pub role: String,
    /// The factor on input `k` is `activation[k]^alpha / weight[k]^beta`, up to a constant.
    pub alpha: f32,
    pub beta: f32,
    /// Smallest, median and largest factor.
    pub factors: [f32; 3],
    pub modules: Vec<ModuleReport>,
}

/// Errors are `‖x·Wᵀ − x·Ŵᵀ‖² / ‖x·Wᵀ‖²` over the calibration rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModuleReport {
    /// Name of the module in the checkpoint.
    pub name: String,
    pub num_weights: u64,
    /// Of rounding to nearest, without factors and clipping.
    pub error_rtn: f64,
    /// With factors and clipping, rounded to nearest.
    pub error_awq: f64,
    /// Of what is written.
    pub error: f64,
    /// Share of the groups whose largest weights are clipped.
    pub clipped: f64,
    /// Whether the weights stay in 16 bits.
    pub is_skipped: bool,
}
