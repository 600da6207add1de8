//! One layer, an embedding and a head on one backend.

use bespoke_kernel_gen::spec::{LinearRole, ModelShape};

use super::Part;
use crate::backend::reference::ReferenceBackend;
use crate::backend::{Backend, Inspect, Precision, RowsKind};
use crate::batch::{Batch, BatchLimits};
use crate::error::Error;
use crate::kernels::abi::LogitStats;
use crate::model::weights::ModelWeights;

pub(super) struct Side<B: Backend> {
    pub(super) backend: B,
    embedding: B::Embedding,
    /// Before qkv, gate_up and the head.
    norms: [B::Norm; 3],
    qk_norm: Option<(B::Norm, B::Norm)>,
    /// By role.
    linears: [B::Linear; 5],
    inputs: [B::Input; 5],
    residual: B::Rows,
    delta: B::Rows,
    qkv: B::Rows,
    gate_up: B::Rows,
    logits: B::Rows,
    kv_cache: B::KvCache,
    stats: Vec<LogitStats>,
}

const ROLES: [LinearRole; 5] =
    [LinearRole::Qkv, LinearRole::O, LinearRole::GateUp, LinearRole::Down, LinearRole::Head];

/// Makes an array of what `make` gives, which may fail.
fn each<T>(make: impl FnMut(LinearRole) -> Result<T, Error>) -> Result<[T; 5], Error> {
    let all: Vec<T> = ROLES.into_iter().map(make).collect::<Result<_, _>>()?;
    Ok(all.try_into().unwrap_or_else(|_| unreachable!("one for each of five roles")))
}

impl<B: Backend> Side<B> {
    pub(super) fn new(
        mut backend: B,
        weights: &dyn ModelWeights,
        shape: &ModelShape,
        limits: &BatchLimits,
        num_pages: usize,
    ) -> Result<Side<B>, Error> {
        backend.reserve(limits)?;
        let BatchLimits { rows_max, logit_rows_max, .. } = *limits;
        let rows = |backend: &mut B, width, kind| backend.new_rows(rows_max, width, kind);
        let residual = rows(&mut backend, shape.hidden_size, RowsKind::Residual)?;
        let delta = rows(&mut backend, shape.hidden_size, RowsKind::Linear)?;
        let qkv = rows(&mut backend, shape.qkv.n, RowsKind::Linear)?;
        let gate_up = rows(&mut backend, shape.gate_up.n, RowsKind::Linear)?;
        let logits = backend.new_rows(logit_rows_max, shape.vocab_size, RowsKind::Logits)?;
        let inputs = each(|role| backend.new_input(rows_max, role))?;
        let embedding = backend.load_embedding(&weights.embedding()?.view())?;
        let layer = weights.norms(0)?;
        let qk_norm = match layer.qk {
            Some((q, k)) => Some((backend.load_norm(q)?, backend.load_norm(k)?)),
            None => None,
        };
        let norms = [
            backend.load_norm(layer.attention)?,
            backend.load_norm(layer.mlp)?,
            backend.load_norm(weights.final_norm()?)?,
        ];
        let linears = each(|role| {
            let tensors = weights.linear(role, 0)?;
            backend.load_linear(role, &tensors.source())
        })?;
        let kv_cache = backend.new_kv_cache(num_pages)?;
        Ok(Side {
            backend,
            embedding,
            norms,
            qk_norm,
            linears,
            inputs,
            residual,
            delta,
            qkv,
            gate_up,
            logits,
            kv_cache,
            stats: Vec::new(),
        })
    }

