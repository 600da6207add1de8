//! Configs of quantized checkpoints, and the shapes of what is left out.

use serde_json::{Value, json};

use super::{awq, check_refusals, parse, refusal, with};
use crate::model::{AwqConfig, Packing};
use crate::spec::{DType, GroupSize, LinearPlace, LinearRole, WeightFormat};

#[test]
fn awq_configs() {
    let quantization = |fields| parse(awq(fields)).quantization;
    let expected = |group_size, zero_point| {
        Some(AwqConfig {
            group_size,
            zero_point,
            modules_to_not_convert: Vec::new(),
            packing: Packing::Awq,
        })
    };
    let of32 = GroupSize::Of(32);
    assert_eq!(quantization(json!({})), expected(of32, true));
    assert_eq!(quantization(json!({"version": "GEMM"})), expected(of32, true));
    assert_eq!(quantization(json!({"zero_point": false})), expected(of32, false));
    assert_eq!(quantization(json!({"group_size": -1})), expected(GroupSize::Channel, true));
    let autoawq = json!({"bits": null, "group_size": null, "w_bit": 4, "q_group_size": 64});
    assert_eq!(quantization(autoawq), expected(GroupSize::Of(64), true));
    let none = json!({"modules_to_not_convert": null});
    assert_eq!(quantization(none), expected(of32, true));
}

#[test]
fn modules_left_out_stay_dense() {
    let formats = |names: Value| {
        let shape = parse(awq(json!({"modules_to_not_convert": names}))).shape("case");
        let shape = shape.unwrap_or_else(|error| panic!("{error}"));
        [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down, LinearRole::Head]
            .map(|role| shape.linear(role).format)
    };
    let (dense, int4) = (WeightFormat::Dense(DType::BF16), WeightFormat::Awq(GroupSize::Of(32)));
    assert_eq!(formats(json!([])), [int4, int4, int4, int4, dense]);
    assert_eq!(formats(json!(["lm_head"])), [int4, int4, int4, int4, dense]);
    assert_eq!(formats(json!(["down_proj"])), [int4, int4, int4, dense, dense]);
    assert_eq!(formats(json!(["self_attn"])), [dense, dense, int4, int4, dense]);
    assert_eq!(formats(json!(["mlp.gate"])), [int4, int4, int4, int4, dense]);
    let refused = |names| refusal(&awq(json!({"modules_to_not_convert": names})));
    let field = "config.json: quantization_config.modules_to_not_convert: ";
    assert_eq!(
        refused(json!(["q_proj"])),
        format!(
            "{field}\"q_proj\" leaves out self_attn.q_proj of layer 0, but not self_attn.k_proj \
             and self_attn.v_proj, and they are one matmul; leave out all of them or none"
        )
    );
    assert_eq!(
        refused(json!(["layers.1.mlp.up_proj"])),
        format!(
            "{field}\"layers.1.mlp.up_proj\" leaves out mlp.up_proj of layer 1, but not \
             mlp.gate_proj, and they are one matmul; leave out all of them or none"
        )
    );
    assert_eq!(refused(json!([".*"])), format!("{field}\".*\" is not a plain module name"));
}

