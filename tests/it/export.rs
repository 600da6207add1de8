//! GGUF files that are written, and what the importer, which knows those of others, reads there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bespoke::export::gguf::{ExportOptions, HeadFormat, LinearFormat, Summary, export};
use bespoke::files::IfExists;
use bespoke::import::gguf::{BlockFormat, Gguf, Value, import};
use bespoke::model::linear::{LinearPart, LinearSource};
use bespoke::model::weights::{ModelWeights, Weights};
use bespoke::tokenizer::{SpecialTokens, Tokenizer};
use bespoke_kernel_gen::model::{Architecture, ModelConfig, RopeScaling};
use bespoke_kernel_gen::spec::LinearRole;
use half::f16;
use serde_json::{Map, Value as Json, json};
use tempfile::TempDir;

const ROLES: [LinearRole; 4] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down];

const OPTIONS: ExportOptions = ExportOptions {
    linears: LinearFormat::Q4_1,
    head: HeadFormat::AsStored,
    if_exists: IfExists::Refuse,
};

fn tiny(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/tiny").join(case)
}

fn byte_level() -> Json {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    })
}

/// A byte-level tokenizer for ASCII with 103 tokens; 1 and 2 start and end a text.
fn tokenizer() -> Json {
    let specials = ["<|pad|>", "<|start|>", "<|end|>"];
    let texts = specials.into_iter().map(str::to_owned).chain(('!'..='~').map(String::from));
    let merged = ["Ġ", "Ċ", "he", "ll", "hell", "hello"].map(str::to_owned);
    let vocab: Map<String, Json> =
        texts.chain(merged).enumerate().map(|(id, text)| (text, json!(id))).collect();
    let added = |(id, text): (usize, &str)| {
        json!({
            "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": specials.into_iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level(), "post_processor": null,
        "decoder": byte_level(),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab,
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]],
        },
    })
}

/// A tiny model with a tokenizer, and room for what is made of it.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new(case: &str) -> Place {
        let place = Place { dir: TempDir::new().expect("a folder") };
        fs::create_dir(place.model()).expect("a folder");
        for name in ["config.json", "model.safetensors"] {
            fs::copy(tiny(case).join(name), place.model().join(name)).expect("a copy");
        }
        place.write("tokenizer.json", &tokenizer());
        place.write(
            "tokenizer_config.json",
            &json!({
                "bos_token": "<|start|>", "eos_token": {"content": "<|end|>"},
                "pad_token": "<|pad|>", "chat_template": "{{ messages }}",
            }),
        );
        place
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("model.gguf")
    }

    fn imported(&self) -> PathBuf {
        self.dir.path().join("imported")
    }

    fn write(&self, name: &str, value: &Json) {
        fs::write(self.model().join(name), value.to_string()).expect("a file");
    }

    fn edit(&self, name: &str, edit: impl FnOnce(&mut Json)) {
        let text = fs::read(self.model().join(name)).expect("a file");
        let mut value = serde_json::from_slice(&text).expect("JSON");
        edit(&mut value);
        self.write(name, &value);
    }

    fn export(&self, options: &ExportOptions) -> Summary {
        export(&self.model(), &self.file(), options, &mut |_| ()).expect("a file")
    }

    fn refusal(&self) -> String {
        let error = export(&self.model(), &self.file(), &OPTIONS, &mut |_| ()).expect_err("not so");
        let names: Vec<_> = fs::read_dir(self.dir.path()).expect("a folder").flatten().collect();
        assert_eq!(names.len(), 1, "only the model remains: {names:?}");
        error.to_string()
    }

    fn gguf(&self) -> Gguf<fs::File> {
        Gguf::read(fs::File::open(self.file()).expect("a file"), &self.file()).expect("sound")
    }

    fn round_trip(&self, options: &ExportOptions) -> Summary {
        let summary = self.export(options);
        assert_eq!(fs::metadata(self.file()).expect("a file").len(), summary.num_bytes);
        import(&self.file(), &self.imported(), &mut |_| ()).expect("a folder");
        summary
    }
}

