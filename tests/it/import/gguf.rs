//! GGUF files: values of every block type, whole imports, and files that lie.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use bespoke::Error;
use bespoke::import::gguf::{BlockFormat, Gguf, convert, dequantize, import};
use bespoke::quantize::checkpoint::Checkpoint;
use bespoke::tokenizer::{SpecialTokens, Tokenizer};
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

/// What the tokenizer of the tiny model makes of `text` when its split has this name.
fn pieces(split: &'static str, text: &str) -> Vec<String> {
    let mut file = tiny_llama();
    file.set("tokenizer.ggml.pre", Meta::Text(split));
    let dir = import_bytes(&file.bytes()).expect("a sound file");
    let tokenizer = Tokenizer::load(dir.path()).expect("a sound tokenizer");
    let vocab = json(dir.path(), "tokenizer.json")["model"]["vocab"].clone();
    let spelled = |id: u32| {
        let found = vocab.as_object().expect("a vocabulary").iter().find(|entry| *entry.1 == id);
        found.expect("a token of the vocabulary").0.clone()
    };
    let ids = tokenizer.encode(text, SpecialTokens::Add).expect("tokens");
    ids.into_iter().map(spelled).collect()
}

#[test]
fn text_is_cut_as_the_file_says() {
    let cases: [(&str, &str, &[&str]); 9] = [
        ("smollm", "hello world", &["hello", "Ġw", "o", "r", "l", "d"]),
        ("smollm", "hello 123", &["hello", "Ġ", "1", "2", "3"]),
        ("gpt-2", "hello1234", &["hello", "123", "4"]),
        ("default", "a\nhello", &["a", "Ċ", "hello"]),
        ("llama-bpe", "1234", &["123", "4"]),
        ("dbrx", "4123", &["4", "12", "3"]),
        ("qwen2", "12 hello", &["1", "2", "Ġ", "hello"]),
        ("smollm", "<|turn|>hello<|end|>", &["<|turn|>", "hello", "<|end|>"]),
        ("qwen2", "<|turn|>", &["<|turn|>"]),
    ];
    for (split, text, expected) in cases {
        assert_eq!(pieces(split, text), expected, "{split} {text:?}");
    }
}

#[test]
fn a_beginning_is_added_only_when_asked_for() {
    for (add, num_tokens) in [(false, 1), (true, 2)] {
        let mut file = tiny_llama();
        file.set("tokenizer.ggml.add_bos_token", Meta::Bool(add));
        let dir = import_bytes(&file.bytes()).expect("a sound file");
        let tokenizer = Tokenizer::load(dir.path()).expect("a sound tokenizer");
        let ids = |special| tokenizer.encode("hello", special).expect("tokens");
        assert_eq!(ids(SpecialTokens::Add).len(), num_tokens);
        assert_eq!(ids(SpecialTokens::Omit).len(), 1);
        assert_eq!(json(dir.path(), "tokenizer_config.json")["add_bos_token"], add);
    }
}

/// The tiny Llama, renamed to another family: keys, and tensors where they differ.
fn renamed(family: &'static str) -> GgufFile {
    let mut file = tiny_llama();
    file.set("general.architecture", Meta::Text(family));
    for (key, _) in &mut file.metadata {
        if let Some(rest) = key.strip_prefix("llama.") {
            *key = format!("{family}.{rest}");
        }
    }
    file
}

fn add_tensor(file: &mut GgufFile, name: &str, dims: &[usize]) {
    let values = 0..dims.iter().product::<usize>();
    let data = values.flat_map(|i| (i as f32).to_le_bytes()).collect();
    let dims = dims.iter().map(|&dim| dim as u64).collect();
    file.tensors.push(GgufTensor { name: name.to_owned(), dims, kind: F32, data });
}

#[test]
fn qwen_keeps_its_rows_and_brings_its_extras() {
    let mut qwen2 = renamed("qwen2");
    for (name, len) in [("q", 64), ("k", 32), ("v", 32)] {
        add_tensor(&mut qwen2, &format!("blk.0.attn_{name}.bias"), &[len]);
    }
    let mut qwen3 = renamed("qwen3");
    for name in ["q", "k"] {
        add_tensor(&mut qwen3, &format!("blk.0.attn_{name}_norm.weight"), &[HEAD_DIM]);
    }
    let cases =
        [(qwen2, "self_attn.k_proj.bias", 32), (qwen3, "self_attn.q_norm.weight", HEAD_DIM)];
    for (mut file, extra, len) in cases {
        add_tensor(&mut file, "output.weight", &[HIDDEN, 105]);
        let dir = import_bytes(&file.bytes()).expect("a sound file");
        let config = ModelConfig::from_file(&dir.path().join("config.json")).expect("a config");
        assert!(!config.tie_word_embeddings);
        let rows_of_q = rows(dir.path(), "model.layers.0.self_attn.q_proj.weight");
        assert!(rows_of_q.iter().enumerate().all(|(i, &value)| value == (i / HIDDEN) as f32));
        let expected: Vec<f32> = (0..len).map(|i| i as f32).collect();
        assert_eq!(rows(dir.path(), &format!("model.layers.0.{extra}")), expected);
    }
    assert!(refusal(&renamed("qwen2")).contains("attn_q.bias"));
    assert!(refusal(&renamed("qwen3")).contains("attn_q_norm"));
}

