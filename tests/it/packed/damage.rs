//! Files that are cut, changed or made up.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use bespoke::engine::Engine;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{load, logits, options, pack, with_weights};
use bespoke::Error;

const CASE: &str = "llama-awq-mixed";

/// A sound file, and the logits of its weights.
fn sound() -> &'static (Vec<u8>, Vec<u32>) {
    static SOUND: OnceLock<(Vec<u8>, Vec<u32>)> = OnceLock::new();
    SOUND.get_or_init(|| {
        let (_dir, path) = pack(CASE, &options(bespoke_tests::tiny_kernels()));
        (fs::read(&path).unwrap(), logits(&mut open(&path).unwrap()))
    })
}

fn open(path: &Path) -> Result<Engine, Error> {
    load(&with_weights(CASE, path)?, &options(bespoke_tests::tiny_kernels()))
}

/// Loads a file with these bytes: an error that names it, or the right logits.
fn check(bytes: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.bin");
    fs::write(&path, bytes).unwrap();
    let mut engine = open(&path).map_err(|error| error.to_string())?;
    assert!(logits(&mut engine) == sound().1, "what is wrong was not noticed");
    Ok(())
}

#[track_caller]
fn refused(bytes: &[u8]) {
    let error = check(bytes).expect_err("a damaged file");
    assert!(error.contains("weights.bin"), "{error}");
}

/// The header of a file as JSON, and where the arrays may begin.
fn header(bytes: &[u8]) -> (Value, usize) {
    let len = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[56..56 + len]).unwrap(), 56 + len)
}

/// The sound file with a changed header, whose hash is right.
fn forged(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let bytes = &sound().0;
    let (mut json, end) = header(bytes);
    change(&mut json);
    let mut text = serde_json::to_vec(&json).unwrap();
    let room = end - 56;
    if text.len() < room {
        text.resize(room, b' ');
    }
    let mut forged = bytes[..16].to_vec();
    forged.extend((text.len() as u64).to_le_bytes());
    forged.extend(blake3::hash(&text).as_bytes());
    forged.extend(&text);
    forged.extend(&bytes[end..]);
    forged
}

#[test]
fn a_sound_file_is_taken() {
    check(&sound().0).unwrap();
    check(&forged(|_| {})).unwrap();
}

#[test]
fn every_array_is_checked() {
    let bytes = &sound().0;
    let (json, _) = header(bytes);
    for (name, array) in json["arrays"].as_object().unwrap() {
        let at = |key: &str| array[key].as_u64().unwrap() as usize;
        for place in [at("offset"), at("offset") + at("len") - 1] {
            let mut changed = bytes.clone();
            changed[place] ^= 4;
            let error = check(&changed).expect_err(name);
            assert!(error.contains(name.as_str()) && error.contains("checksum"), "{error}");
        }
        refused(&bytes[..at("offset") + at("len") - 1]);
    }
}

#[test]
fn absurd_headers_are_refused() {
    let huge = [u64::MAX, u64::MAX - 63, 1 << 63, 1 << 40, 1, 63];
    for number in huge {
        refused(&forged(|json| json["file_len"] = json!(number)));
        refused(&forged(|json| json["arrays"]["embedding"]["offset"] = json!(number)));
        refused(&forged(|json| json["arrays"]["embedding"]["len"] = json!(number)));
        // Panels of a few tiles may have the same length as others.
        let fields = ["n", "k", "lanes", "cols"];
        for field in fields.into_iter().take(if number > 64 { 4 } else { 2 }) {
            refused(&forged(|json| json["linears"]["layers.0.qkv"][field] = json!(number)));
            refused(&forged(|json| json["linears"]["head"][field] = json!(number)));
        }
        refused(&forged(|json| {
            json["linears"]["layers.0.qkv"]["format"] = json!({"awq": {"group": number}});
        }));
    }
    refused(&forged(|json| json["linears"]["layers.0.qkv"]["format"] = json!("int8")));
    refused(&forged(|json| json["linears"]["layers.0.qkv"]["format"] = json!("int3")));
    refused(&forged(|json| _ = json["arrays"].as_object_mut().unwrap().remove("final_norm")));
    refused(&forged(|json| _ = json["linears"].as_object_mut().unwrap().remove("head")));
    refused(&forged(|json| json["more"] = json!(1)));
    refused(&forged(|json| *json = json!([])));
}

#[test]
fn other_versions_and_files_are_refused() {
    let mut newer = sound().0.clone();
    newer[8] = 200;
    let error = check(&newer).unwrap_err();
    assert!(error.contains("version 200") && error.contains("anew"), "{error}");
    refused(b"");
    refused(b"BSPKPACK");
    refused(&[0; 4096]);
    refused(&fs::read(super::tiny(CASE).join("model.safetensors")).unwrap());
}

/// So many cases, none of them written to a file.
fn cases(num: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(num) }
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn cut_files_are_refused(share in 0.0..1.0f64) {
        let bytes = &sound().0;
        refused(&bytes[..(share * bytes.len() as f64) as usize]);
    }

    /// A flipped bit is noticed, or lies where nothing is.
    #[test]
    fn changed_files_are_noticed(share in 0.0..1.0f64, bit in 0..8u32, len in 1..20usize) {
        let mut bytes = sound().0.clone();
        let start = (share * bytes.len() as f64) as usize;
        let end = (start + len).min(bytes.len());
        bytes[start..end].iter_mut().for_each(|byte| *byte ^= 1 << bit);
        if let Err(error) = check(&bytes) {
            prop_assert!(error.contains("weights.bin"), "{error}");
        }
    }
}
