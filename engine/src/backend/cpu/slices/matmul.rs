//! Matmuls over weights that are packed once.

use std::marker::PhantomData;

use bespoke_kernel_gen::spec::{ActivationType, GroupSize, KernelSpec, LinearRole};
use half::f16;

use super::{Needs, Runner, check_rows};
use crate::backend::cpu::float_memory;
use crate::backend::cpu::kernels::{ByRows, Matmul, MatmulKernels, Weights};
use crate::backend::cpu::memory::Memory;
use crate::backend::cpu::pack::{self, AwqPanels, Panels};
use crate::binding::{AwqGemm, Binding, Computes, Element, Gemm};
use crate::error::Error;
use crate::kernels::abi::{AwqGemmArgs, GemmArgs, RowsIn};
use crate::model::linear::{AwqView, DenseView, LinearPart, LinearSource};

/// `out = x · weightᵀ + bias` over dense weights of type `E`, with `N` outputs and `K` inputs.
pub struct DenseMatmul<B, E, const N: usize, const K: usize> {
    weight: Memory,
    bias: Option<Memory>,
    kernels: ByRows<GemmArgs>,
    needs: Needs,
    binding: PhantomData<fn() -> (B, E)>,
}

/// The same over 4-bit weights with float32 rows, `GROUP` inputs to a scale and a zero.
pub struct AwqMatmul<B, const N: usize, const K: usize, const GROUP: usize> {
    panels: AwqPanels,
    bias: Option<Memory>,
    kernels: ByRows<AwqGemmArgs>,
    needs: Needs,
    binding: PhantomData<fn() -> B>,
}

/// 4-bit weights as AWQ "gemm" checkpoints hold them: eight outputs to a word, in the order 0 2 4 6
/// 1 3 5 7 from its lowest bits on, and `value = (q − zero) · scale`.
#[derive(Clone, Copy, Debug)]
pub struct AwqWeights<'a, const N: usize, const K: usize, const GROUP: usize> {
    /// `[K, N / 8]`
    qweight: &'a [u32],
    /// `[K / GROUP, N / 8]`; `None`: every zero is 8.
    qzeros: Option<&'a [u32]>,
    /// `[K / GROUP, N]`
    scales: &'a [f16],
}

impl<B: Binding, E: Element, const N: usize, const K: usize> DenseMatmul<B, E, N, K> {
    /// Packs `weight`, an array of `K` inputs for each output.
    ///
    /// # Errors
    /// No memory, or a kernel that is not in the table.
    pub fn new(
        runner: &Runner<B>,
        weight: &[[E::Value; K]; N],
        bias: Option<&[f32; N]>,
    ) -> Result<Self, Error>
    where
        B: Computes<Gemm<E, N, K>>,
    {
        let spec = KernelSpec::Gemm { n: N, k: K, weight: E::DTYPE };
        let (found, needs) = runner.find(|lookup| lookup.matmul(spec))?;
        let MatmulKernels { cols, matmul: Matmul::Gemm(kernels), .. } = found else {
            unreachable!("a Gemm is served by its own kernels");
        };
        // SAFETY: float32, float16 and bfloat16 are plain bytes.
        let bytes = unsafe { bytes_of(weight.as_flattened()) };
        let view = DenseView { n: N, k: K, dtype: E::DTYPE, bytes };
        let source = source(LinearPart::Dense(view));
        let panels = Panels { n: N, k: K, lanes: runner.target.lanes(), cols };
        let weight = pack::dense(&source, E::DTYPE, panels, runner.num_threads())?;
        Ok(DenseMatmul { weight, bias: load_bias(bias)?, kernels, needs, binding: PhantomData })
    }

    /// Computes as many rows as `x` has.
    ///
    /// # Errors
    /// `out` has room for another number of rows.
    pub fn run(
        &self,
        runner: &mut Runner<B>,
        x: &[[f32; K]],
        out: &mut [[f32; N]],
    ) -> Result<(), Error> {
        check_rows(x.len(), out.len())?;
        if x.is_empty() {
            return Ok(());
        }
        let args = GemmArgs {
            rows: x.len(),
            x: float_rows(x),
            weight: self.weight.ptr(),
            scales: std::ptr::null(),
            bias: bias_ptr(&self.bias),
            out: out.as_mut_ptr().cast(),
        };
        let run = self.kernels.of(x.len()).run;
        // SAFETY: rows and outputs are as many, of the kernel's sizes; the weights were packed for
        // it.
        unsafe { runner.run(self.needs, run, &args) }
        Ok(())
    }
}

