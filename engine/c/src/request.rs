//! Requests: run to their end, or started, read and cancelled.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Duration;

use ::engine::handle::{Cancellation, Event, RequestStream, Submission};
use ::engine::request::{FinishReason, Request, RequestOutput};
use ::engine::tokenizer::stream::{StopStrings, TextStream};

use crate::border::guard;
use crate::engine::{BespokeEngine, OpenEngine};
use crate::handles;
use crate::input::size_of_struct;
use crate::output::{self, BespokeCallback, BespokeEvent, BespokeFinishReason};
use crate::params::{self, BespokeParams};
use crate::status::{BespokeStatus, Failure};

/// A request that was started. 0 is none.
pub type BespokeRequest = u64;

/// Runs a request to its end and gives its events to `callback`, on the calling thread, with `user`
/// as it is. Other requests of the engine run meanwhile.
///
/// `BESPOKE_STATUS_OK` after the last event; `BESPOKE_STATUS_CANCELLED` where the callback asked
/// for the end, after which it is not called again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_generate(
    engine: BespokeEngine,
    params: *const BespokeParams,
    callback: BespokeCallback,
    user: *mut c_void,
) -> BespokeStatus {
    guard(|| {
        let callback = callback.ok_or_else(|| Failure::argument("callback is null"))?;
        // SAFETY: the caller's promise.
        let mut reader = unsafe { submit(engine, params) }?;
        loop {
            let Some(mut news) = reader.next(None)? else { continue };
            let mut text = std::mem::take(&mut news.text).into_bytes();
            let event = output::event(&news, &mut text, &news.ids);
            // SAFETY: the caller's promise; nothing of ours is locked meanwhile.
            let is_cancelled = unsafe { callback(user, &raw const event) } != 0;
            if news.finish_reason != BespokeFinishReason::None {
                return Ok(BespokeStatus::Ok);
            }
            if is_cancelled {
                return Ok(BespokeStatus::Cancelled);
            }
        }
    })
}

/// Starts a request and returns at once; its events are for `bespoke_next`. Writes the request to
/// `request`, or 0 where it fails. It has to be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_start(
    engine: BespokeEngine,
    params: *const BespokeParams,
    request: *mut BespokeRequest,
) -> BespokeStatus {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { output::write(request, 0, "request") }?;
        // SAFETY: as above.
        let reader = unsafe { submit(engine, params) }?;
        let cancellation = reader.stream.cancellation();
        let opened = OpenRequest { cancellation, reader: Mutex::new(reader) };
        let handle = handles::add_request(opened)?;
        // SAFETY: as above.
        unsafe { output::write(request, handle, "request") }?;
        Ok(BespokeStatus::Ok)
    })
}

/// Waits `timeout_ms` milliseconds for the next event and writes it to `event`, whose size has to
/// be set; 0 does not wait, a negative number waits as long as it takes.
///
/// What the event points to is valid until the same thread's next call of this function.
/// `BESPOKE_STATUS_TIMEOUT` where no event came; `BESPOKE_STATUS_ENDED` after the last event, and
/// after an error of the request; `BESPOKE_STATUS_BUSY` while another thread waits for the same
/// request's events.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_next(
    request: BespokeRequest,
    timeout_ms: i64,
    event: *mut BespokeEvent,
) -> BespokeStatus {
    guard(|| {
        // NOTE: before an event is taken that could not be given.
        // SAFETY: the caller's promise.
        unsafe { size_of_struct(event) }?;
        let request = handles::request(request)?;
        let mut reader = match request.reader.try_lock() {
            Ok(reader) => reader,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let message = "another thread waits for this request's events";
                return Err(Failure::new(BespokeStatus::Busy, message));
            }
        };
        if reader.has_ended {
            return Ok(BespokeStatus::Ended);
        }
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        let Some(news) = reader.next(timeout)? else { return Ok(BespokeStatus::Timeout) };
        // SAFETY: as above.
        unsafe { output::write_event(event, news) }?;
        Ok(BespokeStatus::Ok)
    })
}

/// Ends a request early, from any thread; does nothing to one that has ended. What was generated
/// before, and a last event, still come.
#[unsafe(no_mangle)]
pub extern "C" fn bespoke_cancel(request: BespokeRequest) -> BespokeStatus {
    guard(|| {
        handles::request(request)?.cancellation.cancel();
        Ok(BespokeStatus::Ok)
    })
}

