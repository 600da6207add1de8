//! The decoder's ops as launches of generated kernels.

use std::ops::Range;

use bespoke_kernel_gen::cuda::attention_plan::Shape;
use bespoke_kernel_gen::cuda::matmul::AwqLayout;
use bespoke_kernel_gen::cuda::pages::Layout;
use bespoke_kernel_gen::cuda::{AwqGemm, Choice, Gemm, Launch, RowType, Spec, Variant};
use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::{LinearRole, ModelShape};

use super::buffers::{CudaInput, CudaKvCache, CudaLinear, CudaRows};
use super::device::{Address, Device, Use};
use super::kernels::Kernel;
use super::pack::{self, AwqTiles};
use super::params::{
    Bytes, EmbedParams, LinearParams, LogitStatsOut, PagedAttentionParams, RmsNormParams,
    RopeParams, SampleParams, SiluAndMulParams,
};
use super::step::{InputLimits, Items, Places, StepInputs, buckets, padding_max};
use super::{CudaBackend, KvMemory};
use crate::backend::cpu::pack::embedding;
use crate::backend::{Backend, Inspect, Precision, RowsKind, Step};
use crate::batch::{Batch, BatchLimits, PageCopy};
use crate::error::Error;
use crate::kernels::abi::LogitStats;
use crate::model::linear::{DenseView, LinearSource};

/// Bytes of an element of rows between ops.
const ROW_ELEMENT: usize = 2;
/// Workspace that parts of decoded rows take at most, as far as it holds one row: launches are
/// repeated where a batch has more.
const PARTS_BYTES_MAX: usize = 256 << 20;

impl<D: Device> CudaBackend<D> {
    fn launch<P: Bytes>(device: &mut D, kernel: &Kernel<D::Kernel>, launch: Launch, params: &P) {
        device.launch(&kernel.run, launch, params.bytes());
    }

    fn places(&self) -> &Places {
        &self.inputs.as_ref().expect("reserve() comes first").places
    }

