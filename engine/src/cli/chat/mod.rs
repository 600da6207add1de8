//! `bespoke chat`: a conversation with a model, in the terminal.

mod answer;
mod conversation;
mod input;
mod interrupt;
mod lines;
mod settings;
mod transcript;

use std::borrow::Cow;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;

use super::console::Console;
use super::generate::Memory;
use super::model::{self, ModelArgs, ModelFiles};
use super::progress::Meter;
use super::prompt::chat_ids;
use super::sampling::SamplingArgs;
use super::startup::StartupReport;
use crate::config::EngineOptions;
use crate::engine::Engine;
use crate::error::Error;
use crate::handle::{EngineHandle, EngineState, HandleLimits};
use crate::kv_cache::Namespace;
use crate::request::Request;
use crate::sampling::choice_seed;
use crate::session::SessionId;
use crate::session_file::SessionFile;
use crate::tokenizer::chat::Message;
use answer::{End, Model, Settings, Stats};
use conversation::{Conversation, Encode, Prompt};
use input::{Command, HELP, Input};
use interrupt::{Interrupts, WhenIdle};
use lines::{Line, Lines};
use transcript::{ChatFolder, NamedChat};

/// Chat with a model
///
/// Answers are streamed to standard output. Where standard input is no terminal, each line of it is
/// a message or a command, and an error ends the chat.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Keep the conversation under this name, and go on with it if there is one
    #[arg(long, value_name = "NAME")]
    session: Option<String>,
    /// System prompt [default: that of the model's chat template]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_tokens: usize,
    /// Tokens of the conversation that the model sees at most [default: as many as the model was
    /// trained for, as far as memory allows]
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Text that ends an answer and is not part of it; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Go on after the model's end token
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object at the end instead of the answers
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bespoke chat --model smollm2-135m --temperature 0.7
  bespoke chat --model smollm2-135m --session trip --system 'You plan journeys.'
  echo 'Name a colour.' | bespoke chat --model smollm2-135m --json

/help lists the commands of a chat. Ctrl-C stops an answer and keeps what is there of it.
A named conversation lies in the folder `chats` of the model cache: its text after each answer, its
keys and values at the end, so that the next start computes new messages only.
When the context is full, the oldest questions and answers are left out, with a notice, until half
of it is free; the system prompt stays.";

/// The JSON of the command.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    backend: &'a str,
    session: Option<&'a str>,
    messages: Vec<Message>,
    /// One for each answer of this run, in order.
    turns: &'a [Stats],
    memory: Memory,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let files = ModelFiles::open(&args.model.model, console)?;
    check(args, &files)?;
    let settings = settings(args, &files)?;
    let folder = chat_folder(args, console)?;
    let session = SessionId::new(Namespace::default(), args.session.as_deref().unwrap_or("chat"))?;
    let named = match (&folder, &args.session) {
        (Some(folder), Some(_)) => Some(folder.take(&session)?),
        _ => None,
    };
    let mut conversation = match &named {
        Some(named) => named.load(&files)?.unwrap_or_default(),
        None => Conversation::default(),
    };
    if let Some(system) = &args.system {
        conversation.system = Some(system.clone()).filter(|system| !system.is_empty());
    }
    let handle = start_engine(args, &files, console)?;
    if let Some(named) = named.as_ref().filter(|_| !conversation.is_empty()) {
        resume(&handle, &session, &named.dir, console)?;
    }
    let lines = Lines::open(folder.as_ref().map(ChatFolder::history))?;
    let when_idle = if lines.is_terminal() { WhenIdle::Ignore } else { WhenIdle::Exit };
    // NOTE: after the line editor, which has a handler of its own that this one passes signals to.
    let interrupts = Interrupts::listen(when_idle)?;
    let (max_context, backend) =
        handle.call(|engine| (engine.max_context(), engine.backend_name()))?;
    let mut chat = Chat {
        args,
        model: Model { files: &files, handle, session, interrupts },
        named,
        settings,
        conversation,
        max_context,
        num_attempts: 0,
        turns: Vec::new(),
        is_terminal: lines.is_terminal(),
    };
    let startup = chat.model.handle.call(|engine| engine.startup().clone())?;
    model::warn(&startup, console);
    if args.model.run.startup_report {
        let report = StartupReport::new(&[&files.startup, &startup], console);
        console.report(&report.text());
    }
    if chat.is_terminal {
        chat.greet(backend, console);
    }
    chat.serve(lines, console)?;
    chat.keep_session()?;
    if args.json {
        let memory = chat.model.handle.call(|engine| Memory::of(engine))?;
        return console.print_json(&Report {
            model: &args.model.model,
            backend,
            session: args.session.as_deref(),
            messages: chat.conversation.messages(),
            turns: &chat.turns,
            memory,
        });
    }
    Ok(())
}