/// All numbers of a model by what they are, as computed with.
fn numbers(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let config = ModelConfig::from_file(&dir.join("config.json")).expect("a config");
    let shape = config.shape("model").expect("a shape");
    let weights = Weights::open(dir, &config, &shape).expect("weights");
    let rows = |source: &LinearSource| {
        let mut row = vec![0.0; source.k()];
        let mut all = Vec::new();
        for n in 0..source.n() {
            source.row(n, &mut row);
            all.extend_from_slice(&row);
        }
        all.extend(source.bias.iter().flatten());
        all
    };
    let embedding = weights.embedding().expect("an embedding");
    let parts = vec![LinearPart::Dense(embedding.view())];
    let source = LinearSource { parts, row_map: None, bias: None };
    let head = weights.linear(LinearRole::Head, 0).expect("a head");
    let mut all = BTreeMap::from([
        ("embedding".to_owned(), rows(&source)),
        ("head".to_owned(), rows(&head.source())),
        ("norm".to_owned(), weights.final_norm().expect("a norm")),
    ]);
    for layer in 0..shape.num_layers {
        let norms = weights.norms(layer).expect("norms");
        let (q, k) = norms.qk.unwrap_or_default();
        all.insert(format!("{layer} norms"), [norms.attention, norms.mlp, q, k].concat());
        for role in ROLES {
            let linear = weights.linear(role, layer).expect("a linear");
            all.insert(format!("{layer} {role:?}"), rows(&linear.source()));
        }
    }
    all
}

fn in_float16(numbers: BTreeMap<String, Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
    let rounded = |values: Vec<f32>| values.into_iter().map(|v| f16::from_f32(v).to_f32());
    numbers.into_iter().map(|(name, values)| (name, rounded(values).collect())).collect()
}

/// What has to be the same of two models, whatever their tensors' types.
fn comparable(dir: &Path) -> ModelConfig {
    let config = ModelConfig::from_file(&dir.join("config.json")).expect("a config");
    let architecture = match config.architecture {
        // The importer writes it as a Llama.
        Architecture::InternLm2 => Architecture::Llama,
        other => other,
    };
    let dtype = bespoke_kernel_gen::spec::DType::F16;
    ModelConfig { architecture, dtype, quantization: None, ..config }
}

#[test]
fn dense_models_come_back() {
    let cases = [
        "llama-gqa2",
        "llama-mha-tied",
        "llama-mqa-hd24",
        "llama-hd80-bias",
        "llama-rope-linear",
        "llama-rope-yarn",
        "llama3-rope",
        "mistral-sliding",
        "qwen2-gqa7",
        "qwen3-qknorm",
        "phi3-fused",
        "internlm2-fused",
    ];
    for case in cases {
        let place = Place::new(case);
        if case == "llama3-rope" {
            // The importer takes Llama 3's own context for granted.
            place.edit("config.json", |config| {
                config["rope_scaling"]["original_max_position_embeddings"] = json!(8192);
            });
        }
        let summary = place.round_trip(&OPTIONS);
        assert_eq!(summary.rounding, None);
        assert_eq!(summary.notes.len(), usize::from(case == "mistral-sliding"), "{case}");
        assert_eq!(comparable(&place.model()), comparable(&place.imported()), "{case}");
        let expected = in_float16(numbers(&place.model()));
        for (name, found) in numbers(&place.imported()) {
            assert!(found == expected[&name], "{case}: {name} differs");
        }
    }
}

#[test]
fn quantized_models_come_back() {
    for (case, blocks) in [("g32", 1), ("g64", 2), ("g128", 4), ("gchannel", 0)] {
        let place = Place::new(&format!("llama-awq-{case}"));
        let exact = place.round_trip(&ExportOptions { linears: LinearFormat::Q5_0, ..OPTIONS });
        let rounding = exact.rounding.expect("quantized weights");
        assert_eq!((rounding.num_rounded, rounding.error_max), (0, 0.0));
        let expected = in_float16(numbers(&place.model()));
        assert!(numbers(&place.imported()) == expected, "{case} differs");

        fs::remove_dir_all(place.imported()).expect("removed");
        let options = ExportOptions { if_exists: IfExists::Replace, ..OPTIONS };
        let summary = place.round_trip(&options);
        assert!(summary.num_bytes < exact.num_bytes);
        let rounding = summary.rounding.expect("quantized weights");
        assert!(rounding.num_rounded > 0 && rounding.num_rounded < rounding.num_groups);
        assert_eq!(rounding.num_groups, exact.rounding.expect("quantized weights").num_groups);
        assert!(rounding.error_max > 0.0 && rounding.error_max < 0.008, "{rounding:?}");
        check_error(&place, rounding.error_max);
        let linear: u64 = place.gguf().tensors.values().filter(is_q4_1).map(num_blocks).sum();
        if let Some(num_groups) = linear.checked_div(blocks) {
            assert_eq!(rounding.num_groups, num_groups, "{case}");
        }
    }
}

fn is_q4_1(info: &&bespoke::import::gguf::TensorInfo) -> bool {
    info.format == BlockFormat::Q4_1
}

