//! The command line, run inside the test's process.

mod bench;
mod eval;
mod export;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use bespoke::cli::{self, Console, Exit};
use bespoke::kernels::generated;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::tokenizer::byte_tokenizer;

/// What a command left behind.
struct Run {
    exit: Exit,
    out: String,
    err: String,
}

/// Runs `bespoke ARGS` with a model cache of its own.
fn run_in(home: &Path, args: &[&str]) -> Run {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut console = Console {
        out: &mut out,
        err: &mut err,
        is_terminal: false,
        kernels: generated::table(),
        home: Some(home.to_owned()),
        program: None,
        bundle: None,
        start: Instant::now(),
        before_main: None,
    };
    let exit = cli::run([&["bespoke"], args].concat(), &mut console);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { exit, out: text(out), err: text(err) }
}

fn run(args: &[&str]) -> Run {
    run_in(tempfile::tempdir().unwrap().path(), args)
}

/// Runs a command that must succeed, and reads its standard output as one JSON value.
#[track_caller]
fn json(args: &[&str]) -> Value {
    let run = run(args);
    assert_eq!(run.exit, Exit::Done, "{}", run.err);
    serde_json::from_str(&run.out).unwrap()
}

#[track_caller]
fn check_error(args: &[&str], exit: Exit, expect: &str) {
    let run = run(args);
    assert_eq!((run.exit, run.out.as_str()), (exit, ""), "{args:?}: {}", run.err);
    let told = run.err.lines().any(|line| line.starts_with("error: "));
    assert!(told || exit == Exit::WrongUsage, "{}", run.err);
    assert!(run.err.contains(expect), "{args:?}: {}", run.err);
}

fn tiny(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/tiny").join(case)
}

/// A tiny model with a byte-level tokenizer and a chat template, in a folder of its own.
fn tiny_with_tokenizer() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(tiny("llama-gqa2").join(name), dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    dir
}

const REFERENCE: [&str; 2] = ["--backend", "reference"];

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn wrong_usage_exits_with_2() {
    let check = |args: &[&str], expect: &str| check_error(args, Exit::WrongUsage, expect);
    check(&[], "Usage: bespoke");
    check(&["brew"], "unrecognized subcommand 'brew'");
    check(&["generate", "--model", "m"], "--prompt");
    check(&["generate", "--model", "m", "--prompt", "a", "--prompt-ids", "1"], "cannot be used");
    check(&["generate", "--model", "m", "--prompt-ids", "1,x"], "'x' is not a token id");
    check(&["generate", "--model", "m", "--prompt", "a", "--threads", "0"], "from 1 to 1024");
    check(&["generate", "--prompt", "a"], "--model");
    check(&["logits", "--model", "m", "--prompt-ids", "1"], "--output");
    check(&["quantize", "m", "-o", "d", "--group-size", "48"], "'48'");
    check(&["quantize", "m", "-o", "d", "--method", "guess"], "'guess'");
    check(&["quantize", "m", "-o", "d", "--shard-size", "5T"], "such as 500M or 5G");
    let both = ["--report-perplexity", "f", "--no-report-perplexity"];
    check(&[&["quantize", "m", "-o", "d"], &both[..]].concat(), "cannot be used");
}

#[test]
fn helps() {
    for command in [
        "quickstart",
        "pull",
        "import",
        "export",
        "quantize",
        "generate",
        "chat",
        "logits",
        "perplexity",
        "eval",
        "bench",
        "kernels",
    ] {
        let run = run(&[command, "--help"]);
        assert_eq!((run.exit, run.err.as_str()), (Exit::Done, ""), "{command}");
        assert!(run.out.contains(&format!("Usage: bespoke {command}")), "{}", run.out);
    }
    assert!(run(&["--version"]).out.starts_with("bespoke "));
}