    fn upload_floats(&mut self, values: &[f32], what: &str) -> Result<Address, Error> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.upload_weights(&bytes, what)
    }

    fn upload_weights(&mut self, bytes: &[u8], what: &str) -> Result<Address, Error> {
        let address = self.device.alloc(bytes.len(), Use::Weights, what)?;
        self.device.upload(address, bytes);
        self.weights_bytes += bytes.len();
        Ok(address)
    }

    fn page_layer_bytes(&self) -> usize {
        let ModelShape { num_kv_heads, head_dim, page_size, .. } = self.shape;
        Layout { num_kv_heads, head_dim, page_size, kv: self.kv_type }.page_bytes()
    }

    /// Pages of a layer that rows which fill up a batch are written to.
    fn num_spare_pages(&self) -> usize {
        let inputs = self.inputs.as_ref().expect("reserve() comes first");
        padding_max(inputs.recorded_rows_max()).div_ceil(self.shape.page_size)
    }

    /// How attention is cut, with a workspace for the longest row at least.
    fn attention_cut(&self, limits: &BatchLimits) -> InputLimits {
        let Choice::PagedAttention(prefill) = self.kernels.prefill().variant.choice else {
            unreachable!("attention is served by its kernel")
        };
        let window = self.shape.sliding_window.unwrap_or(0);
        let rows_max = prefill.op.rows_max(&prefill.config);
        let mut limits = InputLimits {
            batch: *limits,
            page_size: self.shape.page_size,
            rotary_dim: self.shape.rotary_dim,
            attention: Shape { window, rows_max, parts_max: 0 },
        };
        let part_bytes = 4 * self.kernels.decode().variant.workspace(1).floats;
        let of_row = limits.chunks_max();
        let of_batch = of_row * limits.batch.sequences_max;
        let affordable = PARTS_BYTES_MAX / part_bytes.max(1);
        limits.attention.parts_max = of_batch.min(affordable).max(of_row);
        limits
    }

    fn norm_rows(
        &mut self,
        num_rows: usize,
        select: Address,
        residual: &CudaRows,
        delta: Option<&CudaRows>,
        weight: Address,
        out: &CudaInput,
    ) {
        assert!(num_rows <= out.rows_max && out.k == residual.width);
        assert!(delta.is_none_or(|delta| delta.width == residual.width));
        let params = RmsNormParams {
            residual: residual.data.0,
            delta: delta.map_or(0, |delta| delta.data.0),
            weight: weight.0,
            select: select.0,
            out: out.data.0,
            num_rows: num_rows as u32,
            epsilon: self.eps,
        };
        let kernel = self.kernels.rms_norm();
        let launch = kernel.launch(num_rows, self.kernels.num_sms);
        Self::launch(&mut self.device, kernel, launch, &params);
    }

    fn attend(&mut self, is_decode: bool, items: Items, params: PagedAttentionParams) {
        let kernel = if is_decode { self.kernels.decode() } else { self.kernels.prefill() };
        let params =
            PagedAttentionParams { items: items.items.0, num_items: items.num_items.0, ..params };
        let launch = kernel.launch(items.num_max, self.kernels.num_sms);
        Self::launch(&mut self.device, kernel, launch, &params);
    }

    /// Leaves the statistics of `num_rows` rows of logits on the device.
    pub fn launch_sample(&mut self, logits: &CudaRows, num_rows: usize) {
        assert!(num_rows <= logits.rows_max);
        let params = SampleParams {
            logits: logits.data.0,
            out: self.work.stats.0,
            num_rows: num_rows as u32,
            pad: 0,
        };
        let kernel = self.kernels.sample();
        let launch = kernel.launch(num_rows, self.kernels.num_sms);
        Self::launch(&mut self.device, kernel, launch, &params);
    }

    /// Fills rows with numbers in −1..1, for measurements.
    pub fn fill_rows(&mut self, rows: &CudaRows) {
        let element = if rows.is_f32 { size_of::<f32>() } else { ROW_ELEMENT };
        self.fill(rows.data, rows.rows_max * rows.width, element);
    }

    /// As [`CudaBackend::fill_rows`].
    pub fn fill_input(&mut self, input: &CudaInput) {
        self.fill(input.data, input.rows_max * input.k, ROW_ELEMENT);
    }

    /// Overwrites the first rows with bytes of this value, for verification.
    pub fn poison_rows(&mut self, rows: &CudaRows, num_rows: usize, byte: u8) {
        let element = if rows.is_f32 { size_of::<f32>() } else { ROW_ELEMENT };
        assert!(num_rows <= rows.rows_max);
        self.poison(rows.data, num_rows * rows.width * element, byte);
    }

    /// Overwrites what a launch of so many rows by a candidate uses beside its operands, as another
    /// launch may leave it behind.
    pub fn poison_workspace(&mut self, candidate: &Variant, num_rows: usize, byte: u8) {
        let len = 4 * candidate.workspace(num_rows).floats;
        assert!(len <= self.work.workspace_bytes, "candidates are loaded before `reserve`");
        self.poison(self.work.workspace, len, byte);
    }

    fn poison(&mut self, to: Address, len: usize, byte: u8) {
        if len > 0 {
            self.device.upload(to, &vec![byte; len]);
            self.device.synchronize();
        }
    }

    /// Counters of the workspace that are not zero, as they have to be between launches.
    pub fn num_counters_left(&mut self) -> usize {
        let mut bytes = vec![0; 4 * self.work.num_counters];
        self.device.download(self.work.counters, &mut bytes);
        bytes.chunks_exact(4).filter(|counter| *counter != [0; 4]).count()
    }

    /// The first rows as they lie in memory.
    pub fn row_bytes(&mut self, rows: &CudaRows, num_rows: usize) -> Vec<u8> {
        let element = if rows.is_f32 { size_of::<f32>() } else { ROW_ELEMENT };
        assert!(num_rows <= rows.rows_max);
        let mut bytes = vec![0; num_rows * rows.width * element];
        self.device.download(rows.data, &mut bytes);
        bytes
    }

    fn fill(&mut self, to: Address, len: usize, element: usize) {
        // NOTE: a prime number of values, so that rows differ.
        const NUM_VALUES: usize = 65_521;
        let value = |i: usize| ((i * i * 40_503 + i * 977) % 2001) as f32 / 1000.0 - 1.0;
        let values: Vec<u8> = (0..NUM_VALUES)
            .flat_map(|i| match (element, self.shape.cuda_rows()) {
                (ROW_ELEMENT, RowType::F16) => half::f16::from_f32(value(i)).to_le_bytes().to_vec(),
                (ROW_ELEMENT, RowType::BF16) => {
                    half::bf16::from_f32(value(i)).to_le_bytes().to_vec()
                }
                _ => value(i).to_le_bytes().to_vec(),
            })
            .collect();
        let bytes = len * element;
        for first in (0..bytes).step_by(values.len()) {
            let part = &values[..values.len().min(bytes - first)];
            self.device.upload(to.offset(first), part);
        }
        self.device.synchronize();
    }

    fn pack(&self, kernels_idx: usize, source: &LinearSource<'_>) -> Result<AwqTiles, Error> {
        let num_threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        match *self.kernels.linear_spec(kernels_idx) {
            Spec::AwqGemm(AwqGemm { n, k, group, rows }) => {
                pack::awq(source, &AwqLayout::new(n, k, group), rows, num_threads)
            }
            Spec::Gemm(Gemm { rows, .. }) => {
                let weight = pack::dense(source, rows, num_threads)?;
                Ok(AwqTiles { weight, scales: Vec::new() })
            }
            _ => unreachable!("a linear is served by a matmul"),
        }
    }

    /// Memory of `rows` × `width` elements.
    fn alloc_rows(&mut self, rows: usize, width: usize, element: usize) -> Result<Address, Error> {
        let len = rows.checked_mul(width).and_then(|num| num.checked_mul(element));
        let len = len.ok_or_else(|| {
            Error::Resources(format!("{rows} rows of {width} elements do not fit any memory"))
        })?;
        self.device.alloc(len, Use::Working, "activations")
    }
}

