//! Devices: what timings depend on, and how near two of them are.

use serde::{Deserialize, Serialize};

use crate::target::Target;

/// A machine that kernels are measured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Device {
    Cpu(CpuDevice),
    Cuda(CudaDevice),
}

/// A CPU, its caches, and the threads that share the work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuDevice {
    pub target: Target,
    /// `amd`, `intel`, `arm` or another short word; `unknown` where the system does not say.
    pub vendor: String,
    /// On aarch64 the part, which names the core's design.
    pub family: u32,
    /// On aarch64 the variant, the first number of the design's revision.
    pub model: u32,
    /// Of one core; 0 where unknown.
    pub l2_kib: usize,
    pub l3_kib: usize,
    pub num_threads: usize,
    /// As sold; information only.
    pub name: String,
}

/// A GPU, or the part of one that a process has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaDevice {
    /// `sm_90a`
    pub arch: String,
    pub num_sms: usize,
    pub memory_gib: usize,
    /// As sold; information only.
    pub name: String,
}

/// How near a machine is to the one that a choice was made on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Match {
    /// All that timings depend on is equal.
    Exact,
    /// Same instruction set and CPU family; other caches or threads.
    Family,
}

impl Device {
    /// Short, readable and stable: `avx512-amd-25-17-l2-1024-l3-32768-t2`,
    /// `sm_90a-sms-132-mem-80`. The name as sold does not enter.
    pub fn key(&self) -> String {
        match self {
            Device::Cpu(device) => device.key(),
            Device::Cuda(device) => device.key(),
        }
    }

    /// Name of the target or architecture.
    pub fn target(&self) -> &str {
        match self {
            Device::Cpu(device) => device.target.name(),
            Device::Cuda(device) => &device.arch,
        }
    }
}

impl CpuDevice {
    pub fn key(&self) -> String {
        let CpuDevice { target, vendor, family, model, l2_kib, l3_kib, num_threads, .. } = self;
        let target = target.name();
        format!("{target}-{vendor}-{family}-{model}-l2-{l2_kib}-l3-{l3_kib}-t{num_threads}")
    }

    /// The device of a key, without its name.
    pub fn parse_key(key: &str) -> Option<CpuDevice> {
        let words: Vec<&str> = key.split('-').collect();
        let [target, vendor, family, model, "l2", l2, "l3", l3, threads] = words[..] else {
            return None;
        };
        let device = CpuDevice {
            target: Target::from_name(target)?,
            vendor: vendor.to_string(),
            family: family.parse().ok()?,
            model: model.parse().ok()?,
            l2_kib: l2.parse().ok()?,
            l3_kib: l3.parse().ok()?,
            num_threads: threads.strip_prefix('t')?.parse().ok()?,
            name: String::new(),
        };
        (device.key() == key).then_some(device)
    }

    /// How well a choice made on the device of `key` suits this one; `None`: not at all.
    pub fn matches(&self, key: &str) -> Option<Match> {
        if self.key() == key {
            return Some(Match::Exact);
        }
        let other = CpuDevice::parse_key(key)?;
        let is_family =
            (self.target, &self.vendor, self.family) == (other.target, &other.vendor, other.family);
        is_family.then_some(Match::Family)
    }
}

/// Sizes of memory are told apart by so many GiB: what of it a driver keeps for itself differs.
const MEMORY_STEP_GIB: usize = 4;

impl CudaDevice {
    /// A device of so many bytes of memory, as the driver tells them.
    pub fn new(arch: &str, num_sms: usize, memory_bytes: usize, name: &str) -> CudaDevice {
        let step = MEMORY_STEP_GIB << 30;
        let memory_gib = ((memory_bytes + step / 2) / step).max(1) * MEMORY_STEP_GIB;
        CudaDevice { arch: arch.to_string(), num_sms, memory_gib, name: name.to_string() }
    }

    pub fn key(&self) -> String {
        let CudaDevice { arch, num_sms, memory_gib, .. } = self;
        format!("{arch}-sms-{num_sms}-mem-{memory_gib}")
    }

