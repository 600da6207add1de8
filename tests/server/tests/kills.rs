//! Processes that are killed while they write.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A tiny dense model of the golden results.
fn model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden/tiny/llama-gqa2")
}

fn quantize(output: &Path, group_size: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bespoke-under-test"));
    command.arg("quantize").arg(model()).arg("-o").arg(output);
    command.args(["--overwrite", "--group-size", group_size]);
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
