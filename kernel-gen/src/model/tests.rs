//! One case a line: fields laid over a small valid config, and what must come out.

mod quantization;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Architecture, ModelConfig, RopeScaling};
use crate::presets::PRESETS;
use crate::spec::DType;

fn base() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16"
    })
}

/// The base with `fields` laid over it.
fn with(fields: Value) -> Value {
    let mut config = base();
    for (name, value) in fields.as_object().expect("the cases are objects") {
        config[name] = value.clone();
    }
    config
}

fn typed(model_type: &str, class: &str, fields: Value) -> Value {
    let mut config = with(fields);
    config["model_type"] = model_type.into();
    config["architectures"] = json!([class]);
    config
}

fn qwen(fields: Value) -> Value {
    typed("qwen2", "Qwen2ForCausalLM", fields)
}

fn awq(fields: Value) -> Value {
    let mut quantization = json!({"quant_method": "awq", "bits": 4, "group_size": 32});
    for (name, value) in fields.as_object().expect("the cases are objects") {
        quantization[name] = value.clone();
    }
    with(json!({"quantization_config": quantization}))
}

fn parse(config: Value) -> ModelConfig {
    ModelConfig::parse(&config.to_string()).unwrap_or_else(|error| panic!("{error}: {config}"))
}

/// The message of a config that must be refused, by parsing or by its shape.
fn refusal(config: &Value) -> String {
    let shape = ModelConfig::parse(&config.to_string()).and_then(|config| config.shape("case"));
    match shape {
        Ok(_) => panic!("not refused: {config}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn sizes_and_defaults() {
    let config = parse(base());
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.num_heads, config.num_kv_heads, config.head_dim), (4, 2, 16));
    assert_eq!((config.rotary_dim, config.max_position), (16, 256));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-5, 10_000.0));
    assert_eq!((config.dtype, config.rope_scaling), (DType::BF16, RopeScaling::Default));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2]));
    assert_eq!((config.sliding_window, config.quantization), (None, None));
    assert!(!(config.qkv_bias || config.o_bias || config.mlp_bias || config.qk_norm));
    assert!(!config.tie_word_embeddings);
}

#[test]
fn fields_that_say_the_same_in_several_ways() {
    assert_eq!(parse(with(json!({"num_key_value_heads": null}))).num_kv_heads, 4);
    assert_eq!(parse(with(json!({"head_dim": null}))).head_dim, 16);
    assert_eq!(parse(with(json!({"head_dim": 24}))).head_dim, 24);
    assert_eq!(parse(with(json!({"eos_token_id": [2, 7]}))).eos_token_ids, [2, 7]);
    assert_eq!(parse(with(json!({"eos_token_id": null}))).eos_token_ids, [0; 0]);
    assert_eq!(parse(with(json!({"dtype": "float32"}))).dtype, DType::F32);
    assert_eq!(parse(with(json!({"torch_dtype": "torch.float16"}))).dtype, DType::F16);
    assert_eq!(parse(with(json!({"torch_dtype": null}))).dtype, DType::F32);
    assert_eq!(parse(with(json!({"partial_rotary_factor": 0.5}))).rotary_dim, 8);
    assert_eq!(parse(with(json!({"model_type": null}))).architecture, Architecture::Llama);
    assert_eq!(parse(with(json!({"architectures": null}))).architecture, Architecture::Llama);
    assert!(parse(with(json!({"tie_word_embeddings": true}))).tie_word_embeddings);
}

#[test]
fn biases_follow_the_family() {
    let bias = |config| {
        let config = parse(config);
        (config.qkv_bias, config.o_bias, config.mlp_bias)
    };
    assert_eq!(bias(with(json!({"attention_bias": true}))), (true, true, false));
    assert_eq!(bias(with(json!({"mlp_bias": true}))), (false, false, true));
    assert_eq!(bias(qwen(json!({}))), (true, false, false));
    let qwen3 = typed("qwen3", "Qwen3ForCausalLM", json!({"attention_bias": true}));
    assert!(parse(qwen3.clone()).qk_norm);
    assert_eq!(bias(qwen3), (true, true, false));
    let internlm = |bias| typed("internlm2", "InternLM2ForCausalLM", json!({"bias": bias}));
    assert_eq!(bias(internlm(true)), (true, true, false));
    assert_eq!(bias(internlm(false)), (false, false, false));
    assert_eq!(bias(typed("phi3", "Phi3ForCausalLM", json!({}))), (false, false, false));
}

