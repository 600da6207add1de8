//! GGUF files: values of every block type, whole imports, and files that lie.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use bespoke::Error;
use bespoke::import::gguf::{BlockFormat, Gguf, convert, dequantize, import};
use bespoke::quantize::checkpoint::Checkpoint;
use bespoke_kernel_gen::model::ModelConfig;
use half::f16;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value as Json;
use tempfile::TempDir;

use super::gguf_file::{F32, GgufFile, GgufTensor, HEAD_DIM, HIDDEN, Meta, tiny_llama};

fn import_bytes(bytes: &[u8]) -> Result<TempDir, Error> {
    let dir = TempDir::new().expect("a temporary folder");
    let path = PathBuf::from("test.gguf");
    convert(Cursor::new(bytes), &path, dir.path(), &mut |_| ())?;
    Ok(dir)
}

fn refusal(file: &GgufFile) -> String {
    import_bytes(&file.bytes()).map(|_| ()).expect_err("this file must be refused").to_string()
}

fn json(dir: &Path, name: &str) -> Json {
    serde_json::from_slice(&fs::read(dir.join(name)).expect(name)).expect(name)
}

fn rows(dir: &Path, name: &str) -> Vec<f32> {
    let bytes = fs::read(dir.join("model.safetensors")).expect("weights");
    let file = SafeTensors::deserialize(&bytes).expect("a sound safetensors file");
    let tensor = file.tensor(name).expect(name);
    let (halves, _) = tensor.data().as_chunks::<2>();
    halves.iter().map(|half| f16::from_le_bytes(*half).to_f32()).collect()
}

/// Blocks of random bytes and their values by the `gguf` Python package 0.19.0.
#[test]
fn every_block_type_has_the_published_values() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/gguf/blocks.safetensors");
    let bytes = fs::read(path).expect("golden blocks");
    let golden = SafeTensors::deserialize(&bytes).expect("golden blocks");
    let ids = [0, 1, 30, 2, 3, 6, 7, 8, 12, 13, 14];
    for id in ids {
        let format = BlockFormat::from_id(id).expect("a supported type");
        let blocks = golden.tensor(&format!("{}.blocks", format.name())).expect("blocks");
        let expected = golden.tensor(&format!("{}.values", format.name())).expect("values");
        let mut values = vec![0.0; expected.data().len() / 4];
        dequantize(format, blocks.data(), &mut values);
        let found: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(found, expected.data(), "{}", format.name());
    }
}

#[test]
fn unsupported_block_types_are_named() {
    let error = BlockFormat::from_id(10).expect_err("Q2_K is not supported");
    assert!(error.contains("Q2_K") && error.contains("Q4_K"), "{error}");
}

#[test]
fn a_llama_becomes_an_ordinary_folder() {
    let work = TempDir::new().expect("a temporary folder");
    let (file, out) = (work.path().join("tiny.gguf"), work.path().join("tiny"));
    fs::write(&file, tiny_llama().bytes()).expect("a file");
    let mut last = 0;
    import(&file, &out, &mut |progress| {
        assert!(progress.done > last && progress.done <= progress.total);
        last = progress.done;
    })
    .expect("a sound file");
    let config = ModelConfig::from_file(&out.join("config.json")).expect("a sound config");
    assert_eq!((config.hidden_size, config.num_kv_heads, config.head_dim), (HIDDEN, 2, HEAD_DIM));
    assert!(config.tie_word_embeddings);
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![0]));
    assert_eq!(config.rms_norm_eps, 1e-5);
    let tokenizer = json(&out, "tokenizer_config.json");
    assert_eq!(tokenizer["chat_template"], "{{ messages }}");
    assert_eq!(tokenizer["eos_token"], "<|end|>");
    assert_eq!(json(&out, "generation_config.json")["eos_token_id"], 0);
    assert_eq!(Checkpoint::open(&out).expect("sound weights").tensors.len(), 11);
    let names: Vec<_> = fs::read_dir(work.path()).expect("a folder").flatten().collect();
    assert_eq!(names.len(), 2, "only the file and the folder remain: {names:?}");
    let again = import(&file, &out, &mut |_| ()).expect_err("the folder exists");
    assert!(again.to_string().contains("already exists"), "{again}");
}

