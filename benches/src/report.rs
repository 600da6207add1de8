//! Measured times against the machine's limits, as a table for people and a file to commit.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bespoke::Error;
use bespoke::backend::cpu::limits::Limits;
use bespoke::backend::cpu::work::Work;

/// One line of the report.
#[derive(Clone, Debug)]
pub struct Entry {
    pub group: String,
    pub name: String,
    pub rows: usize,
    pub work: Work,
    /// Median over the samples, of one call.
    pub median: Duration,
}

/// All measurements of a run and the limits measured beside them.
#[derive(Clone, Debug)]
pub struct Report {
    pub limits: Limits,
    pub entries: Vec<Entry>,
}

/// Times of single calls, one a sample, beside criterion's own statistics.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Runs `call` `num_calls` times and remembers the mean; returns the sum, as criterion asks.
    pub fn time(&mut self, num_calls: u64, mut call: impl FnMut()) -> Duration {
        let start = Instant::now();
        for _ in 0..num_calls {
            call();
        }
        let total = start.elapsed();
        self.add(total.div_f64(num_calls.max(1) as f64));
        total
    }

    /// Remembers the time of one call.
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// The middle of the samples; `None` without any.
    pub fn median(mut self) -> Option<Duration> {
        self.0.sort();
        self.0.get(self.0.len() / 2).copied()
    }
}

impl Entry {
    /// Achieved rates and the share of the time that the limits allow.
    pub fn rates(&self, limits: &Limits) -> String {
        let nanoseconds = self.median.as_secs_f64() * 1e9;
        let (bound_time, bound) = self.work.bound(limits);
        format!(
            "{:>9.1} µs {:>7.1} GB/s {:>7.1} GOP/s {:>5.1} % of {}",
            nanoseconds / 1e3,
            self.work.bytes() as f64 / nanoseconds,
            self.work.ops() as f64 / nanoseconds,
            100.0 * bound_time / nanoseconds,
            bound.name()
        )
    }
}

impl Report {
    pub fn new(limits: Limits) -> Report {
        Report { limits, entries: Vec::new() }
    }

    /// Markdown: the machine, its limits, a line per measurement.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "{}.\n\
             The limits were measured in this run; the share is the time that the binding one \
             allows over the median time of a call.\n\n\
             | group | kernel | rows | µs | GB/s | GOP/s | share | bound |\n\
             |---|---|---|---|---|---|---|---|\n",
            self.limits.line()
        );
        for entry in &self.entries {
            let nanoseconds = entry.median.as_secs_f64() * 1e9;
            let (bound_time, bound) = entry.work.bound(&self.limits);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} % | {} |",
                entry.group,
                entry.name,
                entry.rows,
                nanoseconds / 1e3,
                entry.work.bytes() as f64 / nanoseconds,
                entry.work.ops() as f64 / nanoseconds,
                100.0 * bound_time / nanoseconds,
                bound.name()
            );
        }
        text
    }
}

/// Prints a report and writes it to `<folder>/<date>-<device>/<file>`, where `BESPOKE_BENCH_OUT`
/// names a folder.
pub fn publish(file: &str, text: &str) -> Result<(), Error> {
    println!("{text}");
    let Some(folder) = std::env::var_os("BESPOKE_BENCH_OUT") else { return Ok(()) };
    // Cargo starts benches in their package, people think from the repository's root.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let folder = root.join(PathBuf::from(folder));
    let device = device();
    let run = folder.join(format!("{}-{}", date(SystemTime::now()), folder_name(&device)));
    let path = run.join(file);
    std::fs::create_dir_all(&run)
        .and_then(|()| std::fs::write(&path, format!("# {device}\n\n{text}")))
        .map_err(|error| Error::io(&path, error))?;
    println!("written: {}", path.display());
    Ok(())
}

/// The processor by its own account.
fn device() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// `AMD EPYC 9654` → `amd-epyc-9654`
fn folder_name(device: &str) -> String {
    let words = device.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

/// `YYYY-MM-DD` in UTC, by the usual arithmetic on years that start in March.
fn date(time: SystemTime) -> String {
    // A clock before 1970 gives the first day.
    let days = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 86400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", year + era * 400 + carry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_calendar() {
        let check = |days: u64, expected: &str| {
            assert_eq!(date(UNIX_EPOCH + Duration::from_secs(days * 86400 + 1)), expected);
        };
        check(0, "1970-01-01");
        check(59, "1970-03-01");
        check(11_016, "2000-02-29");
        check(20_453, "2025-12-31");
        check(20_454, "2026-01-01");
    }

    #[test]
    fn devices_name_folders() {
        assert_eq!(folder_name("AMD EPYC 9654 96-Core (2.4 GHz)"), "amd-epyc-9654-96-core-2-4-ghz");
    }

    #[test]
    fn the_median_is_the_middle() {
        let samples = Samples([9, 1, 4].map(Duration::from_secs).to_vec());
        assert_eq!(samples.median(), Some(Duration::from_secs(4)));
        assert_eq!(Samples::default().median(), None);
    }

    #[test]
    fn shares_follow_from_limits() {
        let limits = Limits {
            target: bespoke_kernel_gen::target::Target::Avx512,
            num_threads: 2,
            memory_gb_per_s: 25.0,
            cache_gb_per_s: 100.0,
            dot_gop_per_s: 900.0,
            bf16_gop_per_s: 400.0,
            fma_gop_per_s: 200.0,
        };
        let entry = Entry {
            group: "awq_gemm".to_owned(),
            name: "x".to_owned(),
            rows: 1,
            work: Work { memory_bytes: 250_000, dot_ops: 1_000_000, ..Work::default() },
            median: Duration::from_micros(20),
        };
        let report = Report { limits, entries: vec![entry.clone()] };
        let line = "| awq_gemm | x | 1 | 20.0 | 12.5 | 50.0 | 50.0 % | memory |";
        assert!(report.text().contains(line), "{}", report.text());
        assert!(entry.rates(&limits).ends_with("50.0 % of memory"), "{}", entry.rates(&limits));
    }
}
