//! A checkpoint's tensors as the decoder needs them: names, types and shapes checked against the
//! config before anything is allocated, then read linear by linear.

mod quantized;
mod random;
mod repack;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bespoke_kernel_gen::model::{Architecture, ModelConfig, Packing};
use bespoke_kernel_gen::spec::{DType, LinearRole, LinearShape, ModelShape, WeightFormat};
use safetensors::Dtype;

use crate::error::Error;
use crate::model::linear::{AwqView, DenseView, LinearPart, LinearSource};
use crate::model::safetensors::Checkpoint;
use quantized::QuantizedModule;

pub use random::RandomWeights;

/// How many names a message lists.
const NAMES_SHOWN_MAX: usize = 5;

/// The validated weights of one model.
#[derive(Debug)]
pub struct Weights<'a> {
    checkpoint: Checkpoint,
    config: &'a ModelConfig,
    shape: &'a ModelShape,
    /// An embedding that is the head too, once it was read: it is large, and wanted twice.
    tied: OnceLock<DenseTensor>,
}

/// What a decoder is loaded from, part by part.
pub trait ModelWeights {
    fn embedding(&self) -> Result<DenseTensor, Error>;

    fn final_norm(&self) -> Result<Vec<f32>, Error>;

    fn norms(&self, layer_idx: usize) -> Result<LayerNorms, Error>;

    /// The linear `role` of a layer; for the head `layer_idx` says nothing.
    fn linear(&self, role: LinearRole, layer_idx: usize) -> Result<LinearTensors, Error>;
}

/// The norms of one layer.
#[derive(Clone, Debug)]
pub struct LayerNorms {
    pub attention: Vec<f32>,
    pub mlp: Vec<f32>,
    /// `[head_dim]` weights on q and on k.
    pub qk: Option<(Vec<f32>, Vec<f32>)>,
}

/// The tensors of one linear, read into memory.
#[derive(Debug)]
pub struct LinearTensors {
    parts: Vec<PartTensors>,
    row_map: Option<Vec<u32>>,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum PartTensors {
    Dense(DenseTensor),
    Awq(AwqTensors),
}

/// The tensors of an AWQ matrix, as [`AwqView`] describes them.
#[derive(Debug)]
pub struct AwqTensors {
    pub n: usize,
    pub k: usize,
    pub group: usize,
    pub qweight: Vec<u8>,
    pub qzeros: Option<Vec<u8>>,
    pub scales: Vec<u8>,
}

/// A dense matrix, read into memory.
#[derive(Clone, Debug)]
pub struct DenseTensor {
    n: usize,
    k: usize,
    dtype: DType,
    bytes: Arc<Vec<u8>>,
}

/// A stretch of a linear's outputs that is one module of the checkpoint.
struct Module {
    name: String,
    n: usize,
}

/// What a tensor of the checkpoint must be.
struct Expected {
    name: String,
    dtypes: &'static [Dtype],
    shape: Vec<usize>,
    required: bool,
}

const FLOATS: &[Dtype] = &[Dtype::F32, Dtype::F16, Dtype::BF16];
const FLOAT16: &[Dtype] = &[Dtype::F16];

const LAYER_ROLES: [LinearRole; 4] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down];

