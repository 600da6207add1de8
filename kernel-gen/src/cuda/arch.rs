//! GPU architectures: what a kernel may use, and which devices run its machine code.

/// An architecture that kernels are compiled for, oldest first.
///
/// The `a` of sm_90a and sm_100a stands for instructions that only this architecture has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// A100.
    Sm80,
    /// A10, A40, RTX 30.
    Sm86,
    /// L4, L40, RTX 40.
    Sm89,
    /// H100, H200.
    Sm90a,
    /// B200.
    Sm100a,
    /// RTX 50, RTX PRO Blackwell.
    Sm120,
}

impl Arch {
    pub const ALL: [Arch; 6] =
        [Arch::Sm80, Arch::Sm86, Arch::Sm89, Arch::Sm90a, Arch::Sm100a, Arch::Sm120];

    /// 32-bit registers of a multiprocessor, of all of these.
    pub const REGISTERS: usize = 64 << 10;

    /// Name in symbols, plans, JSON and for the compiler.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm86 => "sm_86",
            Arch::Sm89 => "sm_89",
            Arch::Sm90a => "sm_90a",
            Arch::Sm100a => "sm_100a",
            Arch::Sm120 => "sm_120",
        }
    }

    pub fn from_name(name: &str) -> Option<Arch> {
        Arch::ALL.into_iter().find(|arch| arch.name() == name)
    }

    /// Major and minor compute capability.
    pub fn capability(self) -> (u32, u32) {
        match self {
            Arch::Sm80 => (8, 0),
            Arch::Sm86 => (8, 6),
            Arch::Sm89 => (8, 9),
            Arch::Sm90a => (9, 0),
            Arch::Sm100a => (10, 0),
            Arch::Sm120 => (12, 0),
        }
    }

    /// Whether a device of this compute capability runs kernels made for the architecture: those
    /// of the same major version and no older minor one, but for sm_80, whose kernels may take more
    /// shared memory than its successors have, and sm_90a and sm_100a, which run nowhere else.
    pub fn runs_on(self, capability: (u32, u32)) -> bool {
        let (major, minor) = self.capability();
        match self {
            Arch::Sm80 | Arch::Sm90a | Arch::Sm100a => capability == (major, minor),
            Arch::Sm86 | Arch::Sm89 | Arch::Sm120 => capability.0 == major && capability.1 >= minor,
        }
    }

    /// The latest of `archs` that a device of this compute capability runs.
    pub fn best_for(capability: (u32, u32), archs: &[Arch]) -> Option<Arch> {
        archs.iter().copied().filter(|arch| arch.runs_on(capability)).max()
    }

    /// Shared memory that a block may have.
    pub fn shared_bytes_max(self) -> usize {
        let kibibytes = match self {
            Arch::Sm80 => 163,
            Arch::Sm90a | Arch::Sm100a => 227,
            Arch::Sm86 | Arch::Sm89 | Arch::Sm120 => 99,
        };
        kibibytes << 10
    }

    /// Shared memory of a multiprocessor, of which every block takes 1 KiB for the system.
    pub fn shared_bytes_per_sm(self) -> usize {
        self.shared_bytes_max() + 1024
    }

    /// Threads that a multiprocessor holds.
    pub fn threads_max(self) -> usize {
        match self {
            Arch::Sm80 | Arch::Sm90a | Arch::Sm100a => 2048,
            Arch::Sm86 | Arch::Sm89 | Arch::Sm120 => 1536,
        }
    }

    /// Whether `cp.async.bulk` and transactions on mbarriers exist.
    pub fn has_bulk_copies(self) -> bool {
        self >= Arch::Sm90a
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_runs_where_it_can() {
        let best = |capability| Arch::best_for(capability, &Arch::ALL).map(Arch::name);
        assert_eq!(best((8, 0)), Some("sm_80"));
        assert_eq!(best((8, 6)), Some("sm_86"));
        assert_eq!(best((8, 7)), Some("sm_86"));
        assert_eq!(best((8, 9)), Some("sm_89"));
        assert_eq!(best((9, 0)), Some("sm_90a"));
        assert_eq!(best((10, 0)), Some("sm_100a"));
        assert_eq!(best((10, 3)), None);
        assert_eq!(best((12, 1)), Some("sm_120"));
        assert_eq!(best((7, 5)), None);
        assert_eq!(Arch::best_for((8, 9), &[Arch::Sm80, Arch::Sm86]), Some(Arch::Sm86));
        assert_eq!(Arch::best_for((8, 6), &[Arch::Sm80]), None);
    }

    #[test]
    fn names_are_read_back() {
        for arch in Arch::ALL {
            assert_eq!(Arch::from_name(arch.name()), Some(arch));
        }
        assert_eq!(Arch::from_name("sm_90"), None);
    }
}
