//! Processes that are killed while they write.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

/// A tiny dense model of the golden results.
fn model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden/tiny/llama-gqa2")
}

fn quantize(output: &Path, group_size: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bespoke-under-test"));
    command.arg("quantize").arg(model()).arg("-o").arg(output);
    command.args(["--overwrite", "--method", "rtn", "--group-size", group_size]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Every file of a folder with its content; `None` where there is no folder.
fn content(dir: &Path) -> Option<BTreeMap<String, Vec<u8>>> {
    let entries = fs::read_dir(dir).ok()?;
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
    };
    Some(entries.map(file).collect())
}

/// Waits some time that grows with `n` and starts over, in an order without a pattern.
fn wait(n: u32, max: Duration) {
    let share = f64::from(n) * 0.618_033_988_75 % 1.0;
    thread::sleep(max.mul_f64(share));
}

#[test]
fn a_killed_quantizer_leaves_the_old_model_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("int4");
    let whole = ["32", "channel"].map(|group_size| {
        let start = Instant::now();
        assert!(quantize(&output, group_size).status().unwrap().success());
        (content(&output).unwrap(), start.elapsed())
    });
    assert_ne!(whole[0].0, whole[1].0);
    let time = whole[0].1.max(whole[1].1);

    let (mut num_old, mut num_new) = (0, 0);
    for n in 0..100 {
        let before = content(&output).unwrap();
        let group_size = if before == whole[0].0 { "channel" } else { "32" };
        let mut child = quantize(&output, group_size).spawn().unwrap();
        wait(n, time);
        child.kill().unwrap();
        child.wait().unwrap();
        let after = content(&output).expect("the model is never gone");
        assert!(after == whole[0].0 || after == whole[1].0, "run {n}: mixed or cut off");
        match after == before {
            true => num_old += 1,
            false => num_new += 1,
        }
    }
    assert!(num_old > 0, "no process was killed before it had written: kill earlier");
    println!("{num_old} kept the old model, {num_new} had the new one");

    // The next run clears up what they left.
    assert!(quantize(&output, "32").status().unwrap().success());
    let names = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["int4"]);
    assert_eq!(content(&output).unwrap(), whole[0].0);
}

/// The tiny model with the tests' tokenizer, which the method awq reads a text with, and a text.
fn model_with_text(dir: &Path) -> (PathBuf, PathBuf) {
    let (with_tokenizer, text) = (dir.join("tiny"), dir.join("text.txt"));
    fs::create_dir(&with_tokenizer).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(model().join(name), with_tokenizer.join(name)).unwrap();
    }
    fs::write(with_tokenizer.join("tokenizer.json"), TOKENIZER).unwrap();
    fs::write(&text, "a b c d e f g h ".repeat(8)).unwrap();
    (with_tokenizer, text)
}

/// Knows a few words, so that nothing of the runs' time is the tokenizer's.
const TOKENIZER: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
    "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
    "decoder": null,
    "model": {
        "type": "WordLevel", "unk_token": "h",
        "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5, "g": 6, "h": 7}
    }
}"#;

fn awq(model: &Path, text: &Path, output: &Path, group_size: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bespoke-under-test"));
    command.arg("quantize").arg(model).arg("-o").arg(output).arg("--calibration").arg(text);
    command.args(["--overwrite", "--group-size", group_size, "--backend", "reference"]);
    command.args(["--method", "awq+", "--samples", "2", "--seqlen", "16", "--threads", "1"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Every file of a folder, without the times and the interruptions that its report tells.
fn lasting_content(dir: &Path) -> Option<BTreeMap<String, Vec<u8>>> {
    let mut files = content(dir)?;
    let report = files.get_mut("quantization.json").expect("a report");
    let mut json: Json = serde_json::from_slice(report).unwrap();
    json["seconds"] = Json::Null;
    json["num_layers_resumed"] = Json::Null;
    for layer in json["layers"].as_array_mut().unwrap() {
        layer["seconds"] = Json::Null;
    }
    *report = json.to_string().into_bytes();
    Some(files)
}

#[test]
fn a_killed_calibration_leaves_nothing_the_old_model_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let (model, text) = model_with_text(dir.path());
    let outputs = dir.path().join("out");
    let output = outputs.join("int4");
    let quantize = |group_size: &str| awq(&model, &text, &output, group_size);
    let whole = ["32", "channel"].map(|group_size| {
        let start = Instant::now();
        assert!(quantize(group_size).status().unwrap().success());
        (lasting_content(&output).unwrap(), start.elapsed())
    });
    assert_ne!(whole[0].0, whole[1].0);
    let time = whole[0].1.max(whole[1].1);
    fs::remove_dir_all(&output).unwrap();

    let (mut num_old, mut num_new) = (0, 0);
    for n in 0..100 {
        let before = lasting_content(&output);
        let group_size = if before.as_ref() == Some(&whole[0].0) { "channel" } else { "32" };
        let mut child = quantize(group_size).spawn().unwrap();
        wait(n, time);
        child.kill().unwrap();
        child.wait().unwrap();
        let after = lasting_content(&output);
        let is_whole = |files: &BTreeMap<_, _>| whole.iter().any(|(whole, _)| whole == files);
        assert!(after == before || after.as_ref().is_some_and(is_whole), "run {n}: cut off");
        match after == before {
            true => num_old += 1,
            false => num_new += 1,
        }
    }
    assert!(num_old > 0, "no process was killed before it had written: kill earlier");
    println!("{num_old} changed nothing, {num_new} had the new model");

    // The next run goes on with what they left, and clears it up.
    for (group_size, whole) in [("channel", &whole[1]), ("32", &whole[0])] {
        assert!(quantize(group_size).status().unwrap().success());
        assert_eq!(lasting_content(&output).as_ref(), Some(&whole.0));
        let names = fs::read_dir(&outputs).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.collect::<Vec<_>>(), ["int4"]);
    }
}

/// A limit on the size of files fails a write as a full disk does.
#[cfg(unix)]
#[test]
fn a_file_that_cannot_be_written_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (model, text) = model_with_text(dir.path());
    let output = dir.path().join("out/int4");
    // NOTE: in blocks of 512 or 1024 bytes; a layer takes less, and the weights take more.
    for (blocks, has_layers) in [("1", false), ("200", true)] {
        let command = awq(&model, &text, &output, "32");
        let mut limited = Command::new("sh");
        limited.arg("-c").arg(format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\""));
        limited.arg(command.get_program()).args(command.get_args());
        let failed = limited.stdin(Stdio::null()).output().unwrap();
        let error = String::from_utf8(failed.stderr).unwrap();
        assert_eq!(failed.status.code(), Some(1), "{error}");
        assert!(error.contains("error: ") && error.contains("int4"), "{error}");
        assert!(!output.exists());
        let layer = dir.path().join("out/.int4.quantize/layer-0001");
        assert_eq!(layer.exists(), has_layers, "{error}");
    }
    assert!(awq(&model, &text, &output, "32").status().unwrap().success());
    let names = fs::read_dir(dir.path().join("out")).unwrap();
    assert_eq!(names.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), ["int4"]);
}
