//! The decoder's ops as calls of generated kernels.

use std::ops::Range;

use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::{LinearRole, ModelShape, RowFormat};

use super::ahead::{self, Ahead};
use super::buffers::{CpuInput, CpuKvCache, CpuLinear, CpuRows, Packed};
use super::kernels::{Entry, Matmul, Run};
use super::memory::Memory;
use super::work::Work;
use super::{CpuBackend, team::Team};
use crate::backend::{Backend, Inspect, KernelUsage, Precision, RowsKind, Step};
use crate::batch::{Batch, PageCopy};
use crate::error::Error;
use crate::kernels::abi::{
    AwqGemmArgs, EmbedArgs, GemmArgs, GemmBf16Args, LogitStats, PagedAttentionArgs, QuantizeArgs,
    RmsNormArgs, RopeArgs, SampleArgs, Share, SiluAndMulArgs,
};
use crate::kernels::pages;
use crate::model::linear::{DenseView, LinearSource};

/// Kernel arguments on their way to the team.
struct Shared<'a, A>(&'a A);

// SAFETY: the pointers in `A` are read, or written at places that each share has to itself.
unsafe impl<A> Sync for Shared<'_, A> {}

/// One scratch pointer per thread.
struct ScratchPtrs<'a>(&'a mut [Memory]);

// SAFETY: every thread takes only the memory of its own index.
unsafe impl Sync for ScratchPtrs<'_> {}

impl ScratchPtrs<'_> {
    fn get(&self, thread_idx: usize, offset: usize) -> *mut u8 {
        self.0[thread_idx].ptr::<u8>().cast_mut().wrapping_add(offset)
    }
}

/// Runs one kernel on the whole team; each thread's scratch begins `offset` bytes into its memory.
///
/// # Safety
/// `args` as the kernel documents them.
pub(super) unsafe fn run_team<A>(
    team: &mut Team,
    scratch: &mut [Memory],
    offset: usize,
    run: Run<A>,
    args: &A,
) {
    // SAFETY: as the caller vouches.
    unsafe { run_team_before(Ahead::default(), team, scratch, offset, run, args) }
}

/// As [`run_team`], asking for what lies `ahead`.
///
/// # Safety
/// As [`run_team`].
unsafe fn run_team_before<A>(
    ahead: Ahead,
    team: &mut Team,
    scratch: &mut [Memory],
    offset: usize,
    run: Run<A>,
    args: &A,
) {
    let count = team.len();
    let (args, scratch) = (Shared(args), ScratchPtrs(scratch));
    let (args, scratch) = (&args, &scratch);
    team.run_before(ahead, &move |idx| {
        let share = Share { idx, count, scratch: scratch.get(idx, offset) };
        // SAFETY: the caller vouches for the arguments; the kernel's target was checked when the
        // backend was made.
        unsafe { run(args.0, share) }
    });
}

impl CpuBackend {
    /// Runs a kernel on the team, or here alone where one row is not worth waking anybody.
    ///
    /// # Safety
    /// As [`run_team`].
    unsafe fn run_rows<A>(&mut self, num_rows: usize, entry: Entry<A>, args: &A) {
        let start = self.meter.start();
        if num_rows == 1 {
            let share = Share { idx: 0, count: 1, scratch: self.scratch[0].ptr_mut() };
            // SAFETY: as the caller vouches.
            unsafe { (entry.run)(args, share) }
        } else {
            // SAFETY: as the caller vouches.
            unsafe { run_team(&mut self.team, &mut self.scratch, 0, entry.run, args) }
        }
        self.meter.stop(start, entry.idx, |kernel| Work::of(kernel, num_rows));
    }

    /// Runs a matmul on the team.
    ///
    /// # Safety
    /// As [`run_team`].
    unsafe fn run_matmul<A>(&mut self, num_rows: usize, entry: Entry<A>, args: &A, ahead: Ahead) {
        let start = self.meter.start();
        let CpuBackend { team, scratch, .. } = self;
        // SAFETY: as the caller vouches.
        unsafe { run_team_before(ahead, team, scratch, 0, entry.run, args) }
        self.meter.stop(start, entry.idx, |kernel| Work::of(kernel, num_rows));
    }

    fn norm_rows(
        &mut self,
        num_rows: usize,
        select: *const u32,
        residual: &mut CpuRows,
        delta: Option<&CpuRows>,
        weight: &Memory,
        out: &mut CpuInput,
    ) {
        assert!(num_rows <= out.rows_max && out.k == residual.width);
        assert!(delta.is_none_or(|delta| delta.width == residual.width));
        let args = RmsNormArgs {
            rows: num_rows,
            select,
            residual: residual.data.ptr_mut(),
            delta: delta.map_or(std::ptr::null(), |delta| delta.data.ptr()),
            weight: weight.ptr(),
            eps: self.eps,
            out: out.rows_out(),
        };
        let entry = self.kernels.norm(out.format);
        // SAFETY: the buffers hold at least `num_rows` rows of the model's sizes.
        unsafe { self.run_rows(num_rows, entry, &args) }
    }

