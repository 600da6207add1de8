//! The generated kernels of matmuls and of attention on slices, without an engine.
//!
//! [`bind!`](crate::bind) makes a type for each op of a model, such as `model::Qkv`: a
//! [`DenseMatmul`] or an [`AwqMatmul`], and `model::Attention`. Rows are arrays of the model's
//! sizes, so that rows of another size do not compile; how many there are is checked when they are
//! given. `slice::as_chunks` makes such rows of a flat slice.
//!
//! ```ignore
//! bespoke::bind! { mod model; }
//!
//! let mut runner = Runner::<model::Kernels>::new(None)?;
//! let qkv = model::Qkv::new(&runner, &weights, None)?;
//! qkv.run(&mut runner, &rows, &mut outputs)?;
//! ```

mod attention;
mod matmul;

use std::marker::PhantomData;

use bespoke_kernel_gen::target::Target;

use super::kernels::{Lookup, Run};
use super::memory::Memory;
use super::ops::run_team;
use super::team::Team;
use super::{available_threads, best_target, device_key, start_team};
use crate::binding::Binding;
use crate::error::Error;
use crate::kernels::KernelTable;
use crate::kernels::choice::{Choice, DeviceChoice};

pub use attention::{Attention, AttentionOptions, KvCache, Span};
pub use matmul::{AwqMatmul, AwqWeights, DenseMatmul};

/// The threads that run the kernels of a model, and their scratch memory.
pub struct Runner<B> {
    table: KernelTable,
    target: Target,
    device: Option<String>,
    team: Team,
    /// One per thread.
    scratch: Vec<Memory>,
    scratch_bytes: usize,
    binding: PhantomData<fn() -> B>,
}

/// What a runner must have for kernels that were looked up with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Needs {
    target: Target,
    scratch_bytes: usize,
}

impl<B: Binding> Runner<B> {
    /// On `num_threads` threads, the caller's among them; `None`: as many as the process may use.
    /// Kernels are those for the best instruction set that this machine and the model's build have.
    ///
    /// # Errors
    /// No threads, more than 1024, or none that can be started; no memory.
    pub fn new(num_threads: Option<usize>) -> Result<Runner<B>, Error> {
        let table = B::kernels();
        let target = best_target(&table).unwrap_or(Target::Portable);
        let num_threads = num_threads.unwrap_or_else(available_threads);
        let team = start_team(num_threads)?;
        let of_target = table.kernels.iter().filter(|kernel| kernel.target == target);
        let scratch_bytes = of_target.map(|kernel| kernel.scratch_bytes).max().unwrap_or(0).max(64);
        let scratch = (0..num_threads).map(|_| Memory::new(scratch_bytes, "kernel scratch"));
        Ok(Runner {
            table,
            target,
            device: device_key(DeviceChoice::This, target, num_threads),
            team,
            scratch: scratch.collect::<Result<_, _>>()?,
            scratch_bytes,
            binding: PhantomData,
        })
    }

    /// The instruction set of the kernels.
    pub fn target(&self) -> Target {
        self.target
    }

    pub fn num_threads(&self) -> usize {
        self.team.len()
    }

    /// Looks kernels up; an error names those that the table lacks.
    fn find<T>(
        &self,
        find: impl FnOnce(&mut Lookup<'_>) -> Option<T>,
    ) -> Result<(T, Needs), Error> {
        let Runner { table, target, device, .. } = self;
        let choice = Choice { table, target: *target, device: device.as_deref() };
        let mut lookup = Lookup::new(choice);
        let found = find(&mut lookup);
        lookup.finish(&B::shape())?;
        let needs = Needs { target: *target, scratch_bytes: lookup.scratch_bytes };
        match found {
            Some(found) => Ok((found, needs)),
            None => Err(Error::Unsupported(format!(
                "the model {} has no such op; build its kernels anew",
                B::shape().name
            ))),
        }
    }

    /// Runs a kernel on all threads.
    ///
    /// # Safety
    /// `args` as the kernel documents them; `needs` are the kernel's.
    unsafe fn run<A>(&mut self, needs: Needs, run: Run<A>, args: &A) {
        assert!(
            needs.target == self.target && needs.scratch_bytes <= self.scratch_bytes,
            "the kernels were looked up with a runner of another table"
        );
        // SAFETY: as the caller promises; the machine has the target's instructions, and scratch is
        // as large as the kernel wants it.
        unsafe { run_team(&mut self.team, &mut self.scratch, 0, run, args) }
    }
}

/// Refuses outputs that are not as many as the rows they are made from.
fn check_rows(num_rows: usize, num_outputs: usize) -> Result<(), Error> {
    match num_rows == num_outputs {
        true => Ok(()),
        false => Err(Error::Request(format!(
            "{num_rows} rows and room for {num_outputs} outputs; give one output for each row"
        ))),
    }
}
