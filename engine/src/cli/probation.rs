//! A chat template is tried out in a process of its own before strangers' messages go through it.
//!
//! Templates come with models, from anybody. Their steps and their text are bounded wherever they
//! are rendered, but not the memory of values in between: doubling a text thirty times takes few
//! steps. Only a process can be held to an amount of memory, so the program runs itself once more,
//! with limits, on a few chats. What this does not show is a template that behaves with those chats
//! and not with others.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value, json};

use super::console::Console;
use crate::source::ModelFolder;
use crate::tokenizer::chat::{ChatOptions, ChatTemplate, Message};

/// Address space of the process, in bytes.
const MEMORY_MAX: u64 = 512 << 20;
/// What it may compute, in seconds.
const CPU_SECONDS_MAX: u64 = 2;
/// How long it is waited for: the machine may be busy.
const TIME_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);

/// Hidden: what the process runs.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Model folder; without one, the model that the program brings
    dir: Option<PathBuf>,
}

/// A process that tries out a template, until it is asked how that went.
pub(super) struct Probation {
    dir: PathBuf,
    /// `None` in a program that is not this one, such as a test.
    child: Option<Child>,
    start: Instant,
}

impl Probation {
    /// Begins to try out the template of a model with the program `program`.
    pub(super) fn start(files: &ModelFolder, program: Option<&Path>) -> anyhow::Result<Probation> {
        let start = Instant::now();
        let mut child = None;
        if let Some(program) = program {
            let mut command = Command::new(program);
            command.arg("probe-template").env_clear();
            if let ModelFolder::Disk(dir) = files {
                command.arg("--").arg(dir);
            }
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            child = Some(command.spawn().context("cannot start the trial of the chat template")?);
        }
        Ok(Probation { dir: files.root().to_owned(), child, start })
    }

    /// Waits for the end; an error where the template takes too much.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        let Some(child) = &mut self.child else { return Ok(()) };
        loop {
            match child.try_wait().context("the trial of the chat template")? {
                Some(status) if status.success() => return Ok(()),
                Some(_) => break,
                None if self.start.elapsed() > TIME_MAX => break,
                None => thread::sleep(POLL),
            }
        }
        bail!(
            "{}: the chat template takes more than {CPU_SECONDS_MAX} seconds or {} MiB for a few \
             messages, or is damaged; take the model from somebody else",
            self.dir.display(),
            MEMORY_MAX >> 20
        )
    }
}

impl Drop for Probation {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // NOTE: it may have ended, and nobody is left to be told.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Tries out a template. Dies of its limits where it takes too much.
pub(super) fn run(args: &Args, console: &Console<'_>) -> anyhow::Result<()> {
    limit()?;
    let files = match (&args.dir, &console.bundle) {
        (Some(dir), _) => ModelFolder::Disk(dir.clone()),
        (None, Some(bundle)) => ModelFolder::Bundle(bundle.clone()),
        (None, None) => bail!("no model folder is given"),
    };
    let Some(template) = ChatTemplate::read(&files)? else { return Ok(()) };
    for messages in chats() {
        for (add_generation_prompt, tools) in [(true, tools()), (false, Value::Null)] {
            let options = ChatOptions {
                add_generation_prompt,
                tools,
                now: SystemTime::UNIX_EPOCH,
                kwargs: Map::from_iter([(
                    "enable_thinking".to_owned(),
                    add_generation_prompt.into(),
                )]),
            };
            // NOTE: a template may refuse a chat, or take too many steps for it: whoever renders it
            // is told so.
            let _ = template.render(&messages, &options);
        }
    }
    Ok(())
}

#[cfg(unix)]
fn limit() -> anyhow::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let to = |max| Rlimit { current: Some(max), maximum: Some(max) };
    setrlimit(Resource::As, to(MEMORY_MAX))?;
    setrlimit(Resource::Cpu, to(CPU_SECONDS_MAX))?;
    setrlimit(Resource::Core, to(0))?;
    Ok(())
}

#[cfg(not(unix))]
fn limit() -> anyhow::Result<()> {
    Ok(())
}

/// Short chats, a long one, one with a long message, and one that calls tools.
fn chats() -> Vec<Vec<Message>> {
    let pair = |idx: usize| {
        [
            Message::new("user", format!("Question {idx}?")),
            Message::new("assistant", format!("Answer {idx}.")),
        ]
    };
    let mut call = Message::new("assistant", "");
    call.rest.insert(
        "tool_calls".to_owned(),
        json!([{"id": "call_1", "type": "function",
                "function": {"name": "search", "arguments": {"text": "x"}}}]),
    );
    let mut result = Message::new("tool", "{\"found\": [1, 2, 3]}");
    result.rest.insert("tool_call_id".to_owned(), "call_1".into());
    let system = Message::new("system", "Be brief.");
    vec![
        vec![Message::new("user", "Hello")],
        vec![system.clone(), Message::new("user", "Hello")],
        (0..64).flat_map(pair).collect(),
        vec![Message::new("user", "long ".repeat(1 << 14))],
        vec![system, Message::new("user", "Find x."), call, result],
    ]
}

fn tools() -> Value {
    json!([{"type": "function", "function": {
        "name": "search", "description": "Finds a text.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    }}])
}
