//! The lock, `kernels.lock`: which kernel serves which rows of which problem on which device.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::error::Error;

/// Version of the form.
pub const VERSION: u32 = 1;
/// Largest text that is read.
pub const TEXT_BYTES_MAX: usize = 16 << 20;
/// Intervals of a problem: what the engine's table has room for.
pub const INTERVALS_MAX: usize = 8;
/// Words for where a choice comes from.
pub const PROVENANCES: [&str; 3] = ["measured", "model", "default"];

/// The choice of kernels that a build follows.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    pub version: u32,
    #[serde(default)]
    pub options: LockedOptions,
    /// By spec, target and device, ascending.
    #[serde(default, rename = "problem")]
    pub problems: Vec<LockedProblem>,
    /// Every kernel of the problems whose provenance is not `default`, by symbol.
    #[serde(default, rename = "variant")]
    pub certificates: Vec<LockedVariant>,
}

/// How the choice was made; information only.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedOptions {
    /// `invariant` or `free`
    pub profile: String,
    /// `uniform` or `trace`
    pub weights: String,
    pub variants_max: usize,
    pub kernel_bytes_max: Option<usize>,
}

/// What serves one spec on one target, chosen on one device.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedProblem {
    pub spec: String,
    pub target: String,
    /// Key of the device.
    pub device: String,
    /// Ascending; the last has no limit. Of attention two: decoding, then prompts.
    pub intervals: Vec<LockedInterval>,
}

/// Row counts up to `rows_max`, above those of the interval before, and the kernel that serves
/// them.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedInterval {
    /// `None`: no limit.
    pub rows_max: Option<usize>,
    pub symbol: String,
    /// One of [`PROVENANCES`].
    pub provenance: String,
    /// Microseconds of a call, mean over the measured row counts; 0 where none was measured.
    pub us: f64,
    pub default_us: f64,
    /// The best other kernel measured at all of the interval's row counts.
    pub runner_up: Option<String>,
    pub runner_up_us: Option<f64>,
    /// By how much of its time the runner-up is slower; negative where it is faster, but not enough
    /// to be chosen. 0 without one.
    pub margin: f64,
}

/// A kernel of the lock: what it was made from, and what it has passed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedVariant {
    pub symbol: String,
    pub source_hash: String,
    /// Hash of the certificate.
    pub certificate: String,
    pub compiler: String,
    pub code_bytes: usize,
}