#[test]
fn layers_left_out_stay_dense() {
    let shape = |names: Value| {
        let shape = parse(awq(json!({"modules_to_not_convert": names}))).shape("case");
        shape.unwrap_or_else(|error| panic!("{error}"))
    };
    let place = |layer_idx, role| LinearPlace { layer_idx, role };
    let (dense, int4) = (WeightFormat::Dense(DType::BF16), WeightFormat::Awq(GroupSize::Of(32)));
    let mixed = shape(json!(["layers.3.mlp", "model.layers.1.mlp.down_proj"]));
    assert_eq!(
        mixed.dense_linears,
        [place(1, LinearRole::Down), place(3, LinearRole::GateUp), place(3, LinearRole::Down),]
    );
    assert_eq!((mixed.down.format, mixed.gate_up.format), (int4, int4));
    let formats = |role| [0, 1, 2, 3].map(|layer_idx| mixed.linear_in(role, layer_idx).format);
    assert_eq!(formats(LinearRole::Down), [int4, dense, int4, dense]);
    assert_eq!(formats(LinearRole::GateUp), [int4, int4, int4, dense]);
    assert_eq!(formats(LinearRole::Qkv), [int4; 4]);
    assert_eq!(formats(LinearRole::Head), [dense; 4]);
    // What all layers leave out is dense, and no mixture.
    let all = shape(json!(["layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "layers.3.mlp"]));
    assert_eq!(all, shape(json!(["mlp"])));
    assert!(all.dense_linears.is_empty());
}

#[test]
fn gptq_configs() {
    let gptq = |fields: Value| {
        let mut config = awq(json!({"quant_method": "gptq", "sym": true, "desc_act": false}));
        for (name, value) in fields.as_object().expect("the cases are objects") {
            config["quantization_config"][name] = value.clone();
        }
        config
    };
    let packing = |fields| {
        let config = parse(gptq(fields)).quantization.expect("a quantization");
        assert!(config.zero_point);
        config.packing
    };
    let of = |zero_offset, act_order| Packing::Gptq { zero_offset, act_order };
    assert_eq!(packing(json!({})), of(1, false));
    assert_eq!(packing(json!({"desc_act": true})), of(1, true));
    assert_eq!(packing(json!({"checkpoint_format": "gptq"})), of(1, false));
    assert_eq!(packing(json!({"checkpoint_format": "gptq_v2"})), of(0, false));
    assert_eq!(packing(json!({"format": "gptq_v2", "checkpoint_format": "gptq_v2"})), of(0, false));
    let harmless = json!({"dynamic": {}, "lm_head": false, "pack_dtype": "int32", "sym": false});
    assert_eq!(packing(harmless), of(1, false));
    let cases = [
        (gptq(json!({"bits": 8})), "quantization_config.bits: 8 is not supported; supported are"),
        (gptq(json!({"bits": null})), "bits: missing, an integer from 1 to 64 expected"),
        (gptq(json!({"checkpoint_format": "marlin"})), "checkpoint_format: \"marlin\" is not"),
        (
            gptq(json!({"checkpoint_format": "gptq", "format": "gptq_v2"})),
            "format: does not agree with checkpoint_format",
        ),
        (gptq(json!({"is_marlin_format": true})), "is_marlin_format: true given, which is not"),
        (gptq(json!({"dynamic": {"-:.*down": {}}})), "dynamic: an object given, which is not"),
        (
            gptq(json!({"modules_in_block_to_quantize": [["mlp.up_proj"]]})),
            "modules_in_block_to_quantize: a list of 1 given",
        ),
        (gptq(json!({"lm_head": true})), "lm_head: true given"),
        (gptq(json!({"pack_dtype": "int8"})), "pack_dtype: \"int8\" is not supported"),
        (gptq(json!({"group_size": 12})), "group_size: 12 given, a multiple of 8"),
    ];
    check_refusals(&cases);
}

/// A config of compressed-tensors whose fields, the group's and those of its weights are laid over.
fn compressed(fields: Value, group: Value, weights: Value) -> Value {
    let mut config = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "kv_cache_scheme": null, "sparsity_config": {}, "transform_config": {},
        "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": null, "output_activations": null,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group",
                "group_size": 32, "dynamic": false, "actorder": null, "block_structure": null,
                "observer": "minmax"
            }
        }}
    });
    let lay = |target: &mut Value, fields: Value| {
        for (name, value) in fields.as_object().expect("the cases are objects") {
            target[name] = value.clone();
        }
    };
    lay(&mut config["config_groups"]["group_0"]["weights"], weights);
    lay(&mut config["config_groups"]["group_0"], group);
    lay(&mut config, fields);
    with(json!({"quantization_config": config}))
}

