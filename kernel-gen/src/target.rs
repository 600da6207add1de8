//! What CPU kernels are made for; GPU kernels have `cuda::Arch`.

/// A CPU instruction set level, from the most general to the most special.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Plain Rust, any machine.
    Portable,
    /// AVX2, FMA and F16C.
    X86_64V3,
    /// AVX-512 F, BW, CD, DQ, VL with VNNI and BF16.
    Avx512,
}

impl Target {
    pub const ALL: [Target; 3] = [Target::Portable, Target::X86_64V3, Target::Avx512];

    /// Name in symbols, plans and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Target::Portable => "portable",
            Target::X86_64V3 => "x86_64_v3",
            Target::Avx512 => "avx512",
        }
    }

    pub fn from_name(name: &str) -> Option<Target> {
        Target::ALL.into_iter().find(|target| target.name() == name)
    }

    /// Whether the machine that runs this has the instructions.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let v3 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512bf16");
            match self {
                Target::Portable => true,
                Target::X86_64V3 => v3,
                Target::Avx512 => v3 && avx512,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Target::Portable
        }
    }

    /// The best target of the machine that runs this.
    pub fn best() -> Target {
        let all = Target::ALL.into_iter().rev();
        all.into_iter().find(|target| target.is_available()).unwrap_or(Target::Portable)
    }

    /// float32 lanes of a vector register: also the columns of a packed weight tile.
    pub fn lanes(self) -> usize {
        match self {
            Target::Portable | Target::X86_64V3 => 8,
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
        }
    }
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