impl<'a> Weights<'a> {
    /// Opens a model folder's weights and checks that they are exactly those of `config`.
    pub fn open(
        dir: &Path,
        config: &'a ModelConfig,
        shape: &'a ModelShape,
    ) -> Result<Weights<'a>, Error> {
        let checkpoint = Checkpoint::open(dir)?;
        let weights = Weights { checkpoint, config, shape, tied: OnceLock::new() };
        weights.check_groups()?;
        weights.check_tensors()?;
        Ok(weights)
    }

    /// See [`Checkpoint::fingerprint`].
    pub fn fingerprint(&self) -> Result<blake3::Hash, Error> {
        self.checkpoint.fingerprint()
    }

    /// The model folder.
    pub fn dir(&self) -> &Path {
        self.checkpoint.dir()
    }

    /// The files that hold tensors.
    pub fn files(&self) -> Vec<PathBuf> {
        self.checkpoint.paths().map(Path::to_owned).collect()
    }

    /// Whether the checkpoint has the tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.checkpoint.get(name).is_some()
    }

    /// Bytes of all tensors that will be read.
    pub fn num_bytes(&self) -> u64 {
        let wanted = self.checkpoint.tensors().filter(|(name, _)| !self.is_ignored(name));
        wanted.map(|(_, tensor)| tensor.len as u64).sum()
    }

    fn read_part(&self, module: &Module, linear: LinearShape) -> Result<PartTensors, Error> {
        if let Some(quantized) = self.quantized(module, linear) {
            return quantized.read(&self.checkpoint);
        }
        let dense = self.read_dense(&format!("{}.weight", module.name), module.n, linear.k)?;
        Ok(PartTensors::Dense(dense))
    }

    /// The module as its 4-bit tensors, if it has such.
    fn quantized<'b>(
        &self,
        module: &'b Module,
        linear: LinearShape,
    ) -> Option<QuantizedModule<'b>> {
        let WeightFormat::Awq(group) = linear.format else { return None };
        let config = self.config.quantization.as_ref();
        Some(QuantizedModule {
            name: &module.name,
            n: module.n,
            k: linear.k,
            group: group.of(linear.k),
            zero_point: config.is_some_and(|config| config.zero_point),
            has_bias: linear.bias,
            packing: config.map_or(Packing::Awq, |config| config.packing),
        })
    }

    fn read_dense(&self, name: &str, n: usize, k: usize) -> Result<DenseTensor, Error> {
        let is_tied = self.config.tie_word_embeddings && name == self.embedding_name();
        if let Some(tied) = self.tied.get().filter(|_| is_tied) {
            return Ok(tied.clone());
        }
        let dtype = dtype_of(&self.checkpoint, name)?;
        let tensor = DenseTensor { n, k, dtype, bytes: Arc::new(self.checkpoint.read(name)?) };
        match is_tied {
            true => Ok(self.tied.get_or_init(|| tensor).clone()),
            false => Ok(tensor),
        }
    }

    /// A small tensor in float32; its values must be finite.
    pub fn read_floats(&self, name: &str) -> Result<Vec<f32>, Error> {
        let bytes = self.checkpoint.read(name)?;
        let values = floats_of(&self.checkpoint, name, &bytes)?;
        match values.iter().position(|value| !value.is_finite()) {
            Some(idx) => {
                let message = format!("tensor '{name}' is not finite at element {idx}");
                Err(Error::model(self.checkpoint.dir(), message))
            }
            None => Ok(values),
        }
    }

    /// The type of a tensor of floats.
    pub fn dtype(&self, name: &str) -> Result<DType, Error> {
        dtype_of(&self.checkpoint, name)
    }
}

impl ModelWeights for Weights<'_> {
    fn embedding(&self) -> Result<DenseTensor, Error> {
        let (n, k) = (self.shape.vocab_size, self.shape.hidden_size);
        self.read_dense(&self.embedding_name(), n, k)
    }

    fn final_norm(&self) -> Result<Vec<f32>, Error> {
        self.read_floats("model.norm.weight")
    }

    fn norms(&self, layer_idx: usize) -> Result<LayerNorms, Error> {
        let (attention, mlp) = self.norm_names(layer_idx);
        let qk = match self.qk_norm_names(layer_idx) {
            Some((q, k)) => Some((self.read_floats(&q)?, self.read_floats(&k)?)),
            None => None,
        };
        Ok(LayerNorms {
            attention: self.read_floats(&attention)?,
            mlp: self.read_floats(&mlp)?,
            qk,
        })
    }

    fn linear(&self, role: LinearRole, layer_idx: usize) -> Result<LinearTensors, Error> {
        let linear = self.shape.linear_in(role, layer_idx);
        let modules = self.modules(role, layer_idx);
        let mut parts = Vec::new();
        let mut bias = Vec::new();
        for module in &modules {
            parts.push(self.read_part(module, linear)?);
            if linear.bias {
                bias.extend(self.read_floats(&format!("{}.bias", module.name))?);
            }
        }
        let row_map = match (self.config.architecture, role) {
            (Architecture::InternLm2, LinearRole::Qkv) => Some(wqkv_row_map(self.shape)),
            _ => None,
        };
        let bias = linear.bias.then(|| match &row_map {
            Some(map) => map.iter().map(|row| bias[*row as usize]).collect(),
            None => bias,
        });
        Ok(LinearTensors { parts, row_map, bias })
    }
}

