//! `Spec`, an op of any kind at fixed sizes, and `Variant`, one kernel: spec, row regime,
//! architecture and configuration, with its symbol.
//!
//! ```text
//! awq_gemm_n960_k576_g64_bf16_upto8__sm_90a
//! op       sizes, formats     regime target   (Any has no regime; a configuration other than the
//! awq_gemm_n960_k576_g64_bf16_upto8_c_w4_s6__sm_90a                default is written out after c)
//! ```

use std::fmt;

use super::arch::Arch;
use super::op::{Instance, Launch, Op, OpConfig, Workspace};
use super::spec::Regime;
use super::{AwqGemm, Embed, Gemm, PagedAttention, RmsNorm, Rope, Sample, SiluAndMul};
use crate::name::Words;

/// An op with the choices that make it one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kernel<O: Op> {
    pub op: O,
    pub config: O::Config,
}

macro_rules! ops {
    ($($Op:ident),*) => {
        /// An op at fixed sizes. The sizes become constants of the generated kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Spec {
            $($Op($Op),)*
        }

        /// A [`Kernel`] of any op.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Choice {
            $($Op(Kernel<$Op>),)*
        }

        /// Runs the same expression on whichever op it is.
        macro_rules! for_spec {
            ($spec:expr, $op:ident => $body:expr) => {
                match $spec { $(Spec::$Op($op) => $body,)* }
            };
        }

        macro_rules! for_choice {
            ($choice:expr, $kernel:ident => $body:expr) => {
                match $choice { $(Choice::$Op($kernel) => $body,)* }
            };
        }

        impl Spec {
            /// The choice of the default configuration.
            pub fn default_choice(&self, regime: Regime, arch: Arch) -> Choice {
                match *self {
                    $(Spec::$Op(op) => {
                        let config = op.default_config(regime, arch);
                        Choice::$Op(Kernel { op, config })
                    })*
                }
            }

            fn candidate_choices(&self, regime: Regime, arch: Arch) -> Vec<Choice> {
                match *self {
                    $(Spec::$Op(op) => {
                        let configs = op.candidates(regime, arch).into_iter();
                        configs.map(|config| Choice::$Op(Kernel { op, config })).collect()
                    })*
                }
            }

            /// Reads op, sizes and formats of a symbol.
            fn parse(name: &str) -> Option<(Spec, Words<'_>)> {
                $(if let Some(rest) = name.strip_prefix($Op::NAME)
                    && let Some(rest) = rest.strip_prefix('_')
                {
                    let mut words = Words::new(rest);
                    return $Op::parse(&mut words).map(|op| (Spec::$Op(op), words));
                })*
                None
            }

            fn parse_config(&self, words: &mut Words<'_>) -> Option<Choice> {
                match *self {
                    $(Spec::$Op(op) => {
                        let config = <$Op as Op>::Config::parse(words)?;
                        Some(Choice::$Op(Kernel { op, config }))
                    })*
                }
            }
        }

        impl Choice {
            fn spec(&self) -> Spec {
                match *self { $(Choice::$Op(kernel) => Spec::$Op(kernel.op),)* }
            }
        }

        $(impl From<$Op> for Spec {
            fn from(op: $Op) -> Spec {
                Spec::$Op(op)
            }
        })*
    };
}
ops!(AwqGemm, Embed, Gemm, PagedAttention, RmsNorm, Rope, Sample, SiluAndMul);

impl Spec {
    /// The op's name in templates, symbols and tables.
    pub fn op(&self) -> &'static str {
        fn name<O: Op>(_: &O) -> &'static str {
            O::NAME
        }
        for_spec!(self, op => name(op))
    }

    /// The row counts the op has kernels for.
    pub fn regimes(&self) -> &'static [Regime] {
        fn regimes<O: Op>(_: &O) -> &'static [Regime] {
            O::REGIMES
        }
        for_spec!(self, op => regimes(op))
    }

    /// With what the symbols of its kernels begin: `awq_gemm_n960_k576_g64_bf16`.
    pub fn name(&self) -> String {
        format!("{}_{}", self.op(), self.words())
    }

    fn words(&self) -> String {
        for_spec!(self, op => op.words())
    }

    /// The kernel with the default configuration.
    pub fn variant(&self, regime: Regime, arch: Arch) -> Variant {
        Variant { choice: self.default_choice(regime, arch), regime, arch }
    }

    /// All feasible kernels worth a trial.
    pub fn candidates(&self, regime: Regime, arch: Arch) -> Vec<Variant> {
        let choices = self.candidate_choices(regime, arch).into_iter();
        let variants = choices.map(|choice| Variant { choice, regime, arch });
        variants.filter(|variant| variant.is_feasible().is_ok()).collect()
    }
}

/// One kernel: what it computes, for how many rows, on which GPUs, with which choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Variant {
    pub choice: Choice,
    pub regime: Regime,
    pub arch: Arch,
}

/// Threads of a block at most, on every architecture.
const THREADS_MAX: usize = 1024;

impl Variant {
    pub fn spec(&self) -> Spec {
        self.choice.spec()
    }