fn num_blocks(info: &bespoke::import::gguf::TensorInfo) -> u64 {
    info.num_bytes / 20
}

/// No weight is further off than `error_max` steps and what float16 cannot hold.
fn check_error(place: &Place, error_max: f64) {
    let dir = place.model();
    let config = ModelConfig::from_file(&dir.join("config.json")).expect("a config");
    let shape = config.shape("model").expect("a shape");
    let weights = Weights::open(&dir, &config, &shape).expect("weights");
    let imported = numbers(&place.imported());
    for layer in 0..shape.num_layers {
        for role in ROLES {
            let linear = weights.linear(role, layer).expect("a linear");
            let source = linear.source();
            let found = imported[&format!("{layer} {role:?}")].chunks_exact(source.k());
            let mut row = vec![0.0; source.k()];
            for (n, found) in found.enumerate() {
                source.row(n, &mut row);
                let (part_idx, at) = source.locate(n);
                let LinearPart::Awq(view) = source.parts[part_idx] else { panic!("quantized") };
                for (k, (found, expected)) in found.iter().zip(&row).enumerate() {
                    let step = view.scale(k / view.group, at).to_f32();
                    let bound = error_max as f32 * step + expected.abs() / 1024.0 + 1e-7;
                    assert!((found - expected).abs() <= bound, "{role:?} {n} {k}");
                }
            }
        }
    }
}

#[test]
fn the_head_is_stored_as_asked() {
    let formats = |head| {
        let place = Place::new("llama-gqa2");
        place.export(&ExportOptions { head, ..OPTIONS });
        let gguf = place.gguf();
        ["token_embd.weight", "output.weight", "output_norm.weight", "blk.0.attn_q.weight"]
            .map(|name| gguf.tensors[name].format)
    };
    let [f32, f16, q8_0] = [BlockFormat::F32, BlockFormat::F16, BlockFormat::Q8_0];
    assert_eq!(formats(HeadFormat::AsStored), [f32, f32, f32, f32]);
    assert_eq!(formats(HeadFormat::F16), [f16, f16, f32, f32]);
    assert_eq!(formats(HeadFormat::Q8_0), [q8_0, q8_0, f32, f32]);
}

