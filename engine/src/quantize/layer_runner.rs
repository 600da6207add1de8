//! One layer on a backend, half by half: attention and MLP, each from the residual stream to what
//! it adds to it.

use bespoke_kernel_gen::spec::{LinearRole, ModelShape};

use crate::backend::{Backend, Inspect, RowsKind};
use crate::batch::{Batch, BatchLimits};
use crate::error::Error;
use crate::kernels::abi::SequenceSpan;
use crate::model::linear::LinearSource;
use crate::model::rope::Rope;
use crate::model::weights::LayerNorms;

/// The weights that a linear is computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WeightSet {
    Float = 0,
    Quantized = 1,
}

/// The ops of a layer over the rows of one sample. Every op but the first reads what the one before
/// it wrote.
pub(super) trait RunLayer {
    fn load_norms(&mut self, norms: LayerNorms) -> Result<(), Error>;

    fn load_linear(
        &mut self,
        set: WeightSet,
        role: LinearRole,
        source: &LinearSource<'_>,
    ) -> Result<(), Error>;

    /// Norm before the linear `role`, `Qkv` or `GateUp`, over `residual`, `[sample_len, hidden]`.
    fn start(&mut self, role: LinearRole, residual: &[f32]);

    /// The linear `role`, and what lies between it and the next: rope and attention after `Qkv`,
    /// the activation after `GateUp`.
    fn linear(&mut self, set: WeightSet, role: LinearRole);

    /// What the linear `role` reads, `[sample_len, k]`.
    fn input(&mut self, role: LinearRole) -> Vec<f32>;

    /// What the linear `O` or `Down` wrote, `[sample_len, hidden]`.
    fn delta(&mut self) -> Vec<f32>;
}

/// One layer on `backend`.
pub(super) struct LayerRunner<B: Backend> {
    backend: B,
    /// One sample.
    batch: Batch,
    norms: Option<Norms<B>>,
    /// By set and role.
    linears: [[Option<B::Linear>; 4]; 2],
    /// By role.
    inputs: [B::Input; 4],
    residual: B::Rows,
    delta: B::Rows,
    qkv: B::Rows,
    gate_up: B::Rows,
    kv_cache: B::KvCache,
}

struct Norms<B: Backend> {
    attention: B::Norm,
    mlp: B::Norm,
    qk: Option<(B::Norm, B::Norm)>,
}

impl<B: Backend> LayerRunner<B> {
    /// Room for a sample of `sample_len` tokens. `backend` is made for `shape`, which has one
    /// layer.
    pub(super) fn new(
        mut backend: B,
        shape: &ModelShape,
        rope: &mut Rope,
        sample_len: usize,
    ) -> Result<LayerRunner<B>, Error> {
        assert_eq!(shape.num_layers, 1);
        backend.reserve(&BatchLimits {
            rows_max: sample_len,
            sequences_max: 1,
            context_max: sample_len,
            logit_rows_max: 1,
        })?;
        let mut rows = |width, kind| backend.new_rows(sample_len, width, kind);
        let residual = rows(shape.hidden_size, RowsKind::Residual)?;
        let delta = rows(shape.hidden_size, RowsKind::Linear)?;
        let qkv = rows(shape.qkv.n, RowsKind::Linear)?;
        let gate_up = rows(shape.gate_up.n, RowsKind::Linear)?;
        let mut input = |role| backend.new_input(sample_len, role);
        let inputs = [
            input(LinearRole::Qkv)?,
            input(LinearRole::O)?,
            input(LinearRole::GateUp)?,
            input(LinearRole::Down)?,
        ];
        let kv_cache = backend.new_kv_cache(sample_len.div_ceil(shape.page_size))?;
        Ok(LayerRunner {
            batch: sample_batch(shape, rope, sample_len),
            backend,
            norms: None,
            linears: Default::default(),
            inputs,
            residual,
            delta,
            qkv,
            gate_up,
            kv_cache,
        })
    }
}

