//! Certificates: which tests a kernel has passed, and the hash that the lock names them by.

use serde::{Deserialize, Serialize};

/// The levels of verification that one kernel, compiled by one compiler, passed on one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    pub symbol: String,
    /// Of what the kernel is made from.
    pub source_hash: String,
    pub compiler: String,
    /// [`super::Device::key`]
    pub device: String,
    /// In ascending order.
    pub levels: Vec<Level>,
}

/// A passed level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Level {
    /// `V0`, `V1`, …
    pub name: String,
    pub num_cases: usize,
    /// The largest error as a share of its bound, 0 where bits were compared.
    pub max_error: f64,
    /// Runs of each case.
    pub num_repeats: usize,
    /// What is not self-evident, such as why a level does not apply.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// Levels that a certificate has to have before its kernel may be chosen: numbers against the
/// reference, repeats, and the bits of its reduction class.
pub const LEVELS_NEEDED: [&str; 3] = ["V1", "V2", "V4"];

impl Certificate {
    /// 32 hex digits over everything that the certificate says.
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for text in [&self.symbol, &self.source_hash, &self.compiler, &self.device] {
            add(text.as_bytes());
        }
        for Level { name, num_cases, max_error, num_repeats, note } in &self.levels {
            add(name.as_bytes());
            add(&(*num_cases as u64).to_le_bytes());
            add(&max_error.to_bits().to_le_bytes());
            add(&(*num_repeats as u64).to_le_bytes());
            add(note.as_bytes());
        }
        hasher.finalize().to_hex()[..32].to_string()
    }

    /// Whether all of [`LEVELS_NEEDED`] are passed, or the first that is missing.
    pub fn check(&self) -> Result<(), String> {
        for needed in LEVELS_NEEDED {
            let level = self.levels.iter().find(|level| level.name == needed);
            if level.is_none_or(|level| level.num_cases == 0) {
                return Err(format!("the certificate has no case of level {needed}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn certificate(symbol: &str, source_hash: &str) -> Certificate {
        let level = |name: &str| Level {
            name: name.to_string(),
            num_cases: 12,
            max_error: 0.25,
            num_repeats: 64,
            note: String::new(),
        };
        Certificate {
            symbol: symbol.to_string(),
            source_hash: source_hash.to_string(),
            compiler: "rustc 1.89.0".to_string(),
            device: "avx512-amd-25-17-l2-1024-l3-32768-t2".to_string(),
            levels: ["V0", "V1", "V2", "V4"].map(level).to_vec(),
        }
    }

    #[test]
    fn every_word_of_a_certificate_changes_its_hash() {
        let first = certificate("a", "b");
        let mut others = vec![first.clone(); 7];
        others[0].symbol.push('x');
        others[1].source_hash.push('x');
        others[2].compiler.push('x');
        others[3].device.push('x');
        others[4].levels.pop();
        others[5].levels[1].max_error = 0.5;
        others[6].levels[1].note.push('x');
        assert_eq!(first.hash(), certificate("a", "b").hash());
        assert_eq!(first.hash().len(), 32);
        for other in others {
            assert_ne!(other.hash(), first.hash(), "{other:?}");
        }
    }

    #[test]
    fn a_missing_level_is_named() {
        let mut certificate = certificate("a", "b");
        assert_eq!(certificate.check(), Ok(()));
        certificate.levels.remove(2);
        assert!(certificate.check().unwrap_err().contains("V2"));
    }
}