impl<D: Device> CudaBackend<D> {
    /// 16-bit elements of the rows' type.
    fn read_16_bit(&mut self, from: Address, len: usize) -> Vec<f32> {
        let mut bytes = vec![0; ROW_ELEMENT * len];
        self.device.download(from, &mut bytes);
        let elements = bytes.as_chunks::<ROW_ELEMENT>().0.iter();
        match self.shape.cuda_rows() {
            RowType::F16 => elements.map(|x| half::f16::from_le_bytes(*x).to_f32()).collect(),
            RowType::BF16 => elements.map(|x| half::bf16::from_le_bytes(*x).to_f32()).collect(),
        }
    }
}

impl<D: Device> Inspect for CudaBackend<D> {
    fn read_rows(&mut self, num_rows: usize, rows: &CudaRows) -> Vec<f32> {
        assert!(num_rows <= rows.rows_max);
        let len = num_rows * rows.width;
        if !rows.is_f32 {
            return self.read_16_bit(rows.data, len);
        }
        let mut bytes = vec![0; size_of::<f32>() * len];
        self.device.download(rows.data, &mut bytes);
        bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
    }

    fn write_rows(&mut self, values: &[f32], rows: &mut CudaRows) {
        assert!(rows.is_f32 && values.len() <= rows.rows_max * rows.width);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.device.upload(rows.data, &bytes);
    }

    fn read_input(&mut self, num_rows: usize, input: &CudaInput) -> Vec<f32> {
        assert!(num_rows <= input.rows_max);
        self.read_16_bit(input.data, num_rows * input.k)
    }

    fn rows_precision(&self) -> Precision {
        match self.shape.cuda_rows() {
            RowType::F16 => Precision::Float { bits: 11 },
            RowType::BF16 => Precision::Float { bits: 8 },
        }
    }

    fn input_precision(&self, _: &CudaInput) -> Precision {
        self.rows_precision()
    }
}

impl<D: Device> Backend for CudaBackend<D> {
    type Linear = CudaLinear;
    type Embedding = Address;
    type Norm = Address;
    type Rows = CudaRows;
    type Input = CudaInput;
    type KvCache = CudaKvCache;

    fn reserve(&mut self, limits: &BatchLimits) -> Result<(), Error> {
        let input_limits = self.attention_cut(limits);
        self.inputs = Some(StepInputs::new(&mut self.device, input_limits)?);
        // NOTE: decode counts by row; its items are no fewer than rows that are cut.
        let items_max = input_limits.attention.parts_max.max(limits.rows_max);
        let workspace = self.kernels.workspace(limits.rows_max, items_max);
        self.work.workspace_bytes = 4 * workspace.floats;
        self.work.num_counters = workspace.counters;
        let device = &mut self.device;
        self.work.workspace = device.alloc(4 * workspace.floats, Use::Working, "partial sums")?;
        self.work.counters = device.alloc(4 * workspace.counters, Use::Working, "counters")?;
        let logit_rows = limits.logit_rows_max;
        self.work.select = device.alloc(4 * logit_rows, Use::Working, "row indices")?;
        let stats_bytes = size_of::<LogitStatsOut>() * logit_rows;
        self.work.stats = device.alloc(stats_bytes, Use::Working, "statistics of logits")?;
        let logits_bytes = 4 * logit_rows * self.shape.vocab_size;
        self.work.host = Some(device.alloc_host(logits_bytes.max(stats_bytes))?);
        Ok(())
    }