    pub(super) fn run(&mut self, part: Part, batch: &Batch) {
        let num_rows = batch.num_rows();
        let Side { backend, inputs, residual, delta, kv_cache, .. } = self;
        match part {
            Part::Embed => backend.embed(&self.embedding, &batch.tokens, residual),
            Part::Norm(LinearRole::Head) => {
                let input = &mut inputs[LinearRole::Head as usize];
                let (select, delta) = (&batch.logit_rows, Some(&*delta));
                backend.rms_norm_select(select, residual, delta, &self.norms[2], input);
            }
            Part::Norm(role) => {
                let is_first = role == LinearRole::Qkv;
                let (norm, delta) = (&self.norms[usize::from(!is_first)], &*delta);
                let delta = (!is_first).then_some(delta);
                backend.rms_norm(num_rows, residual, delta, norm, &mut inputs[role as usize]);
            }
            Part::Linear(role) => {
                let out = match role {
                    LinearRole::Qkv => &mut self.qkv,
                    LinearRole::O | LinearRole::Down => delta,
                    LinearRole::GateUp => &mut self.gate_up,
                    LinearRole::Head => &mut self.logits,
                };
                let idx = role as usize;
                backend.linear(num_rows, &self.linears[idx], &inputs[idx], out);
            }
            Part::Rope => {
                let qk_norm = self.qk_norm.as_ref().map(|(q, k)| (q, k));
                backend.rope(batch, 0, &mut self.qkv, qk_norm, kv_cache);
            }
            Part::Attention => {
                let out = &mut inputs[LinearRole::O as usize];
                backend.paged_attention(batch, 0, &self.qkv, kv_cache, out);
            }
            Part::SiluAndMul => {
                let out = &mut inputs[LinearRole::Down as usize];
                backend.silu_and_mul(num_rows, &self.gate_up, out);
            }
            Part::Sample => {
                self.stats.clear();
                self.stats.resize(num_rows, LogitStats::default());
                backend.sample(&self.logits, &mut self.stats);
            }
        }
    }
}

impl<B: Inspect> Side<B> {
    /// What an op wrote, row by row.
    pub(super) fn output(&mut self, part: Part, num_rows: usize) -> Vec<f32> {
        let Side { backend, inputs, .. } = self;
        match part {
            Part::Embed => backend.read_rows(num_rows, &self.residual),
            Part::Norm(role) => backend.read_input(num_rows, &inputs[role as usize]),
            Part::Linear(LinearRole::Qkv) | Part::Rope => backend.read_rows(num_rows, &self.qkv),
            Part::Linear(LinearRole::O | LinearRole::Down) => {
                backend.read_rows(num_rows, &self.delta)
            }
            Part::Linear(LinearRole::GateUp) => backend.read_rows(num_rows, &self.gate_up),
            Part::Linear(LinearRole::Head) => backend.read_rows(num_rows, &self.logits),
            Part::Attention => backend.read_input(num_rows, &inputs[LinearRole::O as usize]),
            Part::SiluAndMul => backend.read_input(num_rows, &inputs[LinearRole::Down as usize]),
            Part::Sample => {
                let stats = self.stats.iter();
                stats.flat_map(|s| [s.max, s.argmax as f32, s.log_sum_exp]).collect()
            }
        }
    }

    pub(super) fn precision(&self, part: Part) -> Precision {
        let exact = Precision::Float { bits: 24 };
        match part {
            Part::Embed | Part::Linear(LinearRole::Head) | Part::Sample => exact,
            Part::Linear(_) | Part::Rope => self.backend.rows_precision(),
            Part::Norm(role) => self.backend.input_precision(&self.inputs[role as usize]),
            Part::Attention => self.backend.input_precision(&self.inputs[LinearRole::O as usize]),
            Part::SiluAndMul => {
                self.backend.input_precision(&self.inputs[LinearRole::Down as usize])
            }
        }
    }
}

impl Side<ReferenceBackend> {
    /// Takes over what the other side's op wrote.
    pub(super) fn replace(&mut self, part: Part, values: &[f32]) {
        let rows = match part {
            Part::Embed => &mut self.residual,
            Part::Norm(role) => &mut self.inputs[role as usize],
            Part::Linear(LinearRole::Qkv) | Part::Rope => &mut self.qkv,
            Part::Linear(LinearRole::O | LinearRole::Down) => &mut self.delta,
            Part::Linear(LinearRole::GateUp) => &mut self.gate_up,
            Part::Linear(LinearRole::Head) => &mut self.logits,
            Part::Attention => &mut self.inputs[LinearRole::O as usize],
            Part::SiluAndMul => &mut self.inputs[LinearRole::Down as usize],
            Part::Sample => return,
        };
        rows.values_mut()[..values.len()].copy_from_slice(values);
    }
}
