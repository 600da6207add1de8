//! `kernels.lock`: which kernels serve which rows, as `kernel-gen select` decided. The only input
//! of a build besides the models.

use serde::Deserialize;

use crate::error::Error;

/// The version that this generator writes, and the last it reads.
pub const VERSION: u32 = 1;

/// Largest text that is read.
const BYTES_MAX: usize = 16 << 20;

const HEADER: &str = "\
# Which kernels serve which rows, chosen by measurement. Written by `kernel-gen select`, from the
# records of `bespoke tune`; do not edit.
";

/// All decisions, and the proofs of the kernels that they name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Lock {
    pub version: u32,
    #[serde(default, rename = "problem")]
    pub problems: Vec<LockedProblem>,
    #[serde(default, rename = "certificate")]
    pub certificates: Vec<LockedVariant>,
}

/// What serves a spec on a target and a device class.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct LockedProblem {
    /// As symbols begin.
    pub spec: String,
    pub target: String,
    /// Key of the device class.
    pub device: String,
    /// Ascending; the last has no limit.
    #[serde(rename = "interval")]
    pub intervals: Vec<LockedInterval>,
}

/// Row counts, the kernel that serves them, and why. Times are of the interval, in microseconds.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct LockedInterval {
    /// `None`: no limit.
    pub rows_max: Option<usize>,
    pub symbol: String,
    /// Name of a [`Provenance`](crate::plan::Provenance).
    pub provenance: String,
    pub us: f64,
    pub default_us: f64,
    pub runner_up: Option<String>,
    pub runner_up_us: Option<f64>,
}

/// A kernel that passed verification.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct LockedVariant {
    pub symbol: String,
    /// As `compile::hash` gave it then.
    pub source_hash: String,
    /// Hash of the certificate.
    pub certificate: String,
}

impl Lock {
    /// Reads a lock.
    ///
    /// # Errors
    /// The text is no lock, is of a later version, or is larger than 16 MiB.
    pub fn parse(text: &str) -> Result<Lock, Error> {
        let error = |message: String| Error::Lock { message };
        if text.len() > BYTES_MAX {
            return Err(error(format!("{} bytes; {BYTES_MAX} are read at most", text.len())));
        }
        // NOTE: a later version may have another form, so the version is looked at alone first.
        let table: toml::Table = toml::from_str(text).map_err(|found| error(found.to_string()))?;
        match table.get("version").and_then(toml::Value::as_integer) {
            Some(version) if version == i64::from(VERSION) => {}
            Some(version) => {
                return Err(error(format!(
                    "version {version}, and this kernel-gen reads version {VERSION}; build with \
                     the kernel-gen that wrote it, or write it anew with `kernel-gen select`"
                )));
            }
            None => return Err(error(format!("`version = {VERSION}` is missing"))),
        }
        let lock: Lock = table.try_into().map_err(|found| error(found.to_string()))?;
        for interval in lock.problems.iter().flat_map(|problem| &problem.intervals) {
            let times = [Some(interval.us), Some(interval.default_us), interval.runner_up_us];
            if let Some(us) = times.into_iter().flatten().find(|us| !(us.is_finite() && *us >= 0.0))
            {
                return Err(error(format!("{}: {us} is no time", interval.symbol)));
            }
        }
        Ok(lock)
    }

    /// The lock as text: the same lock, the same bytes.
    pub fn print(&self) -> String {
        let mut text = format!("{HEADER}version = {}\n", self.version);
        for problem in &self.problems {
            let LockedProblem { spec, target, device, intervals } = problem;
            text.push_str(&format!(
                "\n[[problem]]\nspec = {}\ntarget = {}\ndevice = {}\n",
                quoted(spec),
                quoted(target),
                quoted(device)
            ));
            for interval in intervals {
                text.push_str(&print_interval(interval));
            }
        }
        for LockedVariant { symbol, source_hash, certificate } in &self.certificates {
            text.push_str(&format!(
                "\n[[certificate]]\nsymbol = {}\nsource_hash = {}\ncertificate = {}\n",
                quoted(symbol),
                quoted(source_hash),
                quoted(certificate)
            ));
        }
        text
    }

