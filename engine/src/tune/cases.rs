//! What is measured: ops at sizes that serving has, with the memory and arithmetic of each.

use bespoke_kernel_gen::cuda::matmul::{AwqLayout, DenseLayout};
use bespoke_kernel_gen::cuda::pages::Layout;
use bespoke_kernel_gen::cuda::{KvType, Spec};
use bespoke_kernel_gen::spec::{LinearRole, ModelShape};
use bespoke_kernel_gen::tuning::record;

use crate::batch::Batch;
use crate::error::Error;
use crate::kernels::abi::SequenceSpan;

/// One op at one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    Linear {
        role: LinearRole,
        rows: usize,
    },
    /// A row of each of `sequences`, whose contexts have `context` tokens.
    Decode {
        sequences: usize,
        context: usize,
    },
    /// A prompt of `len` tokens.
    Prefill {
        len: usize,
    },
    Embed {
        rows: usize,
    },
    RmsNorm {
        rows: usize,
    },
    Rope {
        rows: usize,
    },
    SiluAndMul {
        rows: usize,
    },
    /// Reads rows of logits and writes next to nothing: the bandwidth of reading.
    Sample {
        rows: usize,
    },
    /// A copy of so many rows of logits by the driver: the bandwidth of copying.
    Copy {
        rows: usize,
    },
}

/// What a case has to do at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes read and written, each once.
    pub bytes: usize,
    /// Multiplications and additions of matrices.
    pub flops: usize,
}

/// Sizes to be measured.
#[derive(Clone, Debug)]
pub struct Cases {
    /// Of matmuls, at which candidates drop out, in the order of their weight.
    pub linear_rows: Vec<usize>,
    /// At which those that are left are measured as well.
    pub other_rows: Vec<usize>,
    /// Sequences and tokens of each.
    pub decode: Vec<(usize, usize)>,
    pub prefill: Vec<usize>,
    /// Of the ops between matmuls.
    pub small_rows: Vec<usize>,
    /// Rows of logits that are read and copied.
    pub logit_rows: usize,
}

impl Default for Cases {
    fn default() -> Cases {
        Cases {
            linear_rows: vec![1, 8, 16, 32, 64, 512, 128, 2048],
            other_rows: vec![2, 4, 12, 24, 48, 96, 256, 1024],
            decode: vec![(1, 1024), (1, 16384), (8, 2048), (32, 1024), (32, 4096), (128, 1024)],
            prefill: vec![512, 2048, 8192],
            small_rows: vec![1, 32, 512, 8192],
            logit_rows: 512,
        }
    }
}

impl Cases {
    /// All cases of a model. Those that the type of the KV cache does not matter to come with
    /// 16-bit caches only.
    pub fn all(&self, shape: &ModelShape, kv: KvType) -> Vec<Case> {
        let decode = self.decode.iter();
        let mut all: Vec<Case> =
            decode.map(|(sequences, context)| decode_case(*sequences, *context)).collect();
        all.extend(self.prefill.iter().map(|len| Case::Prefill { len: *len }));
        all.extend(self.small_rows.iter().map(|rows| Case::Rope { rows: *rows }));
        if kv != KvType::Rows {
            return all;
        }
        let rows_max = self.logit_rows;
        all.push(Case::Copy { rows: rows_max.div_ceil(2) });
        all.push(Case::Sample { rows: rows_max });
        for role in LinearRole::ALL {
            // The head never has more rows than a step may want logits of.
            let limit = if role == LinearRole::Head { rows_max } else { usize::MAX };
            let rows = self.linear_rows.iter().chain(&self.other_rows);
            let rows = rows.filter(|rows| **rows <= limit);
            all.extend(rows.map(|rows| Case::Linear { role, rows: *rows }));
        }
        for &rows in &self.small_rows {
            all.extend([Case::Embed { rows }, Case::RmsNorm { rows }, Case::SiluAndMul { rows }]);
        }
        let window = shape.sliding_window.unwrap_or(usize::MAX);
        all.retain(|case| !matches!(case, Case::Decode { context, .. } if *context > window));
        all
    }
}

fn decode_case(sequences: usize, context: usize) -> Case {
    Case::Decode { sequences, context }
}

impl Case {
    /// Rows of the batch.
    pub fn num_rows(&self) -> usize {
        match *self {
            Case::Decode { sequences, .. } => sequences,
            Case::Prefill { len } => len,
            Case::Linear { rows, .. }
            | Case::Embed { rows }
            | Case::RmsNorm { rows }
            | Case::Rope { rows }
            | Case::SiluAndMul { rows } => rows,
            Case::Sample { .. } | Case::Copy { .. } => 1,
        }
    }

