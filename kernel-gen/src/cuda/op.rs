//! What an op's file says about its kernels: the trait `Op`, and the plain values it answers with.

use std::fmt;

use super::arch::Arch;
use super::spec::Regime;
use crate::name::Words;

/// An op at fixed sizes.
pub trait Op: Copy + Ord + fmt::Debug {
    /// Name of the op, of its folder in `templates/` and of the namespace of its body.
    const NAME: &'static str;
    /// The row counts the op has kernels for.
    const REGIMES: &'static [Regime] = &[Regime::Any];
    /// The choices its kernels leave open.
    type Config: OpConfig;

    /// Sizes and types, as words of a symbol: `n960_k576_g64_bf16`.
    fn words(&self) -> String;

    /// Reads `words` back.
    fn parse(words: &mut Words<'_>) -> Option<Self>;

    /// What is used where nothing was measured.
    fn default_config(&self, regime: Regime, arch: Arch) -> Self::Config;

    /// All configurations worth a trial, feasible or not; the default is one of them.
    fn candidates(&self, regime: Regime, arch: Arch) -> Vec<Self::Config> {
        vec![self.default_config(regime, arch)]
    }

    /// Whether a kernel with this configuration exists, or the reason why not. Threads and shared
    /// memory of the instance are checked elsewhere.
    fn is_feasible(&self, config: &Self::Config, regime: Regime, arch: Arch) -> Result<(), String>;

    /// How the template becomes a kernel.
    fn instance(&self, config: &Self::Config, regime: Regime, arch: Arch) -> Instance;

    /// The grid for `rows` rows (`paged_attention`: items) on `num_sms` multiprocessors. It is
    /// one and the same for all row counts that a CUDA graph may be replayed for.
    fn launch(&self, config: &Self::Config, regime: Regime, rows: usize, num_sms: usize) -> Launch;

    /// What a launch for up to `rows` rows (`paged_attention`: items) needs besides its operands.
    fn workspace(&self, _config: &Self::Config, _regime: Regime, _rows: usize) -> Workspace {
        Workspace::default()
    }
}

/// A configuration: a few named numbers, or none.
pub trait OpConfig: Copy + Ord + fmt::Debug {
    /// Name in symbols and value of each number.
    fn fields(&self) -> Vec<(&'static str, usize)>;

    /// Reads what `fields` makes of it, `t256_s4`, or nothing.
    fn parse(words: &mut Words<'_>) -> Option<Self>;
}

/// Declares the configuration of an op: its numbers, each with its name in symbols.
macro_rules! config {
    ($(#[$attribute:meta])* pub struct Config {
        $($(#[$field_attribute:meta])* $field:ident: $short:literal,)*
    }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct Config {
            $($(#[$field_attribute])* pub $field: usize,)*
        }

        impl $crate::cuda::op::OpConfig for Config {
            fn fields(&self) -> Vec<(&'static str, usize)> {
                vec![$(($short, self.$field)),*]
            }

            fn parse(_words: &mut $crate::name::Words<'_>) -> Option<Config> {
                Some(Config { $($field: _words.size($short)?),* })
            }
        }
    };
}
pub(super) use config;

/// A member of the struct `Constants` that a body is instantiated with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Constant {
    /// `using Rows = F16;`
    Type { name: &'static str, value: &'static str },
    /// `static constexpr u32 HIDDEN = 576;`
    Size { name: &'static str, value: usize },
    /// `static constexpr bool QK_NORM = true;`
    Flag { name: &'static str, value: bool },
}

pub(super) fn type_of(name: &'static str, value: &'static str) -> Constant {
    Constant::Type { name, value }
}

pub(super) fn size(name: &'static str, value: usize) -> Constant {
    Constant::Size { name, value }
}

pub(super) fn flag(name: &'static str, value: bool) -> Constant {
    Constant::Flag { name, value }
}

impl fmt::Display for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Constant::Type { name, value } => write!(f, "using {name} = {value};"),
            Constant::Size { name, value } => write!(f, "static constexpr u32 {name} = {value};"),
            Constant::Flag { name, value } => write!(f, "static constexpr bool {name} = {value};"),
        }
    }
}

/// One kernel's instantiation of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// The body's struct, `Skinny` in `awq_gemm::Skinny`.
    pub kernel: &'static str,
    /// Its launch parameters, a struct of `templates/common/params.h`.
    pub params: &'static str,
    pub constants: Vec<Constant>,
    /// Threads of a block.
    pub threads: usize,
    /// Blocks that must fit on a multiprocessor; bounds the registers.
    pub min_blocks: usize,
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
}

/// How many blocks a launch has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    pub grid_x: usize,
    pub grid_y: usize,
}

/// Device memory that a launch needs besides its operands. Launches of one stream may share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workspace {
    /// float32 elements.
    pub floats: usize,
    /// 32-bit counters, zero before and after every launch.
    pub counters: usize,
}