    /// The problems that `is_wanted`, with the certificates of their kernels.
    pub fn filtered(&self, is_wanted: impl Fn(&LockedProblem) -> bool) -> Lock {
        let problems: Vec<LockedProblem> =
            self.problems.iter().filter(|problem| is_wanted(problem)).cloned().collect();
        let is_named = |variant: &&LockedVariant| {
            let mut intervals = problems.iter().flat_map(|problem| &problem.intervals);
            intervals.any(|interval| interval.symbol == variant.symbol)
        };
        let certificates = self.certificates.iter().filter(is_named).cloned().collect();
        Lock { version: self.version, problems, certificates }
    }
}

fn print_interval(interval: &LockedInterval) -> String {
    let mut text = String::from("[[problem.interval]]\n");
    if let Some(rows) = interval.rows_max {
        text.push_str(&format!("rows_max = {rows}\n"));
    }
    text.push_str(&format!("symbol = {}\n", quoted(&interval.symbol)));
    text.push_str(&format!("provenance = {}\n", quoted(&interval.provenance)));
    text.push_str(&format!("us = {:?}\ndefault_us = {:?}\n", interval.us, interval.default_us));
    if let Some(symbol) = &interval.runner_up {
        text.push_str(&format!("runner_up = {}\n", quoted(symbol)));
    }
    if let Some(us) = interval.runner_up_us {
        text.push_str(&format!("runner_up_us = {us:?}\n"));
    }
    text
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_string()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock() -> Lock {
        let interval = |rows_max, symbol: &str| LockedInterval {
            rows_max,
            symbol: symbol.to_string(),
            provenance: "measured".to_string(),
            us: 12.0,
            default_us: 14.25,
            runner_up: Some("other \"quoted\"\n".to_string()),
            runner_up_us: Some(13.5),
        };
        let problem = LockedProblem {
            spec: "gemm_n64_k64_f32".to_string(),
            target: "avx512".to_string(),
            device: "avx512-amd-25-17-l2-1024-l3-32768-t2".to_string(),
            intervals: vec![
                LockedInterval { runner_up: None, runner_up_us: None, ..interval(Some(1), "a") },
                interval(None, "b"),
            ],
        };
        let certificate = |symbol: &str| LockedVariant {
            symbol: symbol.to_string(),
            source_hash: "01".to_string(),
            certificate: "02".to_string(),
        };
        Lock {
            version: VERSION,
            problems: vec![problem],
            certificates: vec![certificate("a"), certificate("b"), certificate("c")],
        }
    }

    #[test]
    fn what_is_printed_reads_back() {
        let text = lock().print();
        assert_eq!(Lock::parse(&text).unwrap(), lock());
        assert_eq!(Lock::parse(&text).unwrap().print(), text);
        let empty = Lock { version: VERSION, ..Lock::default() };
        assert_eq!(Lock::parse(&empty.print()).unwrap(), empty);
        assert_eq!(lock().filtered(|_| true).certificates.len(), 2);
        assert_eq!(lock().filtered(|_| false), empty);
    }

    #[test]
    fn what_is_no_lock_is_refused() {
        let text = lock().print();
        let cases = [
            (String::new(), "`version = 1` is missing"),
            ("version = 2\nfuture = true\n".to_string(), "version 2"),
            (text.replace("version = 1", "version = 0"), "version 0"),
            (text.replace("us = 12.0", "us = nan"), "no time"),
            (text.replace("us = 12.0", "us = -1.0"), "no time"),
            (text.replace("symbol = ", "symbel = "), "symbol"),
            (text.replace("rows_max = 1", "rows_max = -1"), "rows_max"),
            ("version".to_string(), "TOML"),
            (" ".repeat(BYTES_MAX + 1), "bytes"),
        ];
        for (text, expected) in cases {
            let error = Lock::parse(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
