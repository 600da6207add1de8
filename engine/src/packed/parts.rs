//! From a file to a decoder: its parts where they lie, or its tensors for any backend.

use std::sync::Arc;

use bespoke_kernel_gen::spec::{DType, LinearRole, ModelShape};

use super::PackedFile;
use super::format::TABLE;
use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::memory::Memory;
use crate::backend::cpu::packed::{LinearLayout, PanelArray, PanelFormat};
use crate::error::Error;
use crate::model::decoder::Parts;
use crate::model::linear::AWQ_NIBBLE;
use crate::model::weights::{AwqTensors, DenseTensor, LayerNorms, LinearTensors, ModelWeights};

/// The packed weights of a model with the sizes of `shape`.
pub struct PackedParts<'a> {
    file: &'a PackedFile,
    shape: &'a ModelShape,
    is_tied: bool,
}

pub(super) fn linear_name(role: LinearRole, layer_idx: usize) -> String {
    let role = match role {
        LinearRole::Qkv => "qkv",
        LinearRole::O => "o",
        LinearRole::GateUp => "gate_up",
        LinearRole::Down => "down",
        LinearRole::Head => return "head".to_owned(),
    };
    format!("layers.{layer_idx}.{role}")
}

/// The norms of a layer: before attention, before the MLP, on q, on k.
pub(super) fn norm_name(layer_idx: usize, idx: usize) -> String {
    let norm = ["attention_norm", "mlp_norm", "q_norm", "k_norm"][idx];
    format!("layers.{layer_idx}.{norm}")
}

pub(super) fn array_name(linear: &str, array: &str) -> String {
    format!("{linear}.{array}")
}

impl<'a> PackedParts<'a> {
    /// `is_tied`: the head is the embedding.
    pub fn new(file: &'a PackedFile, shape: &'a ModelShape, is_tied: bool) -> PackedParts<'a> {
        PackedParts { file, shape, is_tied }
    }

    fn table(&self) -> Result<Memory, Error> {
        let ModelShape { vocab_size, hidden_size, dtype, .. } = *self.shape;
        self.file.array(TABLE, vocab_size * hidden_size * dtype.size())
    }

    fn read_norms(&self, layer_idx: usize) -> Result<LayerNorms, Error> {
        let norm = |idx, len| self.file.floats(&norm_name(layer_idx, idx), len);
        let ModelShape { hidden_size, head_dim, qk_norm, .. } = *self.shape;
        Ok(LayerNorms {
            attention: norm(0, hidden_size)?,
            mlp: norm(1, hidden_size)?,
            qk: match qk_norm {
                true => Some((norm(2, head_dim)?, norm(3, head_dim)?)),
                false => None,
            },
        })
    }

    /// The layout of a linear, with sizes as the model's shape has them.
    fn layout(&self, role: LinearRole, name: &str) -> Result<LinearLayout, Error> {
        let layout = self.file.layout(name)?;
        let (linear, panels) = (self.shape.linear(role), layout.panels);
        match (panels.n, panels.k) == (linear.n, linear.k) {
            true => Ok(layout),
            false => Err(self.file.damaged(&format!(
                "'{name}' is {}x{}; the model's config asks for {}x{}",
                panels.n, panels.k, linear.n, linear.k
            ))),
        }
    }

    fn arrays(&self, name: &str, layout: &LinearLayout) -> Result<Vec<Memory>, Error> {
        let array = |array: PanelArray| {
            // Layouts whose lengths cannot be computed are refused when the file is opened.
            let len = array.len(layout.panels).unwrap_or(usize::MAX);
            self.file.array(&array_name(name, array.name), len)
        };
        layout.arrays().into_iter().map(array).collect()
    }

    fn bias(&self, role: LinearRole, name: &str) -> Result<Option<Vec<f32>>, Error> {
        let linear = self.shape.linear(role);
        match linear.bias {
            true => self.file.floats(&array_name(name, "bias"), linear.n).map(Some),
            false => Ok(None),
        }
    }
}

impl Parts<CpuBackend> for PackedParts<'_> {
    fn embedding(&mut self, backend: &mut CpuBackend) -> Result<Memory, Error> {
        Ok(backend.packed_embedding(self.table()?))
    }

    fn final_norm(&mut self) -> Result<Vec<f32>, Error> {
        ModelWeights::final_norm(self)
    }

    fn norms(&mut self, layer_idx: usize) -> Result<LayerNorms, Error> {
        self.read_norms(layer_idx)
    }

    fn linear(
        &mut self,
        backend: &mut CpuBackend,
        role: LinearRole,
        layer_idx: usize,
    ) -> Result<crate::backend::cpu::CpuLinear, Error> {
        let name = linear_name(role, layer_idx);
        let layout = self.layout(role, &name)?;
        let arrays = self.arrays(&name, &layout)?;
        let bias = self.bias(role, &name)?;
        match backend.packed_linear(role, &layout, arrays, bias.as_deref())? {
            Some(linear) => Ok(linear),
            // In another form than the kernels want: a head in int8 that is to be float, or pairs.
            None => {
                let tensors = ModelWeights::linear(self, role, layer_idx)?;
                crate::backend::Backend::load_linear(backend, role, &tensors.source())
            }
        }
    }
}