impl Lock {
    /// Reads a lock. Its words are checked here, its symbols by whoever uses them.
    pub fn parse(text: &str) -> Result<Lock, Error> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let error = |message: String| Error::Lock { message };
        if text.len() > TEXT_BYTES_MAX {
            let len = text.len();
            return Err(error(format!("{len} bytes; {TEXT_BYTES_MAX} are possible")));
        }
        let syntax = |found: toml::de::Error| error(found.to_string().trim_end().to_string());
        let Version { version } = toml::from_str(text).map_err(syntax)?;
        if version != VERSION {
            return Err(error(format!(
                "version {version}, this program knows {VERSION}; write it anew with \
                 `kernel-gen select` of this program, or build with the program that wrote it"
            )));
        }
        let lock: Lock = toml::from_str(text).map_err(syntax)?;
        lock.check().map_err(error)?;
        Ok(lock)
    }

    /// The problem of a spec on a target, chosen on the device of this key.
    pub fn problem(&self, spec: &str, target: &str, device: &str) -> Option<&LockedProblem> {
        self.problems.iter().find(|problem| {
            (&*problem.spec, &*problem.target, &*problem.device) == (spec, target, device)
        })
    }

    pub fn variant(&self, symbol: &str) -> Option<&LockedVariant> {
        self.certificates.iter().find(|variant| variant.symbol == symbol)
    }

    /// The text. Equal locks give equal bytes; what [`Lock::parse`] reads of it is equal.
    pub fn print(&self) -> String {
        let mut text = format!("{HEADER}\nversion = {}\n", self.version);
        let LockedOptions { profile, weights, variants_max, kernel_bytes_max } = &self.options;
        text.push_str(&format!(
            "\n[options]\nprofile = {}\nweights = {}\nvariants_max = {variants_max}\n",
            quoted(profile),
            quoted(weights)
        ));
        if let Some(bytes) = kernel_bytes_max {
            text.push_str(&format!("kernel_bytes_max = {bytes}\n"));
        }
        let key = |problem: &LockedProblem| {
            (problem.spec.clone(), problem.target.clone(), problem.device.clone())
        };
        let problems: BTreeMap<_, _> =
            self.problems.iter().map(|problem| (key(problem), problem)).collect();
        for problem in problems.values() {
            print_problem(problem, &mut text);
        }
        let variants: BTreeMap<_, _> =
            self.certificates.iter().map(|variant| (&variant.symbol, variant)).collect();
        for variant in variants.values() {
            let LockedVariant { symbol, source_hash, certificate, compiler, code_bytes } = variant;
            text.push_str(&format!(
                "\n[[variant]]\nsymbol = {}\nsource_hash = {}\ncertificate = {}\ncompiler = {}\n\
                 code_bytes = {code_bytes}\n",
                quoted(symbol),
                quoted(source_hash),
                quoted(certificate),
                quoted(compiler)
            ));
        }
        text
    }

    /// What has to hold of a lock whoever wrote it.
    fn check(&self) -> Result<(), String> {
        let mut symbols = BTreeSet::new();
        for LockedVariant { symbol, source_hash, certificate, .. } in &self.certificates {
            if source_hash.is_empty() || certificate.is_empty() {
                return Err(format!(
                    "{symbol} has no certificate; measure it with `bespoke tune` and write the \
                     lock with `kernel-gen select`"
                ));
            }
            if !symbols.insert(symbol) {
                return Err(format!("variant {symbol} is there twice"));
            }
        }
        let mut keys = BTreeSet::new();
        for problem in &self.problems {
            if !keys.insert((&problem.spec, &problem.target, &problem.device)) {
                let LockedProblem { spec, target, device, .. } = problem;
                return Err(format!("problem {spec} for {target} on {device} is there twice"));
            }
            problem.check()?;
            for interval in &problem.intervals {
                if interval.provenance != "default" && !symbols.contains(&interval.symbol) {
                    return Err(format!(
                        "{} serves {} without a certificate; measure it with `bespoke tune` and \
                         write the lock with `kernel-gen select`",
                        interval.symbol, problem.spec
                    ));
                }
            }
        }
        Ok(())
    }
}

impl LockedProblem {
    /// The interval that serves a row count.
    pub fn interval(&self, rows: usize) -> Option<&LockedInterval> {
        self.intervals.iter().find(|interval| interval.rows_max.is_none_or(|max| rows <= max))
    }

    fn check(&self) -> Result<(), String> {
        let LockedProblem { spec, target, device, intervals } = self;
        let place = format!("problem {spec} for {target} on {device}");
        let Some((last, others)) = intervals.split_last() else {
            return Err(format!("{place} has no intervals"));
        };
        if intervals.len() > INTERVALS_MAX {
            return Err(format!("{place}: {} intervals; at most {INTERVALS_MAX}", intervals.len()));
        }
        if last.rows_max.is_some() {
            return Err(format!("{place}: the last interval has a rows_max"));
        }
        let mut rows_before = 0;
        for interval in others {
            match interval.rows_max {
                Some(rows_max) if rows_max > rows_before => rows_before = rows_max,
                _ => {
                    return Err(format!("{place}: rows_max has to grow from interval to interval"));
                }
            }
        }
        for interval in intervals {
            if !PROVENANCES.contains(&&*interval.provenance) {
                return Err(format!(
                    "{place}: provenance {:?} is not one of {}",
                    interval.provenance,
                    PROVENANCES.join(", ")
                ));
            }
            let times = [Some(interval.us), Some(interval.default_us), interval.runner_up_us];
            let mut times = times.into_iter().flatten();
            let is_bad = |us: f64| !(us.is_finite() && us >= 0.0);
            if times.any(is_bad) || !interval.margin.is_finite() {
                return Err(format!("{place}: a time or margin that is no number"));
            }
        }
        Ok(())
    }
}

const HEADER: &str = "\
# Which kernel serves which rows. Chosen by `kernel-gen select` from measurements: do not edit,
# select anew. Times in microseconds.
";

