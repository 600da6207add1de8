//! The engine's thread: takes what has come in, steps, and hands the events out.

use std::any::Any;
use std::collections::BTreeMap;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crate::engine::Engine;
use crate::error::Error;
use crate::handle::shared::{
    Call, EngineState, Inbox, LiveRequest, Shared, StepTimes, Submitted, WorkCounts,
};
use crate::handle::stream::Event;
use crate::request::{FinishReason, RequestId, RequestOutput};

/// An engine and the requests it serves.
pub(super) struct Worker {
    engine: Engine,
    shared: Arc<Shared>,
    live: BTreeMap<RequestId, LiveRequest>,
    counts: WorkCounts,
    step_times: StepTimes,
    /// Requests that no longer wait, and the tokens of their prompts, since the last publication.
    num_started: usize,
    num_started_tokens: usize,
    /// Live requests that have a token.
    num_running: usize,
    /// What was taken from the inbox, and what the step gave; reused.
    submitted: Vec<Submitted>,
    calls: Vec<Call>,
    outputs: Vec<RequestOutput>,
}

/// What the inbox says about going on.
struct Orders {
    is_draining: bool,
    /// Nothing may go on any longer.
    is_late: bool,
}

impl Worker {
    pub(super) fn new(engine: Engine, shared: Arc<Shared>) -> Worker {
        Worker {
            engine,
            shared,
            live: BTreeMap::new(),
            counts: WorkCounts::default(),
            step_times: StepTimes::default(),
            num_started: 0,
            num_started_tokens: 0,
            num_running: 0,
            submitted: Vec::new(),
            calls: Vec::new(),
            outputs: Vec::new(),
        }
    }

