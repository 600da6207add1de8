//! Device classes: what timings of CPU kernels depend on.

use std::fs;
use std::path::Path;

use crate::target::Target;

/// What timings depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuDevice {
    pub target: Target,
    /// `amd`, `intel`, or another short word.
    pub vendor: String,
    pub family: u32,
    pub model: u32,
    /// Of one core; 0: unknown.
    pub l2_kib: usize,
    /// That one core reaches; 0: unknown.
    pub l3_kib: usize,
    pub num_threads: usize,
    /// Information only.
    pub name: String,
}

impl CpuDevice {
    /// Short, readable and stable: `avx512-amd-25-17-l2-1024-l3-32768-t2`.
    pub fn key(&self) -> String {
        let CpuDevice { target, vendor, family, model, l2_kib, l3_kib, num_threads, .. } = self;
        let target = target.name();
        format!("{target}-{vendor}-{family}-{model}-l2-{l2_kib}-l3-{l3_kib}-t{num_threads}")
    }
}

/// The CPU that runs this, with its best target, as far as the system tells.
pub fn this_cpu(num_threads: usize) -> CpuDevice {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let caches = Path::new("/sys/devices/system/cpu/cpu0/cache");
    CpuDevice {
        target: Target::best(),
        vendor: vendor(field(&info, "vendor_id")),
        family: field(&info, "cpu family").parse().unwrap_or(0),
        model: field(&info, "model").parse().unwrap_or(0),
        l2_kib: cache_kib(caches, "2"),
        l3_kib: cache_kib(caches, "3"),
        num_threads,
        name: field(&info, "model name").to_string(),
    }
}

/// The first value of this name.
fn field<'a>(info: &'a str, name: &str) -> &'a str {
    let value = |line: &'a str| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then(|| value.trim())
    };
    info.lines().find_map(value).unwrap_or_default()
}

/// One word without dashes.
fn vendor(id: &str) -> String {
    match id {
        "AuthenticAMD" => "amd".to_string(),
        "GenuineIntel" => "intel".to_string(),
        "" => "unknown".to_string(),
        other => {
            let letters = other.chars().filter(char::is_ascii_alphanumeric).take(16);
            letters.collect::<String>().to_ascii_lowercase()
        }
    }
}

/// Size of the data or unified cache of a level.
fn cache_kib(caches: &Path, level: &str) -> usize {
    let read = |idx: usize, name: &str| {
        let path = caches.join(format!("index{idx}")).join(name);
        fs::read_to_string(path).unwrap_or_default().trim().to_string()
    };
    let is_wanted =
        |idx: &usize| read(*idx, "level") == level && read(*idx, "type") != "Instruction";
    let size = (0..8).find(is_wanted).map(|idx| read(idx, "size")).unwrap_or_default();
    match size.strip_suffix('M') {
        Some(mib) => mib.parse::<usize>().map_or(0, |mib| mib * 1024),
        None => size.strip_suffix('K').unwrap_or(&size).parse().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_say_what_timings_depend_on() {
        let device = CpuDevice {
            target: Target::X86_64V3,
            vendor: vendor("AuthenticAMD"),
            family: 25,
            model: 17,
            l2_kib: 1024,
            l3_kib: 32768,
            num_threads: 2,
            name: "A CPU".to_string(),
        };
        assert_eq!(device.key(), "x86_64_v3-amd-25-17-l2-1024-l3-32768-t2");
        let renamed = CpuDevice { name: "Another".to_string(), ..device.clone() };
        assert_eq!(renamed.key(), device.key());
        assert_ne!(CpuDevice { num_threads: 3, ..device.clone() }.key(), device.key());
        assert_ne!(CpuDevice { model: 18, ..device.clone() }.key(), device.key());
        assert_eq!(this_cpu(3).key(), this_cpu(3).key());
        assert!(this_cpu(3).key().ends_with("-t3"));
    }

    #[test]
    fn fields_are_found_by_their_whole_names() {
        let info = "processor\t: 0\nmodel name\t: A: B\nmodel\t\t: 17\nmodel\t\t: 18\n";
        assert_eq!(field(info, "model"), "17");
        assert_eq!(field(info, "model name"), "A: B");
        assert_eq!(field(info, "vendor_id"), "");
        assert_eq!(vendor("Some-Vendor Ltd. with a long name"), "somevendorltdwit");
    }
}