    /// The device of a key, without its name.
    pub fn parse_key(key: &str) -> Option<CudaDevice> {
        let words: Vec<&str> = key.split('-').collect();
        let [arch, "sms", num_sms, "mem", memory_gib] = words[..] else { return None };
        let device = CudaDevice {
            arch: arch.to_string(),
            num_sms: num_sms.parse().ok()?,
            memory_gib: memory_gib.parse().ok()?,
            name: String::new(),
        };
        (device.key() == key).then_some(device)
    }
}

/// This machine with its best target, for work by `num_threads` threads.
///
/// What the system does not tell is `unknown` or 0, so that the key is still a stable one.
pub fn this_cpu(num_threads: usize) -> CpuDevice {
    let mut device = match std::fs::read_to_string("/proc/cpuinfo") {
        Ok(text) => from_cpuinfo(&text),
        Err(_) => from_cpuid(),
    };
    device.target = Target::best();
    device.num_threads = num_threads;
    (device.l2_kib, device.l3_kib) = (cache_kib(2), cache_kib(3));
    device
}

/// What Linux says of the first processor.
fn from_cpuinfo(text: &str) -> CpuDevice {
    let value = |name: &str| {
        let line = text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim())
        });
        line.unwrap_or_default()
    };
    let implementer = value("CPU implementer");
    let (vendor, family, model) = match implementer.is_empty() {
        true => (value("vendor_id"), value("cpu family"), value("model")),
        false => (implementer, value("CPU part"), value("CPU variant")),
    };
    CpuDevice {
        target: Target::Portable,
        vendor: short_vendor(vendor),
        family: parse_number(family),
        model: parse_number(model),
        l2_kib: 0,
        l3_kib: 0,
        num_threads: 1,
        name: value("model name").to_string(),
    }
}

/// A decimal number, or a hexadecimal one after `0x`; 0 for anything else.
fn parse_number(text: &str) -> u32 {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_default()
}

