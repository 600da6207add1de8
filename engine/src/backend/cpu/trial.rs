//! One matmul outside of a model, run by any of its kernels as the backend runs it: weights in the
//! kernel's layout that come from memory, rows from the caches, and the whole team.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bespoke_kernel_gen::spec::{DType, KernelSpec, LinearRole, RowFormat};
use bespoke_kernel_gen::target::Target;

use super::memory::Memory;
use super::ops::run_team;
use super::pack::{self, Panels};
use super::team::Team;
use crate::error::Error;
use crate::kernels::abi::{AwqGemmArgs, GemmArgs, GemmBf16Args, RowsIn, bf16_stride, int8_stride};
use crate::kernels::{Kernel, KernelFn};
use crate::model::linear::LinearSource;

/// Bytes around outputs and scratch that no kernel may write.
const CANARY_BYTES: usize = 4096;
const CANARY: u8 = 0xa5;
/// Scratch and what is around it before a checked call, in turns: NaN in every float format and -1;
/// large in all of them, because a maximum hides NaN; zero.
const SCRATCH_POISONS: [u8; 3] = [0xff, 0x4b, 0x00];
/// Outputs before a checked call: a quiet NaN that no sum gives.
const POISON: u32 = 0x7fc0_dead;

/// Rows that a matmul reads.
#[derive(Clone, Debug, PartialEq)]
pub enum Rows {
    /// `[rows, k]`
    Float(Vec<f32>),
    /// `[rows, k]`, bits of bfloat16
    Bf16(Vec<u16>),
    /// Values are `q · scale`.
    Int8 {
        /// `[rows, k]`
        q: Vec<i8>,
        /// `[rows, k / group]`
        scales: Vec<f32>,
        group: usize,
    },
}

/// How much memory and how many threads a trial takes.
#[derive(Clone, Copy, Debug)]
pub struct TrialOptions {
    pub num_threads: usize,
    /// Weights are repeated until they fill this, at least once.
    pub cold_bytes: usize,
    pub rows_max: usize,
}

/// A matmul with weights, rows and outputs.
pub struct Trial {
    spec: KernelSpec,
    target: Target,
    options: TrialOptions,
    team: Team,
    /// One per thread, each between canaries.
    scratch: Vec<Memory>,
    scratch_bytes: usize,
    /// Counts checked calls.
    num_checked: usize,
    rows: RowBuffers,
    /// Copies in the layout of each number of tiles a panel.
    weights: BTreeMap<usize, Vec<Weights>>,
    next: usize,
    bias: Memory,
    /// `[rows_max, n]` between canaries.
    out: Memory,
}

struct Weights {
    weight: Memory,
    scales: Option<Memory>,
    zeros: Option<Memory>,
}

struct RowBuffers {
    float: Option<Memory>,
    bf16: Option<Memory>,
    /// Levels, scales, sums.
    int8: Option<[Memory; 3]>,
}

impl Trial {
    /// A trial of `spec` over `rows`, as many as `options.rows_max`, and a `bias` of every output.
    ///
    /// # Errors
    /// `spec` is no matmul, there is no memory, or threads cannot be started.
    pub fn new(
        spec: KernelSpec,
        target: Target,
        rows: &Rows,
        bias: &[f32],
        options: TrialOptions,
    ) -> Result<Trial, Error> {
        let (n, k) = sizes(&spec)?;
        assert_eq!(bias.len(), n, "a bias for each output");
        let num_threads = options.num_threads;
        let team = Team::new(num_threads).map_err(|error| {
            Error::Resources(format!("cannot start {num_threads} threads: {error}"))
        })?;
        let mut bias_memory = Memory::floats(n, "a bias")?;
        bias_memory.as_f32_mut().copy_from_slice(bias);
        let out_bytes = options.rows_max * n * 4 + 2 * CANARY_BYTES;
        Ok(Trial {
            spec,
            target,
            options,
            team,
            scratch: Vec::new(),
            scratch_bytes: 0,
            num_checked: 0,
            rows: RowBuffers::new(rows, options.rows_max, k)?,
            weights: BTreeMap::new(),
            next: 0,
            bias: bias_memory,
            out: Memory::new(out_bytes, "outputs")?,
        })
    }