#[test]
fn failures_exit_with_1() {
    let check = |args: &[&str], expect: &str| check_error(args, Exit::Failed, expect);
    check(&["generate", "--model", "nowhere", "--prompt", "a"], "no model 'nowhere'");
    check(
        &["generate", "--model", "smollm2-135m", "--prompt", "a"],
        "run: bespoke pull smollm2-135m",
    );
    check(&["perplexity", "--model", "../..", "--file", "x"], "without config.json");
    check(&["pull", "no-such-preset"], "neither a Hub repository");
    check(&["import", "gguf", "/no/such.gguf", "-o", "/no/out"], "/no");
    let empty = tempfile::tempdir().unwrap();
    let out = empty.path().join("out");
    let out = out.to_str().unwrap();
    check(&["quantize", empty.path().to_str().unwrap(), "-o", out], "without config.json");
    let file = empty.path().join("not.gguf");
    fs::write(&file, "GGUFx").unwrap();
    check(&["import", "gguf", file.to_str().unwrap(), "-o", out], "not.gguf");
    assert!(!Path::new(out).exists());
}

#[test]
fn generates_from_ids() {
    let model = tiny("llama-gqa2");
    let model = model.to_str().unwrap();
    let args = ["generate", "--model", model, "--prompt-ids", "5, 6,7", "--max-tokens", "4"];
    let report = json(&[&args[..], &REFERENCE, &["--ignore-eos", "--json"]].concat());
    assert_eq!(
        keys(&report),
        [
            "model",
            "backend",
            "prompt_ids",
            "output_ids",
            "text",
            "logprobs",
            "finish_reason",
            "timing",
            "memory",
        ]
    );
    assert_eq!(report["model"], model);
    assert_eq!(report["backend"], "reference");
    assert_eq!(report["prompt_ids"], serde_json::json!([5, 6, 7]));
    assert_eq!(report["output_ids"].as_array().unwrap().len(), 4);
    let logprobs = report["logprobs"].as_array().unwrap();
    assert!(logprobs.len() == 4 && logprobs.iter().all(|value| value.as_f64().unwrap() <= 0.0));
    assert_eq!(report["text"], Value::Null);
    assert_eq!(report["finish_reason"], "length");
    assert_eq!(
        keys(&report["timing"]),
        ["load_ms", "first_token_ms", "total_ms", "prompt_tokens_per_s", "decode_tokens_per_s"]
    );
    assert_eq!(keys(&report["memory"]), ["weights_bytes", "kv_cache_bytes", "peak_rss_bytes"]);
    assert!(report["memory"]["weights_bytes"].as_u64().unwrap() > 0);

    let run = run(&[&args[..], &REFERENCE, &["--ignore-eos"]].concat());
    let ids: Vec<String> =
        report["output_ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(run.out, format!("{}\n", ids.join(",")));
    assert!(run.err.contains("[3 prompt tokens at "), "{}", run.err);
}

#[test]
fn generates_text() {
    let dir = tiny_with_tokenizer();
    let model = dir.path().to_str().unwrap();
    let args = ["generate", "--model", model, "--max-tokens", "24", "--ignore-eos"];
    let args = [&args[..], &REFERENCE, &["--prompt", "hello"]].concat();
    let report = json(&[&args[..], &["--json"]].concat());
    assert_eq!(report["prompt_ids"], serde_json::json!([256, 257, 111]));
    let text = report["text"].as_str().unwrap();
    // People get the same text, as a stream, and nothing else on standard output.
    assert_eq!(run(&args).out, format!("{text}\n"));

    // A stop string ends the answer before it.
    let (at, stop) = text.char_indices().nth(4).expect("24 tokens with some text");
    let stop = stop.to_string();
    let at = text.find(&stop).unwrap_or(at);
    let stopped = json(&[&args[..], &["--json", "--stop", &stop]].concat());
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..at]);
    assert_eq!(stopped["finish_reason"], "stop");
    let num_ids = |report: &Value| report["output_ids"].as_array().unwrap().len();
    assert!(num_ids(&stopped) < num_ids(&report));
}