    fn load_linear(
        &mut self,
        role: LinearRole,
        source: &LinearSource<'_>,
    ) -> Result<CudaLinear, Error> {
        let shape = self.shape.linear(role);
        assert_eq!((source.n(), source.k()), (shape.n, shape.k), "{role:?} has other sizes");
        let kernels_idx = self.kernels.linear_idx(role, source.is_quantized());
        let packed = self.pack(kernels_idx, source)?;
        let bias = match &source.bias {
            None => Address::NULL,
            Some(bias) => self.upload_floats(bias, "a bias")?,
        };
        let weight = self.upload_weights(&packed.weight, "packed weights")?;
        let scales = match packed.scales.is_empty() {
            true => Address::NULL,
            false => self.upload_weights(&packed.scales, "packed scales")?,
        };
        Ok(CudaLinear { role, kernels_idx, weight, scales, bias })
    }

    fn load_embedding(&mut self, source: &DenseView<'_>) -> Result<Address, Error> {
        let table = embedding(source, self.shape.dtype)?;
        self.upload_weights(table.bytes(), "the embedding table")
    }

    fn load_norm(&mut self, weight: Vec<f32>) -> Result<Address, Error> {
        self.upload_floats(&weight, "a norm")
    }

    fn new_rows(
        &mut self,
        rows_max: usize,
        width: usize,
        kind: RowsKind,
    ) -> Result<CudaRows, Error> {
        let is_f32 = kind != RowsKind::Linear;
        let element = if is_f32 { size_of::<f32>() } else { ROW_ELEMENT };
        Ok(CudaRows { data: self.alloc_rows(rows_max, width, element)?, is_f32, rows_max, width })
    }

    fn new_input(&mut self, rows_max: usize, role: LinearRole) -> Result<CudaInput, Error> {
        let k = self.shape.linear(role).k;
        Ok(CudaInput { data: self.alloc_rows(rows_max, k, ROW_ELEMENT)?, rows_max, k })
    }

    fn has_own_memory(&self) -> bool {
        true
    }

    fn num_pages(&self, wanted: Option<usize>) -> Result<usize, Error> {
        if let Some(wanted) = wanted {
            return Ok(wanted);
        }
        let free = self.device.free_bytes()?;
        let bytes = match self.kv_memory {
            KvMemory::Share(share) => (free as f64 * share) as usize,
            KvMemory::Bytes(bytes) => bytes,
        };
        let num_pages = (bytes / self.page_bytes()).saturating_sub(self.num_spare_pages());
        if num_pages == 0 {
            return Err(Error::Resources(format!(
                "{bytes} bytes for the KV cache, of {free} that are free on {}, do not hold a \
                 page of {}; free memory of the device or give the cache more with --kv-memory",
                self.device.info().name,
                self.page_bytes()
            )));
        }
        Ok(num_pages)
    }

    fn new_kv_cache(&mut self, num_pages: usize) -> Result<CudaKvCache, Error> {
        let (num_layers, page_bytes) = (self.shape.num_layers, self.page_layer_bytes());
        let num_spare = self.num_spare_pages();
        let len = CudaKvCache::len(num_layers, num_pages + num_spare, page_bytes);
        let len = len.ok_or_else(|| {
            Error::Resources(format!("{num_pages} pages do not fit any memory; give fewer"))
        })?;
        let data = self.device.alloc(len, Use::Working, "the KV cache")?;
        let inputs = self.inputs.as_mut().expect("reserve() comes first");
        inputs.spare_slot = (num_pages * self.shape.page_size) as u32;
        Ok(CudaKvCache { data, page_bytes, num_pages, num_spare, num_layers })
    }

    fn page_bytes(&self) -> usize {
        self.shape.num_layers * self.page_layer_bytes()
    }

    fn identity(&self) -> String {
        format!("cuda {}", self.kernels.identity())
    }

    fn provenances(&self) -> Vec<Provenance> {
        self.kernels.provenances()
    }

    fn weights_bytes(&self) -> usize {
        self.weights_bytes
    }

