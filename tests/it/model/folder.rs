//! Model folders made from a tiny model, with one thing changed.

use std::path::{Path, PathBuf};

use bespoke::Error;
use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::KernelTable;
use bespoke::model::weights::Weights;
use bespoke_kernel_gen::model::ModelConfig;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A tensor: name, type, shape, bytes.
#[derive(Clone, Debug)]
pub(super) struct TestTensor {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<u64>,
    pub(super) bytes: Vec<u8>,
}

/// The files of a tiny model in memory.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    pub(super) config: Map<String, Value>,
    pub(super) tensors: Vec<TestTensor>,
}

impl Folder {
    pub(super) fn read(case: &str) -> Folder {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/tiny").join(case);
        let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Vec<TestTensor> = file
            .iter()
            .map(|(name, view)| TestTensor {
                name: name.to_owned(),
                dtype: view.dtype().to_string(),
                shape: view.shape().iter().map(|dim| *dim as u64).collect(),
                bytes: view.data().to_vec(),
            })
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Folder { config: serde_json::from_str(&config).unwrap(), tensors }
    }

    pub(super) fn tensor(&mut self, name: &str) -> &mut TestTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub(super) fn remove(&mut self, name: &str) -> TestTensor {
        let idx = self.tensors.iter().position(|tensor| tensor.name == name).unwrap();
        self.tensors.remove(idx)
    }

    /// The folder on disk with one weights file.
    pub(super) fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::to_string(&self.config).unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), serialize(&self.tensors)).unwrap();
        dir
    }
}

/// Loads a folder as the engine does, on the reference backend, reading every tensor.
pub(super) fn load(folder: &Folder) -> Result<Engine, Error> {
    let options = EngineOptions {
        backend: BackendChoice::Reference,
        ..EngineOptions::new(KernelTable::default())
    };
    load_with(folder, &options)
}

pub(super) fn load_with(folder: &Folder, options: &EngineOptions) -> Result<Engine, Error> {
    Engine::load(folder.write().path(), options, &mut |_| {})
}

/// Bits of the logits of a few tokens.
pub(super) fn logits(engine: &mut Engine) -> Vec<u32> {
    let mut all = Vec::new();
    engine
        .logits(&[1, 2, 3, 150, 77], &mut |_, row| {
            all.extend(row.iter().map(|logit| logit.to_bits()));
        })
        .unwrap();
    all
}

/// The header's JSON for tensors that lie one after another.
pub(super) fn header(tensors: &[TestTensor]) -> Map<String, Value> {
    let mut end = 0;
    let mut map = Map::new();
    for TestTensor { name, dtype, shape, bytes } in tensors {
        let start = end;
        end += bytes.len();
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        map.insert(name.clone(), entry);
    }
    map
}

/// A safetensors file of any header and data.
pub(super) fn assemble(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

pub(super) fn serialize(tensors: &[TestTensor]) -> Vec<u8> {
    let header = serde_json::to_string(&header(tensors)).unwrap();
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    assemble(&header, &data)
}

/// Validates a folder's weights against its config, reading no tensor.
pub(super) fn open(dir: &Path) -> Result<(), Error> {
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let config = ModelConfig::parse(&config)?;
    let shape = config.shape("test")?;
    Weights::open(dir, &config, &shape).map(|_| ())
}

/// The error is about the model and names all of `words`.
#[track_caller]
pub(super) fn assert_refused(result: Result<(), Error>, words: &[&str]) {
    let error = result.expect_err("the folder was accepted");
    assert!(matches!(error, Error::Model { .. }), "{error:?}");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "'{word}' is missing in: {message}");
    }
}