/// Where conversations and the history are kept. A chat without a name does without, where nothing
/// can be written.
fn chat_folder(args: &Args, console: &Console<'_>) -> anyhow::Result<Option<ChatFolder>> {
    let cache = console.cache().map_err(anyhow::Error::from);
    match cache.and_then(|cache| ChatFolder::open(cache.root.join("chats"))) {
        Ok(folder) => Ok(Some(folder)),
        Err(error) if args.session.is_some() => Err(error),
        Err(_) => Ok(None),
    }
}

/// Refuses what cannot work before anything is loaded.
fn check(args: &Args, files: &ModelFiles) -> anyhow::Result<()> {
    ensure!(
        files.tokenizer()?.chat_template().is_some(),
        "{}: the model has no chat template, so it cannot chat; continue a text with bespoke \
         generate --prompt",
        files.source.files.root().display()
    );
    ensure!(
        !args.sampling.has_top_logprobs(),
        "--top-logprobs has no place in a chat; bespoke generate lists them"
    );
    Ok(())
}

fn settings(args: &Args, files: &ModelFiles) -> anyhow::Result<Settings> {
    let request = Request {
        max_tokens: args.max_tokens,
        sampling: args.sampling.params(files)?,
        ignore_eos: args.ignore_eos,
        stop_token_ids: if args.ignore_eos { Vec::new() } else { files.eos_ids() },
        ..Request::default()
    };
    // All but the prompt is known.
    let example =
        Request { prompt_ids: vec![0], stop_strings: args.stop.clone(), ..request.clone() };
    example.check(files.config.vocab_size, usize::MAX, 0)?;
    Ok(Settings { request, stops: args.stop.clone() })
}

/// Loads the model on the engine's thread, with a progress bar.
fn start_engine(
    args: &Args,
    files: &ModelFiles,
    console: &mut Console<'_>,
) -> anyhow::Result<EngineHandle> {
    let options = EngineOptions {
        max_context: args.max_context,
        ..files.options(&args.model.run, usize::MAX, console)
    };
    let tokenizer = files.tokenizer()?.clone();
    let source = files.source.clone();
    let (progress, reports) = mpsc::sync_channel(64);
    let load = move || {
        let mut engine = Engine::load_from(&source, &options, &mut |report| {
            // NOTE: who shows progress is there until this function returns.
            let _ = progress.send(report);
        })?;
        engine.set_tokenizer(tokenizer);
        Ok(engine)
    };
    let mut meter = Meter::new(console);
    let started = thread::scope(|scope| {
        let starter = scope.spawn(|| EngineHandle::start(load, HandleLimits::default()));
        reports.iter().for_each(|report| meter.show_load(report));
        starter.join()
    });
    match started {
        Ok(started) => Ok(started?),
        Err(_) => bail!("starting the engine panicked"),
    }
}

/// Takes up the keys and values of a named conversation, as far as they are any good.
fn resume(
    handle: &EngineHandle,
    session: &SessionId,
    dir: &Path,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    let path = SessionFile::path(dir, session);
    if !path.exists() {
        return Ok(());
    }
    let expected = session.clone();
    let loaded = handle.call(move |engine| {
        let id = engine.load_session(&path)?;
        if id == expected {
            return Ok(());
        }
        engine.end_session(&id)?;
        Err(Error::model(&path, format!("it is the file of session {id}")))
    })?;
    if let Err(error) = loaded {
        console.report(&format!("the conversation is computed again: {error}\n"));
    }
    Ok(())
}

/// A running chat.
struct Chat<'a> {
    args: &'a Args,
    model: Model<'a>,
    named: Option<NamedChat>,
    settings: Settings,
    conversation: Conversation,
    max_context: usize,
    /// How often the last message was answered anew.
    num_attempts: usize,
    turns: Vec<Stats>,
    is_terminal: bool,
}

impl Encode for ModelFiles {
    fn chat(&self, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
        chat_ids(self, messages)
    }
}

