//! Work on several cores, no more of them than cargo grants.
//!
//! cargo hands out job tokens through a pipe (the protocol of GNU make): a process owns one from
//! the start, reads a byte for each further one, and writes the byte back when it is done.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How many jobs may run at once.
#[derive(Debug)]
pub enum Jobs {
    Threads(usize),
    /// As many as there are tokens in the pipe.
    Tokens(Tokens),
}

#[derive(Debug)]
pub struct Tokens {
    take: File,
    give: File,
}

/// How often a waiting worker asks for a token.
const POLL: Duration = Duration::from_millis(20);

impl Jobs {
    /// As many jobs as there are cores.
    pub fn cores() -> Jobs {
        Jobs::Threads(std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// The jobs that `CARGO_MAKEFLAGS` (or `MAKEFLAGS`) grants, else [`Jobs::cores`].
    pub fn from_flags(flags: &str) -> Jobs {
        Tokens::open(flags).map_or_else(Jobs::cores, Jobs::Tokens)
    }

    /// Runs `work` for every index below `num`, in any order; returns the results in order, or the
    /// error of the lowest index that failed. After an error, nothing new is begun.
    pub fn run<T: Send, E: Send>(
        &self,
        num: usize,
        work: impl Fn(usize) -> Result<T, E> + Sync,
    ) -> Result<Vec<T>, E> {
        let next = AtomicUsize::new(0);
        let results: Mutex<Vec<(usize, Result<T, E>)>> = Mutex::new(Vec::new());
        let step = || {
            let idx = next.fetch_add(1, Ordering::Relaxed);
            if idx >= num {
                return;
            }
            let result = work(idx);
            if result.is_err() {
                next.fetch_max(num, Ordering::Relaxed);
            }
            results.lock().unwrap_or_else(|poison| poison.into_inner()).push((idx, result));
        };
        let is_left = || next.load(Ordering::Relaxed) < num;
        std::thread::scope(|scope| {
            let workers = match self {
                Jobs::Threads(threads) => *threads,
                Jobs::Tokens(_) => MAX_WORKERS,
            };
            for _ in 1..workers.min(num) {
                scope.spawn(|| {
                    while is_left() {
                        self.with_token(step);
                    }
                });
            }
            // NOTE: this thread works on the token that the process owns.
            while is_left() {
                step();
            }
        });
        let mut results = results.into_inner().unwrap_or_else(|poison| poison.into_inner());
        results.sort_by_key(|(idx, _)| *idx);
        results.into_iter().map(|(_, result)| result).collect()
    }

    /// Runs `step` if there is a token for it, else waits a moment.
    fn with_token(&self, step: impl Fn()) {
        let Jobs::Tokens(tokens) = self else {
            return step();
        };
        let mut token = [0];
        match (&tokens.take).read(&mut token) {
            Ok(1) => {
                step();
                // NOTE: a closed pipe means that cargo is gone; so is whoever wants the token.
                let _ = (&tokens.give).write_all(&token);
            }
            _ => std::thread::sleep(POLL),
        }
    }
}

/// Workers that wait for tokens at most.
const MAX_WORKERS: usize = 32;

impl Tokens {
    /// Opens the pipe that `--jobserver-auth` names: `fifo:PATH`, or `R,W`, two open files.
    fn open(flags: &str) -> Option<Tokens> {
        let value = flags.split_whitespace().rev().find_map(|flag| {
            flag.strip_prefix("--jobserver-auth=").or_else(|| flag.strip_prefix("--jobserver-fds="))
        })?;
        let (take, give) = match value.strip_prefix("fifo:") {
            Some(path) => (PathBuf::from(path), PathBuf::from(path)),
            None => {
                let (take, give) = value.split_once(',')?;
                let file = |number: &str| {
                    number.parse::<u32>().ok().map(|number| format!("/proc/self/fd/{number}"))
                };
                (PathBuf::from(file(take)?), PathBuf::from(file(give)?))
            }
        };
        Some(Tokens { take: open_without_waiting(&take)?, give: open_to_write(&give)? })
    }
}

/// Opened anew, so that only our own reads return at once.
#[cfg(target_os = "linux")]
fn open_without_waiting(path: &std::path::Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()
}

/// Elsewhere a pipe cannot be opened anew: the jobs are those of the machine.
#[cfg(not(target_os = "linux"))]
fn open_without_waiting(_path: &std::path::Path) -> Option<File> {
    None
}

fn open_to_write(path: &std::path::Path) -> Option<File> {
    std::fs::OpenOptions::new().write(true).open(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs 40 jobs and returns the most that ran at once.
    fn most_at_once(jobs: &Jobs) -> usize {
        let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let results: Result<Vec<usize>, ()> = jobs.run(40, |idx| {
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            most.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(3));
            running.fetch_sub(1, Ordering::SeqCst);
            Ok(idx * idx)
        });
        assert_eq!(results, Ok((0..40).map(|idx| idx * idx).collect()));
        most.into_inner()
    }

    #[test]
    fn no_more_threads_than_asked_for() {
        assert_eq!(most_at_once(&Jobs::Threads(1)), 1);
        assert!(most_at_once(&Jobs::Threads(3)) <= 3);
    }

    #[test]
    fn an_error_stops_the_rest() {
        let begun = AtomicUsize::new(0);
        let result: Result<Vec<()>, usize> = Jobs::Threads(2).run(1000, |idx| {
            begun.fetch_add(1, Ordering::SeqCst);
            if idx == 5 { Err(idx) } else { Ok(()) }
        });
        assert_eq!(result, Err(5));
        assert!(begun.into_inner() < 1000);
        assert_eq!(Jobs::Threads(4).run(0, |_| Err::<(), ()>(())), Ok(vec![]));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn tokens_bound_the_jobs_and_are_given_back() {
        use std::os::fd::AsRawFd;
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"+-").unwrap();
        let (take, give) = (reader.as_raw_fd(), writer.as_raw_fd());
        let jobs = Jobs::from_flags(&format!("-j --jobserver-auth={take},{give}"));
        assert!(matches!(jobs, Jobs::Tokens(_)));
        let most = most_at_once(&jobs);
        assert!((2..=3).contains(&most), "{most} jobs with two tokens beside our own");
        let mut left = [0; 2];
        reader.read_exact(&mut left).unwrap();
        left.sort_unstable();
        assert_eq!(&left, b"+-");
    }

    #[test]
    fn flags_without_a_pipe_mean_all_cores() {
        for flags in ["", "-j4", "--jobserver-auth=x,y", "--jobserver-auth=fifo:/nowhere/at/all"] {
            assert!(matches!(Jobs::from_flags(flags), Jobs::Threads(_)), "{flags}");
        }
    }
}
