//! Which kernels serve an op for a batch.

use std::collections::BTreeSet;

use bespoke_kernel_gen::cuda::attention_plan::DECODE_ROWS_MAX;
use bespoke_kernel_gen::cuda::{KvType, Spec};
use bespoke_kernel_gen::spec::{KernelSpec, LinearRole, ModelShape, RowFormat};

use super::Part;
use crate::backend::cpu::CpuOptions;
use crate::backend::cuda::device::Device;
use crate::batch::Batch;
use crate::kernels::choice::Choice;

pub(super) fn cpu_kernels(
    choice: Choice<'_>,
    shape: &ModelShape,
    options: &CpuOptions,
    part: Part,
    batch: &Batch,
) -> Vec<String> {
    let CpuOptions { kv_dtype, activation, .. } = *options;
    let hidden = shape.hidden_size;
    let rows_of = |role| shape.linear_rows(role, activation);
    let is_decode = batch.spans.iter().all(|span| span.num_rows == 1);
    // A spec and the row count that decides about its kernel.
    let any = |spec| vec![(spec, 1)];
    let wanted = match part {
        Part::Embed => any(KernelSpec::Embed { hidden, dtype: shape.dtype }),
        Part::Norm(role) => any(KernelSpec::RmsNorm { hidden, out: rows_of(role) }),
        Part::Linear(role) => {
            let rows = batch.num_rows();
            shape.linear_kernel(role, activation).map_or(vec![], |spec| vec![(spec, rows)])
        }
        Part::Rope => any(shape.rope_kernel(kv_dtype)),
        Part::Attention => {
            let rows = if is_decode { 1 } else { usize::MAX };
            let mut all = vec![(shape.paged_attention_kernel(kv_dtype), rows)];
            let out = rows_of(LinearRole::O);
            if out != RowFormat::F32 {
                all.extend(any(KernelSpec::Quantize { k: shape.o.k, out }));
            }
            all
        }
        Part::SiluAndMul => any(KernelSpec::SiluAndMul {
            intermediate: shape.intermediate_size,
            out: rows_of(LinearRole::Down),
        }),
        Part::Sample => any(KernelSpec::Sample { vocab: shape.vocab_size }),
    };
    let found = wanted.iter().filter_map(|(spec, rows)| choice.kernel(spec, *rows));
    found.map(|kernel| kernel.symbol.to_owned()).collect()
}

pub(super) fn cuda_kernels<D: Device>(
    device: &D,
    shape: &ModelShape,
    kv: KvType,
    part: Part,
    batch: &Batch,
) -> Vec<String> {
    // A spec and the row count that decides about its kernel; of attention one row means decoding.
    let any = |spec| vec![(spec, 1)];
    let wanted: Vec<(Spec, usize)> = match part {
        Part::Embed => any(shape.cuda_embed()),
        Part::Norm(_) => any(shape.cuda_rms_norm()),
        Part::Linear(role) => {
            let rows = batch.num_rows();
            shape.cuda_linear(role).map_or(vec![], |spec| vec![(spec, rows)])
        }
        Part::Rope => any(shape.cuda_rope(kv)),
        Part::Attention => {
            let is_decoded = |num_rows: u32| num_rows as usize <= DECODE_ROWS_MAX;
            let rows = batch.spans.iter().map(|span| match is_decoded(span.num_rows) {
                true => 1,
                false => usize::MAX,
            });
            let spec = shape.cuda_paged_attention(kv);
            rows.collect::<BTreeSet<usize>>().into_iter().map(|rows| (spec, rows)).collect()
        }
        Part::SiluAndMul => any(shape.cuda_silu_and_mul()),
        Part::Sample => any(shape.cuda_sample()),
    };
    let symbol =
        |(spec, rows): &(Spec, usize)| Some(device.serving(spec)?.interval(*rows).variant.symbol());
    wanted.iter().filter_map(symbol).collect()
}
