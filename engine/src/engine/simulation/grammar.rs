//! A grammar that nobody would write: what it allows is a hash of the output so far.

use std::sync::Arc;

use super::{VOCAB, mix};
use crate::grammar::{Grammar, IsComplete, Matcher, MayEnd, Rules, TooComplex};
use crate::sampling::TokenMask;

/// What an output may be followed by.
pub(super) struct Next {
    pub(super) mask: TokenMask,
    /// Nothing but the end may follow.
    pub(super) is_end: bool,
    /// The last token completed the output.
    pub(super) is_complete: bool,
}

/// Any hash will do, if its grammars are alike.
#[derive(Clone, Copy)]
struct Hashed(u64);

pub(super) fn grammar() -> Grammar {
    Grammar::new(Arc::new(Hashed(0)))
}

/// What may follow `output`, `end_tokens` included.
pub(super) fn next(output: &[u32], end_tokens: &[u32]) -> Next {
    let state = output.iter().fold(Hashed(0), |state, token| state.after(*token));
    let mut mask = TokenMask::new(VOCAB);
    let may_end = state.fill(&mut mask);
    let is_end = may_end && mask.is_empty();
    if may_end {
        end_tokens.iter().for_each(|token| mask.allow(*token));
    }
    Next { mask, is_end, is_complete: !output.is_empty() && state.is_complete() }
}

impl Hashed {
    fn after(self, token: u32) -> Hashed {
        Hashed(mix(self.0 ^ mix(u64::from(token) + 1)))
    }

    /// Half of the tokens, now and then none; says whether the output may end.
    fn fill(self, mask: &mut TokenMask) -> bool {
        let bits = mix(self.0 ^ 0x5eed) as u32;
        mask.set(&[if bits >> 27 == 0 { 0 } else { bits }]);
        bits >> 24 & 3 == 0
    }

    fn is_complete(self) -> bool {
        self.0 >> 60 == 0
    }
}

impl Rules for Hashed {
    fn start(&self) -> Box<dyn Matcher> {
        Box::new(*self)
    }
}

impl Matcher for Hashed {
    fn fill_mask(&mut self, mask: &mut TokenMask) -> Result<MayEnd, TooComplex> {
        Ok(MayEnd(self.fill(mask)))
    }

    fn push(&mut self, token: u32) -> Result<IsComplete, TooComplex> {
        *self = self.after(token);
        Ok(IsComplete(self.is_complete()))
    }
}