#[test]
fn sliding_windows() {
    let mistral = |fields| parse(typed("mistral", "MistralForCausalLM", fields)).sliding_window;
    assert_eq!(mistral(json!({"sliding_window": 8})), Some(8));
    assert_eq!(mistral(json!({"sliding_window": null})), None);
    let qwen = |fields| parse(qwen(fields)).sliding_window;
    assert_eq!(qwen(json!({"sliding_window": 8, "use_sliding_window": false})), None);
    let windowed = |field: &str, value: Value| {
        json!({
            "sliding_window": 8, "use_sliding_window": true, (field): value
        })
    };
    let used = |layers: u32| windowed("max_window_layers", layers.into());
    assert_eq!((qwen(used(4)), qwen(used(0))), (None, Some(8)));
    let types = |kinds: [&str; 4]| windowed("layer_types", json!(kinds));
    assert_eq!(qwen(types(["full_attention"; 4])), None);
    assert_eq!(qwen(types(["sliding_attention"; 4])), Some(8));
    let mixed = ["full_attention", "full_attention", "full_attention", "sliding_attention"];
    assert_eq!(
        refusal(&super::tests::qwen(types(mixed))),
        "config.json: layer_types: a sliding window in 1 of 4 layers; supported is all or none"
    );
    assert_eq!(
        refusal(&super::tests::qwen(used(3))),
        "config.json: max_window_layers: a sliding window in 1 of 4 layers; supported is all or \
         none"
    );
}

#[test]
fn rope_scalings() {
    let scaling = |fields| parse(with(json!({"rope_scaling": fields}))).rope_scaling;
    assert_eq!(scaling(json!(null)), RopeScaling::Default);
    assert_eq!(scaling(json!({"rope_type": "default"})), RopeScaling::Default);
    assert_eq!(
        scaling(json!({"type": "linear", "factor": 4.0})),
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(
        scaling(json!({"rope_type": "dynamic", "factor": 2})),
        RopeScaling::Dynamic { factor: 2.0, original_max_position: 256 }
    );
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32
    });
    assert_eq!(
        scaling(llama3),
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 32,
        }
    );
}

#[test]
fn yarn_follows_transformers() {
    let yarn = |mut fields: Value| {
        fields["rope_type"] = "yarn".into();
        fields["factor"] = json!(4.0);
        parse(with(json!({"rope_scaling": fields}))).rope_scaling
    };
    let expected =
        |original_max_position, attention_factor, beta_fast, truncate| RopeScaling::Yarn {
            factor: 4.0,
            original_max_position,
            beta_fast,
            beta_slow: 1.0,
            attention_factor,
            truncate,
        };
    let temperature = |scale: f64| 0.1 * scale * 4f64.ln() + 1.0;
    assert_eq!(yarn(json!({})), expected(256, temperature(1.0), 32.0, true));
    assert_eq!(
        yarn(json!({"original_max_position_embeddings": 64, "truncate": false})),
        expected(64, temperature(1.0), 32.0, false)
    );
    assert_eq!(
        yarn(json!({"mscale": 0.707, "mscale_all_dim": 2.0, "beta_fast": 16})),
        expected(256, temperature(0.707) / temperature(2.0), 16.0, true)
    );
    assert_eq!(yarn(json!({"mscale": 0.707})), expected(256, temperature(1.0), 32.0, true));
    assert_eq!(yarn(json!({"attention_factor": 1.5})), expected(256, 1.5, 32.0, true));
}

#[test]
fn rope_parameters_replace_the_older_fields() {
    let config = parse(with(json!({"rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5
    }})));
    assert_eq!(config.rope_scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!((config.rope_theta, config.rotary_dim), (5e5, 8));
    let nested = with(json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}));
    assert_eq!(
        refusal(&nested),
        "config.json: rope_parameters.full_attention: an object given; one rope for all layers is \
         supported"
    );
}

