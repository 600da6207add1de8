//! Candidates with planted faults: each calls a sound kernel and then goes wrong in its own way.
//!
//! They go by the symbols and source hashes of variants that could be built, as a kernel does that
//! the compiler has spoilt.

use std::sync::LazyLock;

use bespoke::kernels::abi::{AwqGemmArgs, Share};
use bespoke::kernels::{Kernel, KernelFn, KernelTable};
use bespoke_kernel_gen::plan::{KernelVariant, candidates};
use bespoke_kernel_gen::spec::{ActivationType, KernelSpec, RowRegime};
use bespoke_kernel_gen::{compile, render};

use crate::default_kernels;

/// What is wrong with a planted kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: another name for the default kernel.
    None,
    /// One output of calls with [`WRONG_ROWS`] rows alone.
    Wrong,
    /// One output of every call, within what rounding allows.
    Rounding,
    /// A result that depends on the number of threads.
    Threads,
    /// A result that depends on what scratch memory held before.
    Scratch,
    /// A write behind the outputs.
    OutOfOutputs,
    /// A write behind its scratch memory.
    OutOfScratch,
    /// A write to address 0.
    NullWrite,
    Panic,
    Abort,
    /// No end, from the first call on.
    Hang,
}

impl Fault {
    pub const ALL: [Fault; 11] = [
        Fault::None,
        Fault::Wrong,
        Fault::Rounding,
        Fault::Threads,
        Fault::Scratch,
        Fault::OutOfOutputs,
        Fault::OutOfScratch,
        Fault::NullWrite,
        Fault::Panic,
        Fault::Abort,
        Fault::Hang,
    ];

    fn entry(self) -> Run {
        match self {
            Fault::None => sound(),
            Fault::Wrong => wrong,
            Fault::Rounding => rounding,
            Fault::Threads => threads,
            Fault::Scratch => scratch,
            Fault::OutOfOutputs => out_of_outputs,
            Fault::OutOfScratch => out_of_scratch,
            Fault::NullWrite => null_write,
            Fault::Panic => panic,
            Fault::Abort => abort,
            Fault::Hang => hang,
        }
    }
}

/// The row count at which [`Fault::Wrong`] is wrong.
pub const WRONG_ROWS: usize = 17;
/// What [`Fault::Hang`] says before it falls silent.
pub const HANGING: &str = "hanging";

type Run = unsafe fn(&AwqGemmArgs, Share);

/// The default kernels and one of each fault, for the matmul of [`spec`].
pub fn kernels() -> KernelTable {
    table(&Fault::ALL)
}

/// The default kernels and some with these faults.
pub fn table(faults: &[Fault]) -> KernelTable {
    let table = default_kernels();
    let planted = faults
        .iter()
        .map(|fault| Kernel { run: KernelFn::AwqGemm(fault.entry()), ..*PLANTED[*fault as usize] });
    let kernels: Vec<Kernel> = table.kernels.iter().copied().chain(planted).collect();
    KernelTable { kernels: kernels.leak(), is_tuner: true, ..table }
}

/// The symbol of the kernel with this fault.
pub fn symbol(fault: Fault) -> &'static str {
    PLANTED[fault as usize].symbol
}

/// What the planted kernels compute.
pub fn spec() -> KernelSpec {
    default_kernel().spec
}

/// The default kernel for a few rows of the first quantized matmul. Its rows are float: levels of
/// int8 would hide small errors from the ops behind it.
pub fn default_kernel() -> &'static Kernel {
    let mut kernels = default_kernels().kernels.iter();
    let found = kernels.find(|kernel| {
        let is_float =
            matches!(kernel.spec, KernelSpec::AwqGemm { activation: ActivationType::Float, .. });
        is_float && kernel.regime == RowRegime::Few
    });
    found.expect("the tiny model is quantized")
}

