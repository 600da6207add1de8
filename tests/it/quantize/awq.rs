//! Whole runs of the AWQ quantizer on a tiny model: what is written, interruptions, refusals.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::files::IfExists;
use bespoke::kernels::generated;
use bespoke::quantize::calibration::{CalibrationOptions, TextSource};
use bespoke::quantize::layer_pass::PassOptions;
use bespoke::quantize::quantized_layer::AwqOptions;
use bespoke::quantize::report::QuantizationReport;
use bespoke::quantize::{AwqJob, PerplexityOf, SHARD_BYTES_MAX, awq};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::GroupSize;
use safetensors::SafeTensors;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::tokenizer::byte_tokenizer;

const NUM_LAYERS: usize = 2;

/// A folder with a model that has a tokenizer, a text, and room for what is made of them.
struct Work {
    dir: TempDir,
}

impl Work {
    fn new() -> Work {
        let work = Work { dir: TempDir::new().unwrap() };
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/tiny/llama-gqa2");
        fs::create_dir(work.model()).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(golden.join(name), work.model().join(name)).unwrap();
        }
        let tokenizer = byte_tokenizer().to_string();
        fs::write(work.model().join("tokenizer.json"), tokenizer).unwrap();
        fs::write(work.model().join("README.md"), "---\nlicense: mit\n---\nTiny.\n").unwrap();
        let line = |i: u32| format!("Line {i}: the square of {i} is {}.\n", i * i);
        fs::write(work.text(), (0..10).map(line).collect::<String>()).unwrap();
        work
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("tiny")
    }

    fn text(&self) -> PathBuf {
        self.dir.path().join("text.txt")
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join("out").join(name)
    }

    fn job(&self) -> AwqJob {
        AwqJob {
            options: AwqOptions {
                group_size: GroupSize::Of(32),
                symmetric: false,
                compensate: false,
                skip: Vec::new(),
            },
            pass: PassOptions {
                kernels: generated::table(),
                backend: BackendChoice::Reference,
                num_threads: Some(1),
                target: None,
                spill: None,
            },
            calibration: CalibrationOptions {
                text: TextSource::File(self.text()),
                num_samples: 4,
                sample_len: 32,
            },
            bits_max: None,
            shard_bytes_max: SHARD_BYTES_MAX,
            perplexity: PerplexityOf::HeldOut,
            if_exists: IfExists::Refuse,
        }
    }

    #[track_caller]
    fn run(&self, name: &str, job: &AwqJob) -> QuantizationReport {
        awq(&self.model(), &self.out(name), job, &mut |_| ()).unwrap()
    }

    /// The message of a run that must fail and leave nothing behind.
    #[track_caller]
    fn refusal(&self, job: &AwqJob) -> String {
        let error = awq(&self.model(), &self.out("x"), job, &mut |_| ()).unwrap_err();
        let rest = fs::read_dir(self.dir.path().join("out")).into_iter().flatten().flatten();
        let names: Vec<_> = rest.map(|entry| entry.file_name()).collect();
        assert!(names.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{names:?}");
        assert!(!self.out("x").exists());
        error.to_string()
    }

    /// Names in the folder of outputs.
    fn outputs(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("out")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// Every file of a folder; reports without what depends on the clock and on interruptions.
fn content(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        files.insert(name, fs::read(path).unwrap());
    }
    let report = files.get_mut("quantization.json").unwrap();
    let mut json: Json = serde_json::from_slice(report).unwrap();
    json["seconds"] = Json::Null;
    json["num_layers_resumed"] = Json::Null;
    for layer in json["layers"].as_array_mut().unwrap() {
        layer["seconds"] = Json::Null;
    }
    *report = json.to_string().into_bytes();
    files
}

/// All tensors of a folder, by name.
fn tensors(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut tensors = BTreeMap::new();
    for (name, bytes) in content(dir) {
        if name.ends_with(".safetensors") {
            let file = SafeTensors::deserialize(&bytes).unwrap();
            tensors.extend(file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())));
        }
    }
    tensors
}

fn load(dir: &Path) -> Engine {
    let options = EngineOptions {
        backend: BackendChoice::Reference,
        ..EngineOptions::new(generated::table())
    };
    Engine::load(dir, &options, &mut |_| ()).unwrap()
}