/// Validation.
impl Weights<'_> {
    /// 8 outputs lie in a word of zeros or weights, and `group` inputs share a scale.
    fn check_groups(&self) -> Result<(), Error> {
        for role in LAYER_ROLES {
            let linear = self.shape.linear(role);
            let WeightFormat::Awq(group) = linear.format else { continue };
            let size = group.of(linear.k);
            if size == 0 || !linear.k.is_multiple_of(size) {
                let error = bespoke_kernel_gen::Error::GroupSize { group: size, k: linear.k };
                return Err(Error::KernelGen(error));
            }
            for module in self.modules(role, 0) {
                if !module.n.is_multiple_of(8) {
                    let message = format!(
                        "'{}' has {} outputs, 4-bit weights need a multiple of 8",
                        module.name, module.n
                    );
                    return Err(Error::model(self.checkpoint.dir(), message));
                }
            }
        }
        Ok(())
    }

    /// Every tensor the config asks for is there with its type and shape, and no other.
    fn check_tensors(&self) -> Result<(), Error> {
        let mut found = BTreeSet::new();
        let mut missing = Vec::new();
        // NOTE: layer by layer, so that an absurd layer count ends at the first missing ones.
        for layer_idx in 0..=self.shape.num_layers {
            let expected = match layer_idx.checked_sub(1) {
                None => self.expected_outside_layers(),
                Some(layer_idx) => self.expected_in_layer(layer_idx),
            };
            for expected in expected {
                if self.check_tensor(&expected)? {
                    found.insert(expected.name);
                } else if expected.required {
                    missing.push(expected.name);
                }
            }
            if missing.len() > NAMES_SHOWN_MAX {
                break;
            }
        }
        let dir = self.checkpoint.dir();
        if !missing.is_empty() {
            let message =
                format!("config.json asks for tensors that are missing: {}", list(&missing));
            return Err(Error::model(dir, message));
        }
        let unexpected: Vec<String> = self
            .checkpoint
            .tensors()
            .filter(|(name, _)| !found.contains(*name) && !self.is_ignored(name))
            .map(|(name, _)| name.to_owned())
            .collect();
        if !unexpected.is_empty() {
            let message = format!(
                "the weights hold tensors that config.json does not ask for: {}",
                list(&unexpected)
            );
            return Err(Error::model(dir, message));
        }
        Ok(())
    }

    /// Whether the tensor is there; an error where it has another type or shape.
    fn check_tensor(&self, expected: &Expected) -> Result<bool, Error> {
        let Some(tensor) = self.checkpoint.get(&expected.name) else {
            return Ok(false);
        };
        let path = self.checkpoint.path(tensor);
        if !expected.dtypes.contains(&tensor.dtype) {
            let names: Vec<String> = expected.dtypes.iter().map(Dtype::to_string).collect();
            let message = format!(
                "tensor '{}' has type {}, expected {}",
                expected.name,
                tensor.dtype,
                names.join(" or ")
            );
            return Err(Error::model(path, message));
        }
        if tensor.shape != expected.shape {
            let message = format!(
                "tensor '{}' has shape {:?}, expected {:?} from config.json",
                expected.name, tensor.shape, expected.shape
            );
            return Err(Error::model(path, message));
        }
        Ok(true)
    }

    fn expected_outside_layers(&self) -> Vec<Expected> {
        let shape = self.shape;
        let mut all = vec![
            floats(self.embedding_name(), vec![shape.vocab_size, shape.hidden_size]),
            floats("model.norm.weight".to_owned(), vec![shape.hidden_size]),
        ];
        if !self.config.tie_word_embeddings {
            all.extend(self.expected_linear(LinearRole::Head, 0));
        }
        all
    }

    fn expected_in_layer(&self, layer_idx: usize) -> Vec<Expected> {
        let (attention, mlp) = self.norm_names(layer_idx);
        let hidden = self.shape.hidden_size;
        let mut all = vec![floats(attention, vec![hidden]), floats(mlp, vec![hidden])];
        if let Some((q, k)) = self.qk_norm_names(layer_idx) {
            all.push(floats(q, vec![self.shape.head_dim]));
            all.push(floats(k, vec![self.shape.head_dim]));
        }
        for role in LAYER_ROLES {
            all.extend(self.expected_linear(role, layer_idx));
        }
        all
    }

    fn expected_linear(&self, role: LinearRole, layer_idx: usize) -> Vec<Expected> {
        let linear = self.shape.linear_in(role, layer_idx);
        let mut all = Vec::new();
        for module in self.modules(role, layer_idx) {
            let Module { name, n } = &module;
            match self.quantized(&module, linear) {
                None => all.push(floats(format!("{name}.weight"), vec![*n, linear.k])),
                Some(quantized) => all.extend(quantized.expected()),
            }
            if linear.bias {
                all.push(floats(format!("{name}.bias"), vec![*n]));
            }
        }
        all
    }

    /// Tensors that checkpoints carry along and that nothing needs.
    fn is_ignored(&self, name: &str) -> bool {
        let tied_head =
            self.config.tie_word_embeddings && matches!(name, "lm_head.weight" | "output.weight");
        tied_head
            || name.ends_with("rotary_emb.inv_freq")
            || name.ends_with(".attn.bias")
            || name.ends_with(".attn.masked_bias")
            || name.ends_with(".attention.bias")
            || name.ends_with(".attention.masked_bias")
    }
}