    /// Serves until the engine is drained or dies; every request has its last event then.
    pub(super) fn run(mut self) {
        let state = match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Ok(())) => EngineState::Stopped,
            Ok(Err(error)) => EngineState::Dead(error.to_string()),
            Err(panic) => {
                let message = panic_message(&*panic);
                EngineState::Dead(format!("the engine's thread panicked: {message}"))
            }
        };
        self.end(state);
    }

    fn serve(&mut self) -> Result<(), Error> {
        loop {
            let Orders { is_draining, is_late } = self.take_work();
            for call in mem::take(&mut self.calls) {
                call(&mut self.engine);
            }
            self.add_submitted();
            if self.shared.take_cancels() || is_late {
                self.cancel(is_late);
            }
            if is_draining && self.live.is_empty() {
                let last_call = self.shared.lock().last_call.take();
                if let Some(call) = last_call {
                    call(&mut self.engine);
                }
                return Ok(());
            }
            self.step()?;
        }
    }

    /// Publishes the counters and takes what has come in; where there is nothing to do, waits.
    fn take_work(&mut self) -> Orders {
        let shared = Arc::clone(&self.shared);
        let mut inbox = shared.lock();
        self.publish(&mut inbox);
        if self.engine.is_idle() {
            inbox = shared.wait_for_work(inbox);
        }
        mem::swap(&mut self.submitted, &mut inbox.submitted);
        mem::swap(&mut self.calls, &mut inbox.calls);
        let now = Instant::now();
        inbox.stats.last_beat = now;
        Orders {
            is_draining: inbox.state == EngineState::Draining,
            is_late: inbox.deadline.is_some_and(|deadline| deadline <= now),
        }
    }

    fn publish(&mut self, inbox: &mut Inbox) {
        inbox.stats.num_waiting -= mem::take(&mut self.num_started);
        inbox.stats.num_waiting_tokens -= mem::take(&mut self.num_started_tokens);
        inbox.stats.num_running = self.num_running;
        inbox.stats.counts = self.counts;
        inbox.stats.status = self.engine.status();
        inbox.stats.step_times = self.step_times;
    }

    fn add_submitted(&mut self) {
        self.submitted.reverse();
        // A request stays in the list until the engine has it, so that it has its last event even
        // if the engine panics over it.
        while let Some(submitted) = self.submitted.last_mut() {
            let added = match submitted.live.flag.is_raised() {
                true => None,
                false => Some(self.engine.add_request(mem::take(&mut submitted.request))),
            };
            let Some(Submitted { live, .. }) = self.submitted.pop() else { return };
            match added {
                None => self.retire(live, Event::Cancelled),
                Some(Ok(id)) => drop(self.live.insert(id, live)),
                Some(Err(Error::Busy(message))) => self.retire(live, Event::Busy(message)),
                Some(Err(error)) => self.retire(live, Event::Refused(error.to_string())),
            }
        }
    }

    /// Cancels the requests whose flag is raised, or all.
    fn cancel(&mut self, is_late: bool) {
        let cancelled = self.live.iter().filter(|(_, live)| is_late || live.flag.is_raised());
        let ids: Vec<RequestId> = cancelled.map(|(id, _)| *id).collect();
        for id in ids {
            self.engine.cancel(id);
            if let Some(live) = self.live.remove(&id) {
                self.retire(live, Event::Cancelled);
            }
        }
    }

    fn step(&mut self) -> Result<(), Error> {
        if !self.engine.is_idle() {
            self.counts.num_steps += 1;
            let start = Instant::now();
            let result = self.engine.step(&mut self.outputs);
            self.step_times.add(start.elapsed());
            let mut outputs = mem::take(&mut self.outputs);
            outputs.drain(..).for_each(|output| self.deliver(output));
            self.outputs = outputs;
            result?;
        }
        // NOTE: else this thread would park with them.
        if self.engine.is_idle() && !self.live.is_empty() {
            let num_lost = self.live.len();
            return Err(Error::Engine(format!("the engine has lost {num_lost} requests")));
        }
        Ok(())
    }

    fn deliver(&mut self, output: RequestOutput) {
        let (id, is_end) = (output.id, output.finish_reason.is_some());
        // NOTE: requests that a call added to the engine have no stream.
        let Some(live) = self.live.get_mut(&id) else { return };
        if mem::take(&mut live.is_waiting) {
            self.num_started += 1;
            self.num_started_tokens += live.prompt_len;
            self.num_running += 1;
        }
        live.num_choices_left -= usize::from(is_end);
        let is_last = live.num_choices_left == 0;
        self.counts.num_tokens += u64::from(output.token.is_some());
        match output.finish_reason {
            None => {}
            Some(FinishReason::Stop) => self.counts.num_stop += 1,
            Some(FinishReason::Length) => self.counts.num_length += 1,
            Some(FinishReason::Failed(_)) => self.counts.num_failed += 1,
        }
        (live.sink)(Event::Output(output));
        if is_last && let Some(live) = self.live.remove(&id) {
            self.retire(live, Event::Finished);
        }
    }

    /// Gives a request its last event.
    fn retire(&mut self, mut live: LiveRequest, last: Event) {
        match live.is_waiting {
            true => {
                self.num_started += 1;
                self.num_started_tokens += live.prompt_len;
            }
            false => self.num_running -= 1,
        }
        self.counts.count(&last);
        (live.sink)(last);
    }

    /// Refuses what comes from now on, and gives those who wait for anything the reason.
    fn end(&mut self, state: EngineState) {
        let last = match &state {
            EngineState::Dead(reason) => Event::Died(reason.clone()),
            _ => Event::Cancelled,
        };
        let mut inbox = self.shared.lock();
        inbox.state = state;
        self.submitted.append(&mut inbox.submitted);
        self.calls.append(&mut inbox.calls);
        drop(inbox);
        self.calls.clear();
        let waiting = mem::take(&mut self.submitted).into_iter().map(|submitted| submitted.live);
        let live: Vec<_> = mem::take(&mut self.live).into_values().chain(waiting).collect();
        for live in live {
            // A sink may be what has panicked.
            drop(catch_unwind(AssertUnwindSafe(|| self.retire(live, last.clone()))));
        }
        let shared = Arc::clone(&self.shared);
        self.publish(&mut shared.lock());
        shared.set_over();
    }
}

/// What a panic said.
pub(super) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