#[test]
fn writes_a_model_and_what_became_of_it() {
    let work = Work::new();
    let mut stages = Vec::new();
    let out = work.out("int4");
    let report = awq(&work.model(), &out, &work.job(), &mut |progress| {
        assert!(progress.done <= progress.total, "{progress:?}");
        stages.push(progress.stage);
    })
    .unwrap();
    stages.dedup();
    assert_eq!(stages[..2], ["quantizing layers", "writing weights"]);
    assert_eq!(work.outputs(), ["int4"]);

    let config = ModelConfig::from_file(&out.join("config.json")).unwrap();
    assert_eq!(config.quantization.unwrap().group_size, GroupSize::Of(32));
    load(&out);
    assert_eq!(report.layers.len(), NUM_LAYERS);
    assert!(report.error.rtn > 0.0 && report.error.written <= report.error.rtn, "{report:?}");
    assert!(report.bytes.after < report.bytes.before);
    assert_eq!(report.bits_per_weight, 4.625);
    let perplexity = report.perplexity.as_ref().unwrap();
    assert!(perplexity.before > 1.0 && perplexity.after > 1.0);
    assert_eq!((perplexity.ctx, perplexity.tokens_scored % 15), (32, 0));

    let json: Json = serde_json::from_slice(&content(&out)["quantization.json"]).unwrap();
    assert_eq!(json["perplexity"]["after"], perplexity.after);
    assert_eq!(json["calibration"]["num_samples"], 4);
    assert_eq!(json["calibration"]["text"], "text.txt");
    let page = String::from_utf8(fs::read(out.join("quantization.html")).unwrap()).unwrap();
    assert!(page.contains("mlp.down_proj") && page.ends_with("</html>\n"));
    let card = String::from_utf8(fs::read(out.join("README.md")).unwrap()).unwrap();
    assert!(card.starts_with("---\nlicense: mit\n---\n# tiny in 4 bits\n"), "{card}");
    assert!(card.ends_with("Tiny.\n"), "{card}");
}

#[test]
fn the_same_in_gives_the_same_out() {
    let work = Work::new();
    for compensate in [false, true] {
        let mut job = work.job();
        job.options.compensate = compensate;
        let name = |run| format!("{compensate}-{run}");
        work.run(&name(1), &job);
        job.pass.num_threads = Some(3);
        work.run(&name(2), &job);
        let [first, second] = [1, 2].map(|run| content(&work.out(&name(run))));
        assert_eq!(first.keys().collect::<Vec<_>>(), second.keys().collect::<Vec<_>>());
        for (file, bytes) in first {
            assert!(bytes == second[&file], "{file} differs, compensate: {compensate}");
        }
    }
    assert_ne!(tensors(&work.out("false-1")), tensors(&work.out("true-1")));
}

