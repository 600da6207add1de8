//! How many rows steps have: what a choice of kernels is weighed by.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::error::Error;
use crate::files::{IfExists, write_file};

/// Row counts that are told apart; larger ones count as this one.
const ROWS_MAX: usize = 4096;

/// Steps by their row counts. Others may read while the engine counts.
#[derive(Debug)]
pub struct RowHistogram {
    /// Steps of as many rows as the place says.
    counts: Box<[AtomicU64]>,
}

/// The form in which a trace is written: `{"rows": {"1": 123, "8": 45}}`.
#[derive(Serialize)]
struct Trace {
    rows: BTreeMap<usize, u64>,
}

impl Default for RowHistogram {
    fn default() -> RowHistogram {
        RowHistogram { counts: (0..=ROWS_MAX).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl RowHistogram {
    /// A step of `num_rows` rows was computed.
    pub fn add(&self, num_rows: usize) {
        self.counts[num_rows.min(ROWS_MAX)].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts of another engine besides.
    pub fn merge(&self, other: &RowHistogram) {
        for (count, other) in self.counts.iter().zip(&other.counts) {
            count.fetch_add(other.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Steps by rows, without row counts that no step had.
    pub fn counts(&self) -> BTreeMap<usize, u64> {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        counts.enumerate().filter(|(_, count)| *count > 0).collect()
    }

    /// Writes what `kernel-gen select --from-trace` reads; the file is there whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let text = serde_json::to_string(&Trace { rows: self.counts() })
            .map_err(|error| Error::Resources(format!("{}: {error}", path.display())))?;
        write_file(path, format!("{text}\n").as_bytes(), IfExists::Replace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_rows() {
        let (histogram, other) = (RowHistogram::default(), RowHistogram::default());
        for rows in [1, 1, 8, ROWS_MAX, ROWS_MAX + 1, usize::MAX] {
            histogram.add(rows);
        }
        other.add(8);
        histogram.merge(&other);
        assert_eq!(histogram.counts(), BTreeMap::from([(1, 2), (8, 2), (ROWS_MAX, 3)]));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        for _ in 0..2 {
            histogram.write(&path).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(text, "{\"rows\":{\"1\":2,\"8\":2,\"4096\":3}}\n");
        }
        assert!(histogram.write(&folder.path().join("trace.json/none")).is_err());
    }
}