    pub fn team(&mut self) -> &mut Team {
        &mut self.team
    }

    /// Makes room for `kernel` and packs `source` in its layout, unless that is done.
    pub fn prepare(&mut self, kernel: &Kernel, source: &LinearSource<'_>) -> Result<(), Error> {
        self.check(kernel);
        let bytes = kernel.scratch_bytes.max(64).next_multiple_of(64);
        if bytes > self.scratch_bytes {
            let part = |_| Memory::new(bytes + 2 * CANARY_BYTES, "kernel scratch");
            self.scratch = (0..self.team.len()).map(part).collect::<Result<_, _>>()?;
            self.scratch_bytes = bytes;
        }
        if self.weights.contains_key(&kernel.cols) {
            return Ok(());
        }
        let first = self.pack(kernel.cols, source)?;
        let bytes = first.bytes();
        let num_copies = self.options.cold_bytes.div_ceil(bytes).clamp(1, 512);
        let mut copies = vec![first];
        while copies.len() < num_copies {
            copies.push(copies[0].copy()?);
        }
        self.weights.insert(kernel.cols, copies);
        Ok(())
    }

    fn pack(&self, cols: usize, source: &LinearSource<'_>) -> Result<Weights, Error> {
        let (n, k) = sizes(&self.spec)?;
        let panels = Panels { n, k, lanes: self.target.lanes(), cols };
        let num_threads = self.team.len();
        Ok(match self.spec {
            KernelSpec::AwqGemm { group, .. } => {
                let group = bespoke_kernel_gen::spec::activation_group(k, group)
                    .ok_or_else(|| Error::Unsupported(format!("no group for {k} inputs")))?;
                let packed = pack::awq(source, LinearRole::Qkv, group, panels, num_threads)?;
                Weights {
                    weight: packed.weight,
                    scales: Some(packed.scales),
                    zeros: Some(packed.zeros),
                }
            }
            KernelSpec::Gemm { weight: DType::I8, .. } => {
                let (weight, scales) = pack::int8(source, panels, num_threads)?;
                Weights { weight, scales: Some(scales), zeros: None }
            }
            KernelSpec::GemmBf16 { .. } => {
                let weight = pack::bf16_pairs(source, panels, num_threads)?;
                Weights { weight, scales: None, zeros: None }
            }
            KernelSpec::Gemm { weight, .. } => {
                let weight = pack::dense(source, weight, panels, num_threads)?;
                Weights { weight, scales: None, zeros: None }
            }
            _ => return Err(not_a_matmul(&self.spec)),
        })
    }

    /// How long one call of `kernel` over the first `num_rows` rows takes.
    pub fn time(&mut self, kernel: &Kernel, num_rows: usize) -> Duration {
        let start = Instant::now();
        self.run(kernel, num_rows);
        start.elapsed()
    }

