//! Which tokens a grammar leaves of a row of logits.

/// Tokens of one word.
const WORD: usize = u32::BITS as usize;

/// A set of the tokens of one vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask {
    /// One bit for each token, the lowest first; 0 behind the vocabulary.
    words: Vec<u32>,
    vocab_size: usize,
}

impl TokenMask {
    /// No token of `vocab_size`.
    pub fn new(vocab_size: usize) -> TokenMask {
        TokenMask { words: vec![0; vocab_size.div_ceil(WORD)], vocab_size }
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Takes over a set with the same order of bits. Tokens behind it are not in the set, and what
    /// it has behind the vocabulary is left out.
    pub fn set(&mut self, words: &[u32]) {
        self.clear();
        let num_words = words.len().min(self.words.len());
        self.words[..num_words].copy_from_slice(&words[..num_words]);
        let num_in_last = self.vocab_size % WORD;
        if num_in_last > 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << num_in_last) - 1;
        }
    }

    /// Adds `token`; one outside the vocabulary changes nothing.
    pub fn allow(&mut self, token: u32) {
        if (token as usize) < self.vocab_size {
            self.words[token as usize / WORD] |= 1 << (token as usize % WORD);
        }
    }

    pub fn is_allowed(&self, token: u32) -> bool {
        let word = self.words.get(token as usize / WORD);
        word.is_some_and(|word| word >> (token as usize % WORD) & 1 == 1)
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Appends `logits`, of the vocabulary or its beginning, to `out`: −∞ in place of the tokens
    /// outside the set.
    pub(super) fn extend(&self, out: &mut Vec<f32>, logits: &[f32]) {
        for (word, logits) in self.words.iter().zip(logits.chunks(WORD)) {
            match *word {
                0 => out.resize(out.len() + logits.len(), f32::NEG_INFINITY),
                u32::MAX => out.extend_from_slice(logits),
                bits => out.extend(logits.iter().enumerate().map(|(idx, logit)| {
                    if bits >> idx & 1 == 1 { *logit } else { f32::NEG_INFINITY }
                })),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_hold_what_they_were_given() {
        for vocab_size in [1, 31, 32, 33, 64, 70] {
            let mut mask = TokenMask::new(vocab_size);
            assert!(mask.is_empty());
            mask.set(&[u32::MAX; 4]);
            assert!((0..vocab_size as u32).all(|token| mask.is_allowed(token)));
            assert!((vocab_size as u32..200).all(|token| !mask.is_allowed(token)));
            mask.set(&[0b10]);
            mask.allow(vocab_size as u32 - 1);
            mask.allow(vocab_size as u32);
            let logits: Vec<f32> = (0..vocab_size).map(|idx| idx as f32).collect();
            let mut out = Vec::new();
            mask.extend(&mut out, &logits);
            let expected = logits.iter().enumerate().map(|(idx, logit)| {
                let is_in = (idx == 1 || idx == vocab_size - 1) && idx < vocab_size;
                if is_in { *logit } else { f32::NEG_INFINITY }
            });
            assert_eq!(out, expected.collect::<Vec<f32>>());
        }
    }
}
