//! What one HTTP request asks of the engine, and its events on their way to the client.
//!
//! The engine's thread puts events into a queue, which holds at most what the request may generate;
//! the handler takes all that are there at once. Dropping a [`Generation`] calls everything off,
//! which is what happens when the client goes away.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, timeout_at};

use super::app::App;
use super::error::ApiError;
use super::metrics::{Outcome, RequestMeter};
use super::openai::Usage;
use crate::handle::{Cancellation, Event, Submission};
use crate::request::{Failure, FinishReason, Request, RequestOutput};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::stream::{StopStrings, TextStream};

/// Requests to the engine that belong together, one for each prompt.
pub(super) struct Generation {
    app: Arc<App>,
    events: UnboundedReceiver<(usize, Event)>,
    cancellations: Vec<Cancellation>,
    /// Events that were taken out of the queue; the vector is reused.
    batch: Vec<(usize, Event)>,
    num_choices: usize,
    has_session: bool,
    /// Requests without their last event.
    num_open: usize,
    /// Whether the counts of a prompt's tokens are in.
    has_counts: Vec<bool>,
    prompt_lens: Vec<usize>,
    usage: Usage,
    /// For the first token, then for the whole answer.
    deadline: Instant,
    request_deadline: Instant,
    has_output: bool,
    /// `None` once the outcome is counted.
    meter: Option<RequestMeter>,
}

/// What [`Generation::next`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    Outputs,
    /// Nothing for a while, so that a client may want a sign of life.
    Silence,
    /// Every choice has its end, and all outputs were given.
    Finished,
    /// Somebody called it off.
    Cancelled,
}

/// Outputs of choices, by the index of their prompt.
pub(super) type Outputs = Vec<(usize, RequestOutput)>;

/// Events that are taken out of the queue at once.
const BATCH_MAX: usize = 256;

/// Time without events after which a stream says that it lives.
const SILENCE: Duration = Duration::from_secs(15);

impl Generation {
    /// Queues `requests`, all or none of them; they have equal numbers of choices.
    pub(super) fn start(
        app: &Arc<App>,
        requests: Vec<Request>,
        meter: RequestMeter,
    ) -> Result<Generation, ApiError> {
        let (sender, events) = unbounded_channel();
        let now = Instant::now();
        let timeouts = app.options.timeouts;
        let mut generation = Generation {
            app: Arc::clone(app),
            events,
            cancellations: Vec::with_capacity(requests.len()),
            batch: Vec::new(),
            num_choices: requests.first().map_or(1, |request| request.num_choices),
            has_session: requests.iter().any(|request| request.session.is_some()),
            num_open: 0,
            has_counts: vec![false; requests.len()],
            prompt_lens: requests.iter().map(|request| request.prompt_ids.len()).collect(),
            usage: Usage::default(),
            deadline: now + timeouts.queue.min(timeouts.request),
            request_deadline: now + timeouts.request,
            has_output: false,
            meter: Some(meter),
        };
        for (idx, request) in requests.into_iter().enumerate() {
            let sender = sender.clone();
            // NOTE: a receiver that is gone has called the request off.
            let sink = Box::new(move |event| drop(sender.send((idx, event))));
            let submission = app.handle.submit_with(request, sink).map_err(ApiError::from);
            match submission.and_then(accepted) {
                Ok(cancellation) => generation.cancellations.push(cancellation),
                Err(error) => return Err(generation.fail(error)),
            }
            generation.num_open += 1;
        }
        Ok(generation)
    }

    /// Waits for news, and puts all outputs that are there into `outputs`.
    pub(super) async fn next(&mut self, outputs: &mut Outputs) -> Result<News, ApiError> {
        outputs.clear();
        if self.num_open == 0 {
            self.end(Outcome::Finished);
            return Ok(News::Finished);
        }
        if self.batch.is_empty() {
            let wake = self.deadline.min(Instant::now() + SILENCE);
            let receiving = self.events.recv_many(&mut self.batch, BATCH_MAX);
            match timeout_at(wake, receiving).await {
                Ok(0) => return Err(self.fail(engine_gone())),
                Ok(_) => {}
                Err(_) if Instant::now() < self.deadline => return Ok(News::Silence),
                Err(_) => {
                    let error = self.late();
                    return Err(self.fail(error));
                }
            }
        }
        self.sort(outputs)
    }