/// What the processor says of itself, for programs that see no /proc. They get kernels that were
/// chosen for its family.
#[cfg(target_arch = "x86_64")]
fn from_cpuid() -> CpuDevice {
    let cpuid = raw_cpuid::CpuId::new();
    let (vendor, version) = (cpuid.get_vendor_info(), cpuid.get_feature_info());
    CpuDevice {
        vendor: short_vendor(vendor.as_ref().map_or("", |vendor| vendor.as_str())),
        family: version.as_ref().map_or(0, |version| version.family_id().into()),
        model: version.as_ref().map_or(0, |version| version.model_id().into()),
        ..from_cpuinfo("")
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn from_cpuid() -> CpuDevice {
    from_cpuinfo("")
}

fn short_vendor(vendor: &str) -> String {
    match vendor {
        "AuthenticAMD" => "amd".to_string(),
        "GenuineIntel" => "intel".to_string(),
        "0x41" => "arm".to_string(),
        "0x46" => "fujitsu".to_string(),
        "0x48" => "hisilicon".to_string(),
        "0x4e" => "nvidia".to_string(),
        "0x51" => "qualcomm".to_string(),
        "0x61" => "apple".to_string(),
        "0x6d" => "microsoft".to_string(),
        "0xc0" => "ampere".to_string(),
        _ => {
            let letters = vendor.chars().filter(char::is_ascii_alphanumeric).take(16);
            let word = letters.collect::<String>().to_ascii_lowercase();
            if word.is_empty() { "unknown".to_string() } else { word }
        }
    }
}

/// Size of the first processor's cache of a level, as Linux lists it.
fn cache_kib(level: usize) -> usize {
    let folder = std::path::Path::new("/sys/devices/system/cpu/cpu0/cache");
    let read = |idx: usize, name: &str| {
        let text = std::fs::read_to_string(folder.join(format!("index{idx}/{name}")));
        text.map(|text| text.trim().to_string()).unwrap_or_default()
    };
    let found = (0..8).find(|idx| {
        read(*idx, "level") == level.to_string() && read(*idx, "type") != "Instruction"
    });
    found.and_then(|idx| parse_kib(&read(idx, "size"))).unwrap_or_default()
}

/// `1024K`, `32M`
fn parse_kib(text: &str) -> Option<usize> {
    match text.strip_suffix('M') {
        Some(mib) => mib.parse::<usize>().ok()?.checked_mul(1024),
        None => text.strip_suffix('K')?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPUINFO: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n\
                           model\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n\
                           model\t\t: 18\n";

    fn zen4() -> CpuDevice {
        CpuDevice {
            target: Target::Avx512,
            l2_kib: 1024,
            l3_kib: 32768,
            num_threads: 2,
            ..from_cpuinfo(CPUINFO)
        }
    }

    #[test]
    fn keys_are_read_back() {
        let device = zen4();
        assert_eq!(device.key(), "avx512-amd-25-17-l2-1024-l3-32768-t2");
        let read = CpuDevice::parse_key(&device.key()).unwrap();
        assert_eq!(CpuDevice { name: device.name.clone(), ..read }, device);
        for wrong in ["", "avx512", "avx512-amd-25-17-l2-1024-l3-32768-t02", "sm_90a-sms-1-mem-2"] {
            assert_eq!(CpuDevice::parse_key(wrong), None, "{wrong}");
        }
        let unnamed = from_cpuinfo("");
        assert_eq!(unnamed.key(), "portable-unknown-0-0-l2-0-l3-0-t1");
        let here = this_cpu(3);
        assert!(CpuDevice::parse_key(&here.key()).is_some_and(|read| read.num_threads == 3));
    }

    #[test]
    fn aarch64_names_its_cores_by_implementer_part_and_variant() {
        let text = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\n\
                    CPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n\
                    CPU revision\t: 1\n";
        let neoverse_n1 = CpuDevice { target: Target::Neon, ..from_cpuinfo(text) };
        assert_eq!(neoverse_n1.key(), "neon-arm-3340-3-l2-0-l3-0-t1");
        let other = neoverse_n1.key().replace("3340-3", "3340-4");
        assert_eq!(neoverse_n1.matches(&other), Some(Match::Family));
        let other = neoverse_n1.key().replace("3340-3", "3393-3");
        assert_eq!(neoverse_n1.matches(&other), None);
        let unknown = from_cpuinfo(&text.replace("0x41", "0x7f"));
        assert_eq!(unknown.key(), "portable-0x7f-3340-3-l2-0-l3-0-t1");
        assert!(CpuDevice::parse_key(&unknown.key()).is_some());
    }

    #[test]
    fn keys_of_gpus_are_read_back() {
        let mib = 1 << 20;
        for (mebibytes, gib) in [(81_079, 80), (143_771, 140), (40_442, 40), (9_856, 8), (500, 4)] {
            let device = CudaDevice::new("sm_90a", 132, mebibytes * mib, "a GPU");
            assert_eq!(device.key(), format!("sm_90a-sms-132-mem-{gib}"));
            let read = CudaDevice::parse_key(&device.key()).unwrap();
            assert_eq!(CudaDevice { name: device.name.clone(), ..read }, device);
        }
        for wrong in ["", "sm_90a", "sm_90a-sms-0132-mem-80", "sm_90a-sms-1-mem-2-3"] {
            assert_eq!(CudaDevice::parse_key(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn other_caches_and_threads_are_the_same_family() {
        let device = zen4();
        let check = |key: &str, expected| assert_eq!(device.matches(key), expected, "{key}");
        check("avx512-amd-25-17-l2-1024-l3-32768-t2", Some(Match::Exact));
        check("avx512-amd-25-97-l2-1024-l3-65536-t16", Some(Match::Family));
        check("x86_64_v3-amd-25-17-l2-1024-l3-32768-t2", None);
        check("avx512-intel-25-17-l2-1024-l3-32768-t2", None);
        check("avx512-amd-26-17-l2-1024-l3-32768-t2", None);
        check("something else", None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_processor_says_what_the_system_says() {
        if let Ok(text) = std::fs::read_to_string("/proc/cpuinfo") {
            let CpuDevice { name, .. } = from_cpuinfo(&text);
            assert_eq!(CpuDevice { name, ..from_cpuid() }, from_cpuinfo(&text));
        }
    }

    #[test]
    fn sizes_of_caches_are_read() {
        for (text, kib) in [("1024K", Some(1024)), ("32M", Some(32768)), ("", None), ("x", None)] {
            assert_eq!(parse_kib(text), kib);
        }
    }
}
