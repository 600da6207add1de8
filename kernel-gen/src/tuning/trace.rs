//! Traces: how often an engine's steps had how many rows.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::Error;

/// Largest text that is read.
pub const TEXT_BYTES_MAX: usize = 4 << 20;

/// Steps by their row count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    pub rows: BTreeMap<usize, u64>,
}

impl Trace {
    /// Reads `{"rows": {"1": 123, "8": 45}}`.
    pub fn parse(text: &str) -> Result<Trace, Error> {
        #[derive(Deserialize)]
        struct Text {
            rows: BTreeMap<String, u64>,
        }
        let error = |message: String| Error::Trace { message };
        if text.len() > TEXT_BYTES_MAX {
            return Err(error(format!("{} bytes; {TEXT_BYTES_MAX} are possible", text.len())));
        }
        let text: Text = serde_json::from_str(text).map_err(|found| error(found.to_string()))?;
        let mut trace = Trace::default();
        for (rows, count) in text.rows {
            let number = rows.parse().ok().filter(|rows: &usize| *rows > 0);
            let number = number.ok_or_else(|| error(format!("{rows:?} is no number of rows")))?;
            trace.add(number, count);
        }
        Ok(trace)
    }

    /// Adds what another engine counted.
    pub fn merge(&mut self, other: &Trace) {
        for (rows, count) in &other.rows {
            self.add(*rows, *count);
        }
    }

    fn add(&mut self, rows: usize, count: u64) {
        let sum = self.rows.entry(rows).or_default();
        *sum = sum.saturating_add(count);
    }

    /// Steps that each point of an ascending grid stands for. Row counts between two points are the
    /// upper one's, those above the last are its as often as it fits them. A point stands for a
    /// thousandth of all steps at least, so that what has not happened is still chosen well.
    pub fn weights(&self, grid: &[usize]) -> Vec<f64> {
        let mut weights = vec![0.0; grid.len()];
        for (rows, count) in &self.rows {
            let count = *count as f64;
            match grid.iter().position(|point| rows <= point) {
                Some(idx) => weights[idx] += count,
                None => {
                    if let (Some(weight), Some(last)) = (weights.last_mut(), grid.last()) {
                        *weight += count * *rows as f64 / *last as f64;
                    }
                }
            }
        }
        let least = (weights.iter().sum::<f64>() / 1000.0).max(f64::MIN_POSITIVE.sqrt());
        weights.iter().map(|weight| weight.max(least)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_read_and_added_up() {
        let mut trace = Trace::parse(r#"{"rows": {"1": 900, "8": 50, "5": 50}}"#).unwrap();
        trace.merge(&Trace::parse(r#"{"rows": {"1": 1000, "1024": 3}}"#).unwrap());
        assert_eq!(trace.rows, BTreeMap::from([(1, 1900), (5, 50), (8, 50), (1024, 3)]));
        assert_eq!(trace.weights(&[1, 8, 64, 512]), [1900.0, 100.0, 2.006, 6.0]);
        assert_eq!(trace.weights(&[]), Vec::<f64>::new());
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        for text in [
            "",
            "{}",
            r#"{"rows": {"0": 1}}"#,
            r#"{"rows": {"x": 1}}"#,
            r#"{"rows": {"1": -1}}"#,
            r#"{"rows": [1]}"#,
        ] {
            assert!(Trace::parse(text).unwrap_err().to_string().starts_with("trace: "), "{text}");
        }
    }
}
