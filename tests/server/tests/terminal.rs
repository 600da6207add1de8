//! `bespoke chat` at a terminal: a pseudo-terminal, at which the test sits.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use bespoke_server_tests::LONG;
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::chat::{H, Place, kept};

/// A program at a terminal.
struct Session {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    /// What was shown and not yet waited for.
    seen: String,
}

/// What the line editor shows when it listens; what is typed before comes another way.
const PROMPT: &str = "> ";

const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const ENTER: &str = "\r";
const ALT_ENTER: &str = "\x1b\r";

impl Session {
    fn start(mut command: Command) -> Session {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let path = OsStr::from_bytes(name.as_bytes());
        // NOTE: or it would become the terminal of the tests too, where they have none.
        let flags = OFlags::NOCTTY.bits().cast_signed();
        let open = || {
            let mut options = OpenOptions::new();
            Stdio::from(options.read(true).write(true).custom_flags(flags).open(path).unwrap())
        };
        command.stdin(open()).stdout(open()).stderr(open()).env("TERM", "xterm");
        // SAFETY: both are single system calls, which may be made between fork and exec. They make
        // the terminal the one whose Ctrl-C reaches the program.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        // NOTE: only the child may hold the terminal, or its end would not be seen.
        drop(command);
        let keyboard = File::from(master);
        let mut reader = keyboard.try_clone().unwrap();
        let (sender, screen) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // An error is how a terminal tells that nobody is left at it.
            while let Ok(len @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Session { child, keyboard, screen, seen: String::new() }
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until `text` is shown, and forgets what was before.
    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let end = Instant::now() + LONG;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            let Ok(bytes) = self.screen.recv_timeout(left) else {
                panic!("{text:?} was not shown, but {:?}", self.seen);
            };
            self.seen += &String::from_utf8_lossy(&bytes);
        }
    }

    fn end(mut self) {
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // NOTE: after a failed test; a child that has ended cannot be killed, and that is fine.
        let _ = self.child.kill();
    }
}

#[test]
fn a_person_can_chat() {
    let place = Place::new();
    let args = [&H[..], &["--session", "a", "--max-tokens", "7"]].concat();
    let mut session = Session::start(place.command(&args));
    session.wait_for("/help lists the commands");
    session.wait_for(PROMPT);
    session.press("one");
    session.press(ENTER);
    session.wait_for("hhhhhhh\r\n");
    session.wait_for(PROMPT);
    // A message of two lines, by Alt-Enter and by a backslash.
    for keys in ["two", ALT_ENTER, "lines", ENTER] {
        session.press(keys);
    }
    session.wait_for("hhhhhhh\r\n");
    session.wait_for(PROMPT);
    session.press("three\\\rlines\r");
    session.wait_for("hhhhhhh\r\n");
    session.wait_for(PROMPT);
    // Ctrl-C clears the line.
    session.press("not this");
    session.wait_for("not this");
    session.press(CTRL_C);
    session.wait_for(PROMPT);
    session.press("four\r");
    session.wait_for("hhhhhhh\r\n");
    session.wait_for(PROMPT);
    // A mistake is told and ends nothing.
    session.press("/nothing\r");
    session.wait_for("error: there is no command /nothing");
    session.wait_for(PROMPT);
    // Tab completes, and the history has earlier lines.
    session.press("/un\t\r");
    session.wait_for("taken back: four");
    session.wait_for(PROMPT);
    session.press(CTRL_D);
    session.end();
    let chats = place.home().join("chats");
    let expected = ["one", "hhhhhhh", "two\nlines", "hhhhhhh", "three\nlines", "hhhhhhh"];
    assert_eq!(kept(&chats.join("a.json")), expected);
    let history = chats.join("history");
    let lines = fs::read_to_string(&history).unwrap();
    assert!(lines.contains("\nfour\n") && !lines.contains("not this"), "{lines}");
    assert_eq!(fs::metadata(&history).unwrap().permissions().mode() & 0o777, 0o600);

    let mut session = Session::start(place.command(&args));
    session.wait_for("going on after 6 messages");
    session.wait_for(PROMPT);
    // The arrow goes back beyond `/undo` and `/nothing` to `four`.
    session.press("\x1b[A\x1b[A\x1b[A\r");
    session.wait_for("hhhhhhh\r\n");
    session.wait_for(PROMPT);
    session.press("/exit\r");
    session.end();
    assert_eq!(kept(&chats.join("a.json"))[6], "four");
}

#[test]
fn ctrl_c_stops_an_answer() {
    let place = Place::new();
    let args = [&H[..], &["--session", "a", "--max-tokens", "200000"]].concat();
    let mut session = Session::start(place.command(&args));
    session.wait_for(PROMPT);
    for question in ["one", "two"] {
        session.press(question);
        session.press(ENTER);
        session.wait_for("hhhhhhhhhhhhhhhh");
        session.press(CTRL_C);
        session.wait_for("[stopped]");
        session.wait_for(PROMPT);
    }
    // It is the chat that goes on, with Ctrl-C at the prompt as before.
    session.press("gone");
    session.wait_for("gone");
    session.press(CTRL_C);
    session.wait_for(PROMPT);
    session.press("/set max-tokens 5\r");
    session.wait_for(PROMPT);
    session.press("three\r");
    session.wait_for("hhhhh\r\n");
    session.wait_for(PROMPT);
    session.press(CTRL_D);
    session.end();
    let kept = kept(&place.home().join("chats/a.json"));
    assert_eq!([&kept[0], &kept[2], &kept[4], &kept[5]], ["one", "two", "three", "hhhhh"]);
    assert!(kept[1].len() < 200_000 && kept[1].bytes().all(|byte| byte == b'h'));
}

#[test]
fn answers_cannot_steer_the_terminal() {
    let place = Place::new();
    // Token 27 is ESC.
    let args = ["--logit-bias", "27=100", "--max-tokens", "3"];
    let mut session = Session::start(place.command(&args));
    session.wait_for(PROMPT);
    session.press("one\r");
    session.wait_for("\u{FFFD}\u{FFFD}\u{FFFD}\r\n");
    session.wait_for(PROMPT);
    session.press(CTRL_D);
    session.end();
}
