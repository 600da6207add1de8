//! Runs CUDA kernels on the CPU: the same sources, compiled by g++ against another `ptx.cuh`.
//!
//! Each CUDA thread is a fiber. They run in an order drawn from a seed, and every rule that a
//! device leaves to the programmer is checked:
//!
//! - Accesses stay inside their allocation, are aligned, and read only what was written.
//! - Asynchronous copies arrive when they are waited for, never before; until then their
//!   destination is NaN and must not be touched.
//! - Two accesses to a word, one of them a write, are ordered by a barrier, an mbarrier, a
//!   `warp_sync`, or (between blocks) by a fence and an atomic.
//! - Nothing that earlier kernels wrote is touched before `grid_wait`, except constants.
//! - Collectives are reached by all lanes of a warp, barriers by all their threads.
//!
//! A broken rule is a [`Fault`] that names the place in the source; a launch that breaks none gives
//! a [`Report`] with the bank conflicts of each access to shared memory.
//!
//! Sums of `mma` are added in float32 in the order of k, one rounding each; a device's are more
//! precise inside one instruction and round otherwise. Compare by a tolerance.
//!
//! What it cannot show: timing, caches, the order of accesses in the async proxy, and races between
//! accesses that a compiler reorders.

mod compiler;
mod machine;
mod report;

pub use compiler::{CompileError, Library, Source, compile};
pub use machine::{Access, Emulator, Launch};
pub use report::{Fault, FaultKind, Report, SharedAccesses};
