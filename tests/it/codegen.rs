//! The generator from `config.json` to emitted text, through its public stages.

use bespoke_kernel_gen::config::KernelConfig;
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::plan::{self, KernelVariant, PlanOptions};
use bespoke_kernel_gen::presets::{self, PRESETS};
use bespoke_kernel_gen::spec::{ActivationType, GroupSize, LinearPlace, LinearRole, ModelShape};
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::{generate, name, render};
use proptest::prelude::*;

fn preset(name: &str) -> ModelShape {
    presets::shape(name, &[]).unwrap_or_else(|error| panic!("{error}"))
}

fn planned(shapes: &[ModelShape], targets: &[Target]) -> Vec<KernelVariant> {
    let plan = plan::plan(shapes, targets, &PlanOptions::default());
    plan.unwrap_or_else(|error| panic!("{error}")).variants
}

fn variants(shapes: &[ModelShape]) -> Vec<KernelVariant> {
    planned(shapes, &Target::ALL)
}

fn check_plan(name: &str) {
    let variants = planned(&[preset(name)], &[Target::Avx512]);
    insta::assert_snapshot!(format!("plan_{name}"), plan::print(&variants));
}

#[test]
fn plan_of_smollm2_135m() {
    check_plan("smollm2-135m");
}

#[test]
fn plan_of_smollm2_135m_awq() {
    check_plan("smollm2-135m-awq");
}

#[test]
fn plan_of_qwen2_5_0_5b() {
    check_plan("qwen2.5-0.5b");
}

#[test]
fn plan_of_qwen2_5_7b_awq() {
    check_plan("qwen2.5-7b-awq");
}

#[test]
fn plan_of_llama_3_1_8b_awq() {
    check_plan("llama-3.1-8b-awq");
}

#[test]
fn plan_of_internlm2_5_7b() {
    check_plan("internlm2.5-7b");
}

#[test]
fn plan_of_mistral_7b() {
    check_plan("mistral-7b");
}

/// What the kernels of a model are besides, where some layers' linears are not quantized.
#[test]
fn plan_of_a_mixed_model() {
    let plain = preset("smollm2-135m-awq");
    let mut mixed = plain.clone();
    mixed.dense_linears = [LinearRole::GateUp, LinearRole::Down]
        .map(|role| LinearPlace { layer_idx: 29, role })
        .into();
    let plain = variants(&[plain]);
    let mixed = variants(&[mixed]);
    assert!(plain.iter().all(|variant| mixed.contains(variant)));
    let added: Vec<KernelVariant> =
        mixed.into_iter().filter(|variant| !plain.contains(variant)).collect();
    insta::assert_snapshot!(plan::print(&added));
}

/// One kernel of each op, as it is declared; the hash changes with every template and is left out.
#[test]
fn rendered_kernels() {
    let symbols = [
        "embed_h576_f16__portable",
        "rms_norm_h576_int8_g64__x86_64_v3",
        "gemm_n49152_k576_f16_many__avx512",
        "gemm_n49152_k576_i8_one__avx512",
        "gemm_bf16_n960_k576_few__avx512",
        "awq_gemm_n960_k576_g64_int8_few__avx512",
        "awq_gemm_n576_k1536_g64_float_many__x86_64_v3",
        "awq_gemm_n576_k1536_g64_int8_one__neon",
        "rope_h9_v3_d64_r64_p32_f16__avx512",
        "paged_attention_h9_v3_d64_w0_p32_int8_many__portable",
        "silu_and_mul_i1536_int8_g64__avx512",
        "quantize_k576_g64__avx512",
        "sample_v49152__avx512",
    ];
    let variants = variants(&[preset("smollm2-135m-awq"), preset("smollm2-135m")]);
    let declaration = |symbol: &str| {
        let variant = variants.iter().find(|variant| variant.symbol() == symbol);
        let variant = variant.unwrap_or_else(|| panic!("{symbol} is not planned"));
        render::render(variant).declaration("0")
    };
    insta::assert_snapshot!(format!("kernels! {{\n{}}}\n", symbols.map(declaration).concat()));
}

