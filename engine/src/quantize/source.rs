//! The dense model that is quantized: its configuration, its tensors, and its linears.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{GroupSize, LinearRole, check_group};
use safetensors::Dtype;
use serde_json::{Value as Json, json};

use super::awq_format::PACK;
use super::checkpoint::Checkpoint;
use super::quantized_layer::is_named;
use crate::error::Error;
use crate::model::safetensors::read_json_file;

/// The linears of a layer that are quantized; the head and the embedding stay as they are.
const ROLES: [(LinearRole, &str); 4] = [
    (LinearRole::Qkv, "qkv"),
    (LinearRole::O, "o"),
    (LinearRole::GateUp, "gate_up"),
    (LinearRole::Down, "down"),
];

/// A model folder with float weights.
pub(super) struct SourceModel {
    pub dir: PathBuf,
    /// `config.json` as it is.
    pub config_text: String,
    pub config: ModelConfig,
    pub checkpoint: Checkpoint,
}

/// A linear that can be quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Linear {
    pub layer_idx: usize,
    /// `qkv`, `o`, `gate_up` or `down`.
    pub role: &'static str,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Inputs that share a scale.
    pub group: usize,
}

/// By the name of their module in the checkpoint.
pub(super) type Linears = BTreeMap<String, Linear>;

impl SourceModel {
    /// Reads configuration and headers, and refuses a model that is quantized already.
    pub(super) fn open(dir: &Path) -> Result<SourceModel, Error> {
        let path = dir.join("config.json");
        let config_text = read_json_file(&path)?;
        let json: Json =
            serde_json::from_str(&config_text).map_err(|e| Error::model(&path, e.to_string()))?;
        let is_quantized = json.get("quantization_config").is_some_and(|value| !value.is_null());
        if is_quantized || dir.join("quant_config.json").exists() {
            return Err(Error::Request(format!(
                "{}: already quantized; give the original model",
                dir.display()
            )));
        }
        let config = ModelConfig::parse(&config_text)?;
        let checkpoint = Checkpoint::open(dir)?;
        Ok(SourceModel { dir: dir.to_owned(), config_text, config, checkpoint })
    }

    /// What reports call the model: the folder's own name.
    pub(super) fn name(&self) -> String {
        let dir = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        dir.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned())
    }

    /// Bytes of all tensors.
    pub(super) fn num_bytes(&self) -> u64 {
        self.checkpoint.tensors.values().map(|tensor| tensor.num_bytes).sum()
    }

    /// All linears of all layers, each found in the checkpoint and fit for the group size.
    pub(super) fn linears(&self, group_size: GroupSize) -> Result<Linears, Error> {
        let mut linears = Linears::new();
        for layer_idx in 0..self.config.num_layers {
            for (role, role_name) in ROLES {
                for module in self.config.architecture.modules(role) {
                    let name = format!("model.layers.{layer_idx}.{module}");
                    let (n, k) = self.linear_sizes(&name)?;
                    check_group(k, group_size)?;
                    let group = group_size.of(k);
                    linears.insert(name, Linear { layer_idx, role: role_name, n, k, group });
                }
            }
        }
        Ok(linears)
    }

    fn linear_sizes(&self, name: &str) -> Result<(usize, usize), Error> {
        let Some(tensor) = self.checkpoint.tensors.get(&format!("{name}.weight")) else {
            return Err(Error::model(
                &self.dir,
                format!("tensor '{name}.weight' is missing; is this the original model?"),
            ));
        };
        let path = self.checkpoint.path_of(tensor);
        let [n, k] = tensor.shape[..] else {
            return Err(Error::model(
                path,
                format!("tensor '{name}.weight' has shape {:?}, not two sizes", tensor.shape),
            ));
        };
        if n == 0 || n % PACK != 0 || k == 0 {
            return Err(Error::Unsupported(format!(
                "'{name}' has {n} outputs, which is no multiple of {PACK}"
            )));
        }
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::model(
                path,
                format!(
                    "'{name}.weight' is {:?}; F32, F16 and BF16 can be quantized",
                    tensor.dtype
                ),
            ));
        }
        Ok((n, k))
    }

    /// `config.json` of the quantized model, as the generator takes it. `left_out`: modules whose
    /// weights stay in 16 bits.
    pub(super) fn quantized_config(
        &self,
        group_size: GroupSize,
        left_out: &BTreeSet<String>,
    ) -> Result<String, Error> {
        let path = self.dir.join("config.json");
        let mut json: Json = serde_json::from_str(&self.config_text)
            .map_err(|e| Error::model(&path, e.to_string()))?;
        json["quantization_config"] = json!({
            "quant_method": "awq",
            "bits": 4,
            "group_size": match group_size {
                GroupSize::Of(size) => json!(size),
                GroupSize::Channel => json!(-1),
            },
            "zero_point": true,
            "version": "gemm",
            // NOTE: whole names, because some readers look for them anywhere in a module's name.
            "modules_to_not_convert": match left_out.is_empty() {
                true => Json::Null,
                false => json!(left_out),
            },
        });
        let text = format!("{json:#}\n");
        ModelConfig::parse(&text)?.shape("model")?;
        Ok(text)
    }
}

/// The modules that one of the patterns names; each pattern must name one.
pub(super) fn named_modules(
    linears: &Linears,
    patterns: &[String],
) -> Result<BTreeSet<String>, Error> {
    let mut named = BTreeSet::new();
    for pattern in patterns {
        let found: Vec<String> =
            linears.keys().filter(|module| is_named(pattern, module)).cloned().collect();
        if found.is_empty() {
            let example = linears.keys().next().map_or("", String::as_str);
            return Err(Error::Request(format!(
                "--skip '{}' names no linear of the model; linears have names such as {example}",
                pattern.escape_debug()
            )));
        }
        named.extend(found);
    }
    Ok(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_whole_parts() {
        let module = "model.layers.1.mlp.down_proj";
        for pattern in ["down_proj", "layers.1", "mlp", "1.mlp.down_proj", module] {
            assert!(is_named(pattern, module), "{pattern}");
        }
        for pattern in
            ["down", "layers.11", "mlp.up_proj", "", ".", "model.layers.1.mlp.down_proj.x"]
        {
            assert!(!is_named(pattern, module), "{pattern}");
        }
    }

    #[test]
    fn patterns_that_name_nothing_are_refused() {
        let linear = Linear { layer_idx: 0, role: "o", n: 8, k: 8, group: 8 };
        let linears = Linears::from([("model.layers.0.self_attn.o_proj".to_owned(), linear)]);
        let named = |pattern: &str| named_modules(&linears, &[pattern.to_owned()]);
        assert_eq!(named("o_proj").ok().map(|named| named.len()), Some(1));
        let message = named("q_proj").map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("'q_proj'") && message.contains("self_attn.o_proj"), "{message}");
    }
}