/// Runs until `stop` says so, which is an interruption like any other.
fn interrupt(work: &Work, job: &AwqJob, stop: &dyn Fn(&'static str, u64) -> bool) {
    let interrupted = catch_unwind(AssertUnwindSafe(|| {
        awq(&work.model(), &work.out("int4"), job, &mut |progress| {
            assert!(!stop(progress.stage, progress.done), "an interruption");
        })
        .map(|_| ())
    }));
    assert!(interrupted.is_err(), "the run was not interrupted");
    assert!(!work.out("int4").exists());
}

#[test]
fn interrupted_runs_go_on_where_they_ended() {
    let work = Work::new();
    for compensate in [false, true] {
        let mut job = work.job();
        job.options.compensate = compensate;
        work.run("whole", &job);
        for layer in 0..=NUM_LAYERS {
            let first = layer as u64 * 1000;
            interrupt(&work, &job, &|stage, done| match layer {
                NUM_LAYERS => stage == "writing weights" && done > 3,
                _ => stage == "quantizing layers" && done > first,
            });
            let report = work.run("int4", &job);
            assert_eq!(report.num_layers_resumed, layer);
            assert_eq!(content(&work.out("int4")), content(&work.out("whole")), "layer {layer}");
            let mut outputs = work.outputs();
            outputs.sort();
            assert_eq!(outputs, ["int4", "whole"]);
            fs::remove_dir_all(work.out("int4")).unwrap();
        }
        fs::remove_dir_all(work.out("whole")).unwrap();
    }
}

#[test]
fn what_another_run_left_is_not_taken_over() {
    let work = Work::new();
    let job = work.job();
    work.run("whole", &job);
    let mut other = work.job();
    other.options.symmetric = true;
    let behind_one = |stage: &'static str, done: u64| stage == "quantizing layers" && done > 1000;
    interrupt(&work, &other, &behind_one);
    let report = work.run("int4", &job);
    assert_eq!(report.num_layers_resumed, 0);
    assert_eq!(content(&work.out("int4")), content(&work.out("whole")));
    fs::remove_dir_all(work.out("int4")).unwrap();

    // A layer that was damaged on the disk.
    interrupt(&work, &job, &behind_one);
    let layer = work.out(".int4.quantize/layer-0000");
    let mut bytes = fs::read(&layer).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 16;
    fs::write(&layer, bytes).unwrap();
    let report = work.run("int4", &job);
    assert_eq!(report.num_layers_resumed, 0);
    assert_eq!(content(&work.out("int4")), content(&work.out("whole")));
}

#[test]
fn shards_hold_the_same_tensors() {
    let work = Work::new();
    work.run("one", &work.job());
    let mut job = work.job();
    job.shard_bytes_max = 40_000;
    work.run("many", &job);
    let out = work.out("many");
    let index: Json =
        serde_json::from_slice(&content(&out)["model.safetensors.index.json"]).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let mut files: Vec<&str> = map.values().map(|file| file.as_str().unwrap()).collect();
    files.sort_unstable();
    files.dedup();
    assert!(files.len() > 2 && files[0].starts_with("model-00001-of-000"), "{files:?}");
    let (one, many) = (tensors(&work.out("one")), tensors(&out));
    assert_eq!(one, many);
    assert_eq!(map.len(), many.len());
    let total: usize = many.values().map(Vec::len).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    // One tensor alone may be larger than a shard.
    let sizes: Vec<u64> =
        files.iter().map(|file| fs::metadata(out.join(file)).unwrap().len()).collect();
    let largest = many.values().map(|bytes| bytes.len() as u64).max().unwrap();
    assert!(sizes.iter().all(|size| *size < largest.max(40_000) + 4096), "{sizes:?}");
    load(&out);
}

#[test]
fn skipped_modules_stay_as_they_are() {
    let work = Work::new();
    let mut job = work.job();
    job.options.skip = vec!["down_proj".to_owned()];
    let report = work.run("int4", &job);
    let expected: Vec<String> =
        (0..NUM_LAYERS).map(|layer| format!("model.layers.{layer}.mlp.down_proj")).collect();
    assert_eq!(report.modules_not_converted, expected);
    let out = work.out("int4");
    let config: Json = serde_json::from_slice(&content(&out)["config.json"]).unwrap();
    assert_eq!(config["quantization_config"]["modules_to_not_convert"], json!(expected));
    let bytes = fs::read(work.model().join("model.safetensors")).unwrap();
    let original = SafeTensors::deserialize(&bytes).unwrap();
    for module in expected {
        let name = format!("{module}.weight");
        assert_eq!(tensors(&out)[&name], original.tensor(&name).unwrap().data());
    }
    load(&out);

    job.options.skip = vec!["down".to_owned()];
    assert!(work.refusal(&job).contains("'down' names no linear"));
    job.options.skip = vec!["model".to_owned()];
    assert!(work.refusal(&job).contains("nothing is left to quantize"));
    job.options.skip = vec!["q_proj".to_owned()];
    assert!(work.refusal(&job).contains("q_proj"));
}

/// Logits after every token of a text.
fn logits(dir: &Path) -> Vec<f32> {
    let ids: Vec<u32> = "the answer to all".bytes().map(u32::from).collect();
    let mut logits = Vec::new();
    load(dir).logits_of(&ids, 0..ids.len(), &mut |_, row| logits.extend_from_slice(row)).unwrap();
    logits
}

/// `‖a − b‖² / ‖b‖²`
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let squares: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
    squares / b.iter().map(|b| b * b).sum::<f32>()
}

#[test]
fn budgets_leave_the_worst_in_16_bits() {
    let work = Work::new();
    let mut job = work.job();
    work.run("all", &job);
    let mut distances = vec![distance(&logits(&work.out("all")), &logits(&work.model()))];
    for (bits, name) in [(9.0, "some"), (15.5, "few")] {
        job.bits_max = Some(bits);
        let report = work.run(name, &job);
        assert!(report.bits_per_weight <= bits && report.bits_per_weight > bits - 4.0);
        let skipped = report.layers.iter().flat_map(|layer| &layer.groups);
        let skipped = skipped.flat_map(|group| &group.modules).filter(|module| module.is_skipped);
        assert_eq!(skipped.count(), report.modules_not_converted.len());
        let config = ModelConfig::from_file(&work.out(name).join("config.json")).unwrap();
        let left_out = config.quantization.unwrap().modules_to_not_convert;
        assert_eq!(left_out, report.modules_not_converted);
        distances.push(distance(&logits(&work.out(name)), &logits(&work.model())));
    }
    // Weights that stay are multiplied by the factors that their neighbours were divided by.
    let [all, some, few] = distances[..] else { panic!("three distances") };
    assert!(few < some && some < all && few < all / 4.0, "{distances:?}");
}