/// GGUF keeps rotary pairs side by side, model folders keep them half a head apart.
#[test]
fn rotary_pairs_come_apart() {
    let dir = import_bytes(&tiny_llama().bytes()).expect("a sound file");
    for (name, heads) in [("q_proj", 4), ("k_proj", 2)] {
        let values = rows(dir.path(), &format!("model.layers.0.self_attn.{name}.weight"));
        for (row, columns) in values.chunks_exact(HIDDEN).enumerate() {
            let (head, at) = (row / HEAD_DIM, row % HEAD_DIM);
            let source = head * HEAD_DIM + 2 * (at % (HEAD_DIM / 2)) + at / (HEAD_DIM / 2);
            assert!(columns.iter().all(|&value| value == source as f32), "{name} row {row}");
        }
        assert_eq!(values.len(), heads * HEAD_DIM * HIDDEN);
    }
    let values = rows(dir.path(), "model.layers.0.self_attn.v_proj.weight");
    // The first byte of the first block is 0, its nibbles 0 - 8 at scale 0.5.
    assert_eq!((values[0], values[16]), (-4.0, -4.0));
    // The second byte is 13: nibbles 13 and 0.
    assert_eq!((values[1], values[17]), (2.5, -4.0));
}

#[test]
fn numbers_that_do_not_fit_are_refused() {
    for value in [1e6f32, 65520.0, f32::INFINITY, f32::NAN] {
        let mut file = tiny_llama();
        file.tensor("output_norm.weight").data[12..16].copy_from_slice(&value.to_le_bytes());
        let message = refusal(&file);
        assert!(message.contains("output_norm.weight") && message.contains("65504"), "{message}");
    }
    let mut file = tiny_llama();
    file.tensor("output_norm.weight").data[12..16].copy_from_slice(&65519.0f32.to_le_bytes());
    assert_eq!(
        rows(import_bytes(&file.bytes()).expect("fits").path(), "model.norm.weight")[3],
        65504.0
    );
}

/// A change to a sound file, and a word its refusal must contain.
type Case = (&'static str, Box<dyn Fn(&mut GgufFile)>, &'static str);

fn set(key: &'static str, value: Meta) -> Box<dyn Fn(&mut GgufFile)> {
    Box::new(move |file| file.set(key, value.clone()))
}

fn remove(name: &'static str) -> Box<dyn Fn(&mut GgufFile)> {
    Box::new(move |file| {
        file.tensors.retain(|tensor| tensor.name != name);
        file.metadata.retain(|entry| entry.0 != name);
    })
}

#[test]
fn contradictions_are_refused_with_their_name() {
    let extra = |name: &'static str| -> Box<dyn Fn(&mut GgufFile)> {
        Box::new(move |file| {
            let (name, data) = (name.to_owned(), vec![0; 128]);
            file.tensors.push(GgufTensor { name, dims: vec![32], kind: F32, data });
        })
    };
    let cases: Vec<Case> = vec![
        ("architecture", set("general.architecture", Meta::Text("mamba")), "mamba"),
        ("experts", set("llama.expert_count", Meta::U32(8)), "expert_count"),
        ("layers", set("llama.block_count", Meta::U32(2)), "blk.1.attn_norm.weight"),
        ("many layers", set("llama.block_count", Meta::U32(u32::MAX)), "4294967295"),
        ("no layers", set("llama.block_count", Meta::U32(0)), "block_count"),
        ("heads", set("llama.attention.head_count", Meta::U32(5)), "5"),
        ("no heads", set("llama.attention.head_count", Meta::U32(0)), "head_count"),
        ("hidden", set("llama.embedding_length", Meta::U32(32)), "token_embd.weight"),
        ("rope", set("llama.rope.scaling.type", Meta::Text("longrope")), "longrope"),
        ("text as number", set("llama.context_length", Meta::Text("x")), "context_length"),
        ("missing key", remove("llama.context_length"), "context_length"),
        ("missing tensor", remove("blk.0.ffn_up.weight"), "blk.0.ffn_up.weight"),
        ("unknown tensor", extra("blk.0.surprise"), "surprise"),
        ("twice", extra("output_norm.weight"), "output_norm.weight"),
        ("tokenizer", set("tokenizer.ggml.model", Meta::Text("llama")), "byte-level BPE"),
        ("split", set("tokenizer.ggml.pre", Meta::Text("chameleon")), "chameleon"),
        ("eos", set("tokenizer.ggml.eos_token_id", Meta::U32(5000)), "5000"),
        ("types", set("tokenizer.ggml.token_type", Meta::I32s(vec![1])), "token_type"),
        ("merge", set("tokenizer.ggml.merges", Meta::Texts(vec!["h x".into()])), "h x"),
        ("one part", set("tokenizer.ggml.merges", Meta::Texts(vec!["he".into()])), "he"),
        ("same token", set("tokenizer.ggml.tokens", Meta::Texts(vec!["a".into(); 103])), "both"),
        ("tokens", set("tokenizer.ggml.tokens", Meta::Texts(vec!["a".into(); 200])), "200"),
        ("alignment", set("general.alignment", Meta::U32(24)), "24"),
        ("no alignment", set("general.alignment", Meta::U32(0)), "alignment"),
    ];
    for (name, change, word) in cases {
        let mut file = tiny_llama();
        change(&mut file);
        let message = refusal(&file);
        assert!(message.contains(word), "{name}: {message}");
    }
}