/// Names.
impl Weights<'_> {
    fn embedding_name(&self) -> String {
        match self.config.architecture {
            Architecture::InternLm2 => "model.tok_embeddings.weight".to_owned(),
            _ => "model.embed_tokens.weight".to_owned(),
        }
    }

    /// The norm before attention and the one before the MLP.
    pub fn norm_names(&self, layer_idx: usize) -> (String, String) {
        let (attention, mlp) = match self.config.architecture {
            Architecture::InternLm2 => ("attention_norm", "ffn_norm"),
            _ => ("input_layernorm", "post_attention_layernorm"),
        };
        let name = |norm| format!("model.layers.{layer_idx}.{norm}.weight");
        (name(attention), name(mlp))
    }

    fn qk_norm_names(&self, layer_idx: usize) -> Option<(String, String)> {
        let name = |norm| format!("model.layers.{layer_idx}.self_attn.{norm}.weight");
        self.shape.qk_norm.then(|| (name("q_norm"), name("k_norm")))
    }

    /// The modules of a linear in the order of its outputs.
    fn modules(&self, role: LinearRole, layer_idx: usize) -> Vec<Module> {
        let shape = self.shape;
        let n = shape.linear(role).n;
        let names = self.config.architecture.modules(role);
        if role == LinearRole::Head {
            let name = match self.config.tie_word_embeddings {
                true => self.embedding_name().trim_end_matches(".weight").to_owned(),
                false => names[0].to_owned(),
            };
            return vec![Module { name, n }];
        }
        let num_outputs = |idx| match (names.len(), idx) {
            (1, _) => n,
            (2, _) => shape.intermediate_size,
            (_, 0) => shape.num_heads * shape.head_dim,
            _ => shape.num_kv_heads * shape.head_dim,
        };
        let module = |(idx, name): (usize, &&str)| Module {
            name: format!("model.layers.{layer_idx}.{name}"),
            n: num_outputs(idx),
        };
        names.iter().enumerate().map(module).collect()
    }
}

