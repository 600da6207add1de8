//! Safetensors headers and indexes.

use std::path::Path;

use bespoke::Error;
use bespoke::model::safetensors::Checkpoint;
use serde_json::{Value, json};

use super::folder::{Folder, assemble, assert_refused, header, serialize};

/// Opens a folder whose `model.safetensors` has these bytes.
fn open_file(bytes: &[u8]) -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir.path()).map(|_| ())
}

fn open_header(header: &str, data_len: usize) -> Result<(), Error> {
    open_file(&assemble(header, &vec![0; data_len]))
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let mut folder = Folder::read("llama-gqa2");
    folder.tensors.truncate(3);
    let whole = serialize(&folder.tensors);
    open_file(&whole).unwrap();
    let header_end = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let lengths = (0..header_end + 64).chain((header_end + 64..whole.len()).step_by(1009));
    for len in lengths {
        assert_refused(open_file(&whole[..len]), &["model.safetensors"]);
    }
}

#[test]
fn a_file_with_bytes_at_its_end_is_refused() {
    let mut whole = serialize(&Folder::read("llama-gqa2").tensors);
    whole.push(0);
    assert_refused(open_file(&whole), &["the tensors end", "bytes"]);
}

#[test]
fn absurd_header_lengths_are_refused() {
    for len in [u64::MAX, 1 << 63, (1 << 63) - 1, 1 << 32, 11] {
        let mut file = len.to_le_bytes().to_vec();
        file.extend_from_slice(b"{}        ");
        assert_refused(open_file(&file), &[&len.to_string(), "header"]);
    }
}

#[test]
fn headers_that_are_not_objects_are_refused() {
    let nested = "[".repeat(100_000);
    let headers = ["", "null", "[]", "{", "\u{1}", "{\"a\":1}", "{\"a\":{}}", &nested];
    for header in headers {
        assert_refused(open_header(header, 0), &["header"]);
    }
}

#[test]
fn duplicate_names_are_refused() {
    let entry = r#""w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
    let header = format!("{{{entry},{entry}}}");
    assert_refused(open_header(&header, 4), &["'w'", "twice"]);
}