#[test]
fn takes_sampling_options() {
    let dir = tiny_with_tokenizer();
    let model = dir.path().to_str().unwrap();
    let generate = |more: &[&str]| {
        let args = ["generate", "--model", model, "--max-tokens", "6", "--prompt-ids", "5,6,7"];
        json(&[&args[..], &REFERENCE, &["--json"], more].concat())
    };
    let ids = |more: &[&str]| -> Vec<u64> {
        let report = generate(&[&["--ignore-eos", "--logit-bias", "104=100"], more].concat());
        let ids = report["output_ids"].as_array().unwrap().iter();
        ids.map(|id| id.as_u64().unwrap()).collect()
    };
    // Token 104 is the byte "h"; the bias makes it win wherever nothing forbids it.
    assert_eq!(ids(&[]), [104; 6]);
    assert_ne!(ids(&["--logit-bias", "104=-100", "--logit-bias", "104=-100"])[0], 104);
    assert!(!ids(&["--bad-words", "h"]).contains(&104));
    let alternate = ids(&["--bad-words", " hh"]);
    for (idx, id) in alternate.iter().enumerate() {
        assert_eq!(*id == 104, idx % 2 == 0, "{alternate:?}");
    }

    // Token 258 ends an answer, as generation_config.json says.
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 258}"#).unwrap();
    let end = ["--logit-bias", "258=100", "--min-tokens"];
    for (min_tokens, num_output) in [("0", 1), ("1", 2), ("4", 5)] {
        let report = generate(&[&end[..], &[min_tokens]].concat());
        assert_eq!(report["finish_reason"], "stop");
        assert_eq!(report["output_ids"].as_array().unwrap().len(), num_output);
    }

    let report = generate(&["--ignore-eos", "--top-logprobs", "3"]);
    let rows = report["top_logprobs"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    for ((row, id), logprob) in rows
        .iter()
        .zip(report["output_ids"].as_array().unwrap())
        .zip(report["logprobs"].as_array().unwrap())
    {
        assert_eq!(row.as_array().unwrap().len(), 3);
        assert_eq!(row[0], serde_json::json!([id, logprob]));
        assert!(row[1][1].as_f64() <= row[0][1].as_f64());
    }
}

#[test]
fn refuses_bad_sampling_options() {
    let dir = tiny_with_tokenizer();
    let model = dir.path().to_str().unwrap();
    let args = |more: &[&'static str]| {
        [&["generate", "--model", model, "--prompt", "a"], &REFERENCE[..], more].concat()
    };
    let check = |more: &[&'static str], expect: &str| {
        check_error(&args(more), Exit::Failed, expect);
    };
    check(&["--presence-penalty", "-3"], "presence_penalty is -3");
    check(&["--frequency-penalty", "2.5"], "frequency_penalty is 2.5");
    check(&["--logit-bias", "512=1"], "token id 512 is outside the vocabulary of 512 tokens");
    check(&["--logit-bias", "5=-101"], "logit_bias of token 5 is -101");
    check(&["--bad-words", " "], "a bad word is empty");
    check(&["--json", "--top-logprobs", "21"], "num_top_logprobs is 21");
    let check = |more: &[&'static str], expect: &str| {
        check_error(&args(more), Exit::WrongUsage, expect);
    };
    check(&["--logit-bias", "5"], "'5' is not a token id and a bias");
    check(&["--logit-bias", "-5=1"], "'-5=1' is not a token id and a bias");
    check(&["--top-logprobs", "2"], "--json");

    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let args = ["generate", "--model", model, "--prompt-ids", "1", "--bad-words", "a"];
    check_error(&args, Exit::Failed, "no tokenizer.json");
}

