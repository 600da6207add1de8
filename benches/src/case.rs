//! One kernel with its arguments, set up as it meets them in a model: weights and KV pages come
//! from memory, activations from the caches.

use bespoke::Error;
use bespoke::backend::cpu::memory::Memory;
use bespoke::backend::cpu::pack::Panels;
use bespoke::backend::cpu::team::Team;
use bespoke::backend::cpu::work::Work;
use bespoke::kernels::abi::{
    AwqGemmArgs, EmbedArgs, GemmArgs, GemmBf16Args, PagedAttentionArgs, QuantizeArgs, RmsNormArgs,
    RopeArgs, RowsIn, RowsOut, SampleArgs, SequenceSpan, Share, SiluAndMulArgs, bf16_stride,
    int8_stride,
};
use bespoke::kernels::pages::page_bytes;
use bespoke::kernels::{Kernel, KernelFn};
use bespoke_kernel_gen::spec::{
    ActivationType, DType, GroupSize, KernelSpec, KvDType, RowFormat, RowRegime, activation_group,
};

/// Copies of weights and pages are made until they hold this much, so that every call finds its own
/// out of the caches.
const COLD_BYTES: usize = 160 << 20;
/// Tokens that a decoding row looks back over.
const DECODE_CONTEXT: usize = 1024;
/// Rows of the embedding table.
const VOCABULARY: usize = 32768;
/// A byte that makes harmless values in every element type: small positive floats, nibbles, int8.
const FILL: u8 = 0x2d;

/// A kernel, ready to be called again and again.
pub struct Case {
    pub op: &'static str,
    pub symbol: &'static str,
    pub rows: usize,
    /// Of one call.
    pub work: Work,
    call: Box<dyn Invoke>,
}

impl Case {
    /// `rows` rows for `kernel`, whose regime must serve that many.
    pub fn new(kernel: &Kernel, rows: usize) -> Result<Case, Error> {
        // As the backend does: one row of a small op is not worth waking anybody.
        let is_alone = rows == 1 && kernel.regime == RowRegime::Any;
        let mut setup = Setup { buffers: Vec::new(), is_alone };
        let (call, work) = match kernel.run {
            KernelFn::Embed(run) => embed(&mut setup, kernel, run, rows)?,
            KernelFn::RmsNorm(run) => rms_norm(&mut setup, kernel, run, rows)?,
            KernelFn::Gemm(run) => gemm(&mut setup, kernel, run, rows)?,
            KernelFn::GemmBf16(run) => gemm_bf16(&mut setup, kernel, run, rows)?,
            KernelFn::AwqGemm(run) => awq_gemm(&mut setup, kernel, run, rows)?,
            KernelFn::Rope(run) => rope(&mut setup, kernel, run, rows)?,
            KernelFn::PagedAttention(run) => paged_attention(&mut setup, kernel, run, rows)?,
            KernelFn::SiluAndMul(run) => silu_and_mul(&mut setup, kernel, run, rows)?,
            KernelFn::Quantize(run) => quantize(&mut setup, kernel, run, rows)?,
            KernelFn::Sample(run) => sample(&mut setup, kernel, run, rows)?,
        };
        let op = kernel.spec.op();
        Ok(Case { op, symbol: kernel.symbol, rows, work, call })
    }

    /// One call on all threads of `team`.
    pub fn run(&mut self, team: &mut Team, scratch: &mut Scratch) {
        assert_eq!(team.len(), scratch.0.len(), "scratch is for another team");
        self.call.invoke(team, scratch);
    }
}

/// Bench groups are named by op.
pub const OPS: [&str; 10] = [
    "awq_gemm",
    "gemm",
    "gemm_bf16",
    "paged_attention",
    "embed",
    "rms_norm",
    "rope",
    "silu_and_mul",
    "quantize",
    "sample",
];

/// Row counts that a kernel of `regime` is measured at.
pub fn row_counts(regime: RowRegime) -> &'static [usize] {
    match regime {
        RowRegime::Any => &[1, 512],
        RowRegime::One => &[1],
        RowRegime::Few => &[8],
        RowRegime::Many => &[512],
    }
}

/// Scratch memory, one part per thread.
pub struct Scratch(Vec<Memory>);

impl Scratch {
    /// Enough for any of `kernels`.
    pub fn new<'a>(
        num_threads: usize,
        kernels: impl Iterator<Item = &'a Kernel>,
    ) -> Result<Scratch, Error> {
        let bytes = kernels.map(|kernel| kernel.scratch_bytes).max().unwrap_or(0).max(64);
        (0..num_threads)
            .map(|_| Memory::new(bytes, "scratch"))
            .collect::<Result<_, _>>()
            .map(Scratch)
    }
}