impl Chat<'_> {
    fn greet(&self, backend: &str, console: &mut Console<'_>) {
        let (model, max_context) = (&self.args.model.model, self.max_context);
        console.report(&format!(
            "{model} on {backend}, a context of {max_context} tokens; /help lists the commands\n"
        ));
        let num_messages = self.conversation.messages().len();
        if !self.conversation.is_empty() {
            console.report(&format!("going on after {num_messages} messages\n"));
        }
    }

    /// Answers until there is no further line.
    fn serve(&mut self, mut lines: Lines, console: &mut Console<'_>) -> anyhow::Result<()> {
        loop {
            let text = match lines.next()? {
                Line::Text(text) => text,
                Line::Interrupted => continue,
                Line::End => return Ok(()),
            };
            let result = match input::parse(&text) {
                Ok(Input::Nothing) => Ok(()),
                Ok(Input::Command(Command::Exit)) => return Ok(()),
                Ok(Input::Command(command)) => self.obey(command, console),
                Ok(Input::Message(text)) => {
                    self.num_attempts = 0;
                    self.ask(text, console)
                }
                Err(error) => Err(error),
            };
            let is_running = self.model.handle.state() == EngineState::Running;
            match result {
                Err(error) if self.is_terminal && is_running => {
                    console.report(&format!("error: {error:#}\n"));
                }
                result => result?,
            }
        }
    }

    fn obey(&mut self, command: Command, console: &mut Console<'_>) -> anyhow::Result<()> {
        match command {
            Command::Help => console.report(HELP),
            Command::Exit => {}
            Command::Reset => {
                self.conversation.reset();
                self.keep_text()?;
                console.report("the conversation starts anew\n");
            }
            Command::Undo => {
                let question = self.take_back()?;
                self.keep_text()?;
                console.report(&format!("taken back: {}\n", first_line(&question)));
            }
            Command::Regen => {
                if self.settings.request.sampling.temperature == 0.0 {
                    console.report("the temperature is 0, so the answer will be the same\n");
                }
                let question = self.take_back()?;
                self.num_attempts += 1;
                return self.ask(question, console);
            }
            Command::System(None) => {
                let system = self.conversation.system.as_deref();
                let none = "no system prompt but the template's own";
                console.report(&format!("{}\n", system.unwrap_or(none)));
            }
            Command::System(Some(text)) => {
                self.conversation.system = Some(text).filter(|text| !text.is_empty());
                self.keep_text()?;
            }
            Command::Set(None) => console.report(&settings::show(&self.settings.request)),
            Command::Set(Some((name, value))) => {
                let vocab_size = self.model.files.config.vocab_size;
                settings::set(&mut self.settings.request, &name, &value, vocab_size)?;
            }
            Command::Save(path) => {
                ensure!(!self.conversation.is_empty(), "there is nothing to save yet");
                transcript::save(Path::new(&path), &self.conversation)?;
                console.report(&format!("saved as {path}\n"));
            }
            Command::Load(path) => {
                self.conversation = transcript::load(Path::new(&path), self.model.files)?;
                self.keep_text()?;
                let num_messages = self.conversation.messages().len();
                console.report(&format!("going on after {num_messages} messages\n"));
            }
            Command::Stats => console.report(&self.stats()),
        }
        Ok(())
    }

    fn take_back(&mut self) -> anyhow::Result<String> {
        self.conversation.take_back().context("there is no message to take back")
    }

    /// Sends a message, and prints the answer. Without an answer the message is taken back.
    fn ask(&mut self, text: String, console: &mut Console<'_>) -> anyhow::Result<()> {
        self.conversation.ask(text);
        let answer = self.fit(console).and_then(|prompt| self.print_answer(&prompt, console));
        let answer = match answer {
            Ok(answer) if !answer.text.is_empty() || answer.stats.finish_reason == End::Stop => {
                answer
            }
            Ok(_) => {
                self.conversation.take_back();
                console.report("[no answer yet; the message is taken back]\n");
                return Ok(());
            }
            Err(error) => {
                self.conversation.take_back();
                return Err(error);
            }
        };
        match answer.stats.finish_reason {
            End::Stop => {}
            End::Interrupted => console.report("[stopped]\n"),
            End::Length => {
                let num_tokens = answer.stats.prompt_tokens + answer.stats.output_tokens;
                let what = match num_tokens >= self.max_context {
                    true => "the context is full",
                    false => "the answer has max-tokens",
                };
                console.report(&format!("[{what}; the answer may be incomplete]\n"));
            }
        }
        self.conversation.answer(answer.text, answer.generated);
        self.turns.push(answer.stats);
        self.keep_text()
    }

    /// The prompt for the next answer. Where it leaves no room for one, the oldest questions and
    /// answers go, until half of the context is free: leaving out one at a time would have the
    /// rest computed again each time.
    fn fit(&mut self, console: &mut Console<'_>) -> anyhow::Result<Prompt> {
        let room = self.settings.request.max_tokens.min(self.max_context / 4).max(1);
        let mut prompt = self.conversation.prompt(self.model.files)?;
        if prompt.ids.len() + room <= self.max_context {
            return Ok(prompt);
        }
        let mut num_dropped = 0;
        while prompt.ids.len() > self.max_context / 2 && self.conversation.drop_oldest() {
            num_dropped += 1;
            prompt = self.conversation.prompt(self.model.files)?;
        }
        ensure!(
            prompt.ids.len() < self.max_context,
            "the message and the system prompt have {} tokens, the context of {} leaves no room \
             for an answer; shorten them or raise --max-context",
            prompt.ids.len(),
            self.max_context
        );
        if num_dropped > 0 {
            console.report(&format!(
                "[the context of {} tokens is full: the oldest {num_dropped} questions and their \
                 answers are left out; /reset forgets all]\n",
                self.max_context
            ));
        }
        Ok(prompt)
    }

    fn print_answer(
        &self,
        prompt: &Prompt,
        console: &mut Console<'_>,
    ) -> anyhow::Result<answer::Answer> {
        let mut settings = self.settings.clone();
        let sampling = &mut settings.request.sampling;
        sampling.seed = choice_seed(sampling.seed, self.num_attempts);
        let (is_terminal, is_streamed) = (self.is_terminal, !self.args.json);
        let answer = self.model.answer(prompt, &settings, &mut |text| match is_streamed {
            true if is_terminal => console.print(&visible(text)),
            true => console.print(text),
            false => Ok(()),
        })?;
        if is_streamed && !answer.text.ends_with('\n') {
            console.print("\n")?;
        }
        Ok(answer)
    }

    /// Keeps the text of a named conversation.
    fn keep_text(&self) -> anyhow::Result<()> {
        self.named.as_ref().map_or(Ok(()), |named| named.save(&self.conversation))
    }

    /// Keeps keys and values of a named conversation.
    fn keep_session(&self) -> anyhow::Result<()> {
        let Some(named) = &self.named else { return Ok(()) };
        let (id, dir) = (self.model.session.clone(), named.dir.clone());
        self.model.handle.call(move |engine| match engine.session_tokens(&id) {
            Ok(_) => engine.save_session(&id, &dir),
            // Nothing was said.
            Err(_) => Ok(()),
        })??;
        Ok(())
    }

    fn stats(&self) -> String {
        let sum = |count: fn(&Stats) -> usize| self.turns.iter().map(count).sum::<usize>();
        let Some(last) = self.turns.last() else { return "nothing was answered yet\n".to_owned() };
        let num_tokens = last.prompt_tokens + last.output_tokens;
        format!(
            "{}in all: {} answers, {} tokens; the context has {num_tokens} of {} tokens\n",
            last.text(),
            self.turns.len(),
            sum(|stats| stats.output_tokens),
            self.max_context
        )
    }
}