/// What cannot run is refused by field, value and what can.
#[test]
fn refusals() {
    let cases = [
        (with(json!({"num_local_experts": 8})), "num_local_experts: 8 given; mixture of experts"),
        (with(json!({"num_experts": 128})), "num_experts: 128 given; mixture of experts"),
        (
            with(json!({"model_type": "gemma2"})),
            "model_type: \"gemma2\" is not supported; supported",
        ),
        (with(json!({"model_type": "qwen"})), "model_type: \"qwen\" is not supported; supported"),
        (
            with(json!({"model_type": null, "architectures": null})),
            "model_type: missing; supported",
        ),
        (
            with(json!({"architectures": ["LlamaForSequenceClassification"]})),
            "architectures: \"LlamaForSequenceClassification\" is not supported",
        ),
        (
            with(json!({"architectures": ["Qwen2ForCausalLM"]})),
            "architectures: Qwen2 does not agree with model_type Llama",
        ),
        (
            with(json!({"hidden_act": "gelu"})),
            "hidden_act: \"gelu\" is not supported; supported is silu",
        ),
        (
            with(json!({"torch_dtype": "float8_e4m3fn"})),
            "torch_dtype: \"float8_e4m3fn\" is not supported",
        ),
        (
            awq(json!({"quant_method": "bitsandbytes"})),
            "quant_method: \"bitsandbytes\" is not supported; supported are",
        ),
        (awq(json!({"quant_method": null})), "quant_method: \"\" is not supported; supported are"),
        (awq(json!({"version": "gemv"})), "version: \"gemv\" is not supported; supported are"),
        (awq(json!({"version": "marlin"})), "version: \"marlin\" is not supported; supported are"),
        (awq(json!({"bits": 8})), "bits: 8 is not supported; supported are"),
        (awq(json!({"group_size": 0})), "group_size: 0 given, a multiple of 8 up to 65536, or -1"),
        (awq(json!({"group_size": 12})), "group_size: 12 given, a multiple of 8"),
        (awq(json!({"group_size": 128})), "group size 128 does not divide the input size 64"),
        (
            with(json!({"rope_scaling": {"type": "longrope"}})),
            "rope_scaling.type: longrope (\"longrope\") is not supported",
        ),
        (
            typed("phi3", "Phi3ForCausalLM", json!({"rope_scaling": {"type": "yarn"}})),
            "rope_scaling.type: longrope (\"yarn\") is not supported",
        ),
        (
            with(json!({"rope_scaling": {"rope_type": "mrope"}})),
            "rope_scaling.rope_type: \"mrope\" is not supported",
        ),
        (with(json!({"rope_scaling": {"rope_type": "linear"}})), "rope_scaling.factor: missing"),
        (
            typed("mistral", "MistralForCausalLM", json!({"mlp_bias": true})),
            "mlp_bias: true given, but Mistral models have no such bias",
        ),
        (
            typed("mistral", "MistralForCausalLM", json!({"num_key_value_heads": null})),
            "num_key_value_heads: missing, an integer from 1 to 4096 expected",
        ),
    ];
    check_refusals(&cases);
}

