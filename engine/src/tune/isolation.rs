//! Kernels are verified in a process of their own, which may crash or hang without harm.
//!
//! The process says which kernel it is about to call and what came of it, a line of JSON each. When
//! it ends early or falls silent, the kernel that it named last is the culprit, and another process
//! goes on behind it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use bespoke_kernel_gen::tuning::certificate::Level;
use bespoke_kernel_gen::tuning::record::Failure;
use serde::{Deserialize, Serialize};

use super::ledger::TakeVerdict;
use crate::error::Error;

/// Bytes of a line at most.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// A line of the process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Line {
    /// The kernel of this symbol is about to be called.
    Begin(String),
    Passed(String, Vec<Level>),
    Failed(String, Failure),
}

/// How kernels are verified apart.
pub struct Isolation<'a> {
    /// The command that verifies kernels by their symbols.
    pub command: &'a dyn Fn(&[String]) -> Command,
    /// How long a process may say nothing.
    pub silence_max: Duration,
}

impl Isolation<'_> {
    /// Verifies all of `symbols`; `take` gets each verdict at once.
    ///
    /// # Errors
    /// No process can be started, one ends before it has called any kernel or is ended by somebody
    /// else, or `take` fails.
    pub fn verify(&self, symbols: &[String], take: &mut TakeVerdict<'_>) -> Result<(), Error> {
        let mut left = symbols.to_vec();
        // NOTE: every process takes at least one of them away.
        while !left.is_empty() {
            let mut process = Process::start((self.command)(&left))?;
            let mut current: Option<String> = None;
            let reason = loop {
                match process.lines.recv_timeout(self.silence_max) {
                    Ok(Line::Begin(symbol)) => current = Some(symbol),
                    Ok(Line::Passed(symbol, levels)) => {
                        left.retain(|other| *other != symbol);
                        current = None;
                        take(&symbol, Ok(levels))?;
                    }
                    Ok(Line::Failed(symbol, failure)) => {
                        left.retain(|other| *other != symbol);
                        current = None;
                        take(&symbol, Err(failure))?;
                    }
                    Err(RecvTimeoutError::Timeout) => break "hang",
                    Err(RecvTimeoutError::Disconnected) => break "crash",
                }
            };
            let end = process.end();
            if reason == "crash" && end.is_foreign && !left.is_empty() {
                return Err(Error::Resources(format!(
                    "the process that verifies kernels was ended by somebody else ({}); what it \
                     has verified is kept, call this again to go on",
                    end.words
                )));
            }
            match current.or_else(|| left.first().filter(|_| reason == "hang").cloned()) {
                Some(symbol) if left.contains(&symbol) => {
                    left.retain(|other| *other != symbol);
                    let message = match reason {
                        "hang" => format!("no end after {} s", self.silence_max.as_secs()),
                        _ => end.words,
                    };
                    take(&symbol, Err(Failure { reason: reason.to_owned(), message }))?;
                }
                _ if left.is_empty() => {}
                _ => {
                    return Err(Error::Resources(format!(
                        "the process that verifies kernels ended before it was done: {}",
                        end.words
                    )));
                }
            }
        }
        Ok(())
    }
}

/// A process, ended when it is dropped.
struct Process {
    child: Child,
    lines: Receiver<Line>,
}

impl Process {
    /// NOTE: its standard input stays open as long as this program lives, which tells the process
    /// when nobody waits for it any more.
    fn start(mut command: Command) -> Result<Process, Error> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // NOTE: a Ctrl-C at the terminal is for this program; a kernel must not look as if it had
        // crashed.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let resources = |error: Box<dyn std::error::Error>| {
            Error::Resources(format!("cannot start the process that verifies kernels: {error}"))
        };
        let mut child = command.spawn().map_err(|error| resources(error.into()))?;
        let (sender, lines) = mpsc::channel();
        let stdout = child.stdout.take().ok_or_else(|| resources("no pipe".into()))?;
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            loop {
                let mut text = String::new();
                let read = reader.by_ref().take(LINE_BYTES_MAX).read_line(&mut text);
                if !read.is_ok_and(|len| len > 0) {
                    return;
                }
                // What else the process prints is not for us.
                if let Ok(line) = serde_json::from_str(&text)
                    && sender.send(line).is_err()
                {
                    return;
                }
            }
        });
        Ok(Process { child, lines })
    }

    /// Ends the process, unless it has ended by itself.
    fn end(&mut self) -> End {
        // NOTE: it may have ended by itself.
        let _ = self.child.kill();
        match self.child.wait() {
            Ok(status) => End { words: status.to_string(), is_foreign: is_foreign(status) },
            Err(error) => End { words: error.to_string(), is_foreign: false },
        }
    }
}

