//! What CPU kernels are made for; GPU kernels have `cuda::Arch`.

/// A CPU instruction set level, from the most general to the most special of each architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Plain Rust, any machine.
    Portable,
    /// AVX2, FMA and F16C.
    X86_64V3,
    /// AVX-512 F, BW, CD, DQ, VL with VNNI and BF16.
    Avx512,
    /// aarch64, NEON with dot product.
    Neon,
}

impl Target {
    pub const ALL: [Target; 4] = [Target::Portable, Target::X86_64V3, Target::Avx512, Target::Neon];

    /// Name in symbols, plans and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Target::Portable => "portable",
            Target::X86_64V3 => "x86_64_v3",
            Target::Avx512 => "avx512",
            Target::Neon => "neon",
        }
    }

    pub fn from_name(name: &str) -> Option<Target> {
        Target::ALL.into_iter().find(|target| target.name() == name)
    }

    /// The architecture that has its instructions, by the compiler's name; `None`: any.
    pub fn arch(self) -> Option<&'static str> {
        match self {
            Target::Portable => None,
            Target::X86_64V3 | Target::Avx512 => Some("x86_64"),
            Target::Neon => Some("aarch64"),
        }
    }

    /// The targets that a program for `arch`, an architecture by the compiler's name, can have
    /// kernels for.
    pub fn of_arch(arch: &str) -> Vec<Target> {
        let fits = |target: &Target| target.arch().is_none_or(|own| own == arch);
        Target::ALL.into_iter().filter(fits).collect()
    }

    /// The targets that the program that runs this can have kernels for.
    pub fn of_this_arch() -> Vec<Target> {
        let arch = match (cfg!(target_arch = "x86_64"), cfg!(target_arch = "aarch64")) {
            (true, _) => "x86_64",
            (_, true) => "aarch64",
            _ => "",
        };
        Target::of_arch(arch)
    }

    /// Whether the machine that runs this has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Target::Portable => true,
            Target::X86_64V3 => has_v3(),
            Target::Avx512 => has_v3() && has_avx512(),
            Target::Neon => has_neon(),
        }
    }

    /// The best target of the machine that runs this.
    pub fn best() -> Target {
        let all = Target::ALL.into_iter().rev();
        all.into_iter().find(|target| target.is_available()).unwrap_or(Target::Portable)
    }

    /// float32 lanes of a vector: also the columns of a packed weight tile.
    pub fn lanes(self) -> usize {
        match self {
            Target::Portable | Target::X86_64V3 | Target::Neon => 8,
            Target::Avx512 => 16,
        }
    }

    /// The value of `#[target_feature(enable = …)]`, empty for the baseline.
    pub fn features(self) -> &'static str {
        match self {
            Target::Portable => "",
            Target::X86_64V3 => "avx,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt",
            Target::Avx512 => {
                "avx,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt,\
                 avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,avx512bf16"
            }
            Target::Neon => "neon,dotprod",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_v3() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_v3() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

/// NEON itself is part of every aarch64.
#[cfg(target_arch = "aarch64")]
fn has_neon() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

#[cfg(not(target_arch = "aarch64"))]
fn has_neon() -> bool {
    false
}

impl serde::Serialize for Target {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> serde::Deserialize<'de> for Target {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Target, D::Error> {
        let name = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Target::from_name(&name)
            .ok_or_else(|| serde::de::Error::custom(format!("no target {name:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_architecture_has_its_own_targets_alone() {
        let x86 = [Target::Portable, Target::X86_64V3, Target::Avx512];
        assert_eq!(Target::of_arch("x86_64"), x86);
        assert_eq!(Target::of_arch("aarch64"), [Target::Portable, Target::Neon]);
        assert_eq!(Target::of_arch("riscv64"), [Target::Portable]);
        assert!(Target::of_this_arch().contains(&Target::best()));
        for target in Target::ALL.into_iter().filter(|target| target.is_available()) {
            assert!(Target::of_this_arch().contains(&target), "{}", target.name());
        }
    }

    #[test]
    fn names_are_read_back() {
        for target in Target::ALL {
            assert_eq!(Target::from_name(target.name()), Some(target));
        }
        assert_eq!(Target::from_name("sse2"), None);
    }
}