#[test]
fn the_file_says_what_it_holds() {
    let place = Place::new("llama-awq-g64");
    let summary = place.export(&OPTIONS);
    let gguf = place.gguf();
    assert_eq!(gguf.tensors.len(), summary.num_tensors);
    let text = |text: &str| Value::String(text.to_owned());
    for (key, value) in [
        ("general.architecture", text("llama")),
        ("general.name", text("model")),
        ("general.file_type", Value::Integer(3)),
        ("llama.block_count", Value::Integer(2)),
        ("llama.attention.head_count_kv", Value::Integer(2)),
        ("llama.vocab_size", Value::Integer(160)),
        ("llama.rope.dimension_count", Value::Integer(32)),
        ("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        ("tokenizer.ggml.bos_token_id", Value::Integer(1)),
        ("tokenizer.ggml.eos_token_id", Value::Integer(2)),
        ("tokenizer.ggml.padding_token_id", Value::Integer(0)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.chat_template", text("{{ messages }}")),
    ] {
        assert_eq!(gguf.metadata[key], value, "{key}");
    }
    // llama.cpp wants a token for every row of the embedding.
    let Value::Strings(tokens) = &gguf.metadata["tokenizer.ggml.tokens"] else { panic!("tokens") };
    let Value::Integers(types) = &gguf.metadata["tokenizer.ggml.token_type"] else { panic!() };
    assert_eq!((tokens.len(), types.len()), (160, 160));
    assert_eq!((tokens[102].as_str(), tokens[103].as_str()), ("hello", "[PAD103]"));
    assert_eq!((types[2], types[3], types[159]), (3, 1, 5));
}

#[test]
fn text_is_tokenized_alike() {
    let place = Place::new("llama-gqa2");
    place.edit("tokenizer.json", |json| {
        json["pre_tokenizer"] = json!({
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level()],
        });
        let bos = json!({"SpecialToken": {"id": "<|start|>", "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        json["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text],
            "special_tokens": {
                "<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]},
            },
        });
        json["model"]["merges"] = json!(["h e", "l l", "he ll", "hell o"]);
    });
    place.write("generation_config.json", &json!({"eos_token_id": [2, 5, 6, 7]}));
    let summary = place.round_trip(&OPTIONS);
    assert!(summary.notes.len() == 1 && summary.notes[0].contains("[7]"), "{:?}", summary.notes);
    let [old, new] =
        [place.model(), place.imported()].map(|dir| Tokenizer::load(&dir).expect("a tokenizer"));
    for text in ["hello hell 123", "<|end|>\nhe", ""] {
        for special in [SpecialTokens::Add, SpecialTokens::Omit] {
            let ids = |tokenizer: &Tokenizer| tokenizer.encode(text, special).expect("tokens");
            assert_eq!(ids(&old), ids(&new), "{text:?}");
        }
    }
    assert_eq!(new.encode("hello", SpecialTokens::Add).expect("tokens"), [1, 102]);
    assert_eq!(new.eos_ids(), [2, 5, 6]);
    assert_eq!(old.num_ids(), new.num_ids(), "fillers are no tokens");
}

#[test]
fn what_gguf_cannot_say_is_refused() {
    assert!(Place::new("llama-rope-dynamic").refusal().contains("rope_scaling"));
    let check = |name: &str, edit: &dyn Fn(&mut Json), expect: &str| {
        let place = Place::new("llama-gqa2");
        place.edit(name, edit);
        let message = place.refusal();
        assert!(message.contains(expect), "{expect}: {message}");
    };
    let tokenizer = "tokenizer.json";
    check(tokenizer, &|json| json["model"]["byte_fallback"] = json!(true), "byte-level");
    check(tokenizer, &|json| json["model"]["ignore_merges"] = json!(true), "ignore_merges");
    check(tokenizer, &|json| json["normalizer"] = json!({"type": "Lowercase"}), "normalizer");
    check(
        tokenizer,
        &|json| json["decoder"] = json!({"type": "Metaspace", "replacement": "▁"}),
        "byte-level",
    );
    let place = Place::new("qwen2-gqa7");
    place.edit("config.json", |config| {
        config["use_sliding_window"] = json!(true);
        config["sliding_window"] = json!(16);
        config["layer_types"] = json!(["sliding_attention", "sliding_attention"]);
    });
    assert!(place.refusal().contains("sliding_window"));
    let place = Place::new("llama-gqa2");
    fs::remove_file(place.model().join("tokenizer.json")).expect("removed");
    assert!(place.refusal().contains("tokenizer.json"));
    let yarn = Place::new("llama-rope-yarn");
    yarn.edit("config.json", |config| config["rope_scaling"]["truncate"] = json!(false));
    assert!(yarn.refusal().contains("truncate"));
    let config = ModelConfig::from_file(&yarn.model().join("config.json")).expect("a config");
    assert!(matches!(config.rope_scaling, RopeScaling::Yarn { truncate: false, .. }));
}

#[test]
fn files_that_are_there_are_kept_unless_told() {
    let place = Place::new("llama-gqa2");
    fs::write(place.file(), "mine").expect("a file");
    let export = |options: &ExportOptions| {
        export(&place.model(), &place.file(), options, &mut |_| ()).map(|_| ())
    };
    let error = export(&OPTIONS).expect_err("it is there").to_string();
    assert!(error.contains("already exists"), "{error}");
    assert_eq!(fs::read(place.file()).expect("kept"), b"mine");
    let replace = ExportOptions { if_exists: IfExists::Replace, ..OPTIONS };
    // What cannot be written leaves the old file as it is.
    let whole = fs::read(place.model().join("config.json")).expect("a file");
    place.edit("config.json", |config| config["num_hidden_layers"] = json!(3));
    export(&replace).expect_err("a layer is missing");
    assert_eq!(fs::read(place.file()).expect("kept"), b"mine");
    fs::write(place.model().join("config.json"), whole).expect("a file");
    export(&replace).expect("a file");
    assert!(fs::read(place.file()).expect("replaced").starts_with(b"GGUF"));
    assert_eq!(fs::read_dir(place.dir.path()).expect("a folder").count(), 2);
}

/// The same folder gives the same bytes, and each tensor is told.
#[test]
fn exports_are_reproducible() {
    let place = Place::new("llama-awq-g32");
    let mut done = Vec::new();
    let mut total = 0;
    export(&place.model(), &place.file(), &OPTIONS, &mut |progress| {
        done.push(progress.done);
        total = progress.total;
    })
    .expect("a file");
    assert!(done.is_sorted() && done.last() == Some(&total), "{done:?} of {total}");
    assert_eq!(total as usize, place.gguf().tensors.len());
    let other = place.dir.path().join("other.gguf");
    export(&place.model(), &other, &OPTIONS, &mut |_| ()).expect("a file");
    assert!(fs::read(place.file()).expect("a file") == fs::read(other).expect("a file"));
}
