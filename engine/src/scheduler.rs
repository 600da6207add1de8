//! Which rows the next step computes. Knows no device, no clock and no randomness.
//!
//! Sequences are served in the order of their arrival. A step takes the next row of every sequence
//! that has one token to compute, then prompts in chunks, up to a token budget, then starts waiting
//! sequences as long as there is room for all tokens they have. Where a running sequence needs a
//! page and none is left, the latest arrival gives its pages back and waits again; it computes them
//! anew from its tokens, as far as they are not found in the cache by then. So those that run
//! always arrived before those that wait.
//!
//! Fairness: the earliest of all unfinished sequences computes at least one token in every step and
//! is never preempted. A sequence therefore ends at the latest after as many steps as it and the
//! unfinished ones before it can have tokens, added up.

use std::collections::VecDeque;

use crate::batch::{Batch, PageCopy};
use crate::error::Error;
use crate::fault::{Fault, is_planted};
use crate::kernels::abi::SequenceSpan;
use crate::kv_cache::{Keep, PagePool, num_pages, slot};
use crate::request::{RequestId, RequestOutput};
use crate::sampling::Sample;
use crate::sequence::Sequence;

/// Bounds of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Rows of one step.
    pub batch_tokens_max: usize,
    /// Rows of one sequence in one step.
    pub chunk_tokens_max: usize,
    /// Sequences that run at once; at most `batch_tokens_max`.
    pub sequences_max: usize,
}

/// Sequences that wait and that run, both in the order of arrival.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// What the step at hand computes, in the order of its spans.
    scheduled: Vec<Scheduled>,
    num_preemptions: u64,
}