#[test]
fn phi3_is_fused_and_rotates_in_part() {
    let mut file = renamed("phi3");
    let split = ["attn_q.", "attn_k.", "attn_v.", "ffn_gate.", "ffn_up."];
    file.tensors.retain(|tensor| !split.iter().any(|name| tensor.name.contains(name)));
    add_tensor(&mut file, "blk.0.attn_qkv.weight", &[HIDDEN, 128]);
    add_tensor(&mut file, "blk.0.ffn_up.weight", &[HIDDEN, 192]);
    file.set("phi3.rope.dimension_count", Meta::U32(8));
    let dir = import_bytes(&file.bytes()).expect("a sound file");
    let config = ModelConfig::from_file(&dir.path().join("config.json")).expect("a config");
    assert_eq!((config.head_dim, config.rotary_dim), (HEAD_DIM, 8));
    assert_eq!(rows(dir.path(), "model.layers.0.mlp.gate_up_proj.weight").len(), HIDDEN * 192);
}

#[test]
fn biases_of_a_llama_come_apart_like_their_rows() {
    let mut file = tiny_llama();
    for (name, len) in [("q", 64), ("k", 32), ("v", 32), ("output", HIDDEN)] {
        add_tensor(&mut file, &format!("blk.0.attn_{name}.bias"), &[len]);
    }
    let dir = import_bytes(&file.bytes()).expect("a sound file");
    let config = ModelConfig::from_file(&dir.path().join("config.json")).expect("a config");
    assert!(config.qkv_bias && config.o_bias && !config.mlp_bias);
    let bias = rows(dir.path(), "model.layers.0.self_attn.q_proj.bias");
    assert_eq!(bias[..3], [0.0, 2.0, 4.0]);
    assert_eq!(bias[8..10], [1.0, 3.0]);
    assert_eq!(rows(dir.path(), "model.layers.0.self_attn.v_proj.bias")[..3], [0.0, 1.0, 2.0]);
}

/// The divisors that Llama 3.2 has, at the tiny model's eight frequencies.
#[test]
fn llama3_scaling_is_read_off_its_divisors() {
    let with_divisors = |divisors: [f32; 8]| {
        let mut file = tiny_llama();
        file.set("llama.rope.freq_base", Meta::F32(500_000.0));
        let data = divisors.iter().flat_map(|d| d.to_le_bytes()).collect();
        let (name, dims) = ("rope_freqs.weight".to_owned(), vec![8]);
        file.tensors.push(GgufTensor { name, dims, kind: F32, data });
        file
    };
    // Wavelengths: 6, 32, 167, 861, 4443, 22914, … ; between 2048 and 8192 they blend.
    let smooth = (8192.0 / (std::f64::consts::TAU * 500_000f64.powf(0.5)) - 1.0) / 3.0;
    let blended = (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32;
    let divisors = [1.0, 1.0, 1.0, 1.0, blended, 32.0, 32.0, 32.0];
    let dir = import_bytes(&with_divisors(divisors).bytes()).expect("a sound file");
    let scaling = &json(dir.path(), "config.json")["rope_scaling"];
    assert_eq!(scaling["rope_type"], "llama3");
    assert_eq!(scaling["factor"], 32.0);
    assert_eq!(scaling["original_max_position_embeddings"], 8192);
    let other = [1.0, 1.0, 1.0, 5.0, blended, 32.0, 32.0, 32.0];
    assert!(refusal(&with_divisors(other)).contains("rope_freqs.weight"));
}

#[test]
fn yarn_and_linear_scaling_go_into_the_config() {
    let mut file = tiny_llama();
    file.set("llama.rope.scaling.type", Meta::Text("yarn"));
    file.set("llama.rope.scaling.factor", Meta::F32(4.0));
    file.set("llama.rope.scaling.original_context_length", Meta::U32(32));
    let dir = import_bytes(&file.bytes()).expect("a sound file");
    let scaling = json(dir.path(), "config.json")["rope_scaling"].clone();
    assert_eq!((&scaling["rope_type"], &scaling["factor"]), (&"yarn".into(), &4.0.into()));
    assert_eq!(scaling["original_max_position_embeddings"], 32);
    assert!(scaling.get("attention_factor").is_none());
    file.set("llama.rope.scaling.type", Meta::Text("linear"));
    let dir = import_bytes(&file.bytes()).expect("a sound file");
    assert_eq!(json(dir.path(), "config.json")["rope_scaling"]["rope_type"], "linear");
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
        ("same token", set("tokenizer.ggml.tokens", Meta::Texts(vec!["a".into(); 105])), "both"),
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
