//! Models whose `config.json` the generator carries, and where other models are found.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::model::{AwqConfig, ModelConfig, Packing};
use crate::spec::{DType, GroupSize, ModelShape};

macro_rules! preset {
    ($name:literal) => {
        ($name, include_str!(concat!("../models/", $name, ".json")))
    };
}

/// Name and `config.json`.
pub const PRESETS: [(&str, &str); 7] = [
    preset!("internlm2.5-7b"),
    preset!("llama-3.1-8b-awq"),
    preset!("mistral-7b"),
    preset!("qwen2.5-0.5b"),
    preset!("qwen2.5-7b-awq"),
    preset!("smollm2-135m"),
    preset!("smollm2-135m-awq"),
];

/// The shapes of a build that names no model: SmolLM2-135M as published (bfloat16) and as its GGUF
/// is imported (float16), dense and quantized at the group sizes its 576 inputs allow.
pub fn default_shapes() -> Result<Vec<ModelShape>, Error> {
    let config = preset_config("smollm2-135m")?;
    let groups = [None, Some(GroupSize::Of(32)), Some(GroupSize::Of(64)), Some(GroupSize::Channel)];
    let mut shapes = Vec::new();
    for dtype in [DType::BF16, DType::F16] {
        for group in groups {
            let quantization = group.map(|group_size| AwqConfig {
                group_size,
                zero_point: true,
                modules_to_not_convert: Vec::new(),
                packing: Packing::Awq,
            });
            let config = ModelConfig { dtype, quantization, ..config.clone() };
            let suffix = group.map(|group| format!("-awq-g{group}")).unwrap_or_default();
            shapes.push(config.shape(&format!("smollm2-135m{suffix}"))?);
        }
    }
    Ok(shapes)
}

fn preset_config(name: &str) -> Result<ModelConfig, Error> {
    match PRESETS.iter().find(|(preset, _)| *preset == name) {
        Some((_, json)) => ModelConfig::parse(json),
        None => {
            let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
            let message = format!(
                "neither a model folder, nor a config.json, nor one of {}",
                names.join(", ")
            );
            Err(Error::Model { name: name.to_string(), message })
        }
    }
}

/// The `config.json` that `model` means: a file, a folder that holds one, or `None` for a preset.
/// Relative paths are looked up in each of `folders`.
pub fn config_file(model: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    let in_folder = |folder: &PathBuf| {
        let path = folder.join(model);
        [path.join("config.json"), path].into_iter().find(|path| path.is_file())
    };
    folders.iter().find_map(in_folder)
}

/// The shape of a model folder, a `config.json` or a preset.
pub fn shape(model: &str, folders: &[PathBuf]) -> Result<ModelShape, Error> {
    match config_file(model, folders) {
        Some(path) => {
            let name = name_of(&path).unwrap_or(model);
            ModelConfig::from_file(&path).and_then(|config| config.shape(name)).map_err(|error| {
                match error {
                    Error::Io { .. } => error,
                    other => Error::Model { name: model.to_string(), message: other.to_string() },
                }
            })
        }
        None => preset_config(model)?.shape(model),
    }
}

/// The folder's name for `…/name/config.json`, else the file's.
fn name_of(path: &Path) -> Option<&str> {
    let named = if path.file_name()? == "config.json" { path.parent()? } else { path };
    named.file_stem()?.to_str()
}
