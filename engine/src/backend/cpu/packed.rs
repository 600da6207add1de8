//! Packed weights as values: what their layout depends on, and from one layout to another.

use std::fmt;

use bespoke_kernel_gen::spec::{DType, LinearRole};

use super::buffers::Packed;
use super::kernels::Weights;
use super::memory::Memory;
use super::pack::{AwqPanels, Panels};
use super::{CpuBackend, CpuLinear, float_memory};
use crate::error::Error;

/// How a linear is packed: its bytes depend on this and on the weights, and on nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearLayout {
    pub panels: Panels,
    pub format: PanelFormat,
}

/// What panels hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanelFormat {
    /// Elements of this type.
    Dense(DType),
    /// bfloat16 in pairs of inputs.
    Bf16Pairs,
    /// Bytes and a scale per output.
    Int8,
    /// Nibbles, with a scale and a zero for every `group` inputs.
    Awq { group: usize },
}

/// One array of a packed linear: `[panel][line][tile][lane]` units of `unit` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PanelArray {
    pub name: &'static str,
    pub unit: usize,
    pub lines: usize,
    /// The byte of columns that pad the last tile.
    padding: u8,
}

impl PanelArray {
    /// Bytes of the array; `None` where they do not fit an address space.
    pub fn len(&self, panels: Panels) -> Option<usize> {
        let columns = panels.n.checked_next_multiple_of(panels.lanes)?;
        columns.checked_mul(self.lines)?.checked_mul(self.unit)
    }

    /// Where the unit of output `n` on `line` begins.
    pub fn offset(&self, panels: Panels, n: usize, line: usize) -> usize {
        let per_panel = panels.cols * panels.lanes;
        let (panel, column) = (n / per_panel, n % per_panel);
        let columns = panels.width(panel) * panels.lanes;
        (panel * per_panel * self.lines + line * columns + column) * self.unit
    }
}

impl LinearLayout {
    /// The arrays in the order in which they are kept.
    pub fn arrays(&self) -> Vec<PanelArray> {
        let k = self.panels.k;
        let array = |name, unit, lines, padding| PanelArray { name, unit, lines, padding };
        match self.format {
            PanelFormat::Dense(dtype) => vec![array("weight", dtype.size(), k, 0)],
            PanelFormat::Bf16Pairs => vec![array("weight", 4, k.div_ceil(2), 0)],
            // NOTE: the byte 128 is the weight 0.
            PanelFormat::Int8 => vec![array("weight", 4, k / 4, 128), array("scales", 4, 1, 0)],
            PanelFormat::Awq { group } => vec![
                array("weight", 4, k / 8, 0),
                array("scales", 2, k / group, 0),
                array("zeros", 1, k / group, 0),
            ],
        }
    }

    /// Whether both hold the same numbers, in panels of whatever width.
    pub fn is_same_matrix(&self, other: &LinearLayout) -> bool {
        let sizes = |layout: &LinearLayout| (layout.panels.n, layout.panels.k, layout.format);
        sizes(self) == sizes(other)
    }

    /// Whether sizes and format go together, so that lengths and places can be computed.
    pub fn is_sound(&self) -> bool {
        let Panels { n, k, lanes, cols } = self.panels;
        let fits = match self.format {
            PanelFormat::Dense(dtype) => dtype != DType::I8,
            PanelFormat::Bf16Pairs => true,
            PanelFormat::Int8 => k.is_multiple_of(4),
            PanelFormat::Awq { group } => {
                group > 0 && k.is_multiple_of(8) && k.is_multiple_of(group)
            }
        };
        let is_some = n > 0 && k > 0 && (1..=64).contains(&lanes) && (1..=64).contains(&cols);
        fits && is_some && self.arrays().iter().all(|array| array.len(self.panels).is_some())
    }
}

/// `awq64 960x576 lanes 16 cols 4`
impl fmt::Display for LinearLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.format {
            PanelFormat::Dense(dtype) => write!(f, "{}", dtype.name())?,
            PanelFormat::Bf16Pairs => write!(f, "bf16 pairs")?,
            PanelFormat::Int8 => write!(f, "int8")?,
            PanelFormat::Awq { group } => write!(f, "awq{group}")?,
        }
        let Panels { n, k, lanes, cols } = self.panels;
        write!(f, " {n}x{k} lanes {lanes} cols {cols}")
    }
}

/// An array of `from` as an array of `to`: panels to rows to panels, unit by unit, so that nothing
/// is rounded.
pub fn repack(array: &PanelArray, bytes: &[u8], from: Panels, to: Panels) -> Result<Memory, Error> {
    assert_eq!((from.n, from.k), (to.n, to.k), "the same matrix");
    let too_large = || Error::Resources("packed weights do not fit an address space".to_owned());
    let len = array.len(to).ok_or_else(too_large)?;
    let mut memory = Memory::new(len, "packed weights")?;
    let out = memory.bytes_mut();
    if array.padding != 0 {
        out.fill(array.padding);
    }
    let unit = array.unit;
    for n in 0..from.n {
        for line in 0..array.lines {
            let (source, target) = (array.offset(from, n, line), array.offset(to, n, line));
            out[target..target + unit].copy_from_slice(&bytes[source..source + unit]);
        }
    }
    Ok(memory)
}

impl CpuBackend {
    /// How the linear `role` is packed where its weights are quantized or not.
    pub fn linear_layout(&self, role: LinearRole, is_quantized: bool) -> LinearLayout {
        self.layout_of(role, self.kernels.linear_idx(role, is_quantized))
    }