    /// Calls `kernel` with poisoned outputs and scratch; the outputs, `[num_rows, n]`.
    ///
    /// Behind the outputs a row and a page are guarded; all of the buffer is where `num_rows` is
    /// the largest number.
    ///
    /// # Errors
    /// What was written that should not have been, in words.
    pub fn checked(&mut self, kernel: &Kernel, num_rows: usize) -> Result<&[f32], String> {
        let n = sizes(&self.spec).map_or(0, |(n, _)| n);
        let (first, len) = (CANARY_BYTES / 4, num_rows * n);
        let end = (4 * (first + len + n) + CANARY_BYTES).min(self.out.len());
        self.out.bytes_mut()[..CANARY_BYTES].fill(CANARY);
        self.out.bytes_mut()[4 * (first + len)..end].fill(CANARY);
        self.out.as_f32_mut()[first..first + len].fill(f32::from_bits(POISON));
        let own = CANARY_BYTES + kernel.scratch_bytes;
        let poison = SCRATCH_POISONS[self.num_checked % SCRATCH_POISONS.len()];
        self.num_checked += 1;
        for scratch in &mut self.scratch {
            scratch.bytes_mut().fill(poison);
        }
        self.run(kernel, num_rows);
        let is_kept = |bytes: &[u8], canary: u8| {
            bytes.iter().fold(true, |kept, byte| kept & (*byte == canary))
        };
        let out = self.out.bytes();
        let around = [&out[..CANARY_BYTES], &out[4 * (first + len)..end]];
        if !around.into_iter().all(|bytes| is_kept(bytes, CANARY)) {
            return Err(format!("wrote outside of the outputs of {num_rows} rows"));
        }
        for scratch in &self.scratch {
            let (before, behind) = (&scratch.bytes()[..CANARY_BYTES], &scratch.bytes()[own..]);
            if !is_kept(before, poison) || !is_kept(behind, poison) {
                return Err(format!(
                    "wrote outside of its {} bytes of scratch",
                    own - CANARY_BYTES
                ));
            }
        }
        Ok(&self.out.as_f32()[first..first + len])
    }

    fn check(&self, kernel: &Kernel) {
        let is_own = kernel.spec == self.spec && kernel.target == self.target;
        assert!(is_own, "{} is not a kernel of this trial", kernel.symbol);
    }

    fn run(&mut self, kernel: &Kernel, num_rows: usize) {
        self.check(kernel);
        assert!(num_rows <= self.options.rows_max && kernel.scratch_bytes <= self.scratch_bytes);
        let copies = self.weights.get(&kernel.cols).expect("`prepare` packed this layout");
        self.next = (self.next + 1) % copies.len();
        let weights = &copies[self.next];
        let (rows, x) = (num_rows, self.rows.rows_in());
        let bias = self.bias.ptr();
        // SAFETY: the outputs stand behind the first canary.
        let out = unsafe { self.out.ptr_mut::<u8>().add(CANARY_BYTES) }.cast();
        match kernel.run {
            KernelFn::AwqGemm(run) => {
                let (scales, zeros) = (ptr(&weights.scales).cast(), ptr(&weights.zeros));
                let weight = weights.weight.ptr();
                let args = AwqGemmArgs { rows, x, weight, scales, zeros, bias, out };
                // SAFETY: weights are packed for this kernel's layout; rows and outputs hold
                // `rows_max` rows, and scratch as much as it wants.
                unsafe { run_team(&mut self.team, &mut self.scratch, CANARY_BYTES, run, &args) }
            }
            KernelFn::Gemm(run) => {
                let scales = ptr(&weights.scales).cast();
                let args = GemmArgs { rows, x, weight: weights.weight.ptr(), scales, bias, out };
                // SAFETY: as above.
                unsafe { run_team(&mut self.team, &mut self.scratch, CANARY_BYTES, run, &args) }
            }
            KernelFn::GemmBf16(run) => {
                let (x, weight) = (ptr(&self.rows.bf16).cast(), weights.weight.ptr());
                let args = GemmBf16Args { rows, x, weight, bias, out };
                // SAFETY: as above.
                unsafe { run_team(&mut self.team, &mut self.scratch, CANARY_BYTES, run, &args) }
            }
            _ => unreachable!("`new` takes matmuls only"),
        }
    }
}

/// Where a memory begins; null where there is none.
fn ptr(memory: &Option<Memory>) -> *const u8 {
    memory.as_ref().map_or(std::ptr::null(), Memory::ptr)
}

impl Weights {
    fn bytes(&self) -> usize {
        let of = |memory: &Option<Memory>| memory.as_ref().map_or(0, Memory::len);
        self.weight.len() + of(&self.scales) + of(&self.zeros)
    }

    fn copy(&self) -> Result<Weights, Error> {
        let copy = |memory: &Memory| {
            let mut copy = Memory::new(memory.len(), "packed weights")?;
            copy.bytes_mut().copy_from_slice(memory.bytes());
            Ok::<_, Error>(copy)
        };
        Ok(Weights {
            weight: copy(&self.weight)?,
            scales: self.scales.as_ref().map(copy).transpose()?,
            zeros: self.zeros.as_ref().map(copy).transpose()?,
        })
    }
}

