//! Measured choices: the candidates of a matmul are verified, and raced against the kernel that
//! serves where nothing was measured, on a CPU in [`cpu`], on a GPU in [`cuda`].

mod cases;
pub mod cpu;
pub mod cuda;
pub mod isolation;
mod known;
pub mod ladder;
mod ledger;
mod operands;
pub mod race;
pub mod report;

pub use cases::{Case, Cases, Cost};
pub use ledger::{Append, Begin, TakeVerdict, TuneProgress, TuneSummary, Verify};