    fn page_layer_bytes(&self) -> usize {
        let ModelShape { num_kv_heads, head_dim, page_size, .. } = self.shape;
        pages::page_bytes(self.kv_dtype.bits(), num_kv_heads, head_dim, page_size)
    }
}

/// What a step's rows must satisfy before kernels follow their pointers.
fn check_batch(batch: &Batch, kv_cache: &CpuKvCache, page_size: usize, rotary_dim: usize) {
    let num_rows = batch.num_rows();
    assert_eq!(batch.slots.len(), num_rows, "one slot per row");
    assert_eq!(batch.cos_sin.len(), num_rows * rotary_dim, "one rotation per row");
    let num_slots = kv_cache.num_pages * page_size;
    assert!(batch.slots.iter().all(|slot| (*slot as usize) < num_slots), "slots lie in the cache");
    let num_pages = kv_cache.num_pages;
    assert!(batch.page_table.iter().all(|page| (*page as usize) < num_pages), "pages exist");
    for span in &batch.spans {
        let pages = (span.context_len as usize).div_ceil(page_size);
        assert!(span.first_page as usize + pages <= batch.page_table.len(), "pages are listed");
        assert!((span.first_row + span.num_rows) as usize <= num_rows, "rows exist");
        assert!(span.num_rows <= span.context_len, "a row sees itself");
    }
}

impl Backend for CpuBackend {
    type Linear = CpuLinear;
    type Embedding = Memory;
    type Norm = Memory;
    type Rows = CpuRows;
    type Input = CpuInput;
    type KvCache = CpuKvCache;

    fn load_linear(
        &mut self,
        role: LinearRole,
        source: &LinearSource<'_>,
    ) -> Result<CpuLinear, Error> {
        self.load_linear(role, source)
    }

    fn load_embedding(&mut self, source: &DenseView<'_>) -> Result<Memory, Error> {
        self.load_embedding(source)
    }

    fn load_norm(&mut self, weight: Vec<f32>) -> Result<Memory, Error> {
        self.load_norm(&weight)
    }

    fn new_rows(&mut self, rows_max: usize, width: usize, _: RowsKind) -> Result<CpuRows, Error> {
        CpuRows::new(rows_max, width)
    }

    fn new_input(&mut self, rows_max: usize, role: LinearRole) -> Result<CpuInput, Error> {
        CpuInput::new(rows_max, self.shape.linear(role).k, &self.kernels.row_formats(role))
    }

    fn prepare_input(&self, weight: &CpuLinear, input: &mut CpuInput) {
        input.set_format(self.kernels.linears[weight.kernels_idx].rows);
    }

    fn new_kv_cache(&mut self, num_pages: usize) -> Result<CpuKvCache, Error> {
        CpuKvCache::new(self.shape.num_layers, num_pages, self.page_layer_bytes())
    }

    fn page_bytes(&self) -> usize {
        self.page_layer_bytes() * self.shape.num_layers
    }

    fn identity(&self) -> String {
        format!("cpu {}", self.kernels.target.name())
    }

    fn weights_bytes(&self) -> usize {
        self.weights_bytes
    }

    fn copy_pages(&mut self, copies: &[PageCopy], kv_cache: &mut CpuKvCache) {
        for copy in copies {
            for layer_idx in 0..kv_cache.num_layers {
                let from = kv_cache.page_range(layer_idx, copy.from);
                let to = kv_cache.page_range(layer_idx, copy.to).start;
                kv_cache.data.bytes_mut().copy_within(from, to);
            }
        }
    }

    fn read_page(&mut self, page: u32, kv_cache: &CpuKvCache, out: &mut Vec<u8>) {
        for layer_idx in 0..kv_cache.num_layers {
            out.extend_from_slice(&kv_cache.data.bytes()[kv_cache.page_range(layer_idx, page)]);
        }
    }

    fn write_page(&mut self, page: u32, bytes: &[u8], kv_cache: &mut CpuKvCache) {
        assert_eq!(bytes.len(), self.page_bytes(), "the bytes of one page");
        for (layer_idx, bytes) in bytes.chunks_exact(kv_cache.page_bytes).enumerate() {
            let page = kv_cache.page_range(layer_idx, page);
            kv_cache.data.bytes_mut()[page].copy_from_slice(bytes);
        }
    }

    fn begin_step(&mut self, _: &Batch) -> Step {
        self.order.begin();
        self.meter.begin_step();
        Step::Compute
    }

    fn begin_rows(&mut self, _: &Batch) {
        self.order.begin();
    }