/// By fault: what a candidate of the generator says of itself, with the default kernel's entry.
static PLANTED: LazyLock<Vec<&'static Kernel>> = LazyLock::new(|| {
    let default = default_kernel();
    let variants = candidates(&default.spec, default.target);
    let fits = |variant: &KernelVariant| {
        let is_larger = variant.scratch_bytes() >= default.scratch_bytes;
        variant.regime != RowRegime::One
            && !variant.is_default()
            && variant.config.cols == default.cols
            && is_larger
    };
    let kernel = |variant: KernelVariant| -> &'static Kernel {
        Box::leak(Box::new(Kernel {
            symbol: variant.symbol().leak(),
            regime: variant.regime,
            rows: variant.config.rows,
            scratch_bytes: variant.scratch_bytes(),
            source_hash: compile::hash(&render::render(&variant)).leak(),
            ..*default
        }))
    };
    let all: Vec<&Kernel> = variants.into_iter().filter(fits).map(kernel).collect();
    assert!(all.len() >= Fault::ALL.len(), "{} candidates", all.len());
    all
});

/// The entry of the default kernel.
fn sound() -> Run {
    static SOUND: LazyLock<Run> = LazyLock::new(|| match default_kernel().run {
        KernelFn::AwqGemm(run) => run,
        _ => unreachable!("the default kernel is a quantized matmul"),
    });
    *SOUND
}

/// Changes the first output, which the first share computes, by its 2¹⁷th part.
///
/// # Safety
/// `args` has outputs.
unsafe fn spoil(args: &AwqGemmArgs) {
    // SAFETY: as the caller vouches.
    unsafe { *args.out.cast::<u32>() ^= 1 << 6 }
}

unsafe fn wrong(args: &AwqGemmArgs, share: Share) {
    // SAFETY: as for any kernel.
    unsafe { sound()(args, share) };
    if args.rows == WRONG_ROWS && share.idx == 0 {
        // SAFETY: there is a row.
        unsafe { spoil(args) }
    }
}

unsafe fn rounding(args: &AwqGemmArgs, share: Share) {
    // SAFETY: as for any kernel.
    unsafe { sound()(args, share) };
    if share.idx == 0 {
        // SAFETY: there is a row.
        unsafe { spoil(args) }
    }
}

unsafe fn threads(args: &AwqGemmArgs, share: Share) {
    // SAFETY: as for any kernel.
    unsafe { sound()(args, share) };
    if share.count == 3 && share.idx == 0 {
        // SAFETY: there is a row.
        unsafe { spoil(args) }
    }
}

unsafe fn scratch(args: &AwqGemmArgs, share: Share) {
    // SAFETY: scratch memory is aligned, and of at least one cache line.
    let before = unsafe { *share.scratch.cast::<f32>() };
    // SAFETY: as for any kernel.
    unsafe { sound()(args, share) };
    if share.idx == 0 {
        // SAFETY: there is a row. A sum that was begun with what was in its memory.
        unsafe { *args.out += before }
    }
}

unsafe fn out_of_outputs(args: &AwqGemmArgs, share: Share) {
    // SAFETY: as for any kernel.
    unsafe { sound()(args, share) };
    let KernelSpec::AwqGemm { n, .. } = spec() else { return };
    if share.idx == 0 {
        // SAFETY: this is wrong, and what the canaries behind the outputs are for.
        unsafe { *args.out.add(args.rows * n) = 0.0 }
    }
}

unsafe fn out_of_scratch(args: &AwqGemmArgs, share: Share) {
    let len = PLANTED[Fault::OutOfScratch as usize].scratch_bytes;
    // SAFETY: as for any kernel, but for what lies behind its scratch memory.
    unsafe {
        *share.scratch.add(len) = 0x5a;
        sound()(args, share);
    }
}

unsafe fn null_write(_: &AwqGemmArgs, _: Share) {
    // SAFETY: there is none; the process ends here.
    unsafe { std::ptr::null_mut::<u32>().write_volatile(1) }
}

unsafe fn panic(_: &AwqGemmArgs, share: Share) {
    assert!(share.idx + 1 < share.count, "a planted panic");
}

unsafe fn abort(_: &AwqGemmArgs, _: Share) {
    std::process::abort()
}

#[allow(clippy::print_stderr, reason = "a test waits for it")]
unsafe fn hang(_: &AwqGemmArgs, _: Share) {
    eprintln!("{HANGING}");
    loop {
        std::thread::park();
    }
}