#[test]
fn renders_messages() {
    let dir = tiny_with_tokenizer();
    let model = dir.path().to_str().unwrap();
    let file = dir.path().join("chat.json");
    fs::write(&file, r#"[{"role": "user", "content": "hi"}]"#).unwrap();
    let args = ["generate", "--model", model, "--max-tokens", "1"];
    let messages = ["--messages", file.to_str().unwrap()];
    let report = json(&[&args[..], &REFERENCE, &["--json"], &messages].concat());
    let expect: Vec<u32> = "user: hi\n".bytes().map(u32::from).collect();
    assert_eq!(report["prompt_ids"], serde_json::json!(expect));

    let check = |expect| check_error(&[&args[..], &messages].concat(), Exit::Failed, expect);
    fs::write(&file, "[]").unwrap();
    check("chat.json: messages: 0 messages");
    fs::write(&file, r#"[{"role": "user", "content": "hi"}]"#).unwrap();
    fs::write(dir.path().join("chat_template.jinja"), "a\n{{ raise_exception('no users') }}")
        .unwrap();
    check("chat template, line 2: no users");
    fs::write(dir.path().join("chat_template.jinja"), "{% if %}").unwrap();
    check("chat_template.jinja: chat template, line 1");
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    check("no chat template; use --prompt");
    fs::remove_file(&file).unwrap();
    check("chat.json");
}

#[test]
fn refuses_bad_prompts() {
    let dir = tiny_with_tokenizer();
    let model = dir.path().to_str().unwrap();
    let check = |prompt: &[&str], expect: &str| {
        let args = ["generate", "--model", model];
        check_error(&[&args[..], &REFERENCE, prompt].concat(), Exit::Failed, expect);
    };
    check(&["--prompt", ""], "the prompt is empty");
    check(&["--prompt-ids", ""], "the prompt is empty");
    check(&["--prompt-ids", "1,512"], "token id 512 at place 1");
    check(&["--prompt-ids=-5"], "token id -5 at place 0");
    check(&["--prompt-ids", "99999999999999"], "outside the vocabulary of 512 tokens");
    check(&["--prompt", &"a".repeat(300)], "300 tokens, the context of 256");
    check(&["--prompt", "a", "--max-tokens", "0"], "max_tokens is 0");
    check(&["--prompt", "a", "--temperature", "nan"], "temperature is NaN");
    check(&["--prompt", "a", "--top-p", "2"], "top_p is 2");
    check(&["--prompt", "a", "--stop", ""], "a stop string is empty");

    fs::write(dir.path().join("tokenizer.json"), "{\"model\": {\"type\": \"BPE\"").unwrap();
    check(&["--prompt", "a"], "tokenizer.json: not a tokenizer");
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    check(&["--prompt", "a"], "no tokenizer.json");
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    check(&["--prompt", "a"], "config.json");
}

#[test]
fn refuses_tokens_beyond_the_vocabulary() {
    let dir = tiny_with_tokenizer();
    let mut tokenizer = byte_tokenizer();
    tokenizer["model"]["vocab"]["long"] = 512.into();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let model = dir.path().to_str().unwrap();
    check_error(
        &["generate", "--model", model, "--prompt", "a"],
        Exit::Failed,
        "token id 512 is outside the model's vocabulary of 512",
    );
}

#[test]
fn writes_logits() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("logits.safetensors");
    let model = tiny("llama-gqa2");
    let model = model.to_str().unwrap();
    let ids = ["logits", "--model", model, "--prompt-ids", "9,8,7", "-o", file.to_str().unwrap()];
    let report = json(&[&ids[..], &REFERENCE, &["--json"]].concat());
    assert_eq!(report["shape"], serde_json::json!([3, 512]));
    let bytes = fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.names(), ["logits"]);
    let logits = tensors.tensor("logits").unwrap();
    assert_eq!((logits.dtype(), logits.shape()), (safetensors::Dtype::F32, &[3, 512][..]));
    // The last row's maximum is the greedy token.
    let last: Vec<f32> = logits.data()[2 * 512 * 4..]
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let best = (0..512).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
    let args = ["generate", "--model", model, "--prompt-ids", "9,8,7", "--max-tokens", "1"];
    let generated = json(&[&args[..], &REFERENCE, &["--json"]].concat());
    assert_eq!(generated["output_ids"], serde_json::json!([best]));

    let others: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(others.len(), 1, "{others:?}");
    let missing = dir.path().join("no/such/folder/x");
    let args = ["logits", "--model", model, "--prompt-ids", "1", "-o", missing.to_str().unwrap()];
    check_error(&[&args[..], &REFERENCE].concat(), Exit::Failed, "no/such/folder");
}