    fn copy_pages(&mut self, copies: &[PageCopy], kv_cache: &mut CudaKvCache) {
        for copy in copies.iter().filter(|copy| copy.from != copy.to) {
            for layer_idx in 0..kv_cache.num_layers {
                let from = kv_cache.page(layer_idx, copy.from);
                let to = kv_cache.page(layer_idx, copy.to);
                self.device.copy(from, to, kv_cache.page_bytes);
            }
        }
    }

    fn read_page(&mut self, page: u32, kv_cache: &CudaKvCache, out: &mut Vec<u8>) {
        for layer_idx in 0..kv_cache.num_layers {
            let start = out.len();
            out.resize(start + kv_cache.page_bytes, 0);
            self.device.download(kv_cache.page(layer_idx, page), &mut out[start..]);
        }
    }

    fn write_page(&mut self, page: u32, bytes: &[u8], kv_cache: &mut CudaKvCache) {
        assert_eq!(bytes.len(), self.page_bytes(), "the bytes of one page");
        for (layer_idx, bytes) in bytes.chunks_exact(kv_cache.page_bytes).enumerate() {
            self.device.upload(kv_cache.page(layer_idx, page), bytes);
        }
    }

    fn begin_step(&mut self, batch: &Batch) -> Step {
        let inputs = self.inputs.as_mut().expect("reserve() comes first");
        inputs.plan(batch);
        let bucket = inputs.bucket(batch).filter(|_| self.has_graphs);
        inputs.upload(&mut self.device, batch, bucket);
        let Some(bucket) = bucket else { return Step::Compute };
        if let Some(graph) = self.graphs.get(&bucket) {
            self.device.replay(graph);
            self.num_graph_steps += 1;
            return Step::Replayed;
        }
        self.device.begin_capture();
        self.recorded_rows = Some(bucket);
        Step::Compute
    }

    fn end_step(&mut self) {
        if let Some(rows) = self.recorded_rows.take() {
            let graph = self.device.end_capture();
            self.device.replay(&graph);
            self.graphs.insert(rows, graph);
        }
    }

    fn recorded_rows(&self) -> Vec<usize> {
        match &self.inputs {
            Some(inputs) if self.has_graphs => buckets(inputs.recorded_rows_max()),
            _ => Vec::new(),
        }
    }

    fn begin_rows(&mut self, batch: &Batch) {
        let inputs = self.inputs.as_mut().expect("reserve() comes first");
        inputs.plan(batch);
        inputs.upload(&mut self.device, batch, None);
    }

    fn embed(&mut self, table: &Address, tokens: &[u32], out: &mut CudaRows) {
        let num_rows = self.launched(tokens.len());
        assert!(num_rows <= out.rows_max);
        let params = EmbedParams {
            table: table.0,
            tokens: self.places().tokens.0,
            out: out.data.0,
            num_rows: num_rows as u32,
            pad: 0,
        };
        let kernel = self.kernels.embed();
        let launch = kernel.launch(num_rows, self.kernels.num_sms);
        Self::launch(&mut self.device, kernel, launch, &params);
    }

    fn rms_norm(
        &mut self,
        num_rows: usize,
        residual: &mut CudaRows,
        delta: Option<&CudaRows>,
        weight: &Address,
        out: &mut CudaInput,
    ) {
        let num_rows = self.launched(num_rows);
        self.norm_rows(num_rows, Address::NULL, residual, delta, *weight, out);
    }

    fn rms_norm_select(
        &mut self,
        select: &[u32],
        residual: &mut CudaRows,
        delta: Option<&CudaRows>,
        weight: &Address,
        out: &mut CudaInput,
    ) {
        // Every row of a recorded step is selected.
        let selected = match self.recorded_rows {
            Some(_) => Address::NULL,
            None => {
                let bytes: Vec<u8> = select.iter().flat_map(|row| row.to_le_bytes()).collect();
                self.device.upload(self.work.select, &bytes);
                self.work.select
            }
        };
        let num_rows = self.launched(select.len());
        self.norm_rows(num_rows, selected, residual, delta, *weight, out);
    }