    /// Rows of logits that it needs.
    pub(super) fn num_logit_rows(&self) -> usize {
        match *self {
            Case::Sample { rows } | Case::Linear { role: LinearRole::Head, rows } => rows,
            Case::Copy { rows } => 2 * rows,
            _ => 0,
        }
    }

    pub(super) fn num_sequences(&self) -> usize {
        match *self {
            Case::Decode { sequences, .. } => sequences,
            _ => 1,
        }
    }

    pub(super) fn num_pages(&self, page_size: usize) -> usize {
        self.num_sequences() * context_max(self).div_ceil(page_size)
    }

    /// What it has to do in `shape`.
    pub fn cost(&self, shape: &ModelShape, kv: KvType) -> Cost {
        let ModelShape { num_kv_heads, head_dim, page_size, hidden_size, .. } = *shape;
        let pages = Layout { num_kv_heads, head_dim, page_size, kv };
        let token_bytes = pages.page_bytes() / page_size;
        let q_width = shape.num_heads * head_dim;
        match *self {
            Case::Linear { role, rows } => linear_cost(shape, role, rows),
            Case::Decode { sequences, context } => Cost {
                bytes: sequences * (context * token_bytes + 4 * q_width),
                flops: 4 * sequences * context * q_width,
            },
            Case::Prefill { len } => {
                let visible = match shape.sliding_window {
                    Some(window) if window < len => {
                        window * (window + 1) / 2 + (len - window) * window
                    }
                    _ => len * (len + 1) / 2,
                };
                Cost { bytes: len * (token_bytes + 4 * q_width), flops: 4 * visible * q_width }
            }
            Case::Embed { rows } => {
                bytes(rows * hidden_size * (shape.dtype.size() + size_of::<f32>()))
            }
            // The residual is read and the input of a linear written.
            Case::RmsNorm { rows } => bytes(rows * hidden_size * 6),
            Case::Rope { rows } => bytes(rows * (2 * (q_width + shape.qkv.n) + token_bytes)),
            Case::SiluAndMul { rows } => bytes(rows * shape.intermediate_size * 6),
            Case::Sample { rows } => bytes(rows * shape.vocab_size * 4),
            Case::Copy { rows } => bytes(2 * rows * shape.vocab_size * 4),
        }
    }
}

impl From<Case> for record::Case {
    fn from(case: Case) -> record::Case {
        match case {
            Case::Decode { sequences, context } => {
                record::Case::Decode { num_sequences: sequences, context_len: context }
            }
            Case::Prefill { len } => record::Case::Prefill(len),
            Case::Linear { rows, .. }
            | Case::Embed { rows }
            | Case::RmsNorm { rows }
            | Case::Rope { rows }
            | Case::SiluAndMul { rows }
            | Case::Sample { rows }
            | Case::Copy { rows } => record::Case::Rows(rows),
        }
    }
}

fn bytes(bytes: usize) -> Cost {
    Cost { bytes, flops: 0 }
}

/// Bytes of a linear's packed weights.
pub(super) fn weight_bytes(shape: &ModelShape, role: LinearRole) -> usize {
    match shape.cuda_linear(role) {
        Ok(Spec::AwqGemm(op)) => {
            let layout = AwqLayout::new(op.n, op.k, op.group);
            layout.weight_bytes() + layout.scale_bytes()
        }
        Ok(Spec::Gemm(op)) => DenseLayout { n: op.n, k: op.k }.weight_bytes(),
        _ => 0,
    }
}

fn linear_cost(shape: &ModelShape, role: LinearRole, rows: usize) -> Cost {
    let linear = shape.linear(role);
    let out_bytes = if role == LinearRole::Head { 4 } else { 2 };
    Cost {
        bytes: weight_bytes(shape, role) + rows * (2 * linear.k + out_bytes * linear.n),
        flops: 2 * rows * linear.n * linear.k,
    }
}

/// What computes a case; nothing of ours does a copy.
pub(super) fn spec_of(case: &Case, shape: &ModelShape, kv: KvType) -> Result<Option<Spec>, Error> {
    Ok(Some(match *case {
        Case::Linear { role, .. } => shape.cuda_linear(role)?,
        Case::Decode { .. } | Case::Prefill { .. } => shape.cuda_paged_attention(kv),
        Case::Embed { .. } => shape.cuda_embed(),
        Case::RmsNorm { .. } => shape.cuda_rms_norm(),
        Case::Rope { .. } => shape.cuda_rope(kv),
        Case::SiluAndMul { .. } => shape.cuda_silu_and_mul(),
        Case::Sample { .. } => shape.cuda_sample(),
        Case::Copy { .. } => return Ok(None),
    }))
}

