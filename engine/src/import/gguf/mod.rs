//! GGUF file → an ordinary model folder in float16.

mod dequantize;
mod reader;
mod sizes;
pub(crate) mod split;
pub(crate) mod tokenizer;
mod weights;

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use serde_json::{Value as Json, json};

pub use dequantize::{BlockFormat, append_f16, dequantize};
pub use reader::{Gguf, TensorInfo, Value};

use self::sizes::{Family, Sizes};
use self::tokenizer::Vocabulary;
use self::weights::Conversions;
use crate::error::Error;
use crate::files::{self, IfExists, StagedDir};
use crate::progress::Report;

/// Converts `file` into the new folder `out`: config.json, generation_config.json,
/// tokenizer.json, tokenizer_config.json and model.safetensors. `out` appears when all is there.
pub fn import(file: &Path, out: &Path, report: Report) -> Result<(), Error> {
    let staged = StagedDir::create(out, IfExists::Refuse)?;
    import_into(file, staged.path(), report)?;
    staged.commit()
}

/// As [`import`], into a folder that is there and empty.
pub(super) fn import_into(file: &Path, dir: &Path, report: Report) -> Result<(), Error> {
    let reader = File::open(file).map_err(|e| Error::io(file, e))?;
    convert(BufReader::new(reader), file, dir, report)
}

/// Converts an opened file; `path` is for messages, `dir` is there and empty.
pub fn convert<R: Read + Seek>(
    reader: R,
    path: &Path,
    dir: &Path,
    report: Report,
) -> Result<(), Error> {
    let mut gguf = Gguf::read(reader, path)?;
    let (sizes, meta) = sizes::sizes(&gguf)?;
    let mut scaling = sizes::rope_scaling(&meta, &sizes)?;
    let conversions = weights::conversions(&gguf, &sizes)?;
    let vocabulary = Vocabulary::read(&gguf, sizes.vocab)?;
    let tokenizer = vocabulary.tokenizer_json(&gguf)?;
    let tokenizer_config = vocabulary.config_json(sizes.context);
    let ids = special_ids(&vocabulary);
    if let Some(llama3) = sizes::llama3_scaling(&mut gguf, &sizes)? {
        scaling = llama3;
    }
    let config = config_json(&sizes, &conversions, scaling, &ids);
    weights::write_weights(&mut gguf, &conversions.list, &dir.join("model.safetensors"), report)?;
    let mut generation = ids;
    generation["_from_model_config"] = json!(true);
    for (name, content) in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
    ] {
        let text = format!("{content:#}\n");
        files::write_durable(&dir.join(name), text.as_bytes())?;
    }
    Ok(())
}

/// The token ids that config.json and generation_config.json share. Several end tokens are a
/// list, one is a number.
fn special_ids(vocabulary: &Vocabulary) -> Json {
    let eos = match vocabulary.eos.as_slice() {
        [] => Json::Null,
        [one] => json!(one),
        several => json!(several),
    };
    json!({
        "bos_token_id": vocabulary.bos,
        "eos_token_id": eos,
        "pad_token_id": vocabulary.pad,
    })
}

fn config_json(sizes: &Sizes, conversions: &Conversions, scaling: Json, ids: &Json) -> Json {
    let (class, model_type) = match (sizes.family, sizes.sliding_window) {
        (Family::Llama, Some(_)) => ("MistralForCausalLM", "mistral"),
        (family, _) => family.class(),
    };
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": conversions.tied_head,
        "torch_dtype": "float16",
        "use_cache": true,
    });
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        config[key] = ids[key].clone();
    }
    match sizes.family {
        Family::Llama | Family::InternLm2 => {
            config["attention_bias"] = json!(conversions.attention_bias);
            config["mlp_bias"] = json!(conversions.mlp_bias);
            if sizes.sliding_window.is_some() {
                config["sliding_window"] = json!(sizes.sliding_window);
            }
        }
        Family::Qwen2 => config["use_sliding_window"] = json!(false),
        Family::Qwen3 => {
            config["attention_bias"] = json!(false);
            config["use_sliding_window"] = json!(false);
        }
        Family::Phi3 => {
            config["sliding_window"] = json!(sizes.sliding_window);
            config["partial_rotary_factor"] =
                json!(sizes.rotary_dim as f64 / sizes.head_dim as f64);
        }
    }
    config
}
