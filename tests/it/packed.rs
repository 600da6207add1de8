//! Weights that are mapped as kernels read them: the same bits as from the checkpoint, whatever
//! happens to the file.

mod bundle;
mod cache;
mod damage;

use std::fs;
use std::path::{Path, PathBuf};

use bespoke::Error;
use bespoke::backend::cpu::is_available;
use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke::packed::{self, PackedFile};
use bespoke::source::{ModelFolder, ModelSource, WeightsSource};
use bespoke_kernel_gen::spec::ActivationType;
use bespoke_kernel_gen::target::Target;
use tempfile::TempDir;

fn tiny(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/tiny").join(case)
}

/// Every tiny model that kernels can be made for.
fn cases() -> Vec<String> {
    let entries = fs::read_dir(tiny("")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut cases: Vec<String> = names.filter(|name| !name.contains("-moe")).collect();
    cases.sort();
    cases
}

fn options(kernels: KernelTable) -> EngineOptions {
    EngineOptions {
        backend: BackendChoice::Cpu,
        num_threads: Some(2),
        max_context: Some(64),
        max_sequences: 2,
        ..EngineOptions::new(kernels)
    }
}

fn load(source: &ModelSource, options: &EngineOptions) -> Result<Engine, Error> {
    Engine::load_from(source, options, &mut |_| {})
}

/// Bits of the logits of a few tokens.
fn logits(engine: &mut Engine) -> Vec<u32> {
    let mut bits = Vec::new();
    let mut keep = |_, row: &[f32]| bits.extend(row.iter().map(|logit| logit.to_bits()));
    engine.logits(&[1, 2, 3, 150, 77, 9, 9, 8, 31, 100], &mut keep).unwrap();
    bits
}

/// The packed weights of a tiny model in a file.
fn pack(case: &str, options: &EngineOptions) -> (TempDir, PathBuf) {
    pack_from(&ModelSource::folder(tiny(case)), options)
}

fn pack_from(source: &ModelSource, options: &EngineOptions) -> (TempDir, PathBuf) {
    let engine = load(source, options).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.bin");
    let mut bytes = Vec::new();
    let decoder = engine.cpu_decoder().unwrap();
    let len = packed::write(decoder, engine.weights_name(), &mut bytes).unwrap();
    assert_eq!(len, bytes.len() as u64);
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// A tiny model whose weights are in a file.
fn with_weights(case: &str, path: &Path) -> Result<ModelSource, Error> {
    Ok(ModelSource {
        files: ModelFolder::Disk(tiny(case)),
        weights: WeightsSource::Packed(PackedFile::open(path)?),
        packed_cache: None,
    })
}

#[test]
fn packed_weights_give_the_same_bits() {
    for case in cases() {
        for activation in [ActivationType::Int8, ActivationType::Float] {
            let options = EngineOptions { activation, ..options(bespoke_tests::tiny_kernels()) };
            let mut direct = load(&ModelSource::folder(tiny(&case)), &options).unwrap();
            let (_dir, path) = pack(&case, &options);
            let mut packed = load(&with_weights(&case, &path).unwrap(), &options).unwrap();
            assert_eq!(logits(&mut packed), logits(&mut direct), "{case} {activation:?}");
            assert_eq!(packed.memory(), direct.memory(), "{case}");
            assert_eq!(packed.weights_name(), direct.weights_name(), "{case}");
            let (again, first) = (again(&packed), fs::read(&path).unwrap());
            assert!(again == first, "{case}: the same weights make the same file");
        }
    }
}

/// Weights in pairs of inputs serve float activations too, and the other way round.
#[test]
fn bf16_pairs_are_read_in_every_form() {
    let model = crate::golden::tiny::bf16_model();
    let targets: Vec<Target> = Target::ALL.into_iter().filter(|t| is_available(*t)).collect();
    let of = |target, activation| EngineOptions {
        target: Some(target),
        activation,
        ..options(bespoke_tests::bf16_kernels())
    };
    let forms = [ActivationType::Bf16, ActivationType::Float];
    let all: Vec<EngineOptions> =
        targets.iter().flat_map(|target| forms.map(|form| of(*target, form))).collect();
    let folder = ModelSource::folder(model.path());
    for from in &all {
        let (_dir, path) = pack_from(&folder, from);
        let packed = ModelSource {
            files: ModelFolder::Disk(model.path().to_owned()),
            weights: WeightsSource::Packed(PackedFile::open(&path).unwrap()),
            packed_cache: None,
        };
        for to in &all {
            let expected = logits(&mut load(&folder, to).unwrap());
            let found = logits(&mut load(&packed, to).unwrap());
            let what = [from, to].map(|options| (options.target, options.activation));
            assert_eq!(found, expected, "{what:?}");
        }
    }
}

fn again(engine: &Engine) -> Vec<u8> {
    let mut bytes = Vec::new();
    let decoder = engine.cpu_decoder().unwrap();
    packed::write(decoder, engine.weights_name(), &mut bytes).unwrap();
    bytes
}

#[test]
fn weights_of_another_target_are_packed_again() {
    let case = "llama-awq-mixed";
    let targets: Vec<Target> = Target::ALL.into_iter().filter(|t| is_available(*t)).collect();
    let of = |target| EngineOptions {
        target: Some(target),
        ..options(bespoke_tests::tiny_kernels_of_all_targets())
    };
    for from in &targets {
        let (_dir, path) = pack(case, &of(*from));
        let source = with_weights(case, &path).unwrap();
        for to in &targets {
            let mut direct = load(&ModelSource::folder(tiny(case)), &of(*to)).unwrap();
            let mut packed = load(&source, &of(*to)).unwrap();
            assert_eq!(logits(&mut packed), logits(&mut direct), "{from:?} to {to:?}");
        }
    }
}

/// The reference backend reads them as a checkpoint, as far as nothing was rounded.
#[test]
fn other_backends_read_packed_weights() {
    for case in cases() {
        let (_dir, path) = pack(&case, &options(bespoke_tests::tiny_kernels()));
        let reference = EngineOptions {
            backend: BackendChoice::Reference,
            ..options(bespoke_tests::tiny_kernels())
        };
        let mut direct = load(&ModelSource::folder(tiny(&case)), &reference).unwrap();
        match load(&with_weights(&case, &path).unwrap(), &reference) {
            Ok(mut packed) => assert_eq!(logits(&mut packed), logits(&mut direct), "{case}"),
            Err(error) => {
                let error = error.to_string();
                assert!(case.contains("awq") && error.contains("kept in int8 only"), "{error}");
            }
        }
    }
}

#[test]
fn weights_of_another_model_are_refused() {
    let options = options(bespoke_tests::tiny_kernels());
    let (_dir, path) = pack("llama-gqa2", &options);
    for case in ["llama-awq-g64", "qwen2-gqa7", "llama-mha-tied"] {
        let error = load(&with_weights(case, &path).unwrap(), &options).err().unwrap().to_string();
        assert!(error.contains("damaged") && error.contains("weights.bin"), "{case}: {error}");
    }
}