    fn end_step(&mut self) {
        self.meter.end_step();
    }

    fn provenances(&self) -> Vec<Provenance> {
        self.kernels.provenances.clone()
    }

    fn kernel_usage(&mut self) -> Result<Vec<KernelUsage>, Error> {
        self.usage()
    }

    fn embed(&mut self, table: &Memory, tokens: &[u32], out: &mut CpuRows) {
        assert!(tokens.len() <= out.rows_max);
        let vocab = self.shape.vocab_size;
        assert!(
            tokens.iter().all(|token| (*token as usize) < vocab),
            "tokens are in the vocabulary"
        );
        let args = EmbedArgs {
            rows: tokens.len(),
            tokens: tokens.as_ptr(),
            table: table.ptr(),
            out: out.data.ptr_mut(),
        };
        let entry = self.kernels.embed;
        // SAFETY: the tokens lie in the table, `out` holds their rows.
        unsafe { self.run_rows(tokens.len(), entry, &args) }
    }

    fn rms_norm(
        &mut self,
        num_rows: usize,
        residual: &mut CpuRows,
        delta: Option<&CpuRows>,
        weight: &Memory,
        out: &mut CpuInput,
    ) {
        assert!(num_rows <= residual.rows_max);
        self.norm_rows(num_rows, std::ptr::null(), residual, delta, weight, out);
    }

    fn rms_norm_select(
        &mut self,
        select: &[u32],
        residual: &mut CpuRows,
        delta: Option<&CpuRows>,
        weight: &Memory,
        out: &mut CpuInput,
    ) {
        assert!(select.iter().all(|row| (*row as usize) < residual.rows_max), "rows exist");
        self.norm_rows(select.len(), select.as_ptr(), residual, delta, weight, out);
    }

    fn linear(&mut self, num_rows: usize, weight: &CpuLinear, x: &CpuInput, out: &mut CpuRows) {
        let shape = self.shape.linear(weight.role);
        let ahead = self.order.next(weight.ahead());
        let ahead = if num_rows <= ahead::ROWS_MAX { ahead } else { Ahead::default() };
        let kernels = &self.kernels.linears[weight.kernels_idx];
        assert!(num_rows <= x.rows_max && num_rows <= out.rows_max);
        assert!(x.k == shape.k && x.format == kernels.rows && out.width == shape.n);
        let bf16 = x.bf16_rows();
        let (rows, x, out) = (num_rows, x.rows_in(), out.data.ptr_mut());
        let bias = weight.bias_ptr();
        match (&weight.packed, &kernels.matmul) {
            (Packed::Dense { weight }, Matmul::Gemm(kernels)) => {
                let entry = kernels.of(rows);
                let weight = weight.ptr();
                let args = GemmArgs { rows, x, weight, scales: std::ptr::null(), bias, out };
                // SAFETY: sizes and formats were compared above, the weights packed for this
                // kernel.
                unsafe { self.run_matmul(rows, entry, &args, ahead) }
            }
            (Packed::Bf16Pairs { weight }, Matmul::GemmBf16(kernels)) => {
                let entry = kernels.of(rows);
                let args = GemmBf16Args { rows, x: bf16, weight: weight.ptr(), bias, out };
                // SAFETY: as above.
                unsafe { self.run_matmul(rows, entry, &args, ahead) }
            }
            (Packed::Int8 { weight, scales }, Matmul::Gemm(kernels)) => {
                let entry = kernels.of(rows);
                let args =
                    GemmArgs { rows, x, weight: weight.ptr(), scales: scales.ptr(), bias, out };
                // SAFETY: as above.
                unsafe { self.run_matmul(rows, entry, &args, ahead) }
            }
            (Packed::Awq(awq), Matmul::AwqGemm(kernels)) => {
                let entry = kernels.of(rows);
                let args = AwqGemmArgs {
                    rows,
                    x,
                    weight: awq.weight.ptr(),
                    scales: awq.scales.ptr(),
                    zeros: awq.zeros.ptr(),
                    bias,
                    out,
                };
                // SAFETY: as above.
                unsafe { self.run_matmul(rows, entry, &args, ahead) }
            }
            _ => unreachable!("weights are packed for the kernel of their role"),
        }
    }