#[test]
fn impossible_budgets_are_refused() {
    let work = Work::new();
    let mut job = work.job();
    for (bits, expected) in [(4.0, "4.625"), (16.0, "quantize nothing"), (-1.0, "4.625")] {
        job.bits_max = Some(bits);
        let message = work.refusal(&job);
        assert!(message.contains(&format!("at most {bits} bits")), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn unfit_texts_are_refused() {
    let work = Work::new();
    let job = work.job();
    let check = |content: &[u8], expected: &[&str]| {
        fs::write(work.text(), content).unwrap();
        let message = work.refusal(&job);
        let whole = expected.iter().all(|part| message.contains(part));
        assert!(whole && message.contains("text.txt"), "{message}");
    };
    check(b"", &["the file is empty"]);
    check(b" \n\t\n", &["the file is empty"]);
    check(b"PK\x03\x04\0\0", &["binary", "byte 4"]);
    check(b"abc\xff", &["not UTF-8 text: byte 3"]);
    check(b"too short", &["9 tokens", "sample of 32", "--seqlen"]);
    check(b"{\"text\": \"a\"}\n{\"text\": 1}\n", &["line 2", "\"text\" with a string"]);
    check(b"{\"text\": \"a\"}\n\n{\"text\": ", &["line 3", "not valid JSON"]);
    check(b"{\"messages\": []}\n", &["line 1", "0 messages"]);
    let chat = br#"{"messages": [{"role": "user", "content": "hi"}]}"#;
    check(chat, &["line 1", "no chat template"]);

    fs::remove_file(work.text()).unwrap();
    assert!(work.refusal(&job).contains("text.txt"));
    fs::write(work.text(), "text ".repeat(100)).unwrap();
    let mut job = work.job();
    job.calibration.num_samples = 0;
    assert!(work.refusal(&job).contains("0 samples"));
    job.calibration = CalibrationOptions { num_samples: 4, sample_len: 4096, ..job.calibration };
    assert!(work.refusal(&job).contains("4096 tokens"));
    let mut job = work.job();
    job.perplexity = PerplexityOf::Text(TextSource::File(work.model().join("config.json.txt")));
    assert!(work.refusal(&job).contains("config.json.txt"));
    fs::remove_file(work.model().join("tokenizer.json")).unwrap();
    let message = work.refusal(&work.job());
    assert!(message.contains("no tokenizer.json") && message.contains("--method rtn"), "{message}");
}

#[test]
fn json_lines_are_texts_and_chats() {
    let work = Work::new();
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}";
    fs::write(work.model().join("chat_template.jinja"), template).unwrap();
    let mut job = work.job();
    job.perplexity = PerplexityOf::Nothing;
    let line = |i: u32| match i % 3 {
        0 => json!(format!("a string {i}")).to_string(),
        1 => json!({"text": format!("a text {i}"), "id": i}).to_string(),
        _ => json!({"messages": [{"role": "user", "content": format!("chat {i}")}]}).to_string(),
    };
    let lines: Vec<String> = (0..30).map(line).collect();
    fs::write(work.text(), lines.join("\n")).unwrap();
    let report = work.run("int4", &job);
    // "a string 0" and the like have as many tokens as characters, and so has "<user>chat 2\n".
    let expected: usize = (0..30u32)
        .map(|i| {
            ["a string ", "a text ", "<user>chat \n"][i as usize % 3].len() + i.to_string().len()
        })
        .sum();
    assert_eq!(report.calibration.num_tokens, expected);
    assert!(report.perplexity.is_none() && report.perplexity_note.is_none());

    // With few tokens all of them are samples, and nothing is held out.
    job.perplexity = PerplexityOf::HeldOut;
    fs::write(work.text(), "x".repeat(70)).unwrap();
    let report = work.run("small", &job);
    assert_eq!(report.calibration.num_samples, 2);
    assert!(report.perplexity_note.unwrap().contains("--report-perplexity"));
    let other = work.dir.path().join("other.txt");
    fs::write(&other, "y".repeat(40)).unwrap();
    job.perplexity = PerplexityOf::Text(TextSource::File(other));
    let perplexity = work.run("other", &job).perplexity.unwrap();
    assert_eq!((perplexity.text.as_str(), perplexity.tokens_scored), ("other.txt", 15));
}

#[test]
fn folders_that_are_there_are_replaced_when_told() {
    let work = Work::new();
    let mut job = work.job();
    let first = work.run("int4", &job);
    let error = awq(&work.model(), &work.out("int4"), &job, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("already exists"), "{error}");
    job.if_exists = IfExists::Replace;
    job.options.symmetric = true;
    let second = work.run("int4", &job);
    assert!(!first.symmetric && second.symmetric);
    assert_eq!(work.outputs(), ["int4"]);
    let error = awq(&work.out("int4"), &work.out("b"), &job, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("already quantized"), "{error}");
}