fn print_problem(problem: &LockedProblem, text: &mut String) {
    let LockedProblem { spec, target, device, intervals } = problem;
    text.push_str(&format!(
        "\n[[problem]]\nspec = {}\ntarget = {}\ndevice = {}\nintervals = [\n",
        quoted(spec),
        quoted(target),
        quoted(device)
    ));
    for interval in intervals {
        let LockedInterval { rows_max, symbol, provenance, us, default_us, margin, .. } = interval;
        let mut words = Vec::new();
        if let Some(rows_max) = rows_max {
            words.push(format!("rows_max = {rows_max}"));
        }
        words.push(format!("symbol = {}", quoted(symbol)));
        words.push(format!("provenance = {}", quoted(provenance)));
        words.push(format!("us = {us:?}"));
        words.push(format!("default_us = {default_us:?}"));
        if let (Some(symbol), Some(us)) = (&interval.runner_up, interval.runner_up_us) {
            words.push(format!("runner_up = {}", quoted(symbol)));
            words.push(format!("runner_up_us = {us:?}"));
        }
        words.push(format!("margin = {margin:?}"));
        text.push_str(&format!("    {{ {} }},\n", words.join(", ")));
    }
    text.push_str("]\n");
}

/// A TOML string. JSON's escapes are TOML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock() -> Lock {
        let interval = |rows_max, symbol: &str, provenance: &str| LockedInterval {
            rows_max,
            symbol: symbol.to_string(),
            provenance: provenance.to_string(),
            us: 12.5,
            default_us: 14.0,
            runner_up: Some("other".to_string()),
            runner_up_us: Some(13.0),
            margin: 0.04,
        };
        let problem = |spec: &str| LockedProblem {
            spec: spec.to_string(),
            target: "avx512".to_string(),
            device: "avx512-amd-25-17-l2-1024-l3-32768-t2".to_string(),
            intervals: vec![
                interval(Some(1), "one", "default"),
                interval(Some(64), "few", "measured"),
                interval(None, "many", "model"),
            ],
        };
        let variant = |symbol: &str| LockedVariant {
            symbol: symbol.to_string(),
            source_hash: "12".to_string(),
            certificate: "34".to_string(),
            compiler: "rustc \"1.89\"\u{7f}\n".to_string(),
            code_bytes: 4096,
        };
        Lock {
            version: VERSION,
            options: LockedOptions {
                profile: "invariant".to_string(),
                weights: "uniform".to_string(),
                variants_max: 4,
                kernel_bytes_max: Some(100_000),
            },
            problems: vec![problem("a"), problem("b")],
            certificates: vec![variant("few"), variant("many")],
        }
    }

    #[test]
    fn what_is_printed_is_read_back() {
        let lock = lock();
        let text = lock.print();
        assert_eq!(Lock::parse(&text).unwrap(), lock);
        let mut other = lock.clone();
        other.problems.reverse();
        other.certificates.reverse();
        assert_eq!(other.print(), text);
        let empty = Lock { version: VERSION, ..Lock::default() };
        assert_eq!(Lock::parse(&empty.print()).unwrap(), empty);
        let problem = lock.problem("b", "avx512", "avx512-amd-25-17-l2-1024-l3-32768-t2").unwrap();
        let symbols = [1, 2, 64, 65].map(|rows| &*problem.interval(rows).unwrap().symbol);
        assert_eq!(symbols, ["one", "few", "few", "many"]);
    }

    #[test]
    fn locks_that_cannot_be_followed_are_refused() {
        let text = lock().print();
        let check = |from: &str, to: &str, message: &str| {
            assert!(text.contains(from), "{from}");
            let error = Lock::parse(&text.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(message), "{from} → {to}: {error}");
        };
        check("version = 1", "version = 9", "version 9");
        check("version = 1", "version = ", "expected");
        check("symbol = \"few\", p", "symbol = \"fewer\", p", "fewer serves a without a cert");
        check("certificate = \"34\"", "certificate = \"\"", "few has no certificate");
        check("rows_max = 64", "rows_max = 1", "has to grow");
        check("rows_max = 64, ", "", "has to grow");
        check("provenance = \"model\"", "provenance = \"guess\"", "\"guess\"");
        check("us = 12.5", "us = nan", "no number");
        check("spec = \"b\"", "spec = \"a\"", "twice");
        check("spec = \"b\"", "specs = \"b\"", "specs");
    }

    #[test]
    fn damaged_locks_are_errors_and_no_panics() {
        let text = lock().print();
        for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
            let _ = Lock::parse(&text[..end]);
            let without = format!("{}{}", &text[..end], &text[(end + 3).min(text.len())..]);
            let _ = Lock::parse(&without);
        }
    }
}