#[test]
fn tensors_that_lie_are_refused() {
    let cases: [(&str, &[u64], u32); 6] = [
        ("huge", &[1 << 40, 1 << 40], F32),
        ("longer than the file", &[HIDDEN as u64, 1 << 20], F32),
        ("empty", &[0, 4], F32),
        ("half a block", &[48, 2], 2),
        ("unknown type", &[HIDDEN as u64], 200),
        ("five dimensions", &[1, 1, 1, 1, 1], F32),
    ];
    for (name, dims, kind) in cases {
        let mut file = tiny_llama();
        let tensor = file.tensor("blk.0.attn_v.weight");
        (tensor.dims, tensor.kind) = (dims.to_vec(), kind);
        let message = refusal(&file);
        assert!(message.contains("blk.0.attn_v.weight"), "{name}: {message}");
    }
}

/// Counts that would ask for terabytes fail on the file's size, before any allocation.
#[test]
fn hostile_counts_are_refused() {
    let header = |tensors: u64, keys: u64, rest: &[u8]| {
        let counts = [tensors.to_le_bytes(), keys.to_le_bytes()].concat();
        [b"GGUF\x03\0\0\0", counts.as_slice(), rest].concat()
    };
    let text = |len: u64| len.to_le_bytes().to_vec();
    let array = |kind: u32, len: u64| {
        let kinds = [9u32.to_le_bytes(), kind.to_le_bytes()].concat();
        [text(1), b"k".to_vec(), kinds, len.to_le_bytes().to_vec()].concat()
    };
    let cases = [
        header(u64::MAX, 0, &[]),
        header(0, u64::MAX, &[]),
        header(500_000_000, 1, &[0; 64]),
        header(60_000, 60_000, &[0; 64]),
        header(0, 1, &text(u64::MAX)),
        header(0, 1, &[text(1 << 40), vec![0; 64]].concat()),
        header(0, 1, &array(8, u64::MAX)),
        header(0, 1, &array(4, 1 << 62)),
        header(0, 1, &array(8, 1 << 21)),
        header(0, 1, &array(9, 1)),
        header(0, 1, &array(77, 1)),
        b"GGUF\x01\0\0\0".to_vec(),
        b"GGUF\0\0\0\x03".to_vec(),
        b"GGML".to_vec(),
        Vec::new(),
    ];
    for bytes in cases {
        let result = Gguf::read(Cursor::new(&bytes), Path::new("test.gguf"));
        assert!(result.is_err(), "{bytes:02x?}");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = tiny_llama().bytes();
    let header_len = bytes.len() - tiny_llama().tensors.iter().map(|t| t.data.len()).sum::<usize>();
    let in_header = 0..header_len;
    let in_data = (header_len..bytes.len()).step_by(997).chain([bytes.len() - 1]);
    for len in in_header.chain(in_data) {
        let result = Gguf::read(Cursor::new(&bytes[..len]), Path::new("test.gguf"));
        assert!(result.is_err(), "the first {len} of {} bytes", bytes.len());
    }
}

#[test]
fn a_failed_import_leaves_nothing() {
    let work = TempDir::new().expect("a temporary folder");
    let (file, out) = (work.path().join("tiny.gguf"), work.path().join("tiny"));
    let mut broken = tiny_llama();
    // The last weights written: the failure comes when most of the folder is there.
    broken.tensor("blk.0.ffn_norm.weight").data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&file, broken.bytes()).expect("a file");
    assert!(import(&file, &out, &mut |_| ()).is_err());
    let names: Vec<_> = fs::read_dir(work.path()).expect("a folder").flatten().collect();
    assert_eq!(names.len(), 1, "only the file remains: {names:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever bytes change, there is an answer: a folder that reads back, or an error.
    #[test]
    fn mutated_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        in_header in any::<bool>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = tiny_llama().bytes();
        let span = if in_header { 3000 } else { bytes.len() };
        for (at, value) in changes {
            bytes[at.index(span)] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(dir) = import_bytes(&bytes) {
            prop_assert!(Checkpoint::open(dir.path()).is_ok());
        }
    }
}