    fn layout_of(&self, role: LinearRole, kernels_idx: usize) -> LinearLayout {
        let linear = self.kernels.linears[kernels_idx];
        let shape = self.shape.linear(role);
        LinearLayout {
            panels: Panels {
                n: shape.n,
                k: shape.k,
                lanes: self.kernels.target.lanes(),
                cols: linear.cols,
            },
            format: match linear.weights {
                Weights::Dense(DType::I8) => PanelFormat::Int8,
                Weights::Dense(dtype) => PanelFormat::Dense(dtype),
                Weights::Bf16Pairs => PanelFormat::Bf16Pairs,
                Weights::Awq { group } => PanelFormat::Awq { group },
            },
        }
    }

    /// Names the layouts of all linears, and of the embedding.
    pub fn layout_name(&self) -> String {
        let mut name = format!("embedding {}", self.shape.dtype.name());
        for role in LinearRole::ALL {
            for is_quantized in [false, true] {
                let layout = self.linear_layout(role, is_quantized);
                name.push_str(&format!("; {role:?} {is_quantized} {layout}"));
            }
        }
        name
    }

    /// Threads that run kernels.
    pub fn num_threads(&self) -> usize {
        self.team.len()
    }

    /// The linear `role` of arrays that were packed as `layout` says, of which they are a part
    /// of a mapped file or not. `None` where they hold other numbers than its kernels read.
    pub fn packed_linear(
        &mut self,
        role: LinearRole,
        layout: &LinearLayout,
        arrays: Vec<Memory>,
        bias: Option<&[f32]>,
    ) -> Result<Option<CpuLinear>, Error> {
        let is_quantized = matches!(layout.format, PanelFormat::Awq { .. });
        let kernels_idx = self.kernels.linear_idx(role, is_quantized);
        let wanted = self.layout_of(role, kernels_idx);
        if !wanted.is_same_matrix(layout) {
            return Ok(None);
        }
        let mut arrays = arrays.into_iter().zip(layout.arrays()).map(|(memory, array)| {
            assert_eq!(Some(memory.len()), array.len(layout.panels), "an array of the layout");
            match wanted == *layout {
                true => Ok(memory),
                false => repack(&array, memory.bytes(), layout.panels, wanted.panels),
            }
        });
        let mut next = || arrays.next().expect("an array for each of the layout");
        let packed = match wanted.format {
            PanelFormat::Dense(_) => Packed::Dense { weight: next()? },
            PanelFormat::Bf16Pairs => Packed::Bf16Pairs { weight: next()? },
            PanelFormat::Int8 => Packed::Int8 { weight: next()?, scales: next()? },
            PanelFormat::Awq { .. } => {
                Packed::Awq(AwqPanels { weight: next()?, scales: next()?, zeros: next()? })
            }
        };
        let bias = bias.map(|bias| float_memory(bias, "a bias")).transpose()?;
        let linear = CpuLinear { role, kernels_idx, packed, bias };
        self.weights_bytes += linear.bytes();
        Ok(Some(linear))
    }

    /// The embedding whose table, `[vocab, hidden]` in the model's type, is `table`.
    pub fn packed_embedding(&mut self, table: Memory) -> Memory {
        let shape = &self.shape;
        let len = shape.vocab_size * shape.hidden_size * shape.dtype.size();
        assert_eq!(table.len(), len, "the bytes of the embedding");
        self.weights_bytes += table.len();
        table
    }

    /// A loaded linear's layout.
    pub fn layout_of_linear(&self, linear: &CpuLinear) -> LinearLayout {
        self.layout_of(linear.role, linear.kernels_idx)
    }
}

impl CpuLinear {
    /// The arrays of its layout, in order.
    pub fn arrays(&self) -> Vec<&[u8]> {
        let memories = match &self.packed {
            Packed::Dense { weight } | Packed::Bf16Pairs { weight } => vec![weight],
            Packed::Int8 { weight, scales } => vec![weight, scales],
            Packed::Awq(AwqPanels { weight, scales, zeros }) => vec![weight, scales, zeros],
        };
        memories.into_iter().map(Memory::bytes).collect()
    }

    /// float32 `[n]`
    pub fn bias_bytes(&self) -> Option<&[u8]> {
        self.bias.as_ref().map(Memory::bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repacking_there_and_back_changes_nothing() {
        let formats = [
            PanelFormat::Dense(DType::F32),
            PanelFormat::Dense(DType::F16),
            PanelFormat::Bf16Pairs,
            PanelFormat::Int8,
            PanelFormat::Awq { group: 32 },
        ];
        let sizes = [(8, 4), (16, 4), (16, 3), (8, 1)];
        for (format, n) in formats.into_iter().flat_map(|f| [8, 40, 130].map(|n| (f, n))) {
            for (lanes, cols) in sizes {
                let from = Panels { n, k: 64, lanes: 8, cols: 2 };
                let to = Panels { lanes, cols, ..from };
                for array in (LinearLayout { panels: from, format }).arrays() {
                    let len = array.len(from).unwrap();
                    let mut bytes = vec![array.padding; len];
                    for (n, line) in (0..n).flat_map(|n| (0..array.lines).map(move |l| (n, l))) {
                        let at = array.offset(from, n, line);
                        let unit = &mut bytes[at..at + array.unit];
                        unit.fill((n * 31 + line * 7) as u8);
                    }
                    let there = repack(&array, &bytes, from, to).unwrap();
                    let back = repack(&array, there.bytes(), to, from).unwrap();
                    assert!(back.bytes() == bytes, "{format:?} {n} {lanes} {cols}");
                }
            }
        }
    }
}