    /// Counts of tokens so far.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    /// Calls the only request off from elsewhere.
    pub(super) fn cancellation(&self) -> Option<Cancellation> {
        self.cancellations.first().cloned()
    }

    /// Ends the generation for a reason that lies outside of it.
    pub(super) fn fail(&mut self, error: ApiError) -> ApiError {
        self.end(outcome(&error));
        self.cancel();
        error
    }

    /// Takes outputs out of the batch, up to what else happened; that is the news where no output
    /// comes before it.
    fn sort(&mut self, outputs: &mut Outputs) -> Result<News, ApiError> {
        let mut batch = std::mem::take(&mut self.batch);
        let is_usual = |event: &Event| match event {
            Event::Output(output) => !matches!(output.finish_reason, Some(FinishReason::Failed(_))),
            other => *other == Event::Finished,
        };
        let num_usual = batch.iter().take_while(|(_, event)| is_usual(event)).count();
        for (idx, event) in batch.drain(..num_usual) {
            match event {
                Event::Output(output) => {
                    self.count(idx, &output);
                    outputs.push((idx, output));
                }
                _ => self.num_open -= 1,
            }
        }
        if num_usual > 0 {
            self.batch = batch;
            return Ok(News::Outputs);
        }
        match batch.drain(..).next() {
            Some((_, event)) => self.break_off(event),
            None => Ok(News::Outputs),
        }
    }

    /// What an event means after which nothing goes on.
    fn break_off(&mut self, event: Event) -> Result<News, ApiError> {
        let error = match event {
            Event::Cancelled if self.app.lifecycle.is_draining() => ApiError::draining(),
            Event::Cancelled => {
                self.end(Outcome::Cancelled);
                self.cancel();
                return Ok(News::Cancelled);
            }
            Event::Refused(message) if self.has_session => ApiError::bad_request(None, message),
            Event::Refused(message) => ApiError::context_length(None, message),
            Event::Busy(message) => ApiError::conflict(message),
            Event::Output(RequestOutput {
                finish_reason: Some(FinishReason::Failed(failure)),
                ..
            }) => failed(failure),
            Event::Died(_) | Event::Output(_) | Event::Finished => engine_gone(),
        };
        Err(self.fail(error))
    }

    fn count(&mut self, idx: usize, output: &RequestOutput) {
        if !std::mem::replace(&mut self.has_output, true) {
            self.deadline = self.request_deadline;
        }
        if !std::mem::replace(&mut self.has_counts[idx], true) {
            let cached = self.usage.prompt_tokens_details.cached_tokens + output.num_cached;
            let prompt = self.usage.prompt_tokens + self.prompt_lens[idx];
            self.usage = Usage::new(prompt, cached, self.usage.completion_tokens);
            if let Some(meter) = &mut self.meter {
                meter.prompt(prompt, cached);
            }
        }
        if output.token.is_some() {
            self.usage.completion_tokens += 1;
            self.usage.total_tokens += 1;
            if let Some(meter) = &mut self.meter {
                meter.token(idx * self.num_choices + output.choice_idx);
            }
        }
    }

    fn late(&self) -> ApiError {
        let timeouts = self.app.options.timeouts;
        match self.has_output || self.deadline == self.request_deadline {
            true => {
                let seconds = timeouts.request.as_secs();
                let message = format!("the answer took longer than {seconds} s; ask for less");
                ApiError::unavailable("request_timeout", message)
            }
            false => {
                let seconds = timeouts.queue.as_secs();
                let message = format!("no token came within {seconds} s; try again later");
                ApiError::unavailable("queue_timeout", message)
            }
        }
    }

    fn cancel(&mut self) {
        self.cancellations.drain(..).for_each(|cancellation| cancellation.cancel());
        self.num_open = 0;
    }

