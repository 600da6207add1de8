//! The command `model`: what it says of records, as text and as JSON.

use bespoke_kernel_gen::plan::{KernelVariant, candidates};
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::record::{
    Appender, Case, Outcome, Problem, Record, Time, VERSION, Variant,
};
use bespoke_kernel_gen::tuning::{CpuDevice, Device, commands};

const SPECS: [&str; 2] = ["awq_gemm_n960_k576_g64_int8", "awq_gemm_n576_k576_g64_int8"];
const KEY: &str = "avx512-amd-25-17-l2-1024-l3-32768-t2";

fn record(variant: &KernelVariant, spec: &str, vs_default: f64) -> Record {
    let time = Time {
        mode: "backend".to_string(),
        cache: "cold".to_string(),
        us: [vs_default; 3],
        num_samples: 20,
        default: format!("{spec}_few__avx512"),
        vs_default,
        noise: 0.01,
        limit_us: None,
    };
    Record {
        v: VERSION,
        problem: Problem {
            spec: spec.to_string(),
            target: "avx512".to_string(),
            case: Case::Rows(4),
        },
        device: Device::Cpu(CpuDevice::parse_key(KEY).unwrap()),
        variant: Variant {
            symbol: variant.symbol(),
            source_hash: "1".to_string(),
            compiler: "rustc 1.89.0".to_string(),
            code_bytes: 1,
        },
        outcome: Outcome::Time(time),
        measured_at: 0,
    }
}

fn model(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
    commands::run("model", &commands::parse("model", &words).unwrap()).unwrap()
}

#[test]
fn the_regret_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let empty = model(&["--records", path]);
    assert!(empty.contains("no times"), "{empty}");
    let mut appender = Appender::open(&folder.path().join("a.jsonl")).unwrap();
    for name in SPECS {
        let spec = bespoke_kernel_gen::name::parse_spec(name).unwrap();
        let few = |one: &KernelVariant| one.symbol().starts_with(&format!("{name}_few_r"));
        for variant in candidates(&spec, Target::Avx512).iter().filter(|one| few(one)) {
            let ratio = if variant.config.prefetch == 0 { 0.8 } else { 1.1 };
            appender.append(&record(variant, name, ratio)).unwrap();
        }
    }
    let text = model(&["--records", path]);
    assert!(text.starts_with(&format!("devices like {KEY}\n")), "{text}");
    assert!(text.contains("regret 0.0 %") && text.contains("defaults 25.0 %"), "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&model(&["--json", "--records", path])).unwrap();
    let class = &json["families"][0]["classes"][0];
    assert_eq!(
        (&class["class"], &class["num_problems"]),
        (&"awq_gemm_int8.avx512".into(), &2.into())
    );
    assert_eq!(class["scores"]["mean_regret"], 0.0);
    assert!((class["scores"]["default_regret"].as_f64().unwrap() - 0.25).abs() < 1e-9);
    assert!(class["scores"]["worst_case"].as_str().unwrap().ends_with("rows 4"));
}