    fn linear(&mut self, num_rows: usize, weight: &CudaLinear, x: &CudaInput, out: &mut CudaRows) {
        let num_rows = self.launched(num_rows);
        let shape = self.shape.linear(weight.role);
        assert!(num_rows <= x.rows_max && num_rows <= out.rows_max);
        assert!(x.k == shape.k && out.width == shape.n);
        let params = LinearParams {
            weight: weight.weight.0,
            scales: weight.scales.0,
            bias: weight.bias.0,
            x: x.data.0,
            out: out.data.0,
            workspace: self.work.workspace.0,
            counters: self.work.counters.0,
            num_rows: num_rows as u32,
            pad: 0,
        };
        let kernel = self.kernels.linear(weight.kernels_idx, num_rows);
        let launch = kernel.launch(num_rows, self.kernels.num_sms);
        Self::launch(&mut self.device, kernel, launch, &params);
    }

    fn rope(
        &mut self,
        batch: &Batch,
        layer_idx: usize,
        qkv: &mut CudaRows,
        qk_norm: Option<(&Address, &Address)>,
        kv_cache: &mut CudaKvCache,
    ) {
        let num_rows = self.launched(batch.num_rows());
        let (cos_sin, slots) = (self.places().cos_sin, self.places().slots);
        let params = RopeParams {
            qkv: qkv.data.0,
            cos_sin: cos_sin.0,
            slots: slots.0,
            q_norm: qk_norm.map_or(0, |(q, _)| q.0),
            k_norm: qk_norm.map_or(0, |(_, k)| k.0),
            kv_cache: kv_cache.layer(layer_idx).0,
            num_rows: num_rows as u32,
            epsilon: self.eps,
        };
        let kernel = self.kernels.rope();
        let launch = kernel.launch(num_rows, self.kernels.num_sms);
        Self::launch(&mut self.device, kernel, launch, &params);
    }

    fn paged_attention(
        &mut self,
        _batch: &Batch,
        layer_idx: usize,
        qkv: &CudaRows,
        kv_cache: &CudaKvCache,
        out: &mut CudaInput,
    ) {
        let places = self.places().clone();
        let params = PagedAttentionParams {
            qkv: qkv.data.0,
            kv_cache: kv_cache.layer(layer_idx).0,
            spans: places.spans.0,
            page_table: places.page_table.0,
            out: out.data.0,
            workspace: self.work.workspace.0,
            counters: self.work.counters.0,
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            ..PagedAttentionParams::default()
        };
        for items in places.decode {
            self.attend(true, items, params);
        }
        if let Some(items) = places.prefill {
            self.attend(false, items, params);
        }
    }

    fn silu_and_mul(&mut self, num_rows: usize, gate_up: &CudaRows, out: &mut CudaInput) {
        let num_rows = self.launched(num_rows);
        assert!(gate_up.width == 2 * out.k && num_rows <= out.rows_max);
        let params = SiluAndMulParams {
            gate_up: gate_up.data.0,
            out: out.data.0,
            num_rows: num_rows as u32,
            pad: 0,
        };
        let kernel = self.kernels.silu_and_mul();
        let launch = kernel.launch(num_rows, self.kernels.num_sms);
        Self::launch(&mut self.device, kernel, launch, &params);
    }

    fn sample(&mut self, logits: &CudaRows, stats: &mut [LogitStats]) {
        if stats.is_empty() {
            return;
        }
        self.launch_sample(logits, stats.len());
        let host = self.work.host.as_mut().expect("reserve() comes first").as_mut();
        let bytes = &mut host[..size_of::<LogitStatsOut>() * stats.len()];
        self.device.download(self.work.stats, bytes);
        self.inputs.as_mut().expect("reserve() comes first").finished();
        let (words, _) = bytes.as_chunks::<4>();
        for (stats, words) in stats.iter_mut().zip(words.as_chunks::<3>().0) {
            let [max, argmax, log_sum_exp] = *words;
            *stats = LogitStats {
                max: f32::from_le_bytes(max),
                argmax: u32::from_le_bytes(argmax),
                log_sum_exp: f32::from_le_bytes(log_sum_exp),
            };
        }
    }

    fn read<'a>(&'a mut self, rows: Range<usize>, logits: &'a CudaRows) -> &'a [f32] {
        assert!(rows.end <= logits.rows_max);
        let row_bytes = 4 * logits.width;
        let host = self.work.host.as_mut().expect("reserve() comes first").as_mut();
        let bytes = &mut host[..rows.len() * row_bytes];
        self.device.download(logits.data.offset(rows.start * row_bytes), bytes);
        self.work.logits.clear();
        let values = bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value));
        self.work.logits.extend(values);
        &self.work.logits
    }
}