    fn rope(
        &mut self,
        batch: &Batch,
        layer_idx: usize,
        qkv: &mut CpuRows,
        qk_norm: Option<(&Memory, &Memory)>,
        kv_cache: &mut CpuKvCache,
    ) {
        check_batch(batch, kv_cache, self.shape.page_size, self.shape.rotary_dim);
        assert!(batch.num_rows() <= qkv.rows_max);
        assert_eq!(qk_norm.is_some(), self.shape.qk_norm, "QK-norm where the kernel has it");
        let offset = kv_cache.layer_offset(layer_idx);
        let (q_norm, k_norm) = match qk_norm {
            Some((q_norm, k_norm)) => (q_norm.ptr(), k_norm.ptr()),
            None => (std::ptr::null(), std::ptr::null()),
        };
        let args = RopeArgs {
            rows: batch.num_rows(),
            qkv: qkv.data.ptr_mut(),
            cos_sin: batch.cos_sin.as_ptr(),
            slots: batch.slots.as_ptr(),
            // SAFETY: the layer's pages lie within the cache.
            kv: unsafe { kv_cache.data.ptr_mut::<u8>().add(offset) },
            q_norm,
            k_norm,
            eps: self.eps,
        };
        let entry = self.kernels.rope;
        // SAFETY: `check_batch` compared the batch with the cache.
        unsafe { self.run_rows(batch.num_rows(), entry, &args) }
    }

    fn paged_attention(
        &mut self,
        batch: &Batch,
        layer_idx: usize,
        qkv: &CpuRows,
        kv_cache: &CpuKvCache,
        out: &mut CpuInput,
    ) {
        assert!(batch.num_rows() <= out.rows_max && out.k == self.shape.o.k);
        let offset = kv_cache.layer_offset(layer_idx);
        let args = PagedAttentionArgs {
            spans: batch.spans.as_ptr(),
            num_spans: batch.spans.len(),
            qkv: qkv.data.ptr(),
            // SAFETY: the layer's pages lie within the cache.
            kv: unsafe { kv_cache.data.ptr::<u8>().add(offset) },
            page_table: batch.page_table.as_ptr(),
            softmax_scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            out: out.float.ptr_mut(),
        };
        let decode = batch.spans.iter().all(|span| span.num_rows == 1);
        let entry = if decode { self.kernels.decode } else { self.kernels.prefill };
        let start = self.meter.start();
        // SAFETY: `rope` compared the batch with the cache in this layer.
        unsafe { run_team(&mut self.team, &mut self.scratch, 0, entry.run, &args) }
        self.meter.stop(start, entry.idx, |kernel| Work::of_attention(kernel, &batch.spans));
        if let (RowFormat::I8 { .. } | RowFormat::Bf16, Some(entry)) =
            (out.format, self.kernels.quantize)
        {
            let rows = batch.num_rows();
            let args = QuantizeArgs { rows, x: out.float.ptr(), out: out.rows_out() };
            // SAFETY: the rows were written by the attention kernel.
            unsafe { self.run_rows(rows, entry, &args) }
        }
    }

    fn silu_and_mul(&mut self, num_rows: usize, gate_up: &CpuRows, out: &mut CpuInput) {
        assert!(num_rows <= gate_up.rows_max && num_rows <= out.rows_max);
        assert!(gate_up.width == 2 * out.k);
        let args =
            SiluAndMulArgs { rows: num_rows, gate_up: gate_up.data.ptr(), out: out.rows_out() };
        let entry = self.kernels.silu_and_mul(out.format);
        // SAFETY: both buffers hold the rows.
        unsafe { self.run_rows(num_rows, entry, &args) }
    }

    fn sample(&mut self, logits: &CpuRows, stats: &mut [LogitStats]) {
        assert!(stats.len() <= logits.rows_max && logits.width == self.shape.vocab_size);
        let args =
            SampleArgs { rows: stats.len(), logits: logits.data.ptr(), out: stats.as_mut_ptr() };
        let entry = self.kernels.sample;
        // SAFETY: both buffers hold the rows.
        unsafe { self.run_rows(stats.len(), entry, &args) }
    }

    fn read<'a>(&'a mut self, rows: Range<usize>, logits: &'a CpuRows) -> &'a [f32] {
        assert!(rows.end <= logits.rows_max);
        &logits.data.as_f32()[rows.start * logits.width..rows.end * logits.width]
    }
}

impl Inspect for CpuBackend {
    fn read_rows(&mut self, num_rows: usize, rows: &CpuRows) -> Vec<f32> {
        rows.data.as_f32()[..num_rows * rows.width].to_vec()
    }

    fn write_rows(&mut self, values: &[f32], rows: &mut CpuRows) {
        rows.data.as_f32_mut()[..values.len()].copy_from_slice(values);
    }

    fn read_input(&mut self, num_rows: usize, input: &CpuInput) -> Vec<f32> {
        input.values(num_rows)
    }

    fn rows_precision(&self) -> Precision {
        Precision::Float { bits: 24 }
    }

    fn input_precision(&self, input: &CpuInput) -> Precision {
        match input.format {
            RowFormat::F32 => Precision::Float { bits: 24 },
            RowFormat::Bf16 => Precision::Float { bits: 8 },
            RowFormat::I8 { group } => Precision::Levels { group },
        }
    }
}