/// Frees a request, and cancels it where it has not ended. A thread that waits for its events gets
/// the last one.
#[unsafe(no_mangle)]
pub extern "C" fn bespoke_request_free(request: BespokeRequest) -> BespokeStatus {
    guard(|| {
        handles::remove_request(request)?.cancellation.cancel();
        Ok(BespokeStatus::Ok)
    })
}

/// What a request's handle stands for.
pub(crate) struct OpenRequest {
    cancellation: Cancellation,
    reader: Mutex<Reader>,
}

/// What a request's next event tells.
pub(crate) struct News {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) usage: Usage,
    pub(crate) finish_reason: BespokeFinishReason,
}

/// Counts of tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) num_prompt: usize,
    pub(crate) num_cached: usize,
    pub(crate) num_output: usize,
}

/// Reads the events of a request.
struct Reader {
    stream: RequestStream,
    /// `None` without a tokenizer.
    text: Option<AnswerText>,
    usage: Usage,
    has_ended: bool,
}

/// The text of an answer, as its tokens come.
struct AnswerText {
    stream: TextStream,
    stops: StopStrings,
    /// Tokens that end the answer and are no part of its text.
    end_ids: Vec<u32>,
}

/// # Safety
/// `params` is as the header says.
unsafe fn submit(handle: u64, params: *const BespokeParams) -> Result<Reader, Failure> {
    let engine = handles::engine(handle)?;
    // SAFETY: the caller's promise.
    let request = unsafe { params::request(&engine, params) }?;
    Reader::new(&engine, request)
}

impl Reader {
    fn new(engine: &OpenEngine, request: Request) -> Result<Reader, Failure> {
        let text = AnswerText::new(engine, &request)?;
        let usage = Usage { num_prompt: request.prompt_ids.len(), ..Usage::default() };
        match engine.handle.submit(request)? {
            Submission::Accepted(stream) => Ok(Reader { stream, text, usage, has_ended: false }),
            Submission::Overloaded { num_waiting, num_waiting_tokens } => {
                let message = format!(
                    "{num_waiting} requests with {num_waiting_tokens} tokens wait already; wait \
                     for some of them"
                );
                Err(Failure::new(BespokeStatus::Busy, message))
            }
            Submission::Draining => {
                Err(Failure::new(BespokeStatus::InvalidHandle, "the engine is being closed"))
            }
        }
    }

    /// The next event; `None` where none comes in time. After an error there are no more.
    fn next(&mut self, timeout: Option<Duration>) -> Result<Option<News>, Failure> {
        let event = match timeout {
            Some(timeout) => self.stream.next_timeout(timeout),
            None => self.stream.next(),
        };
        let Some(event) = event else { return Ok(None) };
        let news = self.read(event);
        let is_last = |news: &News| news.finish_reason != BespokeFinishReason::None;
        self.has_ended = news.as_ref().map_or(true, is_last);
        if news.is_err() {
            self.stream.cancel();
        }
        news.map(Some)
    }

    fn read(&mut self, event: Event) -> Result<News, Failure> {
        let (text, ids, finish_reason) = match event {
            Event::Output(output) => {
                self.usage.num_cached = output.num_cached;
                self.usage.num_output += usize::from(output.token.is_some());
                let finish_reason = match output.finish_reason {
                    None => BespokeFinishReason::None,
                    Some(FinishReason::Stop) => BespokeFinishReason::Stop,
                    Some(FinishReason::Length) => BespokeFinishReason::Length,
                    Some(FinishReason::Failed(failure)) => {
                        let status = BespokeStatus::GenerationFailed;
                        return Err(Failure::new(status, failure.message()));
                    }
                };
                let text = match &mut self.text {
                    Some(text) => text.push(&output)?,
                    None => String::new(),
                };
                (text, output.token.into_iter().collect(), finish_reason)
            }
            Event::Finished | Event::Cancelled => {
                let text = match &mut self.text {
                    Some(text) => text.end()?,
                    None => String::new(),
                };
                (text, Vec::new(), BespokeFinishReason::Cancelled)
            }
            Event::Refused(message) => return Err(Failure::argument(message)),
            Event::Busy(message) => return Err(Failure::new(BespokeStatus::Busy, message)),
            Event::Died(message) => return Err(Failure::new(BespokeStatus::EngineDead, message)),
        };
        Ok(News { text, ids, usage: self.usage, finish_reason })
    }
}

