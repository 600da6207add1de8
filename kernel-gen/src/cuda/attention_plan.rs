//! Spans of a step → the items that `paged_attention` works through.
//!
//! A row's keys are cut into chunks at absolute multiples of [`CHUNK`]. Rows of short spans become
//! one decode item a chunk, added up in the order of the chunks; longer spans become prefill items,
//! each of which takes some rows and all their keys. Both give a row the same bits, so the cut is a
//! matter of speed alone.

use std::ops::Range;

use super::paged_attention::CHUNK;

/// Spans of at most so many rows are decoded row by row: their keys are read once for each.
pub const DECODE_ROWS_MAX: usize = 4;

/// One sequence's rows of a batch: `AttentionSpan` of `templates/common/params.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub first_row: u32,
    pub num_rows: u32,
    /// Index into the page table.
    pub first_page: u32,
    /// Tokens of the sequence, these rows included.
    pub context_len: u32,
}

/// A share of the work: `AttentionItem` of `templates/common/params.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Item {
    pub span: u32,
    /// In the batch.
    pub first_row: u32,
    pub num_rows: u32,
    pub first_key: u32,
    pub num_keys: u32,
    /// Which of the parts of the row's keys this is.
    pub part: u32,
    /// 1: the result is final.
    pub num_parts: u32,
    /// Place of part 0 in the workspace.
    pub first_part: u32,
}

/// What of a kernel its items depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// A row sees so many keys at most, itself included; 0: all.
    pub window: usize,
    /// Rows of a prefill item.
    pub rows_max: usize,
    /// Parts that the workspace of decode has room for.
    pub parts_max: usize,
}

/// The items of a step. Reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub decode: Vec<Item>,
    /// The decode items of each launch: more than one where the workspace is too small for all.
    pub decode_launches: Vec<Range<usize>>,
    /// Longest first.
    pub prefill: Vec<Item>,
}

impl Plan {
    /// Replaces the plan by that of `spans`.
    ///
    /// A row whose chunks the workspace cannot hold is an error.
    pub fn fill(&mut self, shape: &Shape, spans: &[Span]) -> Result<(), String> {
        self.decode.clear();
        self.decode_launches.clear();
        self.prefill.clear();
        let mut launch = Launch::default();
        for (span_idx, span) in spans.iter().enumerate() {
            check_span(span)?;
            if span.num_rows as usize <= DECODE_ROWS_MAX {
                for row in 0..span.num_rows {
                    self.add_decode_row(shape, span_idx, span, row, &mut launch)?;
                }
            } else {
                self.add_prefill_span(shape, span_idx, span);
            }
        }
        self.close_launch(&mut launch);
        // NOTE: the sort is stable, so that the plan is a function of the spans.
        self.prefill.sort_by_key(|item| std::cmp::Reverse(item.num_keys));
        Ok(())
    }

    fn add_decode_row(
        &mut self,
        shape: &Shape,
        span_idx: usize,
        span: &Span,
        row: u32,
        launch: &mut Launch,
    ) -> Result<(), String> {
        let keys = visible(shape, span, row);
        let chunks = keys.start / CHUNK..keys.end.div_ceil(CHUNK);
        // NOTE: a single part is final and takes no workspace.
        let stored = if chunks.len() > 1 { chunks.len() } else { 0 };
        if stored > shape.parts_max {
            return Err(format!(
                "a context of {} tokens is attended to in {stored} parts, and the workspace has \
                 room for {}; plan it for longer contexts",
                span.context_len, shape.parts_max
            ));
        }
        if launch.num_parts + stored > shape.parts_max {
            self.close_launch(launch);
        }
        for chunk in chunks.clone() {
            let first_key = keys.start.max(chunk * CHUNK);
            let end = keys.end.min((chunk + 1) * CHUNK);
            self.decode.push(Item {
                span: span_idx as u32,
                first_row: span.first_row + row,
                num_rows: 1,
                first_key: first_key as u32,
                num_keys: (end - first_key) as u32,
                part: (chunk - chunks.start) as u32,
                num_parts: chunks.len() as u32,
                first_part: launch.num_parts as u32,
            });
        }
        launch.num_parts += stored;
        Ok(())
    }

    fn add_prefill_span(&mut self, shape: &Shape, span_idx: usize, span: &Span) {
        let mut row = 0;
        while row < span.num_rows {
            let num_rows = (span.num_rows - row).min(shape.rows_max.max(1) as u32);
            let first = visible(shape, span, row).start;
            let end = visible(shape, span, row + num_rows - 1).end;
            self.prefill.push(Item {
                span: span_idx as u32,
                first_row: span.first_row + row,
                num_rows,
                first_key: first as u32,
                num_keys: (end - first) as u32,
                part: 0,
                num_parts: 1,
                first_part: 0,
            });
            row += num_rows;
        }
    }

