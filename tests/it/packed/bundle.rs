//! Programs that bring a model: here any bytes stand for the program.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bespoke::bundle::{self, Bundle, Contents, FILES};
use bespoke::cli::{self, Console, Exit};
use bespoke::source::{ModelFolder, ModelSource, WeightsSource};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{load, logits, options, pack, tiny};

const CASE: &str = "llama-awq-mixed";
const PROGRAM: &[u8] = b"\x7FELF is how programs begin";

/// A program that brings a tiny model, with its weights or without.
fn program(has_weights: bool) -> (TempDir, PathBuf) {
    let (dir, weights) = pack(CASE, &options(bespoke_tests::tiny_kernels()));
    let read = |name: &str| Some((name.to_owned(), fs::read(tiny(CASE).join(name)).ok()?));
    let files: BTreeMap<String, Vec<u8>> = FILES.into_iter().filter_map(read).collect();
    let contents = Contents {
        name: CASE,
        targets: vec!["avx512".to_owned()],
        files,
        weights: has_weights.then_some(weights.as_path()),
    };
    let mut bytes = PROGRAM.to_vec();
    let len = bundle::append(&mut bytes, PROGRAM.len() as u64, &contents).unwrap();
    assert_eq!(len, bytes.len() as u64);
    let path = dir.path().join("program");
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn open(path: &Path) -> Arc<Bundle> {
    Arc::new(Bundle::open(path).unwrap().expect("a model"))
}

/// Runs a command of a program that brings `bundle`.
fn run(bundle: Arc<Bundle>, args: &[&str]) -> (Exit, String, String) {
    let home = tempfile::tempdir().unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut console = Console {
        out: &mut out,
        err: &mut err,
        is_terminal: false,
        kernels: bespoke_tests::tiny_kernels(),
        home: Some(home.path().to_owned()),
        program: None,
        bundle: Some(bundle),
        start: Instant::now(),
        before_main: None,
    };
    let exit = cli::run([&["bespoke"], args].concat(), &mut console);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (exit, text(out), text(err))
}

const GENERATE: [&str; 6] = ["generate", "--prompt-ids", "1,2,3", "--max-tokens", "4", "--json"];

#[test]
fn a_program_serves_the_model_that_it_brings() {
    let (_dir, path) = program(true);
    let bundle = open(&path);
    assert_eq!((bundle.name(), bundle.targets()), (CASE, &["avx512".to_owned()][..]));
    let config = fs::read(tiny(CASE).join("config.json")).unwrap();
    assert!(bundle.has("config.json") && bundle.file("config.json").unwrap() == Some(config));
    assert!(!bundle.has("tokenizer.json") && bundle.file("tokenizer.json").unwrap().is_none());
    let source = ModelSource {
        files: ModelFolder::Bundle(bundle.clone()),
        weights: WeightsSource::Packed(bundle.weights().unwrap().unwrap()),
        packed_cache: None,
    };
    let options = options(bespoke_tests::tiny_kernels());
    let mut brought = load(&source, &options).unwrap();
    let mut direct = load(&ModelSource::folder(tiny(CASE)), &options).unwrap();
    assert_eq!(logits(&mut brought), logits(&mut direct));
    assert_eq!(brought.fingerprint(), direct.fingerprint());

    let (exit, out, err) = run(bundle.clone(), &GENERATE);
    assert_eq!(exit, Exit::Done, "{err}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&json["model"], json["backend"].as_str()), (&CASE.into(), Some("cpu")));
    let (exit, out, err) = run(bundle, &["doctor"]);
    assert!(exit == Exit::Done && out.contains(CASE), "{out} {err}");
}

#[test]
fn a_program_without_weights_asks_for_them() {
    let (dir, path) = program(false);
    let bundle = open(&path);
    let (exit, _, err) = run(bundle.clone(), &GENERATE);
    assert!(exit == Exit::Failed && err.contains("--model DIR"), "{err}");
    // The weights alone, and a whole folder.
    let weights = dir.path().join("weights");
    fs::create_dir(&weights).unwrap();
    fs::copy(tiny(CASE).join("model.safetensors"), weights.join("model.safetensors")).unwrap();
    for folder in [weights, tiny(CASE)] {
        let args = [&GENERATE[..], &["--model", folder.to_str().unwrap()]].concat();
        let (exit, _, err) = run(bundle.clone(), &args);
        assert_eq!(exit, Exit::Done, "{err}");
    }
}

#[test]
fn other_files_bring_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("program");
    for bytes in [&b""[..], PROGRAM, &[0; 4096]] {
        fs::write(&path, bytes).unwrap();
        assert!(Bundle::open(&path).unwrap().is_none());
    }
}

/// So many cases, none of them written to a file.
fn cases(num: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(num) }
}

proptest! {
    #![proptest_config(cases(48))]

    /// Whatever is cut off or changed behind the weights is noticed.
    #[test]
    fn damage_is_noticed(share in 0.0..1.0f64, bit in 0..8u32, is_cut in any::<bool>()) {
        let (_dir, path) = program(false);
        let mut bytes = fs::read(&path).unwrap();
        let at = PROGRAM.len() + (share * (bytes.len() - PROGRAM.len()) as f64) as usize;
        match is_cut {
            true => bytes.truncate(at),
            false => bytes[at] ^= 1 << bit,
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(Some(bundle)) = Bundle::open(&path) {
            panic!("{} was taken", bundle.name());
        }
    }
}