impl RowBuffers {
    fn new(rows: &Rows, rows_max: usize, k: usize) -> Result<RowBuffers, Error> {
        match rows {
            Rows::Float(values) => {
                assert_eq!(values.len(), rows_max * k, "all rows");
                let mut float = Memory::floats(values.len(), "activations")?;
                float.as_f32_mut().copy_from_slice(values);
                Ok(RowBuffers { float: Some(float), bf16: None, int8: None })
            }
            Rows::Bf16(values) => {
                assert_eq!(values.len(), rows_max * k, "all rows");
                let stride = 2 * bf16_stride(k);
                let mut bf16 = Memory::new(rows_max * stride, "bf16 activations")?;
                for (to, from) in bf16.bytes_mut().chunks_exact_mut(stride).zip(values.chunks(k)) {
                    let pairs = to.as_chunks_mut::<2>().0.iter_mut().zip(from);
                    pairs.for_each(|(to, from)| *to = from.to_ne_bytes());
                }
                Ok(RowBuffers { float: None, bf16: Some(bf16), int8: None })
            }
            Rows::Int8 { q, scales, group } => {
                assert_eq!((q.len(), scales.len()), (rows_max * k, rows_max * (k / group)));
                let stride = int8_stride(k);
                let mut levels = Memory::new(rows_max * stride, "int8 activations")?;
                for (to, from) in levels.bytes_mut().chunks_exact_mut(stride).zip(q.chunks(k)) {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from as u8);
                }
                let mut scale_memory = Memory::floats(scales.len(), "activation scales")?;
                scale_memory.as_f32_mut().copy_from_slice(scales);
                let mut sums = Memory::floats(scales.len(), "activation sums")?;
                let of_groups = q.chunks(*group).map(|group| group.iter().map(|q| i32::from(*q)));
                for (to, levels) in sums.bytes_mut().chunks_exact_mut(4).zip(of_groups) {
                    to.copy_from_slice(&levels.sum::<i32>().to_ne_bytes());
                }
                Ok(RowBuffers { float: None, bf16: None, int8: Some([levels, scale_memory, sums]) })
            }
        }
    }

    fn rows_in(&self) -> RowsIn {
        let (q, scales, sums) = match &self.int8 {
            Some([q, scales, sums]) => (q.ptr(), scales.ptr(), sums.ptr()),
            None => (std::ptr::null(), std::ptr::null(), std::ptr::null()),
        };
        let f32 = self.float.as_ref().map_or(std::ptr::null(), Memory::ptr);
        RowsIn { f32, q, scales, sums }
    }
}

/// Outputs and inputs of a matmul.
fn sizes(spec: &KernelSpec) -> Result<(usize, usize), Error> {
    match *spec {
        KernelSpec::AwqGemm { n, k, .. }
        | KernelSpec::Gemm { n, k, .. }
        | KernelSpec::GemmBf16 { n, k } => Ok((n, k)),
        _ => Err(not_a_matmul(spec)),
    }
}

fn not_a_matmul(spec: &KernelSpec) -> Error {
    Error::Unsupported(format!("{} has no weights to be packed", spec.op()))
}

/// The form of the rows that the kernels of a matmul read.
pub fn row_format(spec: &KernelSpec) -> RowFormat {
    use bespoke_kernel_gen::spec::{ActivationType, GroupSize, activation_group};
    let group = match *spec {
        KernelSpec::AwqGemm { k, group, activation: ActivationType::Int8, .. } => {
            activation_group(k, group)
        }
        KernelSpec::Gemm { k, weight: DType::I8, .. } => activation_group(k, GroupSize::Channel),
        KernelSpec::GemmBf16 { .. } => return RowFormat::Bf16,
        _ => None,
    };
    group.map_or(RowFormat::F32, |group| RowFormat::I8 { group })
}
