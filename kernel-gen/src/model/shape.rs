//! `ModelConfig` → `ModelShape`: the sizes of every linear and how its weights are stored.

use super::{Architecture, AwqConfig, ModelConfig, Packing};
use crate::error::Error;
use crate::spec::{
    ActivationType, LinearPlace, LinearRole, LinearShape, ModelShape, PAGE_SIZE, WeightFormat,
};

const LAYER_ROLES: [LinearRole; 4] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down];

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
        let dense_linears = self.dense_linears()?;
        let linear = |role, n, k, bias| -> Result<LinearShape, Error> {
            let shape = LinearShape { n, k, format: self.format(role, &dense_linears), bias };
            // NOTE: refuses a group size that does not divide k.
            shape.kernel(ActivationType::Int8)?;
            if matches!(shape.format, WeightFormat::Awq(_)) && (n % 8 != 0 || k % 8 != 0) {
                return Err(quantization_error(
                    "quant_method",
                    format!("8 weights lie in a word, but the {role:?} linear is {n} × {k}"),
                ));
            }
            Ok(shape)
        };
        let mut shape = ModelShape {
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
            dense_linears: Vec::new(),
            page_size: PAGE_SIZE,
        };
        let is_mixed =
            |place: &LinearPlace| matches!(shape.linear(place.role).format, WeightFormat::Awq(_));
        shape.dense_linears = dense_linears.into_iter().filter(is_mixed).collect();
        Ok(shape)
    }

    /// The form that a linear has unless a layer's is left out: dense where all are.
    fn format(&self, role: LinearRole, dense_linears: &[LinearPlace]) -> WeightFormat {
        let num_dense = dense_linears.iter().filter(|place| place.role == role).count();
        match &self.quantization {
            Some(awq) if role != LinearRole::Head && num_dense < self.num_layers => {
                WeightFormat::Awq(awq.group_size)
            }
            _ => WeightFormat::Dense(self.dtype),
        }
    }

    /// The layers' linears that `modules_to_not_convert` leaves out, in order.
    fn dense_linears(&self) -> Result<Vec<LinearPlace>, Error> {
        let mut all = Vec::new();
        let Some(awq) = &self.quantization else { return Ok(all) };
        self.check_head(awq)?;
        if awq.modules_to_not_convert.is_empty() {
            return Ok(all);
        }
        for layer_idx in 0..self.num_layers {
            for role in LAYER_ROLES {
                if self.is_left_out(awq, role, layer_idx)? {
                    all.push(LinearPlace { layer_idx, role });
                }
            }
        }
        Ok(all)
    }

    /// Whether a layer's linear is left out, which must be so for all of its modules or none.
    fn is_left_out(
        &self,
        awq: &AwqConfig,
        role: LinearRole,
        layer_idx: usize,
    ) -> Result<bool, Error> {
        let mut left_out = Vec::new();
        let mut converted = Vec::new();
        let mut pattern_used = "";
        for module in self.architecture.modules(role) {
            match awq.left_out_by(&format!("model.layers.{layer_idx}.{module}")) {
                Some(pattern) => {
                    pattern_used = pattern;
                    left_out.push(*module);
                }
                None => converted.push(*module),
            }
        }
        if !left_out.is_empty() && !converted.is_empty() {
            return Err(quantization_error(
                left_out_field(awq),
                format!(
                    "\"{pattern_used}\" leaves out {} of layer {layer_idx}, but not {}, and they \
                     are one matmul; leave out all of them or none",
                    left_out.join(" and "),
                    converted.join(" and ")
                ),
            ));
        }
        Ok(converted.is_empty())
    }

    /// Refuses a quantized head, which compressed-tensors has where it is not left out.
    fn check_head(&self, awq: &AwqConfig) -> Result<(), Error> {
        let head = self.architecture.modules(LinearRole::Head)[0];
        let is_quantized = matches!(awq.packing, Packing::CompressedTensors { .. })
            && !self.tie_word_embeddings
            && awq.left_out_by(head).is_none();
        match is_quantized {
            false => Ok(()),
            true => Err(quantization_error(
                left_out_field(awq),
                format!("\"{head}\" is missing; a quantized head is not supported"),
            )),
        }
    }
}

/// The field that lists the modules which stay as they are.
fn left_out_field(awq: &AwqConfig) -> &'static str {
    match awq.packing {
        Packing::Awq | Packing::Gptq { .. } => "modules_to_not_convert",
        Packing::CompressedTensors { .. } => "ignore",
    }
}

fn quantization_error(field: &str, message: String) -> Error {
    Error::Config { field: format!("quantization_config.{field}"), message }
}