    fn close_launch(&mut self, launch: &mut Launch) {
        if launch.first < self.decode.len() {
            self.decode_launches.push(launch.first..self.decode.len());
        }
        *launch = Launch { first: self.decode.len(), num_parts: 0 };
    }
}

/// The launch that items are added to.
#[derive(Default)]
struct Launch {
    first: usize,
    num_parts: usize,
}

fn check_span(span: &Span) -> Result<(), String> {
    if span.num_rows > span.context_len {
        return Err(format!("{} rows of a context of {}", span.num_rows, span.context_len));
    }
    Ok(())
}

/// The keys that a row of a span sees.
fn visible(shape: &Shape, span: &Span, row: u32) -> Range<usize> {
    let end = (span.context_len - span.num_rows + row) as usize + 1;
    let start = if shape.window > 0 { end.saturating_sub(shape.window) } else { 0 };
    start..end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(sizes: &[(u32, u32)]) -> Vec<Span> {
        let mut first_row = 0;
        let span = |&(num_rows, context_len): &(u32, u32)| {
            let span = Span { first_row, num_rows, first_page: 0, context_len };
            first_row += num_rows;
            span
        };
        sizes.iter().map(span).collect()
    }

    /// Every row meets each of its keys in exactly one item, and nothing else.
    fn check(shape: &Shape, spans: &[Span]) {
        let mut plan = Plan::default();
        plan.fill(shape, spans).unwrap();
        for (span_idx, span) in spans.iter().enumerate() {
            for row in 0..span.num_rows {
                let keys = visible(shape, span, row);
                let mut seen = vec![0; span.context_len as usize];
                for item in plan.decode.iter().chain(&plan.prefill) {
                    let rows = item.first_row..item.first_row + item.num_rows;
                    if item.span as usize != span_idx || !rows.contains(&(span.first_row + row)) {
                        continue;
                    }
                    // NOTE: prefill masks what single rows do not see.
                    let first = item.first_key as usize;
                    let end = keys.end.min(first + item.num_keys as usize);
                    seen[keys.start.max(first)..end].iter_mut().for_each(|count| *count += 1);
                }
                for (key, count) in seen.iter().enumerate() {
                    let expected = usize::from(keys.contains(&key));
                    assert_eq!(*count, expected, "span {span_idx}, row {row}, key {key}");
                }
            }
        }
        check_decode(shape, &plan);
    }

    /// Parts of a row follow each other, in one launch, in places of the workspace of their own.
    fn check_decode(shape: &Shape, plan: &Plan) {
        let mut next = 0;
        for launch in &plan.decode_launches {
            assert_eq!(launch.start, next);
            next = launch.end;
            let (mut idx, mut num_parts) = (launch.start, 0);
            while idx < launch.end {
                let head = plan.decode[idx];
                for part in 0..head.num_parts {
                    let item = plan.decode[idx + part as usize];
                    assert!(idx + (part as usize) < launch.end);
                    assert_eq!((item.first_row, item.part), (head.first_row, part));
                    assert_eq!((item.num_parts, item.first_part), (head.num_parts, num_parts));
                    assert_eq!(item.num_rows, 1);
                    let first = item.first_key as usize;
                    let end = first + item.num_keys as usize;
                    assert!(first < end && first / CHUNK == (end - 1) / CHUNK);
                }
                num_parts += if head.num_parts > 1 { head.num_parts } else { 0 };
                idx += head.num_parts as usize;
            }
            assert!(num_parts as usize <= shape.parts_max);
        }
        assert_eq!(next, plan.decode.len());
        assert!(plan.prefill.is_sorted_by(|a, b| a.num_keys >= b.num_keys));
    }

    #[test]
    fn every_row_meets_each_key_once() {
        let all = spans(&[(1, 1), (1, 256), (1, 257), (1, 1030), (2, 600), (5, 5), (40, 700)]);
        for window in [0, 1, 8, 256, 300] {
            for rows_max in [1, 16, 32] {
                for parts_max in [5, 8, 100] {
                    check(&Shape { window, rows_max, parts_max }, &all);
                }
            }
        }
        check(&Shape { window: 0, rows_max: 8, parts_max: 0 }, &[]);
    }

    #[test]
    fn more_parts_than_the_workspace_holds_are_an_error() {
        let shape = Shape { window: 0, rows_max: 8, parts_max: 3 };
        let error = Plan::default().fill(&shape, &spans(&[(1, 1030)])).unwrap_err();
        assert!(error.contains("1030") && error.contains('5') && error.contains('3'), "{error}");
        let error = Plan::default().fill(&shape, &spans(&[(3, 2)])).unwrap_err();
        assert!(error.contains("3 rows"), "{error}");
    }

    #[test]
    fn items_are_those_of_the_header() {
        assert_eq!((size_of::<Span>(), size_of::<Item>()), (16, 32));
    }
}