#[test]
fn measures_perplexity() {
    let dir = tiny_with_tokenizer();
    let model = dir.path().to_str().unwrap();
    let file = dir.path().join("text.txt");
    fs::write(&file, "The quick brown fox jumps over the lazy dog. ".repeat(4)).unwrap();
    let file_name = file.to_str().unwrap();
    let args = |ctx| {
        let args = ["perplexity", "--model", model, "--file", file_name, "--ctx", ctx];
        [&args[..], &REFERENCE, &["--json"]].concat()
    };
    let report = json(&args("32"));
    assert_eq!(keys(&report), ["ppl", "tokens_scored", "chunks", "nll_sum"]);
    // "he" is one token wherever it is.
    let num_tokens = 4 * (45 - 1);
    assert_eq!(report["chunks"], num_tokens / 32);
    assert_eq!(report["tokens_scored"], num_tokens / 32 * 15);
    let (ppl, nll) = (report["ppl"].as_f64().unwrap(), report["nll_sum"].as_f64().unwrap());
    assert!((ppl.ln() - nll / (num_tokens / 32 * 15) as f64).abs() < 1e-9, "{ppl} {nll}");
    // An untrained model knows nothing of its 512 tokens.
    assert!((100.0..2000.0).contains(&ppl), "{ppl}");

    let check = |ctx, expect| check_error(&args(ctx), Exit::Failed, expect);
    check("200", "fewer than one chunk of 200");
    check("257", "the chunk size is 257");
    check("2", "the chunk size is 2");
    fs::write(&file, b"abc\xFF").unwrap();
    check("32", "not UTF-8 text: byte 3");
}

#[test]
fn quantizes() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("q");
    let (model, out) = (tiny("llama-gqa2"), out.to_str().unwrap());
    let args = ["quantize", model.to_str().unwrap(), "-o", out, "--method", "rtn"];
    check_error(&[&args[..], &["--group-size", "128"]].concat(), Exit::Failed, "128");
    assert!(!Path::new(out).exists());
    let report = json(&[&args[..], &["--json"]].concat());
    // 64 divides its 64 inputs, but not the 160 of the last linear.
    assert_eq!(report["group_size"], "32");
    let args = ["generate", "--model", out, "--prompt-ids", "1,2,3", "--max-tokens", "2"];
    let report = json(&[&args[..], &REFERENCE, &["--json", "--activations", "float"]].concat());
    assert_eq!(report["backend"], "reference");
}

#[test]
fn quantizes_by_activations() {
    let model = tiny_with_tokenizer();
    let dir = tempfile::tempdir().unwrap();
    let (text, out) = (dir.path().join("text.txt"), dir.path().join("q"));
    fs::write(&text, "Some words to look at. ".repeat(20)).unwrap();
    let (text, out) = (text.to_str().unwrap(), out.to_str().unwrap());
    let args = ["quantize", model.path().to_str().unwrap(), "-o", out, "--seqlen", "32"];
    let args = [&args[..], &["--calibration", text, "--samples", "100"]].concat();
    // Without kernels for the model there are two ways out.
    check_error(&args, Exit::Failed, "BESPOKE_MODEL=");
    check_error(&args, Exit::Failed, "--backend reference");
    assert!(!Path::new(out).exists());

    let reference = [&args[..], &REFERENCE].concat();
    let run = run(&reference);
    assert_eq!(run.exit, Exit::Done, "{}", run.err);
    assert!(run.err.contains("14 samples of 32 tokens, fewer than the 100"), "{}", run.err);
    assert!(run.out.contains("quantization.html") && run.out.contains("bits per weight"));
    let report = json(&[&reference[..], &["--overwrite", "--method", "awq+", "--json"]].concat());
    assert_eq!(
        keys(&report),
        [
            "model",
            "output",
            "method",
            "group_size",
            "symmetric",
            "calibration",
            "bits_per_weight",
            "modules_not_converted",
            "bytes",
            "error",
            "perplexity",
            "perplexity_note",
            "num_layers",
            "num_layers_resumed",
            "seconds",
            "peak_rss_bytes",
        ]
    );
    assert_eq!((&report["method"], &report["group_size"]), (&"awq+".into(), &"32".into()));
    assert!(report["error"]["written"].as_f64() <= report["error"]["rtn"].as_f64());

    let args = [&args[..], &["--overwrite", "--method", "rtn", "--max-bits-per-weight", "5"]];
    check_error(&args.concat(), Exit::Failed, "--max-bits-per-weight needs");
}