impl Stats {
    /// What `/stats` says of the last answer.
    fn text(&self) -> String {
        let Stats { prompt_tokens, cached_tokens, output_tokens, .. } = *self;
        let rate = |count: usize, milliseconds: f64| count as f64 * 1e3 / milliseconds.max(1e-3);
        format!(
            "last answer: {prompt_tokens} prompt tokens, {cached_tokens} of them cached, first \
             token after {:.0} ms, {output_tokens} tokens at {:.1}/s\n",
            self.first_token_ms,
            // The first token comes with the prompt.
            rate(output_tokens.saturating_sub(1), self.total_ms - self.first_token_ms),
        )
    }
}

/// Text without the characters that would steer the terminal: a model may say anything.
fn visible(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    match text.contains(steers) {
        true => Cow::Owned(text.replace(steers, "\u{FFFD}")),
        false => Cow::Borrowed(text),
    }
}

fn first_line(text: &str) -> Cow<'_, str> {
    visible(text.lines().next().unwrap_or(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_steer_a_terminal() {
        assert_eq!(visible("a\n\tb é"), "a\n\tb é");
        assert_eq!(visible("\x1b[2Ja\r\u{9b}"), "\u{FFFD}[2Ja\u{FFFD}\u{FFFD}");
        assert_eq!(first_line("one\ntwo"), "one");
    }
}