/// The rows that decide about a case's kernel; of attention one row means decoding.
pub(super) fn rows_served(case: &Case) -> usize {
    match case {
        Case::Decode { .. } => 1,
        Case::Prefill { .. } => usize::MAX,
        _ => case.num_rows(),
    }
}

/// Tokens of the longest sequence of a case.
pub(super) fn context_max(case: &Case) -> usize {
    match *case {
        Case::Decode { context, .. } => context,
        _ => case.num_rows(),
    }
}

/// The batch of a decode or prefill case; angles are those of place 0.
pub(super) fn batch(shape: &ModelShape, case: &Case) -> Batch {
    let (sequences, rows, context) = match *case {
        Case::Decode { sequences, context } => (sequences, 1, context),
        _ => (1, case.num_rows(), case.num_rows()),
    };
    let pages_of_one = context.div_ceil(shape.page_size);
    let num_pages = (sequences * pages_of_one) as u32;
    let mut batch = Batch::default();
    for sequence in 0..sequences {
        batch.spans.push(SequenceSpan {
            first_row: (sequence * rows) as u32,
            num_rows: rows as u32,
            context_len: context as u32,
            first_page: (sequence * pages_of_one) as u32,
        });
        for position in context - rows..context {
            let page = sequence * pages_of_one + position / shape.page_size;
            let page = scattered(page as u32, num_pages) as usize;
            batch.slots.push((page * shape.page_size + position % shape.page_size) as u32);
            batch.positions.push(position as u32);
            batch.tokens.push((position * 977 % shape.vocab_size) as u32);
            let half = shape.rotary_dim / 2;
            batch.cos_sin.extend(std::iter::repeat_n(1.0, half));
            batch.cos_sin.extend(std::iter::repeat_n(0.0, half));
        }
    }
    batch.page_table.extend((0..num_pages).map(|page| scattered(page, num_pages)));
    batch
}

/// Pages of a server lie in no order: a fixed permutation of `0..num`.
fn scattered(page: u32, num: u32) -> u32 {
    // NOTE: a step that shares no factor with the number visits every page once.
    let step = (num / 2..).find(|step| gcd(*step, num) == 1).unwrap_or(1);
    ((u64::from(page) * u64::from(step) + 3) % u64::from(num)) as u32
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bespoke_kernel_gen::presets;

    #[test]
    fn costs_are_counted() {
        let shape = presets::shape("llama-3.1-8b-awq", &[]).unwrap();
        let gate_up = Case::Linear { role: LinearRole::GateUp, rows: 1 };
        let Cost { bytes, flops } = gate_up.cost(&shape, KvType::Rows);
        assert_eq!(flops, 2 * 28672 * 4096);
        // Half a byte a weight, four bytes for each 128 of them, a row in and a row out.
        assert_eq!(bytes, 28672 * 4096 / 2 + 28672 * 32 * 4 + 2 * 4096 + 2 * 28672);
        let decode = decode_case(2, 1000).cost(&shape, KvType::Rows);
        assert_eq!(decode.bytes, 2 * (1000 * 2 * 8 * 128 * 2 + 4 * 4096));
        let prefill = Case::Prefill { len: 2 }.cost(&shape, KvType::I8);
        assert_eq!(prefill.flops, 4 * 3 * 4096);
    }

    #[test]
    fn pages_are_visited_once() {
        for num in 1..100 {
            let mut pages: Vec<u32> = (0..num).map(|page| scattered(page, num)).collect();
            pages.sort_unstable();
            assert!(pages.into_iter().eq(0..num), "{num}");
        }
    }

    #[test]
    fn quantized_caches_repeat_nothing() {
        let shape = presets::shape("qwen2.5-7b-awq", &[]).unwrap();
        let cases = Cases::default();
        let of = |kv| cases.all(&shape, kv);
        assert!(of(KvType::Rows).len() > of(KvType::I8).len());
        let depends = |case: &Case| {
            matches!(case, Case::Decode { .. } | Case::Prefill { .. } | Case::Rope { .. })
        };
        assert!(of(KvType::I4).iter().all(depends));
    }
}