/// How a process ended.
struct End {
    words: String,
    /// Whether by a signal that people and systems send, and no kernel that breaks down.
    is_foreign: bool,
}

#[cfg(unix)]
fn is_foreign(status: ExitStatus) -> bool {
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    let foreign = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGKILL];
    signal.is_some_and(|signal| foreign.contains(&signal))
}

#[cfg(not(unix))]
fn is_foreign(_status: ExitStatus) -> bool {
    false
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// Verdicts of a process that runs `script` on the symbols that are left.
    fn verify(script: &str, symbols: &[&str], silence: Duration) -> (Vec<(String, String)>, usize) {
        let num_started = std::cell::Cell::new(0);
        let command = |symbols: &[String]| {
            num_started.set(num_started.get() + 1);
            let mut command = Command::new("sh");
            command.arg("-c").arg(script).arg("sh").args(symbols);
            command
        };
        let symbols: Vec<String> = symbols.iter().map(|s| (*s).to_owned()).collect();
        let mut verdicts = Vec::new();
        let isolation = Isolation { command: &command, silence_max: silence };
        isolation
            .verify(&symbols, &mut |symbol, verdict| {
                let word = verdict.map_or_else(|failure| failure.reason, |_| "passed".to_owned());
                verdicts.push((symbol.to_owned(), word));
                Ok(())
            })
            .unwrap();
        verdicts.sort();
        (verdicts, num_started.get())
    }

    /// Passes all, but what `case` does with some.
    fn script(case: &str) -> String {
        format!(
            "for s in \"$@\"; do echo \"{{\\\"begin\\\":\\\"$s\\\"}}\"; case $s in {case} esac; \
             echo \"{{\\\"passed\\\":[\\\"$s\\\",[]]}}\"; done"
        )
    }

    fn words(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn whoever_crashes_is_found_and_the_rest_goes_on() {
        let script = script("b) kill -SEGV $$;; d) exit 3;;");
        let (verdicts, num_started) =
            verify(&script, &["a", "b", "c", "d", "e"], Duration::from_secs(20));
        let expected =
            [("a", "passed"), ("b", "crash"), ("c", "passed"), ("d", "crash"), ("e", "passed")];
        assert_eq!(verdicts, words(&expected));
        assert_eq!(num_started, 3);
    }

    #[test]
    fn whoever_hangs_is_ended() {
        let script = script("a) exec sleep 600;;");
        let (verdicts, _) = verify(&script, &["a", "b"], Duration::from_secs(1));
        assert_eq!(verdicts, words(&[("a", "hang"), ("b", "passed")]));
    }

    #[test]
    fn whoever_is_killed_by_others_is_not_blamed() {
        // NOTE: not INT, which processes in the background of a script are started to ignore.
        for signal in ["TERM", "KILL"] {
            let script = script(&format!("b) kill -{signal} $$;;"));
            let command = |symbols: &[String]| {
                let mut command = Command::new("sh");
                command.arg("-c").arg(&script).arg("sh").args(symbols);
                command
            };
            let isolation = Isolation { command: &command, silence_max: Duration::from_secs(20) };
            let mut passed = Vec::new();
            let symbols = ["a", "b", "c"].map(str::to_owned);
            let error = isolation
                .verify(&symbols, &mut |symbol, verdict| {
                    assert!(verdict.is_ok(), "{symbol}");
                    passed.push(symbol.to_owned());
                    Ok(())
                })
                .unwrap_err();
            assert!(error.to_string().contains("by somebody else"), "{error}");
            assert_eq!(passed, ["a"], "{signal}");
        }
    }

    #[test]
    fn a_process_that_does_nothing_is_an_error() {
        let command = |_: &[String]| Command::new("true");
        let isolation = Isolation { command: &command, silence_max: Duration::from_secs(20) };
        let error = isolation.verify(&["a".to_owned()], &mut |_, _| Ok(())).unwrap_err();
        assert!(error.to_string().contains("before it was done"), "{error}");
    }
}
