//! `bespoke export` and `bespoke dequantize`.

use std::fs;

use bespoke::cli::Exit;
use safetensors::SafeTensors;

use super::{check_error, json, keys, run, tiny, tiny_with_tokenizer};

#[test]
fn writes_gguf_that_imports() {
    let dir = tiny_with_tokenizer();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (model, file) = (path(""), path("model.gguf"));
    let args = ["export", "gguf", &model, "-o", &file];
    let report = json(&[&args[..], &["--json"]].concat());
    let expected = [
        "model",
        "output",
        "bytes",
        "tensors",
        "groups",
        "rounded_groups",
        "error_max_steps",
        "notes",
    ];
    assert_eq!(keys(&report), expected);
    assert_eq!((&report["tensors"], &report["groups"]), (&21.into(), &0.into()));
    check_error(&args, Exit::Failed, "already exists");
    let shown = run(&[&args[..], &["--overwrite", "--head", "q8_0"]].concat());
    assert!(shown.out.contains("model.gguf: 21 tensors, "), "{}{}", shown.out, shown.err);
    let imported = path("imported");
    assert_eq!(run(&["import", "gguf", &file, "-o", &imported]).exit, Exit::Done);
    check_error(&["export", "gguf", &model], Exit::WrongUsage, "--output");
    check_error(&["export", "gguf", &model, "-o", &imported], Exit::Failed, "imported");
    let args = [&args[..], &["--weights", "q2_k"]].concat();
    check_error(&args, Exit::WrongUsage, "'q2_k'");
}

#[test]
fn tells_what_was_rounded() {
    let dir = tiny_with_tokenizer();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(tiny("llama-awq-g64").join(name), dir.path().join(name)).unwrap();
    }
    // 160 tokens are too few for every byte.
    let tokenizer = fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_str(&tokenizer).unwrap();
    tokenizer["added_tokens"] = serde_json::json!([]);
    tokenizer["model"]["merges"] = serde_json::json!([]);
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|_, id| id.as_u64().unwrap() < 128);
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let (model, file) = (dir.path(), dir.path().join("model.gguf"));
    let args = ["export", "gguf", model.to_str().unwrap(), "-o", file.to_str().unwrap()];
    let shown = run(&args).out;
    assert!(shown.contains("that float16 rounds, by 0.00"), "{shown}");
    let shown = run(&[&args[..], &["--overwrite", "--weights", "q5_0"]].concat()).out;
    assert!(shown.contains("groups of 4-bit weights are exact"), "{shown}");
}

#[test]
fn dequantizes_every_quantized_linear() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dequantized.safetensors");
    let args = |case: &str| {
        let model = tiny(case).to_str().unwrap().to_owned();
        ["dequantize".to_owned(), model, "-o".to_owned(), file.to_str().unwrap().to_owned()]
    };
    for (case, num_tensors) in [("llama-awq-g32", 14), ("llama-gqa2", 0)] {
        let args = args(case);
        let shown = run(&args.each_ref().map(String::as_str));
        assert_eq!((shown.exit, shown.out.as_str()), (Exit::Done, ""), "{}", shown.err);
        let bytes = fs::read(&file).unwrap();
        assert_eq!(SafeTensors::deserialize(&bytes).unwrap().len(), num_tensors, "{case}");
    }
}