impl LinearTensors {
    /// One dense matrix in the order of the outputs.
    pub fn dense(tensor: DenseTensor, bias: Option<Vec<f32>>) -> LinearTensors {
        LinearTensors { parts: vec![PartTensors::Dense(tensor)], row_map: None, bias }
    }

    /// One quantized matrix in the order of the outputs.
    pub fn awq(tensors: AwqTensors, bias: Option<Vec<f32>>) -> LinearTensors {
        LinearTensors { parts: vec![PartTensors::Awq(tensors)], row_map: None, bias }
    }

    /// Views of the tensors.
    pub fn source(&self) -> LinearSource<'_> {
        LinearSource {
            parts: self.parts.iter().map(PartTensors::view).collect(),
            row_map: self.row_map.clone(),
            bias: self.bias.clone(),
        }
    }
}

impl PartTensors {
    fn view(&self) -> LinearPart<'_> {
        match self {
            PartTensors::Dense(dense) => LinearPart::Dense(dense.view()),
            PartTensors::Awq(AwqTensors { n, k, group, qweight, qzeros, scales }) => {
                let (n, k, group, qzeros) = (*n, *k, *group, qzeros.as_deref());
                LinearPart::Awq(AwqView { n, k, group, qweight, qzeros, scales })
            }
        }
    }
}

impl DenseTensor {
    /// `bytes`: `[n, k]`, row-major, little-endian.
    pub fn new(n: usize, k: usize, dtype: DType, bytes: Arc<Vec<u8>>) -> DenseTensor {
        assert_eq!(bytes.len(), n * k * dtype.size());
        DenseTensor { n, k, dtype, bytes }
    }

    pub fn view(&self) -> DenseView<'_> {
        DenseView { n: self.n, k: self.k, dtype: self.dtype, bytes: &self.bytes }
    }
}

fn floats(name: String, shape: Vec<usize>) -> Expected {
    Expected { name, dtypes: FLOATS, shape, required: true }
}

/// The values of a float tensor in float32.
fn floats_of(checkpoint: &Checkpoint, name: &str, bytes: &[u8]) -> Result<Vec<f32>, Error> {
    let dtype = dtype_of(checkpoint, name)?;
    let k = bytes.len() / dtype.size();
    let mut values = vec![0.0; k];
    DenseView { n: 1, k, dtype, bytes }.row(0, &mut values);
    Ok(values)
}

fn dtype_of(checkpoint: &Checkpoint, name: &str) -> Result<DType, Error> {
    match checkpoint.get(name).map(|tensor| tensor.dtype) {
        Some(Dtype::F32) => Ok(DType::F32),
        Some(Dtype::F16) => Ok(DType::F16),
        Some(Dtype::BF16) => Ok(DType::BF16),
        found => {
            let message = format!("tensor '{name}': found {found:?}, expected a float type");
            Err(Error::model(checkpoint.dir(), message))
        }
    }
}

fn list(names: &[String]) -> String {
    let shown = names[..names.len().min(NAMES_SHOWN_MAX)].join(", ");
    match names.len().saturating_sub(NAMES_SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Rows of InternLM2's `wqkv` in the order q, k, v. It holds one group after another for every KV
/// head: the group's query heads, its key head, its value head.
fn wqkv_row_map(shape: &ModelShape) -> Vec<u32> {
    let queries = shape.num_heads / shape.num_kv_heads;
    let row = |kv_head: usize, place: usize, dim: usize| {
        ((kv_head * (queries + 2) + place) * shape.head_dim + dim) as u32
    };
    let dims = 0..shape.head_dim;
    let q = (0..shape.num_heads)
        .flat_map(|head| dims.clone().map(move |dim| row(head / queries, head % queries, dim)));
    let kv = (queries..queries + 2).flat_map(|place| {
        let dims = dims.clone();
        (0..shape.num_kv_heads)
            .flat_map(move |head| dims.clone().map(move |dim| row(head, place, dim)))
    });
    q.chain(kv).collect()
}
