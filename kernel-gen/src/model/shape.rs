//! `ModelConfig` → `ModelShape`: the sizes of every linear and how its weights are stored.

use super::awq::names_module;
use super::{Architecture, AwqConfig, ModelConfig};
use crate::error::Error;
use crate::spec::{ActivationType, LinearRole, LinearShape, ModelShape, PAGE_SIZE, WeightFormat};

impl Architecture {
    /// Modules that make up a linear, by their names inside `model.layers.<idx>`; for the head,
    /// its name in the model.
    pub fn modules(self, role: LinearRole) -> &'static [&'static str] {
        match (self, role) {
            (Architecture::InternLm2, LinearRole::Qkv) => &["attention.wqkv"],
            (Architecture::InternLm2, LinearRole::O) => &["attention.wo"],
            (Architecture::InternLm2, LinearRole::GateUp) => {
                &["feed_forward.w1", "feed_forward.w3"]
            }
            (Architecture::InternLm2, LinearRole::Down) => &["feed_forward.w2"],
            (Architecture::InternLm2, LinearRole::Head) => &["output"],
            (Architecture::Phi3, LinearRole::Qkv) => &["self_attn.qkv_proj"],
            (Architecture::Phi3, LinearRole::GateUp) => &["mlp.gate_up_proj"],
            (_, LinearRole::Qkv) => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            (_, LinearRole::O) => &["self_attn.o_proj"],
            (_, LinearRole::GateUp) => &["mlp.gate_proj", "mlp.up_proj"],
            (_, LinearRole::Down) => &["mlp.down_proj"],
            (_, LinearRole::Head) => &["lm_head"],
        }
    }
}

impl ModelConfig {
    /// All sizes that kernels depend on. `name` is what plans call the model.
    pub fn shape(&self, name: &str) -> Result<ModelShape, Error> {
        let attention = self.num_heads * self.head_dim;
        let qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim;
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let linear = |role, n, k, bias| -> Result<LinearShape, Error> {
            let shape = LinearShape { n, k, format: self.format(role)?, bias };
            // NOTE: refuses a group size that does not divide k.
            shape.kernel(ActivationType::Int8)?;
            if matches!(shape.format, WeightFormat::Awq(_)) && (n % 8 != 0 || k % 8 != 0) {
                return Err(quantization_error(
                    "quant_method",
                    format!("awq packs 8 weights a word, but the {role:?} linear is {n} × {k}"),
                ));
            }
            Ok(shape)
        };
        Ok(ModelShape {
            name: name.to_string(),
            num_layers: self.num_layers,
            vocab_size: self.vocab_size,
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            rotary_dim: self.rotary_dim,
            qk_norm: self.qk_norm,
            sliding_window: self.sliding_window,
            dtype: self.dtype,
            qkv: linear(LinearRole::Qkv, qkv, hidden, self.qkv_bias)?,
            o: linear(LinearRole::O, hidden, attention, self.o_bias)?,
            gate_up: linear(LinearRole::GateUp, 2 * intermediate, hidden, self.mlp_bias)?,
            down: linear(LinearRole::Down, hidden, intermediate, self.mlp_bias)?,
            head: linear(LinearRole::Head, self.vocab_size, hidden, false)?,
            page_size: PAGE_SIZE,
        })
    }

    fn format(&self, role: LinearRole) -> Result<WeightFormat, Error> {
        let dense = WeightFormat::Dense(self.dtype);
        match &self.quantization {
            Some(awq) if role != LinearRole::Head && self.is_converted(awq, role)? => {
                Ok(WeightFormat::Awq(awq.group_size))
            }
            _ => Ok(dense),
        }
    }

    /// Whether the linear `role` is quantized, which must be so in all layers and parts, or none.
    fn is_converted(&self, awq: &AwqConfig, role: LinearRole) -> Result<bool, Error> {
        let modules = self.architecture.modules(role);
        let mut left_out = 0;
        let mut pattern_used = None;
        for layer_idx in 0..self.num_layers {
            for module in modules {
                let name = format!("model.layers.{layer_idx}.{module}");
                let pattern =
                    awq.modules_to_not_convert.iter().find(|pattern| names_module(pattern, &name));
                left_out += usize::from(pattern.is_some());
                pattern_used = pattern_used.or(pattern);
            }
        }
        let all = self.num_layers * modules.len();
        match pattern_used {
            None => Ok(true),
            Some(_) if left_out == all => Ok(false),
            Some(pattern) => Err(quantization_error(
                "modules_to_not_convert",
                format!(
                    "\"{pattern}\" leaves out {left_out} of the {all} modules {}; supported is to \
                     leave out all of them, in every layer, or none",
                    modules.join(" and ")
                ),
            )),
        }
    }
}

fn quantization_error(field: &str, message: String) -> Error {
    Error::Config { field: format!("quantization_config.{field}"), message }
}