#[test]
fn numbers_out_of_range() {
    let cases = [
        (with(json!({"hidden_size": null})), "hidden_size: missing, an integer from 1 to 131072"),
        (with(json!({"hidden_size": 576.0})), "hidden_size: 576.0 given, an integer"),
        (with(json!({"hidden_size": -64})), "hidden_size: -64 given, an integer"),
        (with(json!({"hidden_size": "64"})), "hidden_size: \"64\" given, an integer"),
        (with(json!({"hidden_size": 1u64 << 40})), "hidden_size: 1099511627776 given, an integer"),
        (
            with(json!({"num_hidden_layers": 0})),
            "num_hidden_layers: 0 given, an integer from 1 to 1024",
        ),
        (with(json!({"vocab_size": [1]})), "vocab_size: a list of 1 given, an integer"),
        (
            with(json!({"max_position_embeddings": 1 << 25})),
            "max_position_embeddings: 33554432 given",
        ),
        (
            with(json!({"num_key_value_heads": 3})),
            "num_key_value_heads: 3 does not divide num_attention_heads 4",
        ),
        (
            with(json!({"num_attention_heads": 6, "num_key_value_heads": 2})),
            "num_attention_heads: 6 does not divide hidden_size 64, and there is no head_dim",
        ),
        (with(json!({"head_dim": 20})), "head_dim: 20 is not a multiple of 8 up to 1024"),
        (
            with(json!({"num_attention_heads": 16})),
            "head_dim: 4 (hidden_size / num_attention_heads) is not a multiple of 8",
        ),
        (
            with(json!({"partial_rotary_factor": 0.45})),
            "partial_rotary_factor: 0.45 of head_dim 16 is 7",
        ),
        (
            with(json!({"partial_rotary_factor": 2})),
            "partial_rotary_factor: 2 given, a number from",
        ),
        (with(json!({"rope_theta": 0})), "rope_theta: 0 given, a number from"),
        (with(json!({"rms_norm_eps": "small"})), "rms_norm_eps: \"small\" given, a number from"),
        (with(json!({"eos_token_id": -1})), "eos_token_id: -1 given, a token id below 512"),
        (with(json!({"eos_token_id": [2, 512]})), "eos_token_id: 512 given, a token id below 512"),
        (with(json!({"tie_word_embeddings": 1})), "tie_word_embeddings: 1 given, true or false"),
        (with(json!({"rope_scaling": [1]})), "rope_scaling: a list of 1 given, an object expected"),
    ];
    check_refusals(&cases);
}

fn check_refusals(cases: &[(Value, &str)]) {
    for (config, expected) in cases {
        let message = refusal(config);
        assert!(message.contains(expected), "expected {expected:?} in {message:?}");
    }
}

#[test]
fn text_that_is_no_object() {
    let message = |text| ModelConfig::parse(text).expect_err("no config").to_string();
    assert_eq!(message("[]"), "config.json:1:1: a list of 0 given, an object expected");
    assert!(
        message("{\"a\": 1e999}").starts_with("config.json:1:"),
        "{}",
        message("{\"a\": 1e999}")
    );
    assert!(message(&"[".repeat(100_000)).starts_with("config.json:1:"));
    let path = std::path::Path::new("/nonexistent/config.json");
    let error = ModelConfig::from_file(path).expect_err("no file");
    assert!(error.to_string().starts_with("/nonexistent/config.json: "), "{error}");
}

fn any_value() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0i64..4096).prop_map(Value::from),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        number,
        "[a-z0-9_.é]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Replaces the value of the `at`-th field, counting those of nested objects.
fn replace(value: &mut Value, at: &mut usize, new: &Value) {
    let Value::Object(map) = value else { return };
    for (_, value) in map.iter_mut() {
        if *at == 0 {
            *value = new.clone();
        }
        *at = at.wrapping_sub(1);
        replace(value, at, new);
    }
}

proptest! {
    /// Whatever a field holds, the answer is a model whose kernels can be listed, or an error.
    #[test]
    fn mutated_configs_never_panic(
        preset in 0..PRESETS.len(),
        mutations in prop::collection::vec((0usize..40, any_value()), 1..4),
    ) {
        let mut config: Value = serde_json::from_str(PRESETS[preset].1).expect("presets are JSON");
        for (at, new) in mutations {
            replace(&mut config, &mut at.clone(), &new);
        }
        if let Ok(shape) = ModelConfig::parse(&config.to_string()).and_then(|c| c.shape("case")) {
            let _ = crate::plan::plan(
                &[shape],
                &crate::target::Target::ALL,
                &crate::plan::PlanOptions::default(),
            );
        }
    }

    #[test]
    fn damaged_text_never_panics(
        preset in 0..PRESETS.len(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut bytes = PRESETS[preset].1.as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let cut = String::from_utf8_lossy(&bytes[..at]).into_owned();
        let _ = ModelConfig::parse(&cut).and_then(|config| config.shape("case"));
        let damaged = String::from_utf8_lossy(&bytes).into_owned();
        let _ = ModelConfig::parse(&damaged).and_then(|config| config.shape("case"));
    }
}
