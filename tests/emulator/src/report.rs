//! What a launch tells.

use std::fmt;

/// A rule that a kernel broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// An address outside every allocation, or outside shared memory.
    OutOfBounds,
    /// An address that is no multiple of the access's size.
    Misaligned,
    /// A write to memory that the kernel must not write.
    ReadOnly,
    /// A read of bytes that nothing wrote.
    Uninitialized,
    /// The data of an asynchronous copy, touched before its wait; or a copy that was never waited
    /// for.
    NotAwaited,
    /// Two accesses to the same bytes, one of them a write, without an order between them.
    Race,
    /// Memory of earlier kernels, touched before `grid_wait`.
    BeforeGridWait,
    /// Lanes of a warp at different places where all must come to one.
    Divergent,
    /// No thread can go on.
    Deadlock,
    /// A block barrier with wrong or different numbers of threads.
    Barrier,
    /// An mbarrier that is not used as it was initialized.
    Mbarrier,
    /// A launch that could not start.
    Launch,
}

/// In the order of the C++ side, whose 0 is "none".
const KINDS: [FaultKind; 12] = [
    FaultKind::OutOfBounds,
    FaultKind::Misaligned,
    FaultKind::ReadOnly,
    FaultKind::Uninitialized,
    FaultKind::NotAwaited,
    FaultKind::Race,
    FaultKind::BeforeGridWait,
    FaultKind::Divergent,
    FaultKind::Deadlock,
    FaultKind::Barrier,
    FaultKind::Mbarrier,
    FaultKind::Launch,
];

impl FaultKind {
    pub(crate) fn from_number(number: u32) -> Option<FaultKind> {
        KINDS.get((number as usize).checked_sub(1)?).copied()
    }
}

/// The first broken rule of a launch, which ended there.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: FaultKind,
    /// What happened, at which place of the source, in which kernel, block and thread.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

impl std::error::Error for Fault {}

/// Accesses to shared memory at one place of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedAccesses {
    pub file: String,
    pub line: u32,
    /// Passes through the 32 banks that they took.
    pub num_passes: u64,
    /// The same without bank conflicts.
    pub num_passes_min: u64,
}

/// What was counted in a launch without a fault.
#[derive(Clone, Debug)]
pub struct Report {
    pub shared: Vec<SharedAccesses>,
    /// Matrix instructions, of a warp each.
    pub num_mma: u64,
    /// A thread of the grid came to `grid_wait`.
    pub grid_waited: bool,
}

impl Report {
    /// Passes through the banks beyond those without conflicts, of all accesses.
    #[must_use]
    pub fn bank_conflicts(&self) -> u64 {
        self.shared.iter().map(|s| s.num_passes - s.num_passes_min).sum()
    }
}