impl AnswerText {
    /// `None` where the engine has no tokenizer.
    fn new(engine: &OpenEngine, request: &Request) -> Result<Option<AnswerText>, Failure> {
        let Some(tokenizer) = engine.tokenizer_if_any() else { return Ok(None) };
        let models: &[u32] = if request.ignore_eos { &[] } else { &engine.end_ids };
        Ok(Some(AnswerText {
            stream: TextStream::new(Arc::clone(tokenizer)),
            stops: StopStrings::new(request.stop_strings.clone())?,
            end_ids: request.stop_token_ids.iter().chain(models).copied().collect(),
        }))
    }

    /// The text that is certain with this output.
    fn push(&mut self, output: &RequestOutput) -> Result<String, Failure> {
        let is_stop = output.finish_reason == Some(FinishReason::Stop);
        let token = output.token.filter(|token| !(is_stop && self.end_ids.contains(token)));
        let piece = match token {
            Some(token) => self.stream.push(token)?,
            None => String::new(),
        };
        let mut text = self.stops.push(&piece);
        if output.finish_reason.is_some() {
            text.push_str(&self.end()?);
        }
        Ok(text)
    }

    /// The text that was held back, at the end of the answer.
    fn end(&mut self) -> Result<String, Failure> {
        let rest = self.stream.flush()?;
        let mut text = self.stops.push(&rest);
        if !self.stops.is_stopped() {
            text.push_str(&self.stops.flush());
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::mem::zeroed;
    use std::ptr;

    use ::engine::backend::null::{Fault, NullOptions};
    use ::engine::config::EngineOptions;
    use ::engine::engine::Engine;
    use ::engine::handle::{EngineHandle, HandleLimits};
    use ::engine::kernels::KernelTable;

    use super::*;
    use crate::border::bespoke_last_error;
    use crate::engine::bespoke_engine_close;

    /// An engine that fails, and its handle.
    fn failing(fault: Fault) -> u64 {
        let null = NullOptions { fault: Some(fault), ..NullOptions::default() };
        let options =
            EngineOptions { max_context: Some(64), ..EngineOptions::new(KernelTable::default()) };
        let load = move || Engine::null(&null, &options);
        let handle = EngineHandle::start(load, HandleLimits::default()).unwrap();
        handles::add_engine(OpenEngine::of(handle, None).unwrap()).unwrap()
    }

    fn params(ids: &[u32]) -> BespokeParams {
        // SAFETY: numbers and pointers.
        let zeros: BespokeParams = unsafe { zeroed() };
        let (prompt_ids, num_prompt_ids) = (ids.as_ptr(), ids.len());
        BespokeParams { size: size_of::<BespokeParams>(), prompt_ids, num_prompt_ids, ..zeros }
    }

    unsafe extern "C" fn count(user: *mut c_void, _: *const BespokeEvent) -> i32 {
        // SAFETY: `check` gives a counter.
        unsafe { *user.cast::<usize>() += 1 };
        0
    }

    /// The request fails by `status` after `num_events`, and again after the engine's end.
    fn check(fault: Fault, status: BespokeStatus, num_events: usize, words: &str) {
        let engine = failing(fault);
        let mut num = 0;
        // SAFETY: as the header demands.
        let run = |num: &mut usize| unsafe {
            bespoke_generate(engine, &params(&[1, 2]), Some(count), ptr::from_mut(num).cast())
        };
        assert_eq!(run(&mut num), status);
        assert_eq!(num, num_events);
        // SAFETY: never null, and of this thread.
        let text = unsafe { CStr::from_ptr(bespoke_last_error()) }.to_str().unwrap();
        assert!(text.contains(words), "{text}");
        assert_eq!(run(&mut num), status);
        assert_eq!(bespoke_engine_close(engine), BespokeStatus::Ok);
        assert_eq!(run(&mut num), BespokeStatus::InvalidHandle);
    }

    #[test]
    fn failures_of_the_engine_come_as_a_status() {
        let dead = BespokeStatus::EngineDead;
        check(Fault::Panic { step: 3 }, dead, 3, "panicked");
        check(Fault::Error { step: 0 }, dead, 0, "step 0 fails");
        let failed = BespokeStatus::GenerationFailed;
        check(Fault::NotFinite { token: 2 }, failed, 0, "finite logits");
    }
}
