//! Running requests through an engine, with a clock.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use super::samples::Samples;
use super::workload::Workload;
use crate::engine::Engine;
use crate::request::{FinishReason, RequestId, RequestOutput};

/// Requests that are kept at work.
pub(super) struct Load<'a> {
    pub(super) engine: &'a mut Engine,
    pub(super) workload: &'a Workload,
    /// Requests that are in the engine at once.
    pub(super) concurrency: usize,
}

/// What was measured in one run or several.
#[derive(Default)]
pub(super) struct Measurement {
    pub(super) elapsed: Duration,
    pub(super) num_requests: usize,
    pub(super) num_prompt: usize,
    /// Prompt tokens that were found in the KV cache.
    pub(super) num_cached: usize,
    pub(super) num_output: usize,
    /// From the start of a run to the last first token.
    pub(super) prompt_time: Duration,
    /// Tokens that came after `prompt_time`.
    pub(super) num_decoded: usize,
    /// Milliseconds from handing a request over to its first token.
    pub(super) ttft: Samples,
    /// Milliseconds between two tokens of a request that follow each other.
    pub(super) tpot: Samples,
}

/// A request in the engine.
struct Live {
    submitted: Instant,
    last_token: Option<Instant>,
}

impl Load<'_> {
    /// Runs the requests `idxs`, a new one whenever one ends, and adds what it measures.
    /// `on_end` hears how many have ended.
    pub(super) fn run(
        &mut self,
        idxs: Range<usize>,
        measurement: &mut Measurement,
        on_end: &mut dyn FnMut(usize),
    ) -> anyhow::Result<()> {
        let num_requests = idxs.len();
        let (mut waiting, mut live) = (idxs, HashMap::new());
        let mut outputs = Vec::new();
        let (mut num_output, mut num_first) = (0, 0);
        let (mut prompt_time, mut num_by_then) = (Duration::ZERO, 0);
        let start = Instant::now();
        loop {
            let num_free = self.concurrency - live.len();
            for idx in waiting.by_ref().take(num_free) {
                let request = self.workload.request(idx);
                measurement.num_prompt += request.prompt_ids.len();
                let submitted = Instant::now();
                let id = self.engine.add_request(request)?;
                live.insert(id, Live { submitted, last_token: None });
            }
            if live.is_empty() {
                break;
            }
            ensure!(!self.engine.is_idle(), "the engine forgot {} requests", live.len());
            outputs.clear();
            self.engine.step(&mut outputs)?;
            let now = Instant::now();
            let num_live = live.len();
            for output in &outputs {
                num_first += usize::from(measurement.record(output, now, &mut live)?);
            }
            num_output += outputs.len();
            if num_first > 0 {
                (prompt_time, num_by_then, num_first) = (now - start, num_output, 0);
            }
            if live.len() < num_live {
                on_end(num_requests - waiting.len() - live.len());
            }
        }
        measurement.elapsed += start.elapsed();
        measurement.num_requests += num_requests;
        measurement.num_output += num_output;
        measurement.prompt_time += prompt_time;
        measurement.num_decoded += num_output - num_by_then;
        Ok(())
    }
}

impl Measurement {
    /// Notes one token that came at `now`; whether it was the first of its request.
    fn record(
        &mut self,
        output: &RequestOutput,
        now: Instant,
        live: &mut HashMap<RequestId, Live>,
    ) -> anyhow::Result<bool> {
        let milliseconds = |from: Instant| (now - from).as_secs_f64() * 1e3;
        let Some(request) = live.get_mut(&output.id) else {
            bail!("the engine gave a token of request {}, which has ended", output.id.0);
        };
        if let Some(FinishReason::Failed(failure)) = output.finish_reason {
            bail!(failure.message());
        }
        let last_token = request.last_token.replace(now);
        match last_token {
            None => {
                self.ttft.push(milliseconds(request.submitted));
                self.num_cached += output.num_cached;
            }
            Some(last_token) => self.tpot.push(milliseconds(last_token)),
        }
        if output.finish_reason.is_some() {
            live.remove(&output.id);
        }
        Ok(last_token.is_none())
    }
}
