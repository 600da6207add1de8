//! Views of checkpoint tensors that make up one linear.

use bespoke_kernel_gen::spec::DType;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// A dense matrix `[n, k]`, row-major, little-endian, as it lies in a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct DenseView<'a> {
    pub n: usize,
    pub k: usize,
    pub dtype: DType,
    pub bytes: &'a [u8],
}

/// An AWQ "gemm" matrix with `n` outputs and `k` inputs, as it lies in a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct AwqView<'a> {
    pub n: usize,
    pub k: usize,
    /// Inputs that share a scale and a zero (k itself for per-channel).
    pub group: usize,
    /// int32 `[k, n / 8]`
    pub qweight: &'a [u8],
    /// int32 `[k / group, n / 8]`; `None`: symmetric, every zero is 8.
    pub qzeros: Option<&'a [u8]>,
    /// float16 `[k / group, n]`
    pub scales: &'a [u8],
}

/// One part of a linear's outputs.
#[derive(Clone, Copy, Debug)]
pub enum LinearPart<'a> {
    Dense(DenseView<'a>),
    Awq(AwqView<'a>),
}

/// A linear: parts side by side along the outputs, all with the same inputs.
#[derive(Clone, Debug)]
pub struct LinearSource<'a> {
    pub parts: Vec<LinearPart<'a>>,
    /// Output row `i` is row `row_map[i]` of the parts; `None`: in order. Used to split fused
    /// tensors whose rows are interleaved (InternLM2's wqkv).
    pub row_map: Option<Vec<u32>>,
    /// `[n]`, in output order.
    pub bias: Option<Vec<f32>>,
}

/// Nibble positions of the eight columns of an AWQ word (AutoAWQ's interleaving).
pub(crate) const AWQ_NIBBLE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl DenseView<'_> {
    /// Row `row` as float32 into `out`, which holds `k` values.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k);
        let size = self.dtype.size();
        let bytes = &self.bytes[row * self.k * size..(row + 1) * self.k * size];
        match self.dtype {
            DType::F32 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            DType::F16 => {
                // Many at once take one instruction where the machine has it.
                let mut halves = [f16::ZERO; 64];
                for (out, bytes) in out.chunks_mut(64).zip(bytes.chunks(128)) {
                    let halves = &mut halves[..out.len()];
                    for (half, b) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
                        *half = f16::from_le_bytes([b[0], b[1]]);
                    }
                    halves.convert_to_f32_slice(out);
                }
            }
            DType::BF16 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            DType::I8 => unreachable!("checkpoints hold no int8 tensors, the loader refuses them"),
        }
    }
}

impl AwqView<'_> {
    fn word_of(bytes: &[u8], idx: usize) -> u32 {
        let b = &bytes[idx * 4..idx * 4 + 4];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }

    /// Word `idx` of `qweight`.
    pub fn word(&self, idx: usize) -> u32 {
        Self::word_of(self.qweight, idx)
    }

    /// The 4-bit weight of input `k` and output `n`.
    pub fn q(&self, k: usize, n: usize) -> u8 {
        let word = self.word(k * (self.n / 8) + n / 8);
        (word >> (4 * AWQ_NIBBLE[n % 8]) & 15) as u8
    }

    /// The zero of group `group` and output `n`.
    pub fn zero(&self, group: usize, n: usize) -> u8 {
        match self.qzeros {
            None => 8,
            Some(qzeros) => {
                let word = Self::word_of(qzeros, group * (self.n / 8) + n / 8);
                (word >> (4 * AWQ_NIBBLE[n % 8]) & 15) as u8
            }
        }
    }

    /// The scale of group `group` and output `n`.
    pub fn scale(&self, group: usize, n: usize) -> f16 {
        let at = (group * self.n + n) * 2;
        f16::from_le_bytes([self.scales[at], self.scales[at + 1]])
    }

    /// Output `n` dequantized, `(q − zero) · scale`, into `out`, which holds `k` values.
    pub fn row(&self, n: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k);
        for (k, value) in out.iter_mut().enumerate() {
            let group = k / self.group;
            let q = f32::from(self.q(k, n)) - f32::from(self.zero(group, n));
            *value = q * self.scale(group, n).to_f32();
        }
    }
}

impl LinearPart<'_> {
    pub fn n(&self) -> usize {
        match self {
            LinearPart::Dense(view) => view.n,
            LinearPart::Awq(view) => view.n,
        }
    }

    pub fn k(&self) -> usize {
        match self {
            LinearPart::Dense(view) => view.k,
            LinearPart::Awq(view) => view.k,
        }
    }
}

impl LinearSource<'_> {
    /// Number of outputs.
    pub fn n(&self) -> usize {
        self.parts.iter().map(LinearPart::n).sum()
    }

    /// Number of inputs.
    pub fn k(&self) -> usize {
        self.parts[0].k()
    }

    /// Whether any part is quantized.
    pub fn is_quantized(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, LinearPart::Awq(_)))
    }

    /// The part and the row in it that hold output `n`.
    pub fn locate(&self, n: usize) -> (usize, usize) {
        let mut row = match &self.row_map {
            Some(map) => map[n] as usize,
            None => n,
        };
        for (part_idx, part) in self.parts.iter().enumerate() {
            if row < part.n() {
                return (part_idx, row);
            }
            row -= part.n();
        }
        panic!("output {n} of a linear with {} outputs", self.n())
    }

    /// Output `n` in float32 into `out`, which holds `k` values.
    pub fn row(&self, n: usize, out: &mut [f32]) {
        let (part_idx, row) = self.locate(n);
        match &self.parts[part_idx] {
            LinearPart::Dense(view) => view.row(row, out),
            LinearPart::Awq(view) => view.row(row, out),
        }
    }
}