/// What a model's `config.json` must not ask for, and what is said then.
#[test]
fn refusals() {
    let smollm = |fields: &str| {
        let json = PRESETS.iter().find(|(name, _)| *name == "smollm2-135m").map(|row| row.1);
        json.expect("the preset exists").replacen('{', &format!("{{{fields},"), 1)
    };
    let quantized = |fields: &str| smollm(&format!(r#""quantization_config": {{{fields}}}"#));
    let cases = [
        quantized(r#""quant_method": "awq", "bits": 4, "group_size": 128"#),
        quantized(r#""quant_method": "gptq", "bits": 8, "group_size": 64"#),
        quantized(r#""quant_method": "awq", "version": "gemv""#),
        smollm(r#""num_local_experts": 8"#),
        // NOTE: of two fields of one name the last counts, so these replace the preset's.
        smollm("").replace("\"llama\"", "\"mamba\"").replacen("{,", "{", 1),
        smollm("").replace("\"silu\"", "\"gelu\"").replacen("{,", "{", 1),
        smollm("").replace(": 576", ": 577").replacen("{,", "{", 1),
    ];
    let message = |json: &String| {
        let planned = ModelConfig::parse(json)
            .and_then(|config| config.shape("case"))
            .and_then(|shape| plan::plan(&[shape], &Target::ALL, &PlanOptions::default()));
        match planned {
            Ok(_) => panic!("not refused: {json}"),
            Err(error) => format!("{error}\n"),
        }
    };
    insta::assert_snapshot!(cases.iter().map(message).collect::<String>());
}

/// A spec that no kernel serves ends the plan with its symbol and the reason.
#[test]
fn infeasible_specs_are_errors() {
    let cases: [fn(&mut ModelShape); 6] = [
        |shape| shape.qkv.format = awq(GroupSize::Of(128)),
        |shape| shape.qkv.format = awq(GroupSize::Of(0)),
        |shape| (shape.down.k, shape.down.format) = (1540, awq(GroupSize::Channel)),
        |shape| shape.head_dim = 60,
        |shape| shape.page_size = 24,
        |shape| shape.head_dim = 272,
    ];
    let message = |change: fn(&mut ModelShape)| {
        let mut shape = preset("smollm2-135m-awq");
        change(&mut shape);
        match plan::plan(&[shape], &[Target::Avx512], &PlanOptions::default()) {
            Ok(_) => panic!("an infeasible spec was planned"),
            Err(error) => format!("{error}\n"),
        }
    };
    insta::assert_snapshot!(cases.map(message).concat());
}

fn awq(group: GroupSize) -> bespoke_kernel_gen::spec::WeightFormat {
    bespoke_kernel_gen::spec::WeightFormat::Awq(group)
}

/// A size or a group size that changes, changes the kernels.
#[test]
fn sizes_change_the_generated_kernels() {
    let generated = |shape: &ModelShape| {
        generate(std::slice::from_ref(shape), &[Target::Avx512], &PlanOptions::default())
            .unwrap_or_else(|error| panic!("{error}"))
    };
    let shape = preset("smollm2-135m-awq");
    let before = generated(&shape);
    assert!(before.kernels_rs.contains("awq_gemm_n3072_k576_g64_int8_few__avx512"));
    type Change = fn(&mut ModelShape);
    let changes: [(Change, &str); 4] = [
        (|shape| shape.gate_up.format = awq(GroupSize::Of(32)), "awq_gemm_n3072_k576_g32_int8_few"),
        (|shape| shape.gate_up.n = 3136, "awq_gemm_n3136_k576_g64_int8_few"),
        (|shape| shape.head_dim = 72, "rope_h9_v3_d72_r64_p32_f16"),
        (|shape| shape.page_size = 16, "rope_h9_v3_d64_r64_p16_int4"),
    ];
    for (change, symbol) in changes {
        let mut changed = shape.clone();
        change(&mut changed);
        let after = generated(&changed);
        assert!(!before.kernels_rs.contains(symbol) && after.kernels_rs.contains(symbol));
        assert!(!before.kernels_json.contains(symbol) && after.kernels_json.contains(symbol));
    }
}

#[test]
fn generated_text_is_deterministic() {
    let run = || {
        let shapes = presets::default_shapes().unwrap_or_else(|error| panic!("{error}"));
        generate(&shapes, &Target::ALL, &PlanOptions::default())
            .unwrap_or_else(|error| panic!("{error}"))
    };
    let (first, second) = (run(), run());
    assert!(first == second);
    let folder = env!("CARGO_MANIFEST_DIR");
    assert!(!first.kernels_rs.contains(folder) && !first.kernels_json.contains(folder));
    let rows: serde_json::Value =
        serde_json::from_str(&first.kernels_json).unwrap_or_else(|error| panic!("{error}"));
    let symbols: Vec<&str> =
        rows.as_array().into_iter().flatten().filter_map(|row| row["symbol"].as_str()).collect();
    assert_eq!(symbols.len(), first.kernels_rs.matches("\n    kernel ").count());
    assert!(symbols.iter().all(|symbol| first.kernels_rs.contains(symbol)));
}

#[test]
fn every_linear_has_its_kernels() {
    for (name, _) in PRESETS {
        let shape = preset(name);
        let variants = variants(std::slice::from_ref(&shape));
        for role in [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down] {
            let always = [ActivationType::Float, ActivationType::Int8];
            for activation in always.iter().chain(shape.activations()) {
                let spec = shape.linear(role).kernel(*activation);
                let spec = spec.unwrap_or_else(|error| panic!("{name}: {error}"));
                let num = variants.iter().filter(|variant| variant.spec == spec).count();
                assert_eq!(num, spec.regimes().len() * Target::ALL.len(), "{name}: {spec:?}");
            }
        }
    }
}

#[test]
fn symbols_read_back() {
    let mut num = 0;
    for (preset_name, _) in PRESETS {
        for mut variant in variants(&[preset(preset_name)]) {
            let KernelVariant { spec, regime, target, .. } = variant;
            let candidates = KernelConfig::candidates(&spec, regime, target);
            assert!(candidates.contains(&variant.config), "{variant}");
            for config in candidates {
                variant.config = config;
                assert_eq!(name::parse(&variant.symbol()), Some(variant));
                num += 1;
            }
        }
    }
    assert!(num > 1000, "{num} symbols");
}

proptest! {
    #[test]
    fn strange_symbols_are_not_read(
        text in "[a-z0-9_]{0,40}",
        at in 0usize..40,
        byte in 32u8..127,
    ) {
        if let Some(variant) = name::parse(&text) {
            prop_assert_eq!(variant.symbol(), text);
        }
        let mut symbol = "awq_gemm_n960_k576_g64_int8_few__avx512".to_string().into_bytes();
        let at = at % symbol.len();
        symbol[at] = byte;
        let symbol = String::from_utf8_lossy(&symbol).into_owned();
        if let Some(variant) = name::parse(&symbol) {
            prop_assert_eq!(variant.symbol(), symbol);
        }
    }
}