trait Invoke {
    fn invoke(&mut self, team: &mut Team, scratch: &mut Scratch);
}

type Run<A> = unsafe fn(&A, Share);

/// A kernel and the arguments of its calls, taken in turn.
struct Call<A> {
    run: Run<A>,
    args: Vec<A>,
    next: usize,
    /// Whether only the calling thread takes part.
    is_alone: bool,
    /// What the arguments point into.
    _buffers: Vec<Memory>,
}

/// What all threads of a call may read: arguments and the places of their scratch.
struct Shared<'a, A> {
    args: &'a A,
    scratch: &'a [*mut u8],
}

// SAFETY: kernels write disjoint parts of what the pointers lead to, and a thread uses only its own
// scratch.
unsafe impl<A> Sync for Shared<'_, A> {}

impl<A> Invoke for Call<A> {
    fn invoke(&mut self, team: &mut Team, scratch: &mut Scratch) {
        let run = self.run;
        let count = if self.is_alone { 1 } else { team.len() };
        let places: Vec<*mut u8> = scratch.0.iter_mut().map(Memory::ptr_mut).collect();
        let shared = &Shared { args: &self.args[self.next], scratch: &places };
        let job = move |idx: usize| {
            let share = Share { idx, count, scratch: shared.scratch[idx] };
            // SAFETY: `Case::new` made the arguments for this kernel, its target was chosen by what
            // the machine has, and scratch is as large as the largest kernel wants.
            unsafe { run(shared.args, share) }
        };
        match self.is_alone {
            true => job(0),
            false => team.run(&job),
        }
        self.next = (self.next + 1) % self.args.len();
    }
}

type Made = Result<(Box<dyn Invoke>, Work), Error>;

/// Allocates what arguments point to.
struct Setup {
    buffers: Vec<Memory>,
    is_alone: bool,
}

impl Setup {
    /// `len` bytes of [`FILL`]; written, or the system would serve them all from one zero page.
    fn bytes(&mut self, len: usize) -> Result<*mut u8, Error> {
        let mut memory = Memory::new(len, "bench data")?;
        memory.bytes_mut().fill(FILL);
        let start = memory.ptr_mut();
        self.buffers.push(memory);
        Ok(start)
    }

    fn floats(&mut self, len: usize) -> Result<*mut f32, Error> {
        Ok(self.bytes(len * 4)?.cast())
    }

    fn indices(&mut self, len: usize, at: impl Fn(usize) -> usize) -> Result<*mut u32, Error> {
        let start = self.bytes(len * 4)?.cast::<u32>();
        for i in 0..len {
            // SAFETY: `len` words were just allocated, page-aligned.
            unsafe { start.add(i).write(at(i) as u32) };
        }
        Ok(start)
    }

    fn rows_in(&mut self, rows: usize, k: usize, format: RowFormat) -> Result<RowsIn, Error> {
        let out = self.rows_out(rows, k, format)?;
        Ok(RowsIn { f32: out.f32, q: out.q, scales: out.scales, sums: out.sums })
    }

    fn rows_out(&mut self, rows: usize, k: usize, format: RowFormat) -> Result<RowsOut, Error> {
        use std::ptr::null_mut;
        let mut out = RowsOut {
            f32: null_mut(),
            bf16: null_mut(),
            q: null_mut(),
            scales: null_mut(),
            sums: null_mut(),
        };
        match format {
            RowFormat::F32 => out.f32 = self.floats(rows * k)?,
            RowFormat::Bf16 => out.bf16 = self.bytes(rows * 2 * bf16_stride(k))?.cast(),
            RowFormat::I8 { group } => {
                out.q = self.bytes(rows * int8_stride(k))?.cast();
                out.scales = self.floats(rows * (k / group))?;
                out.sums = self.indices(rows * (k / group), |_| 5)?.cast();
            }
        }
        Ok(out)
    }

    fn call<A: 'static>(&mut self, run: Run<A>, args: Vec<A>) -> Box<dyn Invoke> {
        let is_alone = self.is_alone;
        Box::new(Call { run, args, next: 0, is_alone, _buffers: std::mem::take(&mut self.buffers) })
    }
}

/// How many copies of `bytes` bytes keep calls from finding their own in a cache.
fn num_copies(bytes: usize) -> usize {
    COLD_BYTES.div_ceil(bytes).clamp(2, 512)
}

fn wrong_spec(kernel: &Kernel) -> ! {
    panic!("{}: the entry is for another op than {:?}", kernel.symbol, kernel.spec)
}

