//! What the operating system says about memory.

use std::fs;

/// Largest resident size that this process has had, in bytes; `None` where the system does not say.
pub fn peak_rss_bytes() -> Option<u64> {
    field_bytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Resident size of this process now, in bytes.
pub fn rss_bytes() -> Option<u64> {
    field_bytes(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// Memory of the machine in bytes.
pub fn total_bytes() -> Option<u64> {
    field_bytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Memory that a new process can use without swapping, in bytes.
pub fn available_bytes() -> Option<u64> {
    field_bytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// The number of kibibytes that follows `name` at the start of a line, in bytes.
fn field_bytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?.trim();
    value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_fields() {
        let text = "Name:\tbespoke\nVmHWM:\t    1234 kB\nVmRSS:\t 99 kB\n";
        assert_eq!(field_bytes(text, "VmHWM:"), Some(1234 * 1024));
        assert_eq!(field_bytes(text, "VmPeak:"), None);
        assert_eq!(field_bytes("VmHWM: x kB", "VmHWM:"), None);
    }
}
