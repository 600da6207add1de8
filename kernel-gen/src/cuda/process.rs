//! Runs a program to its end, but not forever.

use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How a program ended, and all it wrote.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
}

/// Why a program gave no result.
#[derive(Debug)]
pub enum Failure {
    Io(std::io::Error),
    Timeout(Duration),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Io(error) => write!(f, "{error}"),
            Failure::Timeout(limit) => write!(f, "not done after {} s, stopped", limit.as_secs()),
        }
    }
}

/// Runs `command` with no input. After `limit` it is killed, with the processes it started.
pub fn run(command: &mut Command, limit: Duration) -> Result<Output, Failure> {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Failure::Io)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let stdout = scope.spawn(|| read(stdout));
        let stderr = scope.spawn(|| read(stderr));
        let begin = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Ok(status),
                Ok(None) if begin.elapsed() > limit => {
                    kill(&mut child);
                    break Err(Failure::Timeout(limit));
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => break Err(Failure::Io(error)),
            }
        };
        let (stdout, stderr) =
            (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        Ok(Output { status: status?, stdout, stderr })
    })
}

fn read(pipe: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // NOTE: what was read before an error is worth showing.
        let _ = pipe.read_to_end(&mut bytes);
    }
    bytes
}

/// Kills the child and, where there are process groups, its children.
fn kill(child: &mut std::process::Child) {
    #[cfg(unix)]
    {
        let group = format!("-{}", child.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
    }
    let _ = child.kill();
    let _ = child.wait();
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_come_back() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let output = run(&mut command, Duration::from_secs(60)).unwrap();
        assert_eq!((output.stdout.as_slice(), output.stderr.as_str()), (&b"out\n"[..], "err\n"));
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn what_hangs_is_stopped_with_its_children() {
        let mut command = Command::new("sh");
        // NOTE: the child holds the pipes open as long as it lives.
        command.args(["-c", "sleep 600 & wait"]);
        let result = run(&mut command, Duration::from_millis(100));
        assert!(matches!(result, Err(Failure::Timeout(_))), "{result:?}");
    }
}
