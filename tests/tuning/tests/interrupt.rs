//! Ctrl-C during `bespoke tune`.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use bespoke_kernel_gen::tuning::record::Records;
use bespoke_tuning_tests::planted::HANGING;

use crate::process;

/// Longer than anything that is waited for takes on a busy machine.
const TIME_MAX: Duration = Duration::from_secs(120);

/// `bespoke tune`, and what it says.
struct Tune {
    child: Child,
    lines: Receiver<String>,
}

impl Tune {
    /// In a group of processes of its own, as a shell starts it.
    fn start(kernels: &str, records: &Path) -> Tune {
        let mut command = process(kernels);
        command.arg("tune").arg(bespoke_tuning_tests::model()).arg("--records").arg(records);
        command.args(["--backend", "cpu", "--budget", "300s", "--threads", "2"]);
        // As the planted kernels.
        command.args(["--activations", "float"]);
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Tune { child, lines }
    }

    /// Waits for a line with `text` in it.
    fn wait_for(&self, text: &str) -> String {
        let mut seen = String::new();
        loop {
            match self.lines.recv_timeout(TIME_MAX) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push_str(&format!("{line}\n")),
                Err(error) => panic!("no {text:?}: {error} behind\n{seen}"),
            }
        }
    }

    /// What a terminal does at Ctrl-C: the whole group gets the signal.
    fn interrupt(&self) {
        let group = format!("kill -INT -{}", self.child.id());
        assert!(Command::new("sh").args(["-c", &group]).status().unwrap().success());
    }

    /// Waits until all processes that it has started have ended as well, who hold its standard
    /// error; the exit code.
    fn finish(mut self) -> Option<i32> {
        loop {
            match self.lines.recv_timeout(TIME_MAX) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(error) => panic!("its processes do not end: {error}"),
            }
        }
        self.child.wait().unwrap().code()
    }
}

#[test]
fn the_first_interrupt_keeps_all_and_tells_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let tune = Tune::start("sound", folder.path());
    // NOTE: at its very start, before it is in a group of its own, the signal would reach the
    // process that verifies as well; then it has to be asked for once more.
    while Records::open(folder.path()).0.all.is_empty() {
        std::thread::yield_now();
    }
    tune.interrupt();
    tune.wait_for("ending after the measurement in flight");
    let line = tune.wait_for("interrupted; ");
    assert!(line.contains("the same command goes on from there"), "{line}");
    assert_eq!(tune.finish(), Some(1));
    let (records, warnings) = Records::open(folder.path());
    assert!(warnings.is_empty(), "{warnings:?}");
    let num_kept = records.all.len();
    assert!(line.contains(&format!("interrupted; {num_kept} records")), "{num_kept}: {line}");
    assert!(num_kept > 0);
    let failures: Vec<_> = records.all.iter().filter_map(|record| record.failure()).collect();
    assert!(failures.is_empty(), "the interrupt looks like a crash: {failures:?}");
}

#[test]
fn the_second_interrupt_waits_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let tune = Tune::start("hanging", folder.path());
    tune.wait_for(HANGING);
    tune.interrupt();
    tune.wait_for("ending after the measurement in flight");
    tune.interrupt();
    assert_eq!(tune.finish(), Some(130));
    let (records, _) = Records::open(folder.path());
    assert!(records.all.is_empty(), "nobody waited for a verdict");
}
