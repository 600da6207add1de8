//! Compiled grammars that are kept for requests to come, in memory and within bounds.

use std::collections::HashMap;

use super::Grammar;

/// Names what a grammar was compiled from.
pub(super) type Key = [u8; 32];

/// The grammars used last, as far as their estimated sizes fit.
pub(super) struct Cache {
    bytes_max: usize,
    num_bytes: usize,
    entries: HashMap<Key, Entry>,
    /// Counts uses.
    clock: u64,
}

struct Entry {
    grammar: Grammar,
    num_bytes: usize,
    last_use: u64,
}

impl Cache {
    pub(super) fn new(bytes_max: usize) -> Cache {
        Cache { bytes_max, num_bytes: 0, entries: HashMap::new(), clock: 0 }
    }

    pub(super) fn get(&mut self, key: &Key) -> Option<Grammar> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.last_use = self.clock;
        Some(entry.grammar.clone())
    }

    /// Keeps a grammar in place of those used longest ago. One that is too large for the cache is
    /// not kept.
    pub(super) fn insert(&mut self, key: Key, grammar: Grammar, num_bytes: usize) {
        self.remove(&key);
        if num_bytes > self.bytes_max {
            return;
        }
        while self.num_bytes + num_bytes > self.bytes_max {
            // NOTE: the number of entries is bounded by what the smallest one is counted as.
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_use);
            let Some(oldest) = oldest.map(|(key, _)| *key) else { break };
            self.remove(&oldest);
        }
        self.clock += 1;
        self.num_bytes += num_bytes;
        self.entries.insert(key, Entry { grammar, num_bytes, last_use: self.clock });
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.num_bytes -= entry.num_bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::grammar::{Matcher, Rules};

    struct Nothing;

    impl Rules for Nothing {
        fn start(&self) -> Box<dyn Matcher> {
            unreachable!("the test starts no answer")
        }
    }

    #[test]
    fn keeps_what_was_used_last() {
        let mut cache = Cache::new(100);
        let key = |idx: u8| [idx; 32];
        let grammar = || Grammar::new(Arc::new(Nothing));
        for idx in 0..4 {
            cache.insert(key(idx), grammar(), 25);
        }
        assert!(cache.get(&key(0)).is_some());
        cache.insert(key(4), grammar(), 30);
        assert_eq!(cache.num_bytes, 80);
        let found: Vec<bool> = (0..5).map(|idx| cache.get(&key(idx)).is_some()).collect();
        assert_eq!(found, [true, false, false, true, true]);
        cache.insert(key(5), grammar(), 101);
        assert!(cache.get(&key(5)).is_none() && cache.get(&key(0)).is_some());
        cache.insert(key(0), grammar(), 100);
        assert_eq!((cache.entries.len(), cache.num_bytes), (1, 100));
    }
}