fn awq_gemm(setup: &mut Setup, kernel: &Kernel, run: Run<AwqGemmArgs>, rows: usize) -> Made {
    let KernelSpec::AwqGemm { n, k, group, activation } = kernel.spec else { wrong_spec(kernel) };
    let group = activation_group(k, group).expect("a plan has no group it cannot pack");
    let format = match activation {
        ActivationType::Int8 => RowFormat::I8 { group },
        _ => RowFormat::F32,
    };
    let panels = Panels { n, k, lanes: kernel.target.lanes(), cols: kernel.cols };
    let num_params = panels.padded_n() * (k / group);
    let work = Work::of(kernel, rows);
    let x = setup.rows_in(rows, k, format)?;
    let out = setup.floats(rows * n)?;
    let mut args = Vec::new();
    for _ in 0..num_copies(work.memory_bytes) {
        let weight = setup.bytes(panels.padded_n() * k / 2)?;
        let scales = setup.bytes(num_params * 2)?.cast();
        let zeros = setup.bytes(num_params)?;
        // SAFETY: just allocated, as long as this; a zero is a nibble.
        unsafe { zeros.write_bytes(8, num_params) };
        args.push(AwqGemmArgs { rows, x, weight, scales, zeros, bias: std::ptr::null(), out });
    }
    Ok((setup.call(run, args), work))
}

fn gemm(setup: &mut Setup, kernel: &Kernel, run: Run<GemmArgs>, rows: usize) -> Made {
    let KernelSpec::Gemm { n, k, weight: dtype } = kernel.spec else { wrong_spec(kernel) };
    let is_int8 = dtype == DType::I8;
    let format = match activation_group(k, GroupSize::Channel).filter(|_| is_int8) {
        Some(group) => RowFormat::I8 { group },
        None => RowFormat::F32,
    };
    let panels = Panels { n, k, lanes: kernel.target.lanes(), cols: kernel.cols };
    let work = Work::of(kernel, rows);
    let x = setup.rows_in(rows, k, format)?;
    let out = setup.floats(rows * n)?;
    let scales = match is_int8 {
        true => setup.floats(panels.padded_n())?,
        false => std::ptr::null_mut(),
    };
    let mut args = Vec::new();
    for _ in 0..num_copies(work.memory_bytes) {
        let weight = setup.bytes(work.memory_bytes)?;
        args.push(GemmArgs { rows, x, weight, scales, bias: std::ptr::null(), out });
    }
    Ok((setup.call(run, args), work))
}

fn gemm_bf16(setup: &mut Setup, kernel: &Kernel, run: Run<GemmBf16Args>, rows: usize) -> Made {
    let KernelSpec::GemmBf16 { n, k } = kernel.spec else { wrong_spec(kernel) };
    let work = Work::of(kernel, rows);
    let x = setup.rows_out(rows, k, RowFormat::Bf16)?.bf16;
    let out = setup.floats(rows * n)?;
    let mut args = Vec::new();
    for _ in 0..num_copies(work.memory_bytes) {
        let weight = setup.bytes(work.memory_bytes)?;
        args.push(GemmBf16Args { rows, x, weight, bias: std::ptr::null(), out });
    }
    Ok((setup.call(run, args), work))
}

/// Bytes of a page of one layer.
pub fn kv_page_bytes(kv: KvDType, num_kv_heads: usize, head_dim: usize, page_size: usize) -> usize {
    page_bytes(kv.bits(), num_kv_heads, head_dim, page_size)
}

/// One sequence: its last row over [`DECODE_CONTEXT`] tokens, or a prompt of `rows` tokens.
fn paged_attention(
    setup: &mut Setup,
    kernel: &Kernel,
    run: Run<PagedAttentionArgs>,
    rows: usize,
) -> Made {
    let KernelSpec::PagedAttention { num_heads, num_kv_heads, head_dim, kv, page_size, .. } =
        kernel.spec
    else {
        wrong_spec(kernel)
    };
    let context_len = if rows == 1 { DECODE_CONTEXT } else { rows };
    let num_pages = context_len.div_ceil(page_size);
    let kv_bytes = num_pages * kv_page_bytes(kv, num_kv_heads, head_dim, page_size);
    let qkv = setup.floats(rows * (num_heads + 2 * num_kv_heads) * head_dim)?;
    let out = setup.floats(rows * num_heads * head_dim)?;
    // Pages are met in an order that no prefetcher knows.
    let page_table = setup.indices(num_pages, |i| (i * 7 + 3) % num_pages)?;
    let (num_rows, context) = (rows as u32, context_len as u32);
    let span = [0, num_rows, context, 0];
    let spans: *const SequenceSpan = setup.indices(4, |i| span[i] as usize)?.cast();
    // SAFETY: four words were written; this checks that they are the fields in this order.
    let read = unsafe { spans.read() };
    assert_eq!((read.num_rows, read.context_len), (num_rows, context), "the span's layout");
    let mut args = Vec::new();
    for _ in 0..num_copies(kv_bytes) {
        let kv = setup.bytes(kv_bytes)?;
        args.push(PagedAttentionArgs {
            spans,
            num_spans: 1,
            qkv,
            kv,
            page_table,
            softmax_scale: 0.125,
            out,
        });
    }
    let span = SequenceSpan { num_rows, context_len: context, ..SequenceSpan::default() };
    let work = Work::of_attention(kernel, &[span]);
    Ok((setup.call(run, args), work))
}

