//! The folder of packed weights: hits, misses, and folders that cannot be used.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::packed::PackedCache;
use bespoke::source::ModelSource;
use bespoke_kernel_gen::spec::ActivationType;
use tempfile::TempDir;

use super::{load, logits, options, tiny};

/// A copy of a tiny model, and a folder for packed weights.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new(case: &str) -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(place.model()).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(tiny(case).join(name), place.model().join(name)).unwrap();
        }
        place
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn cache(&self) -> PackedCache {
        PackedCache::new(self.dir.path().join("packed"))
    }

    fn source(&self) -> ModelSource {
        ModelSource { packed_cache: Some(self.cache()), ..ModelSource::folder(self.model()) }
    }

    /// The packed files, by name.
    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cache().dir).into_iter().flatten();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }
}

fn load_cached(source: &ModelSource, options: &EngineOptions) -> Engine {
    load(source, options).unwrap()
}

/// Whether packed weights were found, and none packed.
fn is_hit(engine: &Engine) -> bool {
    let stages: Vec<&str> = engine.startup().stages.iter().map(|stage| stage.name).collect();
    assert_ne!(stages.contains(&"pack weights"), stages.contains(&"set up layers"), "{stages:?}");
    stages.contains(&"set up layers")
}

fn set_age(path: &Path, seconds: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
}

#[test]
fn the_second_load_maps_what_the_first_packed() {
    let place = Place::new("llama-awq-mixed");
    let options = options(bespoke_tests::tiny_kernels());
    let mut first = load_cached(&place.source(), &options);
    let mut second = load_cached(&place.source(), &options);
    assert_eq!((is_hit(&first), is_hit(&second)), (false, true));
    assert_eq!(logits(&mut first), logits(&mut second));
    assert_eq!(first.fingerprint(), second.fingerprint());
    assert_eq!(place.files().len(), 1);
    // Other activations read the head in another form.
    let float = EngineOptions { activation: ActivationType::Float, ..options };
    assert!(!is_hit(&load_cached(&place.source(), &float)));
    assert_eq!(place.files().len(), 2);
    // Not a single one more where the cache is not wanted.
    let without = EngineOptions { packed_cache: false, ..options };
    assert!(!is_hit(&load_cached(&place.source(), &without)));
    assert_eq!(place.files().len(), 2);
}

#[test]
fn a_changed_model_is_packed_anew() {
    let place = Place::new("llama-gqa2");
    let options = options(bespoke_tests::tiny_kernels());
    load_cached(&place.source(), &options);
    let weights = place.model().join("model.safetensors");
    // Only the last bytes change, which no fingerprint covers.
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x40;
    fs::write(&weights, bytes).unwrap();
    set_age(&weights, 100);
    let mut changed = load_cached(&place.source(), &options);
    assert!(!is_hit(&changed));
    let mut direct = load(&ModelSource::folder(place.model()), &options).unwrap();
    assert_eq!(logits(&mut changed), logits(&mut direct));
    assert!(is_hit(&load_cached(&place.source(), &options)));
}

#[test]
fn a_damaged_file_is_told_and_made_anew() {
    let place = Place::new("llama-gqa2");
    let options = options(bespoke_tests::tiny_kernels());
    let mut sound = load_cached(&place.source(), &options);
    let [file] = &place.files()[..] else { panic!("one file") };
    let bytes = fs::read(file).unwrap();
    let mut flipped = bytes.clone();
    let last = flipped.len() - 1;
    flipped[last] ^= 1;
    for damaged in [&flipped[..], &bytes[..bytes.len() / 2], b""] {
        fs::write(file, damaged).unwrap();
        let mut engine = load_cached(&place.source(), &options);
        assert!(!is_hit(&engine));
        let [warning] = &engine.startup().warnings[..] else { panic!("one warning") };
        assert!(warning.contains("damaged"), "{warning}");
        assert_eq!(logits(&mut engine), logits(&mut sound));
        assert!(fs::read(file).unwrap() == bytes, "the file is whole again");
        assert!(is_hit(&load_cached(&place.source(), &options)));
    }
}

#[test]
fn the_longest_unused_goes() {
    let place = Place::new("llama-gqa2");
    let options = options(bespoke_tests::tiny_kernels());
    load_cached(&place.source(), &options);
    let [first] = <[PathBuf; 1]>::try_from(place.files()).unwrap();
    let len = fs::metadata(&first).unwrap().len();
    let with_room = |num: u64| {
        let cache = PackedCache { bytes_max: num * len + len / 2, ..place.cache() };
        ModelSource { packed_cache: Some(cache), ..place.source() }
    };
    let old = place.cache().dir.join("old.bin");
    fs::copy(&first, &old).unwrap();
    set_age(&old, 5000);
    set_age(&first, 9000);
    // Being used makes it the younger of the two.
    assert!(is_hit(&load_cached(&with_room(2), &options)));
    set_age(&place.model().join("model.safetensors"), 77);
    assert!(!is_hit(&load_cached(&with_room(2), &options)));
    let files = place.files();
    assert!(files.contains(&first) && !files.contains(&old) && files.len() == 2, "{files:?}");
    // A model that is larger than the cache leaves the others alone.
    set_age(&place.model().join("model.safetensors"), 88);
    assert!(!is_hit(&load_cached(&with_room(0), &options)));
    assert_eq!(place.files(), files);
}

#[test]
fn a_folder_that_cannot_be_written_is_no_error() {
    let place = Place::new("llama-gqa2");
    let options = options(bespoke_tests::tiny_kernels());
    let file = place.dir.path().join("file");
    fs::write(&file, "").unwrap();
    let cache = PackedCache::new(file.join("packed"));
    let source = ModelSource { packed_cache: Some(cache), ..place.source() };
    for _ in 0..2 {
        let engine = load_cached(&source, &options);
        assert!(!is_hit(&engine) && engine.startup().warnings.is_empty());
    }
}