#[test]
fn lists_kernels() {
    let report = json(&["kernels", "--json"]);
    let rows = report.as_array().unwrap();
    assert_eq!(rows.len(), generated::table().kernels.len());
    let row = rows.iter().find(|row| row["symbol"] == "awq_gemm_n960_k576_g64_int8_one__avx512");
    let row = row.expect("the default build holds the kernels of SmolLM2-135M");
    assert_eq!(
        keys(row),
        [
            "symbol",
            "op",
            "sizes",
            "dtype",
            "group_size",
            "target",
            "config",
            "reduction_class",
            "provenance",
            "serves",
            "bytes",
        ]
    );
    assert_eq!(row["op"], "awq_gemm");
    assert_eq!(row["sizes"], serde_json::json!({"n": 960, "k": 576}));
    assert_eq!(row["group_size"], 64);
    assert_eq!(row["target"], "avx512");
    assert_eq!(row["config"]["regime"], "one");
    let first = &row["serves"][0];
    assert_eq!(keys(first), ["rows_min", "rows_max", "device", "provenance"]);
    assert_eq!((&first["rows_min"], &first["rows_max"]), (&Value::from(1), &Value::from(1)));
    assert_eq!(first["provenance"], "default");
    assert!(first["device"].is_null());
    // The code's size is in the symbol table of this executable.
    if cfg!(target_os = "linux") {
        let is_sized = |row: &Value| row["bytes"].as_u64().is_some_and(|bytes| bytes > 0);
        assert!(rows.iter().all(is_sized), "{row}");
    }
    let text = run(&["kernels"]).out;
    assert_eq!(text.lines().count(), rows.len() + 2);
    assert!(text.ends_with(&format!("\n{} kernels\n", rows.len())));
}

/// Every layer and row count has its kernel and where the choice comes from.
#[test]
fn explains_every_layer() {
    let report = run(&["explain", "smollm2-135m-awq", "--json"]);
    assert_eq!(report.exit, Exit::Done, "{}", report.err);
    let report: Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(keys(&report), ["model", "target", "device", "kernels"]);
    let rows = report["kernels"].as_array().unwrap();
    let of_op = |op: &str| -> Vec<&Value> { rows.iter().filter(|row| row["op"] == op).collect() };
    for op in ["qkv", "o", "gate_up", "down", "head"] {
        let mut next = 1;
        for row in of_op(op) {
            assert_eq!(row["rows_min"], next, "{row}");
            next = row["rows_max"].as_u64().map_or(0, |rows| rows + 1);
            assert!(row["symbol"].is_string() && row["provenance"].is_string(), "{row}");
        }
        assert_eq!(next, 0, "{op}: the last interval has no limit");
    }
    assert_eq!(of_op("qkv")[0]["layers"], "layers 0-29");
    for op in ["embed", "rms_norm", "rope", "attention", "quantize", "silu_and_mul", "sample"] {
        assert!(!of_op(op).is_empty(), "{op}");
    }
    let one = run(&["explain", "smollm2-135m-awq", "--rows", "12"]).out;
    let kernels = one.lines().filter(|line| line.contains(" qkv "));
    assert_eq!(kernels.count(), 1, "{one}");
    check_error(&["explain", "no-such-model"], Exit::Failed, "no-such-model");
}