fn rope(setup: &mut Setup, kernel: &Kernel, run: Run<RopeArgs>, rows: usize) -> Made {
    let KernelSpec::Rope { num_heads, num_kv_heads, head_dim, rotary_dim, kv, page_size, .. } =
        kernel.spec
    else {
        wrong_spec(kernel)
    };
    let page_bytes = kv_page_bytes(kv, num_kv_heads, head_dim, page_size);
    let width = (num_heads + 2 * num_kv_heads) * head_dim;
    let args = RopeArgs {
        rows,
        qkv: setup.floats(rows * width)?,
        cos_sin: setup.floats(rows * rotary_dim)?,
        slots: setup.indices(rows, |i| i)?,
        kv: setup.bytes(rows.div_ceil(page_size) * page_bytes)?,
        q_norm: setup.floats(head_dim)?,
        k_norm: setup.floats(head_dim)?,
        eps: 1e-5,
    };
    Ok((setup.call(run, vec![args]), Work::of(kernel, rows)))
}

fn embed(setup: &mut Setup, kernel: &Kernel, run: Run<EmbedArgs>, rows: usize) -> Made {
    let KernelSpec::Embed { hidden, dtype } = kernel.spec else { wrong_spec(kernel) };
    let table = setup.bytes(VOCABULARY * hidden * dtype.size())?;
    let out = setup.floats(rows * hidden)?;
    let mut args = Vec::new();
    for call in 0..64 {
        // Calls look other rows up than the calls before them.
        let tokens = setup.indices(rows, |i| (call * rows + i) * 7919 % VOCABULARY)?;
        args.push(EmbedArgs { rows, tokens, table, out });
    }
    Ok((setup.call(run, args), Work::of(kernel, rows)))
}

fn rms_norm(setup: &mut Setup, kernel: &Kernel, run: Run<RmsNormArgs>, rows: usize) -> Made {
    let KernelSpec::RmsNorm { hidden, out: format } = kernel.spec else { wrong_spec(kernel) };
    let args = RmsNormArgs {
        rows,
        select: std::ptr::null(),
        residual: setup.floats(rows * hidden)?,
        delta: setup.floats(rows * hidden)?,
        weight: setup.floats(hidden)?,
        eps: 1e-5,
        out: setup.rows_out(rows, hidden, format)?,
    };
    Ok((setup.call(run, vec![args]), Work::of(kernel, rows)))
}

fn silu_and_mul(setup: &mut Setup, kernel: &Kernel, run: Run<SiluAndMulArgs>, rows: usize) -> Made {
    let KernelSpec::SiluAndMul { intermediate, out: format } = kernel.spec else {
        wrong_spec(kernel)
    };
    let args = SiluAndMulArgs {
        rows,
        gate_up: setup.floats(rows * 2 * intermediate)?,
        out: setup.rows_out(rows, intermediate, format)?,
    };
    Ok((setup.call(run, vec![args]), Work::of(kernel, rows)))
}

fn quantize(setup: &mut Setup, kernel: &Kernel, run: Run<QuantizeArgs>, rows: usize) -> Made {
    let KernelSpec::Quantize { k, out: format } = kernel.spec else { wrong_spec(kernel) };
    let args =
        QuantizeArgs { rows, x: setup.floats(rows * k)?, out: setup.rows_out(rows, k, format)? };
    Ok((setup.call(run, vec![args]), Work::of(kernel, rows)))
}

fn sample(setup: &mut Setup, kernel: &Kernel, run: Run<SampleArgs>, rows: usize) -> Made {
    let KernelSpec::Sample { vocab } = kernel.spec else { wrong_spec(kernel) };
    let bytes = rows * vocab * 4;
    let args = SampleArgs {
        rows,
        logits: setup.floats(rows * vocab)?,
        out: setup.bytes(rows * 12)?.cast(),
    };
    // 512 rows of logits are beyond the caches.
    let work = match bytes > COLD_BYTES / 2 {
        true => Work { memory_bytes: bytes, ..Work::default() },
        false => Work::of(kernel, rows),
    };
    Ok((setup.call(run, vec![args]), work))
}
