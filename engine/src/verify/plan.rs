//! Batches around the sizes of pages, and of what kernels take at once.

use bespoke_kernel_gen::spec::ModelShape;

use crate::batch::{Batch, BatchLimits};
use crate::kernels::abi::SequenceSpan;

/// Tokens of a sequence at most.
const CONTEXT_MAX: usize = 320;

/// What a case computes.
pub(super) struct Plan {
    pub(super) limits: BatchLimits,
    pub(super) num_pages: usize,
    /// One sequence each, of the wanted row counts.
    pub(super) layers: Vec<Batch>,
    /// Prompts in pieces, and then a decoded row of each sequence.
    pub(super) sequences: Vec<Batch>,
}

/// Rows of a sequence: tokens `first..end`.
#[derive(Clone, Copy)]
struct Rows {
    sequence: usize,
    first: usize,
    end: usize,
}

impl Plan {
    pub(super) fn new(shape: &ModelShape, row_counts: &[usize]) -> Plan {
        let page = shape.page_size;
        let rows_max = row_counts.iter().copied().max().unwrap_or(1);
        let lens = [rows_max, 1, 2, page - 1, page, page + 1, 2 * page + 3, CONTEXT_MAX - 19];
        let pages_of_one = CONTEXT_MAX.div_ceil(page);
        let num_pages = lens.len() * pages_of_one;
        let batch = |rows: &[Rows]| batch(shape, rows, num_pages, pages_of_one);
        let layer = |rows: &usize| batch(&[Rows { sequence: 0, first: 0, end: *rows }]);
        let mut sequences = Vec::new();
        for (sequence, len) in lens.iter().enumerate().skip(1) {
            for first in (0..len - 1).step_by(rows_max) {
                let end = (first + rows_max).min(len - 1);
                sequences.push(batch(&[Rows { sequence, first, end }]));
            }
        }
        let lasts: Vec<Rows> = (1..lens.len())
            .map(|sequence| {
                let end = lens[sequence];
                Rows { sequence, first: end - 1, end }
            })
            .collect();
        sequences.extend(lasts.chunks(rows_max).map(batch));
        let limits = BatchLimits {
            rows_max: rows_max.max(lens.len()),
            sequences_max: lens.len(),
            context_max: CONTEXT_MAX,
            logit_rows_max: rows_max.max(lens.len()),
        };
        Plan { limits, num_pages, layers: row_counts.iter().map(layer).collect(), sequences }
    }
}

/// Rows with pages that do not lie in order. Tokens and angles depend on sequence and place alone.
fn batch(shape: &ModelShape, all: &[Rows], num_pages: usize, pages_of_one: usize) -> Batch {
    let page = |sequence: usize, idx: usize| (num_pages - 1 - sequence - idx * 8) as u32;
    assert_eq!(num_pages, 8 * pages_of_one, "eight sequences take turns");
    let mut batch = Batch::default();
    for rows in all {
        batch.spans.push(SequenceSpan {
            first_row: batch.num_rows() as u32,
            num_rows: (rows.end - rows.first) as u32,
            context_len: rows.end as u32,
            first_page: batch.page_table.len() as u32,
        });
        let pages = 0..rows.end.div_ceil(shape.page_size);
        batch.page_table.extend(pages.map(|idx| page(rows.sequence, idx)));
        for position in rows.first..rows.end {
            let token = (7 + 31 * rows.sequence + 13 * position + position * position) as u32;
            batch.tokens.push(token % shape.vocab_size as u32);
            batch.positions.push(position as u32);
            let page = page(rows.sequence, position / shape.page_size) as usize;
            batch.slots.push((page * shape.page_size + position % shape.page_size) as u32);
            let half = shape.rotary_dim / 2;
            let angle = |i: usize| position as f32 * 1e4_f32.powf(-(i as f32) / half as f32);
            batch.cos_sin.extend((0..half).map(|i| angle(i).cos()));
            batch.cos_sin.extend((0..half).map(|i| angle(i).sin()));
        }
    }
    // NOTE: backwards, so that a selection that is not read would show.
    batch.logit_rows.extend((0..batch.num_rows() as u32).rev());
    batch
}