impl<B: Inspect> RunLayer for LayerRunner<B> {
    fn load_norms(&mut self, norms: LayerNorms) -> Result<(), Error> {
        let backend = &mut self.backend;
        let qk = match norms.qk {
            Some((q, k)) => Some((backend.load_norm(q)?, backend.load_norm(k)?)),
            None => None,
        };
        self.norms = Some(Norms {
            attention: backend.load_norm(norms.attention)?,
            mlp: backend.load_norm(norms.mlp)?,
            qk,
        });
        Ok(())
    }

    fn load_linear(
        &mut self,
        set: WeightSet,
        role: LinearRole,
        source: &LinearSource<'_>,
    ) -> Result<(), Error> {
        let slot = &mut self.linears[set as usize][role as usize];
        // The weights before make room for these.
        *slot = None;
        *slot = Some(self.backend.load_linear(role, source)?);
        Ok(())
    }

    fn start(&mut self, role: LinearRole, residual: &[f32]) {
        let norms = self.norms.as_ref().expect("norms are loaded before a layer is run");
        let norm = match role {
            LinearRole::Qkv => &norms.attention,
            LinearRole::GateUp => &norms.mlp,
            _ => panic!("no norm stands before {role:?}"),
        };
        let backend = &mut self.backend;
        backend.begin_rows(&self.batch);
        backend.write_rows(residual, &mut self.residual);
        let input = &mut self.inputs[role as usize];
        backend.rms_norm(self.batch.num_rows(), &mut self.residual, None, norm, input);
    }

    fn linear(&mut self, set: WeightSet, role: LinearRole) {
        let num_rows = self.batch.num_rows();
        let LayerRunner { backend, batch, norms, inputs, kv_cache, .. } = self;
        let weight = self.linears[set as usize][role as usize].as_ref();
        let weight = weight.expect("linears are loaded before a layer is run");
        let input = &inputs[role as usize];
        match role {
            LinearRole::Qkv => {
                backend.linear(num_rows, weight, input, &mut self.qkv);
                let qk = norms.as_ref().and_then(|norms| norms.qk.as_ref());
                backend.rope(batch, 0, &mut self.qkv, qk.map(|(q, k)| (q, k)), kv_cache);
                let out = &mut inputs[LinearRole::O as usize];
                backend.paged_attention(batch, 0, &self.qkv, kv_cache, out);
            }
            LinearRole::GateUp => {
                backend.linear(num_rows, weight, input, &mut self.gate_up);
                let out = &mut inputs[LinearRole::Down as usize];
                backend.silu_and_mul(num_rows, &self.gate_up, out);
            }
            LinearRole::O | LinearRole::Down => {
                backend.linear(num_rows, weight, input, &mut self.delta);
            }
            LinearRole::Head => panic!("a layer has no head"),
        }
    }

    fn input(&mut self, role: LinearRole) -> Vec<f32> {
        self.backend.read_input(self.batch.num_rows(), &self.inputs[role as usize])
    }

    fn delta(&mut self) -> Vec<f32> {
        self.backend.read_rows(self.batch.num_rows(), &self.delta)
    }
}

/// All rows of one sequence, in pages 0 and on.
fn sample_batch(shape: &ModelShape, rope: &mut Rope, sample_len: usize) -> Batch {
    let places = 0..sample_len as u32;
    let mut batch = Batch {
        tokens: vec![0; sample_len],
        positions: places.clone().collect(),
        slots: places.collect(),
        spans: vec![SequenceSpan {
            first_row: 0,
            num_rows: sample_len as u32,
            context_len: sample_len as u32,
            first_page: 0,
        }],
        page_table: (0..sample_len.div_ceil(shape.page_size) as u32).collect(),
        ..Batch::default()
    };
    rope.fill(&mut batch, &[sample_len]);
    batch
}