impl<B: Binding, const N: usize, const K: usize, const GROUP: usize> AwqMatmul<B, N, K, GROUP> {
    /// Packs `weights`.
    ///
    /// # Errors
    /// No memory, or a kernel that is not in the table.
    pub fn new(
        runner: &Runner<B>,
        weights: &AwqWeights<'_, N, K, GROUP>,
        bias: Option<&[f32; N]>,
    ) -> Result<Self, Error>
    where
        B: Computes<AwqGemm<N, K, GROUP>>,
    {
        let activation = ActivationType::Float;
        let spec = |group| KernelSpec::AwqGemm { n: N, k: K, group, activation };
        // One group of all inputs has a spec of its own.
        let channel = Some(spec(GroupSize::Channel)).filter(|_| GROUP == K);
        let channel = channel.filter(|spec| runner.table.serving(spec, runner.target).is_some());
        let spec = channel.unwrap_or_else(|| spec(GroupSize::Of(GROUP)));
        let (found, needs) = runner.find(|lookup| lookup.matmul(spec))?;
        let MatmulKernels {
            weights: Weights::Awq { group },
            cols,
            matmul: Matmul::AwqGemm(kernels),
        } = found
        else {
            unreachable!("an AwqGemm is served by its own kernels");
        };
        let panels = Panels { n: N, k: K, lanes: runner.target.lanes(), cols };
        let source = source(LinearPart::Awq(weights.view()));
        let panels = pack::awq(&source, LinearRole::Qkv, group, panels, runner.num_threads())?;
        Ok(AwqMatmul { panels, bias: load_bias(bias)?, kernels, needs, binding: PhantomData })
    }

    /// Computes as many rows as `x` has.
    ///
    /// # Errors
    /// `out` has room for another number of rows.
    pub fn run(
        &self,
        runner: &mut Runner<B>,
        x: &[[f32; K]],
        out: &mut [[f32; N]],
    ) -> Result<(), Error> {
        check_rows(x.len(), out.len())?;
        if x.is_empty() {
            return Ok(());
        }
        let args = AwqGemmArgs {
            rows: x.len(),
            x: float_rows(x),
            weight: self.panels.weight.ptr(),
            scales: self.panels.scales.ptr(),
            zeros: self.panels.zeros.ptr(),
            bias: bias_ptr(&self.bias),
            out: out.as_mut_ptr().cast(),
        };
        let run = self.kernels.of(x.len()).run;
        // SAFETY: as for dense weights.
        unsafe { runner.run(self.needs, run, &args) }
        Ok(())
    }
}

impl<'a, const N: usize, const K: usize, const GROUP: usize> AwqWeights<'a, N, K, GROUP> {
    /// `qweight` is `[K, N / 8]`, `qzeros` `[K / GROUP, N / 8]` (`None`: every zero is 8), and
    /// `scales` `[K / GROUP, N]`.
    ///
    /// # Errors
    /// A slice has another length, `GROUP` does not divide `K`, or 8 does not divide `N`.
    pub fn new(
        qweight: &'a [u32],
        qzeros: Option<&'a [u32]>,
        scales: &'a [f16],
    ) -> Result<Self, Error> {
        if GROUP == 0 || !K.is_multiple_of(GROUP) || !N.is_multiple_of(8) {
            return Err(Error::Request(format!(
                "{N} outputs of {K} inputs in groups of {GROUP}; outputs come by eight, and groups \
                 divide the inputs"
            )));
        }
        let check = |name: &str, len: usize, expected: usize| match len == expected {
            true => Ok(()),
            false => Err(Error::Request(format!(
                "{name} has {len} elements, {N} outputs of {K} inputs in groups of {GROUP} have \
                 {expected}"
            ))),
        };
        check("qweight", qweight.len(), K * (N / 8))?;
        if let Some(qzeros) = qzeros {
            check("qzeros", qzeros.len(), K / GROUP * (N / 8))?;
        }
        check("scales", scales.len(), K / GROUP * N)?;
        Ok(AwqWeights { qweight, qzeros, scales })
    }

    fn view(&self) -> AwqView<'a> {
        // SAFETY: integers and float16 are plain bytes.
        unsafe {
            AwqView {
                n: N,
                k: K,
                group: GROUP,
                qweight: bytes_of(self.qweight),
                qzeros: self.qzeros.map(|zeros| bytes_of(zeros)),
                scales: bytes_of(self.scales),
            }
        }
    }
}

fn source(part: LinearPart<'_>) -> LinearSource<'_> {
    LinearSource { parts: vec![part], row_map: None, bias: None }
}

/// Numbers as they lie in a checkpoint.
///
/// # Safety
/// `T` has no padding.
unsafe fn bytes_of<T>(values: &[T]) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "checkpoints are little-endian") };
    // SAFETY: the same memory, without padding as the caller promises.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn load_bias<const N: usize>(bias: Option<&[f32; N]>) -> Result<Option<Memory>, Error> {
    bias.map(|bias| float_memory(bias, "a bias")).transpose()
}

fn bias_ptr(bias: &Option<Memory>) -> *const f32 {
    bias.as_ref().map_or(std::ptr::null(), Memory::ptr)
}

fn float_rows<const K: usize>(x: &[[f32; K]]) -> RowsIn {
    RowsIn {
        f32: x.as_ptr().cast(),
        q: std::ptr::null(),
        scales: std::ptr::null(),
        sums: std::ptr::null(),
    }
}