#[derive(Clone, Copy, Debug)]
struct Scheduled {
    running_idx: usize,
    num_tokens: usize,
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits) -> Scheduler {
        assert!(limits.sequences_max > 0 && limits.chunk_tokens_max > 0);
        assert!(limits.sequences_max <= limits.batch_tokens_max, "every decode row needs a place");
        Scheduler {
            limits,
            waiting: VecDeque::new(),
            running: Vec::with_capacity(limits.sequences_max),
            scheduled: Vec::with_capacity(limits.sequences_max),
            num_preemptions: 0,
        }
    }

    /// Refuses a sequence of up to `len_max` tokens where the pool could never hold it.
    pub fn check_fits(&self, len_max: usize, pool: &PagePool) -> Result<(), Error> {
        // The last token is never computed.
        let num_needed = num_pages(len_max - 1, pool.page_size());
        if num_needed <= pool.num_pages() {
            return Ok(());
        }
        Err(Error::Request(format!(
            "the request may grow to {len_max} tokens, which take {num_needed} pages of {} \
             tokens; the KV cache has {}; ask for fewer tokens or give the cache more pages",
            pool.page_size(),
            pool.num_pages()
        )))
    }

    /// Queues a sequence that fits and arrived after all others.
    pub fn add(&mut self, sequence: Sequence) {
        let last = self.waiting.back().or(self.running.last());
        assert!(last.is_none_or(|last| last.arrival() < sequence.arrival()), "arrivals ascend");
        self.waiting.push_back(sequence);
    }

    /// Ends the answers to a request early and appends them to `ended`; false where there are none.
    pub fn cancel(
        &mut self,
        id: RequestId,
        pool: &mut PagePool,
        ended: &mut Vec<Sequence>,
    ) -> bool {
        assert!(self.scheduled.is_empty(), "no sequence ends within a step");
        let first = ended.len();
        ended.extend(self.running.extract_if(.., |sequence| sequence.id == id));
        for sequence in &mut ended[first..] {
            if is_planted(Fault::LeakOnCancel) {
                let _ = sequence.pages.pop();
            }
            release(sequence, pool);
        }
        while let Some(idx) = self.waiting.iter().position(|sequence| sequence.id == id) {
            ended.extend(self.waiting.remove(idx));
        }
        let forgotten = ended[first..].iter_mut().filter(|sequence| sequence.session.is_none());
        forgotten.for_each(|sequence| sequence.kept.forget(pool));
        ended.len() > first
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

    /// How often a sequence gave its pages back to one before it.
    pub fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    /// Fills `batch` (all but its angles) with the next step's rows; empty where there are none.
    pub fn schedule(&mut self, pool: &mut PagePool, batch: &mut Batch) {
        assert!(self.scheduled.is_empty(), "the last step was not committed");
        batch.clear();
        let mut budget = self.limits.batch_tokens_max;
        let mut running_idx = 0;
        while running_idx < self.running.len() {
            if self.running[running_idx].num_pending() == 1 && self.make_room(running_idx, pool) {
                budget -= self.schedule_one(running_idx, budget, pool, batch);
            }
            running_idx += 1;
        }
        for running_idx in 0..self.running.len() {
            if self.running[running_idx].num_pending() > 1 {
                budget -= self.schedule_one(running_idx, budget, pool, batch);
            }
        }
        while budget > 0 && self.admit(pool, &mut batch.copies) {
            budget -= self.schedule_one(self.running.len() - 1, budget, pool, batch);
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

    /// Works out what the grammars of the sampled sequences allow.
    pub fn fill_masks(&mut self) {
        for scheduled in &self.scheduled {
            let sequence = &mut self.running[scheduled.running_idx];
            if sequence.num_pending() == scheduled.num_tokens {
                sequence.fill_mask();
            }
        }
    }

    /// Takes over the results of a step, `samples` in the order of the logit rows. Sequences that
    /// end with it are appended to `ended`.
    pub fn commit(
        &mut self,
        samples: &[Option<Sample>],
        pool: &mut PagePool,
        outputs: &mut Vec<RequestOutput>,
        ended: &mut Vec<Sequence>,
    ) {
        let mut samples = samples.iter();
        for scheduled in self.scheduled.drain(..) {
            let sequence = &mut self.running[scheduled.running_idx];
            let num_before = sequence.num_computed;
            sequence.num_computed += scheduled.num_tokens;
            sequence.register_pages(num_before, pool);
            if sequence.num_pending() > 0 {
                continue;
            }
            let sample = samples.next().expect("one sample for each logit row").as_ref();
            sequence.push(sample);
            outputs.push(RequestOutput {
                id: sequence.id,
                choice_idx: sequence.choice_idx,
                token: sample.map(|sample| sample.token),
                logprob: sample.map_or(f32::NEG_INFINITY, |sample| sample.logprob),
                top_logprobs: sample.map_or(Vec::new(), |sample| sample.top_logprobs.clone()),
                num_cached: sequence.num_cached,
                finish_reason: sequence.finish_reason,
            });
        }
        assert!(samples.next().is_none(), "more samples than logit rows");
        let first = ended.len();
        ended.extend(self.running.extract_if(.., |sequence| sequence.finish_reason.is_some()));
        ended[first..].iter_mut().for_each(|sequence| release(sequence, pool));
    }

    /// Gives a running sequence the page for its next token, if need be by preempting the latest
    /// arrivals; false where that was the sequence itself.
    fn make_room(&mut self, running_idx: usize, pool: &mut PagePool) -> bool {
        while self.running[running_idx].needs_page(pool.page_size()) {
            if let Some(page) = pool.allocate() {
                self.running[running_idx].pages.push(page);
                continue;
            }
            let last_idx = self.running.len() - 1;
            let victim = if is_planted(Fault::PreemptsTheNeedy) { running_idx } else { last_idx };
            self.preempt(victim, pool);
            if victim == running_idx {
                return false;
            }
        }
        true
    }

    /// Sends a running sequence back to the queue; what it computed may be found again.
    fn preempt(&mut self, running_idx: usize, pool: &mut PagePool) {
        let mut sequence = self.running.remove(running_idx);
        sequence.release_pages(pool, Keep::Content);
        if is_planted(Fault::PreemptionSkipsToken) {
            sequence.kept.num_tokens += 1;
        }
        self.num_preemptions += 1;
        if is_planted(Fault::PreemptedGoesLast) {
            return self.waiting.push_back(sequence);
        }
        self.waiting.push_front(sequence);
    }

    /// Starts the first waiting sequence if there is room for it.
    fn admit(&mut self, pool: &mut PagePool, copies: &mut Vec<PageCopy>) -> bool {
        if self.running.len() == self.limits.sequences_max {
            return false;
        }
        let Some(sequence) = self.waiting.front_mut() else { return false };
        let parent = self.running.iter().find(|running| running.arrival() == (sequence.id, 0));
        match parent {
            // Its prompt is this one's, and will be shared.
            Some(parent) if parent.num_computed < parent.num_prompt => return false,
            Some(parent) if !sequence.has_run => sequence.fork_pages(parent, pool),
            _ => sequence.find_pages(pool),
        }
        // NOTE: a page for each that runs, so that a start does not preempt at once.
        if !sequence.reserve_pages(self.running.len(), pool, copies) {
            return false;
        }
        if !sequence.has_run {
            sequence.has_run = true;
            sequence.num_cached = sequence.num_computed;
        }
        self.running.extend(self.waiting.pop_front());
        true
    }

    /// Appends up to `budget` pending tokens of a sequence to the batch; returns how many.
    fn schedule_one(
        &mut self,
        running_idx: usize,
        budget: usize,
        pool: &PagePool,
        batch: &mut Batch,
    ) -> usize {
        let sequence = &self.running[running_idx];
        let num_tokens = sequence.num_pending().min(budget).min(self.limits.chunk_tokens_max);
        if num_tokens == 0 {
            return 0;
        }
        let positions = sequence.num_computed..sequence.num_computed + num_tokens;
        if positions.end == sequence.tokens.len() {
            batch.logit_rows.push((batch.num_rows() + num_tokens - 1) as u32);
        }
        append_span(batch, &sequence.tokens, positions, &sequence.pages, pool.page_size());
        self.scheduled.push(Scheduled { running_idx, num_tokens });
        num_tokens
    }

    /// Checks what must hold between any two steps.
    pub fn check(&self, pool: &PagePool) -> Result<(), String> {
        let all = || self.running.iter().chain(&self.waiting);
        if !all().is_sorted_by_key(Sequence::arrival) {
            let order: Vec<_> = all().map(Sequence::arrival).collect();
            let num_running = self.running.len();
            return Err(format!("not in order of arrival, the first {num_running} run: {order:?}"));
        }
        if self.running.len() > self.limits.sequences_max {
            return Err(format!("{} sequences run", self.running.len()));
        }
        for sequence in &self.running {
            let (num_held, num_tokens) = (sequence.pages.len(), sequence.tokens.len());
            let num_computed = num_pages(sequence.num_computed, pool.page_size());
            if num_held < num_computed || num_held > num_pages(num_tokens, pool.page_size()) {
                return Err(format!("{sequence:?} holds {num_held} pages"));
            }
            if sequence.num_pending() == 0 || sequence.finish_reason.is_some() {
                return Err(format!("{sequence:?} runs with nothing to do"));
            }
        }
        if let Some(sequence) = self.waiting.iter().find(|sequence| !sequence.pages.is_empty()) {
            return Err(format!("{sequence:?} waits and holds pages"));
        }
        pool.check(self.running.iter().map(|sequence| sequence.pages.len()).sum())
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

/// Gives the pages of a sequence that ended back; a session may want them again.
fn release(sequence: &mut Sequence, pool: &mut PagePool) {
    let keep = if sequence.session.is_some() { Keep::Content } else { Keep::Nothing };
    sequence.release_pages(pool, keep);
}