#[test]
fn hostile_entries_are_refused() {
    let cases = [
        // Name, type, shape, offsets; what the message must name.
        (r#"w\u0000x"#, "U8", "[4]", "[0,4]", "name"),
        ("", "U8", "[4]", "[0,4]", "name"),
        ("w", "U8", "[4]", "[4,0]", "4..0"),
        ("w", "U8", "[5]", "[0,5]", "0..5"),
        ("w", "U8", "[4]", "[0,18446744073709551615]", "18446744073709551615"),
        ("w", "U8", "[3]", "[0,4]", "[3]"),
        ("w", "F32", "[4]", "[0,4]", "F32"),
        ("w", "F32", "[4611686018427387905]", "[0,4]", "4611686018427387905"),
        ("w", "U8", "[4294967296,4294967296,4]", "[0,4]", "4294967296"),
        ("w", "U8", "[0,18446744073709551615,2]", "[0,0]", "18446744073709551615"),
        ("w", "U8", "[1,1,1,1,1,1,1,1,4]", "[0,4]", "9 dimensions"),
        ("w", "X9", "[4]", "[0,4]", "X9"),
        ("w", "U8", "[-4]", "[0,4]", "header"),
        ("w", "U8", "[4]", "[1,4]", "[4]"),
    ];
    for (name, dtype, shape, offsets, word) in cases {
        let header = format!(
            r#"{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#
        );
        assert_refused(open_header(&header, 4), &[word]);
    }
}

#[test]
fn overlaps_and_holes_are_refused() {
    let two = |first: [u64; 2], second: [u64; 2]| {
        let entry = |[start, end]: [u64; 2]| {
            json!({
                "dtype": "U8", "shape": [end - start], "data_offsets": [start, end]
            })
        };
        open_header(&json!({"a": entry(first), "b": entry(second)}).to_string(), 8)
    };
    two([0, 4], [4, 8]).unwrap();
    two([4, 8], [0, 4]).unwrap();
    assert_refused(two([0, 5], [4, 8]), &["'b'", "within"]);
    assert_refused(two([0, 8], [0, 8]), &["'b'", "within"]);
    assert_refused(two([0, 3], [4, 8]), &["'b'", "no tensor"]);
}

#[test]
fn flipped_header_bytes_never_panic() {
    let mut folder = Folder::read("llama-awq-g32");
    folder.tensors.truncate(4);
    let whole = serialize(&folder.tensors);
    let header_end = 8 + serde_json::to_string(&header(&folder.tensors)).unwrap().len();
    let mut num_refused = 0;
    for at in 0..header_end {
        for flip in [0x01, 0x10, 0x80] {
            let mut file = whole.clone();
            file[at] ^= flip;
            num_refused += usize::from(open_file(&file).is_err());
        }
    }
    assert!(num_refused > header_end, "only {num_refused} of {} were refused", 3 * header_end);
}

/// The tensors of a tiny model in two shards, and the index of them.
fn write_shards(dir: &Path, folder: &Folder) -> Value {
    let (first, second) = folder.tensors.split_at(folder.tensors.len() / 2);
    let mut weight_map = serde_json::Map::new();
    for (file, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
        std::fs::write(dir.join(file), serialize(tensors)).unwrap();
        for tensor in tensors {
            weight_map.insert(tensor.name.clone(), json!(file));
        }
    }
    json!({"metadata": {"total_size": 1}, "weight_map": weight_map})
}

fn open_index(dir: &Path, index: &str) -> Result<(), Error> {
    std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    Checkpoint::open(dir).map(|_| ())
}

#[test]
fn shards_hold_the_same_tensors_as_one_file() {
    let folder = Folder::read("llama-gqa2");
    let dir = tempfile::tempdir().unwrap();
    let index = write_shards(dir.path(), &folder);
    open_index(dir.path(), &index.to_string()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensors().count(), folder.tensors.len());
    for tensor in &folder.tensors {
        assert_eq!(checkpoint.read(&tensor.name).unwrap(), tensor.bytes, "{}", tensor.name);
    }
}

#[test]
fn an_index_cannot_point_outside_the_folder() {
    let folder = Folder::read("llama-gqa2");
    let dir = tempfile::tempdir().unwrap();
    let index = write_shards(dir.path(), &folder);
    let outside = ["../a.safetensors", "/etc/passwd", "./a.safetensors", "..", "x/a", "", "a\\b"];
    for file in outside {
        let mut index = index.clone();
        index["weight_map"]["model.norm.weight"] = json!(file);
        let result = open_index(dir.path(), &index.to_string());
        assert_refused(result, &["model.norm.weight", "not a plain file name"]);
    }
}

#[test]
fn an_index_that_contradicts_its_shards_is_refused() {
    let folder = Folder::read("llama-gqa2");
    let dir = tempfile::tempdir().unwrap();
    let index = write_shards(dir.path(), &folder);
    let first = folder.tensors[0].name.as_str();

    let mut moved = index.clone();
    moved["weight_map"][first] = json!("b.safetensors");
    assert_refused(open_index(dir.path(), &moved.to_string()), &[first, "b.safetensors"]);

    let mut absent = index.clone();
    absent["weight_map"]["none.weight"] = json!("a.safetensors");
    assert_refused(open_index(dir.path(), &absent.to_string()), &["none.weight", "not hold"]);

    let mut lost = index.clone();
    lost["weight_map"][first] = json!("c.safetensors");
    let error = open_index(dir.path(), &lost.to_string()).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("c.safetensors")));

    let twice = r#"{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}"#;
    assert_refused(open_index(dir.path(), twice), &["'w'", "twice"]);
    for text in ["", "{}", "[]", r#"{"weight_map":{}}"#, r#"{"weight_map":{"w":1}}"#] {
        assert_refused(open_index(dir.path(), text), &["index"]);
    }

    let both = serialize(&folder.tensors);
    std::fs::write(dir.path().join("b.safetensors"), both).unwrap();
    assert_refused(open_index(dir.path(), &index.to_string()), &[first, "also in"]);
}

#[test]
fn a_folder_without_weights_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let result = Checkpoint::open(dir.path()).map(|_| ());
    assert_refused(result, &["model.safetensors", "model.safetensors.index.json"]);
    std::fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert_refused(Checkpoint::open(dir.path()).map(|_| ()), &["not a regular file"]);
}