    pub fn symbol(&self) -> String {
        let mut name = self.spec().name();
        if self.regime != Regime::Any {
            name.push('_');
            name.push_str(&self.regime.name());
        }
        if self.provenance() != "default" {
            name.push_str("_c");
            for (short, value) in self.fields() {
                name.push_str(&format!("_{short}{value}"));
            }
        }
        format!("{name}__{}", self.arch.name())
    }

    /// The variant a symbol names; `None` for anything [`Variant::symbol`] does not write.
    pub fn parse(symbol: &str) -> Option<Variant> {
        let (name, arch) = symbol.rsplit_once("__")?;
        let arch = Arch::from_name(arch)?;
        let (spec, mut words) = Spec::parse(name)?;
        let regime = parse_regime(&mut words);
        let choice = match words.take("c") {
            true => spec.parse_config(&mut words)?,
            false if spec.regimes().contains(&regime) => spec.default_choice(regime, arch),
            false => return None,
        };
        let variant = Variant { choice, regime, arch };
        // NOTE: leftover words, leading zeros and the like do not survive the way back.
        (words.is_empty() && variant.symbol() == symbol).then_some(variant)
    }

    /// Names and values of the configuration's numbers.
    pub fn fields(&self) -> Vec<(&'static str, usize)> {
        for_choice!(&self.choice, kernel => kernel.config.fields())
    }

    /// Where the choice of the configuration comes from.
    pub fn provenance(&self) -> &'static str {
        match self.spec().default_choice(self.regime, self.arch) == self.choice {
            true => "default",
            false => "given",
        }
    }

    /// Kernels of one class give the same bits for a row, whatever the row count.
    pub fn reduction_class(&self) -> String {
        format!("{}.{}", self.spec().op(), self.arch.name())
    }

    /// Whether the kernel exists, or the reason why not.
    pub fn is_feasible(&self) -> Result<(), String> {
        let Variant { choice, regime, arch } = self;
        let spec = self.spec();
        if !spec.regimes().contains(regime) {
            let regime = regime.name();
            return Err(format!("{} has no kernel for row regime {regime}", spec.op()));
        }
        for_choice!(choice, kernel => kernel.op.is_feasible(&kernel.config, *regime, *arch))?;
        check_limits(&self.instance(), *arch)
    }

    /// How the template becomes this kernel.
    pub fn instance(&self) -> Instance {
        let Variant { choice, regime, arch } = self;
        for_choice!(choice, kernel => kernel.op.instance(&kernel.config, *regime, *arch))
    }

    /// The grid for `rows` rows (`paged_attention`: items) on `num_sms` multiprocessors.
    pub fn launch(&self, rows: usize, num_sms: usize) -> Launch {
        let regime = self.regime;
        for_choice!(&self.choice, kernel => kernel.op.launch(&kernel.config, regime, rows, num_sms))
    }

    /// What a launch for up to `rows` rows (`paged_attention`: items) needs besides its operands.
    pub fn workspace(&self, rows: usize) -> Workspace {
        for_choice!(&self.choice, kernel => kernel.op.workspace(&kernel.config, self.regime, rows))
    }
}

/// A line of the printed plan.
impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let instance = self.instance();
        write!(f, "{} threads={}", self.symbol(), instance.threads)?;
        for (short, value) in self.fields().iter().filter(|(short, _)| *short != "t") {
            write!(f, " {short}={value}")?;
        }
        if instance.shared_bytes > 0 {
            write!(f, " shared={}", instance.shared_bytes)?;
        }
        write!(f, " class={} from={}", self.reduction_class(), self.provenance())
    }
}

fn parse_regime(words: &mut Words<'_>) -> Regime {
    let all = [Regime::Decode, Regime::Prefill].into_iter().chain(Regime::MATMUL);
    all.into_iter().find(|regime| words.take(&regime.name())).unwrap_or(Regime::Any)
}

fn check_limits(instance: &Instance, arch: Arch) -> Result<(), String> {
    let Instance { threads, min_blocks, shared_bytes, .. } = *instance;
    if threads == 0 || threads % 32 != 0 || threads > THREADS_MAX {
        return Err(format!("{threads} threads a block; multiples of 32 up to 1024 are possible"));
    }
    if min_blocks == 0 || min_blocks * threads > arch.threads_max() {
        return Err(format!(
            "{min_blocks} blocks of {threads} threads on a multiprocessor, {} holds {} threads",
            arch.name(),
            arch.threads_max()
        ));
    }
    if shared_bytes > arch.shared_bytes_max() {
        return Err(format!(
            "{shared_bytes} bytes of shared memory, {} has {} for a block",
            arch.name(),
            arch.shared_bytes_max()
        ));
    }
    if min_blocks * (shared_bytes + 1024) > arch.shared_bytes_per_sm() {
        return Err(format!(
            "{min_blocks} blocks of {shared_bytes} bytes of shared memory, and 1024 for the \
             system, {} has {}",
            arch.name(),
            arch.shared_bytes_per_sm()
        ));
    }
    Ok(())
}