#[test]
fn names_missing_kernels() {
    let model = tiny("llama-gqa2");
    let args = ["generate", "--model", model.to_str().unwrap(), "--prompt-ids", "1"];
    check_error(&[&args[..], &["--backend", "cpu"]].concat(), Exit::Failed, "embed_h64_f32");
}

/// Who asks for bfloat16 activations with other weights hears what is possible.
#[test]
fn refuses_bf16_activations_of_other_weights() {
    let check = |case: &str, backend: &str, expect: &str| {
        let model = tiny(case);
        let args = ["generate", "--model", model.to_str().unwrap(), "--prompt-ids", "1"];
        let options = ["--activations", "bf16", "--backend", backend];
        check_error(&[&args[..], &options].concat(), Exit::Failed, expect);
    };
    for backend in ["reference", "cpu", "auto"] {
        check("llama-gqa2", backend, "has f32 weights; choose float activations");
        check("llama-awq-g32", backend, "has 4-bit weights; choose int8 or float activations");
        check("llama-awq-mixed", backend, "has 4-bit weights");
    }
    let args = ["explain", "smollm2-135m-awq", "--activations", "bf16"];
    check_error(&args, Exit::Failed, "4-bit weights");
    let args = ["generate", "--model", "m", "--prompt-ids", "1", "--activations", "fp8"];
    check_error(&args, Exit::WrongUsage, "possible values: float, int8, bf16");
}

/// A model of bfloat16 weights has kernels for both forms of rows.
#[test]
fn runs_with_bf16_activations() {
    let model = crate::golden::tiny::bf16_model();
    let args = ["generate", "--model", model.path().to_str().unwrap(), "--prompt-ids", "5,6,7"];
    let options = ["--activations", "bf16", "--max-tokens", "3", "--ignore-eos", "--json"];
    let report = json(&[&args[..], &REFERENCE, &options].concat());
    assert_eq!(report["backend"], "reference");
    let explained = run(&["explain", "smollm2-135m", "--activations", "bf16"]);
    assert_eq!(explained.exit, Exit::Done, "{}", explained.err);
    for symbol in ["gemm_bf16_n960_k576_one", "gemm_bf16_n49152_k576", "quantize_k576_bf16"] {
        assert!(explained.out.contains(symbol), "{symbol}: {}", explained.out);
    }
}

#[test]
fn examines_the_machine() {
    let home = tempfile::tempdir().unwrap();
    let report = run_in(home.path(), &["doctor", "--json"]);
    assert_eq!(report.exit, Exit::Done, "{}", report.err);
    let report: Value = serde_json::from_str(&report.out).unwrap();
    let expected = ["version", "cpu", "memory", "gpu", "cache", "model", "kernels"];
    assert_eq!(keys(&report), expected);
    assert_eq!(report["model"], Value::Null, "this program brings none");
    assert!(report["cpu"]["threads"].as_u64().unwrap() >= 1);
    assert_eq!(report["cache"]["path"].as_str(), home.path().to_str());
    assert_eq!(report["cache"]["models"], serde_json::json!([]));
    assert!(run(&["doctor"]).out.contains("model cache"));
}

/// A reader that goes away, or a full disk.
struct Broken(io::ErrorKind);

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(self.0.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn survives_broken_output() {
    let run = |kind| {
        let (mut out, mut err) = (Broken(kind), Vec::new());
        let mut console = Console {
            out: &mut out,
            err: &mut err,
            is_terminal: false,
            kernels: generated::table(),
            home: None,
            program: None,
            bundle: None,
            start: Instant::now(),
            before_main: None,
        };
        let exit = cli::run(["bespoke", "kernels"], &mut console);
        (exit, String::from_utf8(err).unwrap())
    };
    assert_eq!(run(io::ErrorKind::BrokenPipe), (Exit::Done, String::new()));
    let (exit, err) = run(io::ErrorKind::StorageFull);
    assert_eq!(exit, Exit::Failed);
    assert!(err.starts_with("error: cannot write to standard output"), "{err}");
}
