//! Where lines come from: a person at a terminal, or a pipe.

use std::fs;
use std::io::{self, BufRead, IsTerminal, Read};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Cmd, Config, Context, Editor, Helper, KeyEvent};

use super::input::{self, NAMES};

/// Largest message that is read.
pub(super) const INPUT_BYTES_MAX: usize = 1 << 20;

/// Lines that the history keeps.
const HISTORY_MAX: usize = 1000;

const PROMPT: &str = "> ";

/// What came in.
#[derive(Debug, PartialEq)]
pub(super) enum Line {
    /// Lines that belong together.
    Text(String),
    /// Ctrl-C at the prompt.
    Interrupted,
    /// Ctrl-D, or the end of the pipe.
    End,
}

pub(super) enum Lines {
    Terminal(Box<Terminal>),
    Pipe(Box<dyn BufRead>),
}

pub(super) struct Terminal {
    editor: Editor<Commands, DefaultHistory>,
    /// `None` where nothing is kept.
    history: Option<PathBuf>,
}

impl Lines {
    /// Lines from standard input, with line editing where a person sits at it; `history` is the
    /// file of earlier lines.
    pub(super) fn open(history: Option<PathBuf>) -> anyhow::Result<Lines> {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Ok(Lines::Pipe(Box::new(io::stdin().lock())));
        }
        let config =
            Config::builder().max_history_size(HISTORY_MAX)?.history_ignore_space(true).build();
        let mut editor = Editor::<Commands, _>::with_config(config)?;
        editor.set_helper(Some(Commands));
        // NOTE: a line end that was typed ahead has become the other character.
        for character in ['\r', '\n'] {
            editor.bind_sequence(KeyEvent::alt(character), Cmd::Newline);
        }
        let history = history.filter(|history| match fs::exists(history) {
            Ok(true) => editor.load_history(history).is_ok(),
            _ => true,
        });
        Ok(Lines::Terminal(Box::new(Terminal { editor, history })))
    }

    /// Whether a person sees what is written between two lines.
    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Lines::Terminal(_))
    }

    /// Waits for the next line.
    pub(super) fn next(&mut self) -> anyhow::Result<Line> {
        match self {
            Lines::Terminal(terminal) => terminal.next(),
            Lines::Pipe(reader) => next_of_pipe(reader),
        }
    }
}

impl Terminal {
    fn next(&mut self) -> anyhow::Result<Line> {
        match self.editor.readline(PROMPT) {
            Ok(text) => {
                self.keep(&text);
                Ok(Line::Text(text))
            }
            Err(ReadlineError::Interrupted | ReadlineError::Signal(_)) => Ok(Line::Interrupted),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(error) => Err(error).context("cannot read from the terminal"),
        }
    }

    /// Adds a line to the history. A file that cannot be written is not worth ending a chat.
    fn keep(&mut self, text: &str) {
        let is_kept = !text.trim().is_empty() && self.editor.add_history_entry(text).is_ok();
        if let Some(path) = self.history.as_ref().filter(|_| is_kept)
            && self.editor.append_history(path).is_err()
        {
            self.history = None;
        }
    }
}

/// A message, of as many lines as it has.
fn next_of_pipe(reader: &mut dyn BufRead) -> anyhow::Result<Line> {
    let mut text = String::new();
    loop {
        let mut bytes = Vec::new();
        let num_left = (INPUT_BYTES_MAX - text.len()) as u64 + 1;
        reader.take(num_left).read_until(b'\n', &mut bytes).context("standard input")?;
        if bytes.is_empty() {
            return Ok(if text.is_empty() { Line::End } else { Line::Text(text) });
        }
        let Ok(line) = str::from_utf8(&bytes) else {
            bail!("standard input: a line is not UTF-8 text");
        };
        text.push_str(line);
        if text.len() > INPUT_BYTES_MAX {
            bail!("standard input: a message has more than {INPUT_BYTES_MAX} bytes; shorten it");
        }
        let whole = text.trim_end_matches(['\r', '\n']);
        if input::is_complete(whole) {
            text.truncate(whole.len());
            return Ok(Line::Text(text));
        }
    }
}

/// Helps with commands, and knows where a message goes on.
struct Commands;

impl Helper for Commands {}

impl Highlighter for Commands {}

impl Hinter for Commands {
    type Hint = String;
}

impl Completer for Commands {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..pos];
        let names = NAMES.iter().filter(|name| typed.starts_with('/') && name.starts_with(typed));
        Ok((0, names.map(|name| (*name).to_owned()).collect()))
    }
}

impl Validator for Commands {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(match context.input() {
            text if text.len() > INPUT_BYTES_MAX => {
                ValidationResult::Invalid(Some(format!("  more than {INPUT_BYTES_MAX} bytes")))
            }
            text if input::is_complete(text) => ValidationResult::Valid(None),
            _ => ValidationResult::Incomplete,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &[u8], expected: &[&str]) {
        let mut reader = text;
        for line in expected {
            assert_eq!(next_of_pipe(&mut reader).unwrap(), Line::Text((*line).to_owned()));
        }
        assert_eq!(next_of_pipe(&mut reader).unwrap(), Line::End);
    }

    #[test]
    fn a_pipe_gives_whole_messages() {
        check(b"", &[]);
        check(b"a\nb", &["a", "b"]);
        check(b"a\r\n\nb\n", &["a", "", "b"]);
        check(b"a\\\nb\nc\n", &["a\\\nb", "c"]);
        check(b"\"\"\"\na\n\nb\n\"\"\"\nc\n", &["\"\"\"\na\n\nb\n\"\"\"", "c"]);
        // What is open at the end is taken as it is.
        check(b"\"\"\"\na\n", &["\"\"\"\na\n"]);
    }

    #[test]
    fn a_pipe_is_bounded_and_must_be_text() {
        let largest = [b'a'; INPUT_BYTES_MAX];
        let mut reader = largest.as_slice();
        assert!(matches!(next_of_pipe(&mut reader), Ok(Line::Text(_))));
        let mut reader = io::repeat(b'a').take(u64::MAX);
        let mut reader = io::BufReader::new(&mut reader);
        let error = next_of_pipe(&mut reader).unwrap_err().to_string();
        assert!(error.contains("more than 1048576 bytes"), "{error}");
        let error = next_of_pipe(&mut &b"\xff\n"[..]).unwrap_err().to_string();
        assert!(error.contains("not UTF-8"), "{error}");
    }
}