/// For backends with layouts of their own: the tensors as a checkpoint would have them.
impl ModelWeights for PackedParts<'_> {
    fn embedding(&self) -> Result<DenseTensor, Error> {
        let ModelShape { vocab_size, hidden_size, dtype, .. } = *self.shape;
        let bytes = self.table()?.bytes().to_vec();
        Ok(DenseTensor::new(vocab_size, hidden_size, dtype, Arc::new(bytes)))
    }

    fn final_norm(&self) -> Result<Vec<f32>, Error> {
        self.file.floats("final_norm", self.shape.hidden_size)
    }

    fn norms(&self, layer_idx: usize) -> Result<LayerNorms, Error> {
        self.read_norms(layer_idx)
    }

    fn linear(&self, role: LinearRole, layer_idx: usize) -> Result<LinearTensors, Error> {
        let name = linear_name(role, layer_idx);
        let layout = self.layout(role, &name)?;
        if layout.format == PanelFormat::Int8 {
            return match self.is_tied && role == LinearRole::Head {
                true => Ok(LinearTensors::dense(ModelWeights::embedding(self)?, None)),
                false => Err(Error::Unsupported(format!(
                    "{}: '{name}' is kept in int8 only, and this backend or these activations \
                     want it in 16 bits; give the model's folder with --model",
                    self.file.path().display()
                ))),
            };
        }
        let arrays = self.arrays(&name, &layout)?;
        let bias = self.bias(role, &name)?;
        let bytes: Vec<&[u8]> = arrays.iter().map(Memory::bytes).collect();
        match layout.format {
            PanelFormat::Awq { group } => {
                Ok(LinearTensors::awq(awq_tensors(&layout, group, &bytes), bias))
            }
            PanelFormat::Dense(dtype) => {
                Ok(LinearTensors::dense(dense_tensor(&layout, dtype, bytes[0]), bias))
            }
            PanelFormat::Bf16Pairs => {
                Ok(LinearTensors::dense(dense_tensor(&layout, DType::BF16, bytes[0]), bias))
            }
            PanelFormat::Int8 => unreachable!("int8 was answered above"),
        }
    }
}

/// Panels to rows. A lane may hold several inputs, more than there are on the last line.
fn dense_tensor(layout: &LinearLayout, dtype: DType, panels: &[u8]) -> DenseTensor {
    let (n, k, size) = (layout.panels.n, layout.panels.k, dtype.size());
    let array = layout.arrays()[0];
    let mut bytes = vec![0; n * k * size];
    for (row, out) in bytes.chunks_exact_mut(k * size).enumerate() {
        for (line, out) in out.chunks_mut(array.unit).enumerate() {
            let at = array.offset(layout.panels, row, line);
            out.copy_from_slice(&panels[at..at + out.len()]);
        }
    }
    DenseTensor::new(n, k, dtype, Arc::new(bytes))
}

/// Panels to the words of an AWQ checkpoint.
fn awq_tensors(layout: &LinearLayout, group: usize, bytes: &[&[u8]]) -> AwqTensors {
    let (n, k) = (layout.panels.n, layout.panels.k);
    let arrays = layout.arrays();
    let at = |array: usize, row, line| arrays[array].offset(layout.panels, row, line);
    let mut qweight = vec![0u8; k * n / 2];
    let put = |words: &mut [u8], line: usize, row: usize, q: u8| {
        let nibble = AWQ_NIBBLE[row % 8] as usize;
        words[(line * (n / 8) + row / 8) * 4 + nibble / 2] |= q << (4 * (nibble % 2));
    };
    let mut qzeros = vec![0u8; k / group * n / 2];
    let mut scales = vec![0u8; k / group * n * 2];
    for row in 0..n {
        for line in 0..k / 8 {
            let four = &bytes[0][at(0, row, line)..][..4];
            for (i, pair) in four.iter().enumerate() {
                put(&mut qweight, line * 8 + i, row, pair & 15);
                put(&mut qweight, line * 8 + i + 4, row, pair >> 4);
            }
        }
        for line in 0..k / group {
            let scale = &bytes[1][at(1, row, line)..][..2];
            scales[(line * n + row) * 2..][..2].copy_from_slice(scale);
            put(&mut qzeros, line, row, bytes[2][at(2, row, line)]);
        }
    }
    AwqTensors { n, k, group, qweight, qzeros: Some(qzeros), scales }
}
