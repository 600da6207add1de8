//! Which rows the next step computes. Knows no device, no clock and no randomness.
//!
//! Decode rows come first, then prefill in chunks, up to a token budget. Requests start in the
//! order of their arrival, and only with all pages they can ever need, so that a started request
//! always ends.

use std::collections::VecDeque;

use crate::batch::Batch;
use crate::error::Error;
use crate::kernels::abi::SequenceSpan;
use crate::kv_cache::{PagePool, num_pages, slot};
use crate::request::{RequestId, RequestOutput};
use crate::sampling::Sample;
use crate::sequence::Sequence;

/// Bounds of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Rows of one step.
    pub batch_tokens_max: usize,
    /// Sequences that run at once; at most `batch_tokens_max`.
    pub sequences_max: usize,
    /// Slots of a page.
    pub page_size: usize,
}

/// Sequences that wait and that run.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// What the step at hand computes, in the order of its spans.
    scheduled: Vec<Scheduled>,
}

#[derive(Clone, Copy, Debug)]
struct Scheduled {
    running_idx: usize,
    num_tokens: usize,
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits) -> Scheduler {
        assert!(limits.sequences_max > 0 && limits.page_size > 0);
        assert!(limits.sequences_max <= limits.batch_tokens_max, "every decode row needs a place");
        Scheduler {
            limits,
            waiting: VecDeque::new(),
            running: Vec::with_capacity(limits.sequences_max),
            scheduled: Vec::with_capacity(limits.sequences_max),
        }
    }

    /// Queues a sequence; refuses one that the pool could never hold.
    pub fn add(&mut self, sequence: Sequence, pool: &PagePool) -> Result<(), Error> {
        let num_needed = self.num_pages_needed(&sequence);
        if num_needed > pool.num_pages() {
            return Err(Error::Request(format!(
                "the request may grow to {} tokens, which take {num_needed} pages of {} tokens; \
                 the KV cache has {}; ask for fewer tokens or give the cache more pages",
                sequence.len_max,
                self.limits.page_size,
                pool.num_pages()
            )));
        }
        self.waiting.push_back(sequence);
        Ok(())
    }

    /// Ends a sequence early; false where there is none of that id.
    pub fn cancel(&mut self, id: RequestId, pool: &mut PagePool) -> bool {
        assert!(self.scheduled.is_empty(), "no sequence ends within a step");
        if let Some(idx) = self.waiting.iter().position(|sequence| sequence.id == id) {
            self.waiting.remove(idx);
            return true;
        }
        let Some(idx) = self.running.iter().position(|sequence| sequence.id == id) else {
            return false;
        };
        let sequence = self.running.remove(idx);
        release(sequence, pool);
        true
    }

    /// Whether nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Fills `batch` (all but its angles) with the next step's rows; empty where there are none.
    pub fn schedule(&mut self, pool: &mut PagePool, batch: &mut Batch) {
        assert!(self.scheduled.is_empty(), "the last step was not committed");
        batch.clear();
        let mut budget = self.limits.batch_tokens_max;
        for decoding in [true, false] {
            for running_idx in 0..self.running.len() {
                if self.running[running_idx].is_decoding() == decoding {
                    budget -= self.schedule_one(running_idx, budget, batch);
                }
            }
        }
        while budget > 0 && self.admit(pool) {
            budget -= self.schedule_one(self.running.len() - 1, budget, batch);
        }
    }

    /// The sequences of the batch's spans, in order.
    pub fn scheduled(&self) -> impl Iterator<Item = &Sequence> {
        self.scheduled.iter().map(|scheduled| &self.running[scheduled.running_idx])
    }

    /// The sequences of the batch's logit rows, in order.
    pub fn sampled(&self) -> impl Iterator<Item = &Sequence> {
        let is_sampled = |scheduled: &&Scheduled| {
            self.running[scheduled.running_idx].num_pending() == scheduled.num_tokens
        };
        let sampled = self.scheduled.iter().filter(is_sampled);
        sampled.map(|scheduled| &self.running[scheduled.running_idx])
    }

    /// Takes over the results of a step, `samples` in the order of the logit rows.
    pub fn commit(
        &mut self,
        samples: &[Option<Sample>],
        pool: &mut PagePool,
        outputs: &mut Vec<RequestOutput>,
    ) {
        let mut samples = samples.iter();
        for scheduled in self.scheduled.drain(..) {
            let sequence = &mut self.running[scheduled.running_idx];
            sequence.num_computed += scheduled.num_tokens;
            if sequence.num_pending() > 0 {
                continue;
            }
            let sample = samples.next().expect("one sample for each logit row").as_ref();
            let token = sample.map(|sample| sample.token);
            sequence.push(token);
            outputs.push(RequestOutput {
                id: sequence.id,
                token,
                logprob: sample.map_or(f32::NEG_INFINITY, |sample| sample.logprob),
                top_logprobs: sample.map_or(Vec::new(), |sample| sample.top_logprobs.clone()),
                finish_reason: sequence.finish_reason,
            });
        }
        assert!(samples.next().is_none(), "more samples than logit rows");
        let mut idx = 0;
        while idx < self.running.len() {
            match self.running[idx].finish_reason {
                Some(_) => release(self.running.remove(idx), pool),
                None => idx += 1,
            }
        }
    }

    /// Starts the first waiting sequence if there is room and pages for it.
    fn admit(&mut self, pool: &mut PagePool) -> bool {
        if self.running.len() == self.limits.sequences_max {
            return false;
        }
        let Some(sequence) = self.waiting.front() else {
            return false;
        };
        let num_needed = self.num_pages_needed(sequence);
        let Some(mut sequence) = self.waiting.pop_front() else {
            return false;
        };
        if !pool.allocate_many(num_needed, &mut sequence.pages) {
            self.waiting.push_front(sequence);
            return false;
        }
        self.running.push(sequence);
        true
    }

    fn num_pages_needed(&self, sequence: &Sequence) -> usize {
        num_pages(sequence.num_cached_max(), self.limits.page_size)
    }

    /// Appends up to `budget` pending tokens of a sequence to the batch; returns how many.
    fn schedule_one(&mut self, running_idx: usize, budget: usize, batch: &mut Batch) -> usize {
        let sequence = &self.running[running_idx];
        let num_tokens = sequence.num_pending().min(budget);
        if num_tokens == 0 {
            return 0;
        }
        let positions = sequence.num_computed..sequence.num_computed + num_tokens;
        if positions.end == sequence.tokens.len() {
            batch.logit_rows.push((batch.num_rows() + num_tokens - 1) as u32);
        }
        append_span(batch, &sequence.tokens, positions, &sequence.pages, self.limits.page_size);
        self.scheduled.push(Scheduled { running_idx, num_tokens });
        num_tokens
    }
}

/// Appends the tokens at `positions` of a sequence as one span; asks for no logits.
pub(crate) fn append_span(
    batch: &mut Batch,
    tokens: &[u32],
    positions: std::ops::Range<usize>,
    pages: &[crate::kv_cache::Page],
    page_size: usize,
) {
    batch.spans.push(SequenceSpan {
        first_row: batch.num_rows() as u32,
        num_rows: positions.len() as u32,
        context_len: positions.end as u32,
        first_page: batch.page_table.len() as u32,
    });
    let num_used = num_pages(positions.end, page_size);
    batch.page_table.extend(pages[..num_used].iter().map(|page| page.id()));
    for position in positions {
        batch.tokens.push(tokens[position]);
        batch.positions.push(position as u32);
        batch.slots.push(slot(pages, position, page_size));
    }
}

fn release(sequence: Sequence, pool: &mut PagePool) {
    sequence.pages.into_iter().for_each(|page| pool.free(page));
}