#[test]
fn compressed_configs() {
    let none = || json!({});
    let read = |weights| {
        let config = parse(compressed(none(), none(), weights)).quantization;
        let config = config.expect("a quantization");
        (config.group_size, config.zero_point, config.packing)
    };
    let packing = |act_order| Packing::CompressedTensors { act_order };
    let of32 = GroupSize::Of(32);
    assert_eq!(read(none()), (of32, false, packing(false)));
    assert_eq!(read(json!({"symmetric": false})), (of32, true, packing(false)));
    assert_eq!(read(json!({"actorder": "group"})), (of32, false, packing(true)));
    assert_eq!(read(json!({"actorder": "static"})), (of32, false, packing(false)));
    let channel = json!({"strategy": "channel", "group_size": null});
    assert_eq!(read(channel), (GroupSize::Channel, false, packing(false)));
    assert_eq!(read(json!({"strategy": null})), (of32, false, packing(false)));

    // Names are whole.
    let ignored = |names| compressed(json!({"ignore": names}), none(), none());
    let shape = parse(ignored(json!(["lm_head", "mlp", "model.layers.2.mlp.down_proj"])));
    let shape = shape.shape("case").unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(shape.dense_linears, [LinearPlace { layer_idx: 2, role: LinearRole::Down }]);
    let mut tied = compressed(json!({"ignore": []}), none(), none());
    tied["tie_word_embeddings"] = true.into();
    assert!(parse(tied).shape("case").is_ok());
}

#[test]
fn compressed_refusals() {
    let none = || json!({});
    let top = |fields| compressed(fields, none(), none());
    let group = |fields| compressed(none(), fields, none());
    let weights = |fields| compressed(none(), none(), fields);
    let ignored = |names| compressed(json!({"ignore": names}), none(), none());
    let cases = [
        (ignored(json!([])), "ignore: \"lm_head\" is missing; a quantized head is not supported"),
        (
            ignored(json!(["lm_head", "re:.*down_proj"])),
            "ignore: \"re:.*down_proj\" is not a plain module name",
        ),
        (
            ignored(json!(["lm_head", "model.layers.0.self_attn.v_proj"])),
            "ignore: \"model.layers.0.self_attn.v_proj\" leaves out self_attn.v_proj of layer 0",
        ),
        (top(json!({"format": "int-quantized"})), "format: \"int-quantized\" is not supported"),
        (top(json!({"format": null})), "format: \"\" is not supported"),
        (top(json!({"kv_cache_scheme": {"num_bits": 8}})), "kv_cache_scheme: an object given"),
        (
            top(json!({"sparsity_config": {"format": "sparse-24-bitmask"}})),
            "sparsity_config.format: \"sparse-24-bitmask\" is not supported",
        ),
        (
            top(json!({"transform_config": {"config_groups": {"u": {}}}})),
            "transform_config.config_groups: an object given",
        ),
        (top(json!({"config_groups": {}})), "config_groups: 0 given; supported is one group"),
        (top(json!({"config_groups": {"a": {}, "b": {}}})), "config_groups: 2 given"),
        (top(json!({"config_groups": {"a": 1}})), "config_groups.a: 1 given, an object expected"),
        (group(json!({"targets": ["re:.*mlp.*"]})), "*.targets: \"re:.*mlp.*\" given; supported"),
        (group(json!({"input_activations": {"a": 1}})), "input_activations: an object given"),
        (group(json!({"format": "marlin-24"})), "*.format: \"marlin-24\" is not supported"),
        (group(json!({"weights": null})), "*.weights: missing"),
        (weights(json!({"num_bits": 8})), "*.weights.num_bits: 8 is not supported"),
        (weights(json!({"type": "float"})), "*.weights.type: \"float\" is not supported"),
        (weights(json!({"strategy": "tensor"})), "weights.strategy: \"tensor\" is not supported"),
        (weights(json!({"strategy": "channel"})), "group_size: 32 does not agree with the"),
        (weights(json!({"group_size": null})), "*.weights.group_size: missing"),
        (weights(json!({"dynamic": true})), "*.weights.dynamic: true given"),
        (weights(json!({"block_structure": [1, 2]})), "block_structure: a list of 2 given"),
        (weights(json!({"actorder": "some"})), "*.weights.actorder: \"some\" given"),
        (weights(json!({"zp_dtype": "torch.uint8"})), "zp_dtype: \"torch.uint8\" is not"),
    ];
    check_refusals(&cases);
}
