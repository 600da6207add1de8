//! One answer: a prompt goes to the engine, text comes back as it is generated.

use std::time::{Duration, Instant};

use anyhow::bail;
use serde::Serialize;

use super::conversation::{Generated, Prompt, common_len};
use super::interrupt::Interrupts;
use crate::cli::generate::{TextWriter, round};
use crate::cli::model::ModelFiles;
use crate::handle::{EngineHandle, Event, RequestStream, Submission};
use crate::request::{FinishReason, Request};
use crate::session::{SessionId, SessionTurn};
use crate::tokenizer::SpecialTokens;

/// How answers are generated.
#[derive(Clone)]
pub(super) struct Settings {
    /// All but prompt and session.
    pub(super) request: Request,
    /// Texts that end an answer.
    pub(super) stops: Vec<String>,
}

/// The engine, and the session in which it keeps the conversation.
pub(super) struct Model<'a> {
    pub(super) files: &'a ModelFiles,
    pub(super) handle: EngineHandle,
    pub(super) session: SessionId,
    pub(super) interrupts: Interrupts,
}

/// What came of one prompt.
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) generated: Option<Generated>,
    pub(super) stats: Stats,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum End {
    Stop,
    Length,
    /// By Ctrl-C.
    Interrupted,
}

/// Tokens and times of an answer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Stats {
    pub(super) prompt_tokens: usize,
    /// Those whose keys and values were there already.
    pub(super) cached_tokens: usize,
    pub(super) output_tokens: usize,
    pub(super) finish_reason: End,
    pub(super) first_token_ms: f64,
    pub(super) total_ms: f64,
}

/// What the events of a request have told so far.
#[derive(Default)]
struct Progress {
    output_ids: Vec<u32>,
    num_cached: usize,
    first_token: Option<Duration>,
    finish_reason: Option<FinishReason>,
    is_cancelled: bool,
}

impl Model<'_> {
    /// Answers `prompt`; `print` hears the text as it comes.
    pub(super) fn answer(
        &self,
        prompt: &Prompt,
        settings: &Settings,
        print: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Answer> {
        let mut writer = TextWriter::new(self.files, settings.stops.clone())?;
        let request = self.request(prompt, settings)?;
        let start = Instant::now();
        let mut stream = match self.handle.submit(request)? {
            Submission::Accepted(stream) => stream,
            Submission::Overloaded { .. } | Submission::Draining => {
                bail!("the engine takes no requests; end the chat and start it anew")
            }
        };
        self.interrupts.start(stream.cancellation());
        let progress = follow(&mut stream, start, &mut writer, print);
        let is_interrupted = self.interrupts.finish();
        let progress = progress?;
        print(&writer.push(None)?)?;
        let total = start.elapsed();
        let end = match progress.finish_reason {
            Some(FinishReason::Failed(failure)) => bail!(failure.message()),
            Some(FinishReason::Length) if !writer.is_stopped() => End::Length,
            Some(_) => End::Stop,
            None if is_interrupted || progress.is_cancelled => End::Interrupted,
            None => bail!("the engine ended the answer before it was complete"),
        };
        let milliseconds = |time: Duration| round(time.as_secs_f64() * 1e3);
        let stats = Stats {
            prompt_tokens: prompt.ids.len(),
            cached_tokens: progress.num_cached,
            output_tokens: progress.output_ids.len(),
            finish_reason: end,
            first_token_ms: milliseconds(progress.first_token.unwrap_or(total)),
            total_ms: milliseconds(total),
        };
        let generated = self.generated(prompt, &writer, progress.output_ids)?;
        Ok(Answer { text: writer.text, generated, stats })
    }

    /// The request: what the session has in common with the prompt stays, the rest is new.
    fn request(&self, prompt: &Prompt, settings: &Settings) -> anyhow::Result<Request> {
        let id = self.session.clone();
        let history = self.handle.call(move |engine| {
            // NOTE: no session is one without tokens.
            engine.session_tokens(&id).map(<[u32]>::to_vec).ok()
        })?;
        let turn = SessionTurn::of(self.session.clone());
        // At least one token is computed, from which the answer goes on.
        let step = history.as_deref().map(|history| {
            common_len(history, &prompt.ids).min(prompt.ids.len().saturating_sub(1))
        });
        let turn = SessionTurn { start: step.is_none(), step, ..turn };
        Ok(Request {
            prompt_ids: prompt.ids[step.unwrap_or(0)..].to_vec(),
            stop_strings: settings.stops.clone(),
            session: Some(turn),
            namespace: self.session.namespace(),
            ..settings.request.clone()
        })
    }

    /// The tokens of an answer, where they are those of its text.
    fn generated(
        &self,
        prompt: &Prompt,
        writer: &TextWriter,
        mut output_ids: Vec<u32>,
    ) -> anyhow::Result<Option<Generated>> {
        let tokenizer = self.files.tokenizer()?;
        let is_end = |id: &u32| {
            self.files.config.eos_token_ids.contains(id) || tokenizer.eos_ids().contains(id)
        };
        if output_ids.last().is_some_and(is_end) {
            output_ids.pop();
        }
        if writer.text.is_empty() || tokenizer.decode(&output_ids)? != writer.text {
            return Ok(None);
        }
        let text_ids = tokenizer.encode(&writer.text, SpecialTokens::Omit)?;
        Ok(Some(Generated { prompt_len: prompt.rendered_len, text_ids, output_ids }))
    }
}

/// Takes the events of a request up to the last one.
fn follow(
    stream: &mut RequestStream,
    start: Instant,
    writer: &mut TextWriter,
    print: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Progress> {
    let mut progress = Progress::default();
    for event in stream {
        match event {
            Event::Output(output) => {
                progress.first_token.get_or_insert_with(|| start.elapsed());
                progress.num_cached = progress.num_cached.max(output.num_cached);
                progress.finish_reason = output.finish_reason;
                if let Some(id) = output.token {
                    progress.output_ids.push(id);
                    let text = writer.push(Some(id))?;
                    if !text.is_empty() {
                        print(&text)?;
                    }
                }
            }
            Event::Finished => {}
            Event::Cancelled => progress.is_cancelled = true,
            Event::Refused(reason) | Event::Busy(reason) => bail!("{reason}"),
            Event::Died(reason) => bail!("the engine died: {reason}; start the chat anew"),
        }
    }
    Ok(progress)
}