    fn end(&mut self, outcome: Outcome) {
        if let Some(meter) = self.meter.take() {
            meter.end(outcome);
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.end(Outcome::Disconnected);
        if self.num_open > 0 {
            self.cancel();
        }
    }
}

fn accepted(submission: Submission<Cancellation>) -> Result<Cancellation, ApiError> {
    match submission {
        Submission::Accepted(cancellation) => Ok(cancellation),
        // A guess: so many requests are served in a second.
        Submission::Overloaded { num_waiting, .. } => {
            Err(ApiError::overloaded(Duration::from_secs(1 + num_waiting as u64 / 16)))
        }
        Submission::Draining => Err(ApiError::draining()),
    }
}

fn engine_gone() -> ApiError {
    ApiError::unavailable("engine_unavailable", "the engine does not run any more")
}

/// The same request would fail again.
fn failed(failure: Failure) -> ApiError {
    let error = match failure {
        Failure::NoFiniteLogit => ApiError::internal().with_message(failure.message()),
        Failure::NoAllowedToken | Failure::GrammarTooComplex => {
            ApiError::bad_request("response_format".to_owned(), failure.message())
        }
    };
    ApiError { should_retry: Some(false), ..error.with_code("generation_failed") }
}

/// How a request that fails with `error` is counted.
pub(super) fn outcome(error: &ApiError) -> Outcome {
    match (error.status.as_u16(), error.code) {
        (_, Some("draining")) => Outcome::Drained,
        (_, Some("engine_unavailable")) => Outcome::Died,
        (_, Some("generation_failed")) => Outcome::Failed,
        (_, Some("request_timeout" | "queue_timeout" | "worker_timeout")) => Outcome::TimedOut,
        (409, _) => Outcome::Busy,
        (429, _) => Outcome::Overloaded,
        (500.., _) => Outcome::Failed,
        _ => Outcome::Refused,
    }
}

/// The text of one choice, as its tokens come.
pub(super) struct ChoiceText {
    text: TextStream,
    stops: Option<StopStrings>,
    /// Tokens that end the choice and are no part of its text.
    end_tokens: Arc<[u32]>,
}

/// What choices need to know of their request to make text of tokens.
#[derive(Clone)]
pub(super) struct TextRules {
    pub tokenizer: Arc<Tokenizer>,
    pub stop_strings: Vec<String>,
    pub end_tokens: Arc<[u32]>,
    /// Special tokens that are shown.
    pub markers: Vec<&'static str>,
}

impl TextRules {
    /// Of a request to a model with this tokenizer.
    pub(super) fn of(tokenizer: &Arc<Tokenizer>, request: &Request) -> TextRules {
        let model_ends = if request.ignore_eos { &[] } else { tokenizer.eos_ids() };
        TextRules {
            tokenizer: Arc::clone(tokenizer),
            stop_strings: request.stop_strings.clone(),
            end_tokens: request.stop_token_ids.iter().chain(model_ends).copied().collect(),
            markers: Vec::new(),
        }
    }

    pub(super) fn choice(&self) -> Result<ChoiceText, ApiError> {
        let stops = match self.stop_strings.is_empty() {
            true => None,
            false => Some(StopStrings::new(self.stop_strings.clone())?),
        };
        let text = TextStream::showing(Arc::clone(&self.tokenizer), &self.markers);
        Ok(ChoiceText { text, stops, end_tokens: Arc::clone(&self.end_tokens) })
    }
}

impl ChoiceText {
    /// The output's token, where it is a part of the answer and not what ended it.
    pub(super) fn token(&self, output: &RequestOutput) -> Option<u32> {
        let is_stop = output.finish_reason == Some(FinishReason::Stop);
        output.token.filter(|token| !(is_stop && self.end_tokens.contains(token)))
    }

    /// The text that is certain with this output: whole characters, and no part of a stop string.
    pub(super) fn push(&mut self, output: &RequestOutput) -> Result<String, ApiError> {
        let mut text = match self.token(output) {
            Some(token) => self.text.push(token)?,
            None => String::new(),
        };
        let is_last = output.finish_reason.is_some();
        if is_last {
            text.push_str(&self.text.flush()?);
        }
        let Some(stops) = &mut self.stops else { return Ok(text) };
        let mut text = stops.push(&text);
        if is_last && !stops.is_stopped() {
            text.push_str(&stops.flush());
        }
        Ok(text)
    }
}
