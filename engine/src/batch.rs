//! The token rows of one step.

use crate::kernels::abi::SequenceSpan;

/// Rows of one model forward, sequence after sequence. Reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// `[num_rows]` token ids.
    pub tokens: Vec<u32>,
    /// `[num_rows]` places in their sequences.
    pub positions: Vec<u32>,
    /// `[num_rows]` KV slots: page id · page size + place in the page.
    pub slots: Vec<u32>,
    /// `[num_rows, rotary_dim]` cosines, then sines, of each row's position.
    pub cos_sin: Vec<f32>,
    /// `[num_sequences]`
    pub spans: Vec<SequenceSpan>,
    /// Page ids of all sequences; a span's `first_page` points here.
    pub page_table: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// Pages to be copied before any row is computed, in this order.
    pub copies: Vec<PageCopy>,
}

/// The content of one page of the KV cache, over all layers, for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    pub from: u32,
    pub to: u32,
}

/// What batches are bounded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    pub rows_max: usize,
    pub sequences_max: usize,
    /// Tokens of one sequence.
    pub context_max: usize,
    /// Rows whose logits are computed at once.
    pub logit_rows_max: usize,
}

impl Batch {
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.cos_sin.clear();
        self.spans.clear();
        self.page_table.clear();
        self.logit_rows.clear();
        self.copies.clear();
    }
}
