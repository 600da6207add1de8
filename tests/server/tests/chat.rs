//! `bespoke chat` as a process of its own, on the null backend.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use bespoke::backend::null::next_token;
use bespoke::tokenizer::SpecialTokens;
use bespoke_server_tests::{VOCAB, tokenizer};
use serde_json::{Value, json};

/// A model folder and a model cache, both of one test.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        fs::create_dir(&model).unwrap();
        tokenizer::write(&model);
        let config = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB,
            "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 1 << 18, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "hidden_act": "silu", "tie_word_embeddings": false, "eos_token_id": 257,
        });
        fs::write(model.join("config.json"), config.to_string()).unwrap();
        Place { dir }
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `bespoke chat` with the model.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bespoke-under-test"));
        command.env("BESPOKE_HOME", self.home()).args(["chat", "--backend", "null", "--model"]);
        command.arg(self.path("model")).args(args);
        command
    }

    fn start(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// Runs a chat with these lines.
    fn run(&self, args: &[&str], lines: &str) -> Output {
        let mut child = self.start(args);
        // A chat that refuses its arguments ends without reading.
        match child.stdin.take().unwrap().write_all(lines.as_bytes()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            result => result.unwrap(),
        }
        child.wait_with_output().unwrap()
    }

    /// What a chat that must succeed prints.
    #[track_caller]
    fn text(&self, args: &[&str], lines: &str) -> (String, String) {
        let output = self.run(args, lines);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (out, err) = (text(output.stdout), text(output.stderr));
        assert!(output.status.success(), "{err}");
        (out, err)
    }

    #[track_caller]
    fn json(&self, args: &[&str], lines: &str) -> Value {
        let (out, _) = self.text(&[args, &["--json"]].concat(), lines);
        serde_json::from_str(&out).unwrap()
    }

    #[track_caller]
    fn check_error(&self, args: &[&str], lines: &str, expected: &str) {
        let output = self.run(args, lines);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert!(err.contains("error: ") && err.contains(expected), "{err}");
    }
}

/// Every answer is a row of the letter h.
pub(crate) const H: [&str; 2] = ["--logit-bias", "104=100"];

fn contents(messages: &Value) -> Vec<&str> {
    let messages = messages.as_array().unwrap().iter();
    messages.map(|message| message["content"].as_str().unwrap()).collect()
}

/// What the null backend says to a prompt of this text.
fn answer_to(text: &str, num_tokens: usize) -> String {
    let tokenizer = tokenizer();
    let mut ids = tokenizer.encode(text, SpecialTokens::Omit).unwrap();
    let num_prompt = ids.len();
    (0..num_tokens).for_each(|_| ids.push(next_token(&ids, VOCAB)));
    tokenizer.decode(&ids[num_prompt..]).unwrap()
}

#[test]
fn lines_of_a_pipe_are_answered() {
    let place = Place::new();
    let args = [&H[..], &["--max-tokens", "5"]].concat();
    let lines = "one\n\n\"\"\"\ntwo\nlines\n\"\"\"\nthree\\\nfour";
    let (out, err) = place.text(&args, lines);
    assert_eq!(out, "hhhhh\nhhhhh\nhhhhh\n");
    assert!(!err.contains('\x1b') && err.contains("the answer has max-tokens"), "{err}");
    let report = place.json(&args, lines);
    let expected = ["one", "hhhhh", "two\nlines", "hhhhh", "three\nfour", "hhhhh"];
    assert_eq!(contents(&report["messages"]), expected);
    assert_eq!((&report["backend"], &report["session"]), (&json!("null"), &Value::Null));
    let turns = report["turns"].as_array().unwrap();
    assert_eq!(turns.len(), 3);
    assert!(turns.iter().all(|turn| turn["output_tokens"] == 5));
    assert!(turns.iter().all(|turn| turn["finish_reason"] == "length"));
    assert_eq!(place.text(&args, "").0, "");
}

#[test]
fn the_model_sees_the_conversation_and_computes_what_is_new() {
    let place = Place::new();
    let args = ["--system", "S", "--max-tokens", "6", "--ignore-eos", "--stop", "\u{FFFD}"];
    let report = place.json(&args, "one\ntwo\nthree\n");
    let mut text = "<|im_start|>system\nS<|im_end|>\n".to_owned();
    let messages = contents(&report["messages"]);
    assert_eq!((messages.len(), messages[0]), (7, "S"));
    let mut num_before = 0;
    for (pair, turn) in messages[1..].chunks(2).zip(report["turns"].as_array().unwrap()) {
        text += &format!("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", pair[0]);
        let expected = answer_to(&text, 6);
        let (expected, is_cut) = match expected.find('\u{FFFD}') {
            Some(end) => (&expected[..end], true),
            None => (expected.as_str(), false),
        };
        assert_eq!(pair[1], expected);
        let prompt_tokens = turn["prompt_tokens"].as_u64().unwrap();
        assert_eq!(
            prompt_tokens as usize,
            tokenizer().encode(&text, SpecialTokens::Omit).unwrap().len()
        );
        // All but the question that is new was there, as far as a stop string has not cut it.
        assert!(turn["cached_tokens"].as_u64().unwrap() >= num_before, "{turn}");
        let num_output = turn["output_tokens"].as_u64().unwrap();
        num_before = prompt_tokens + if is_cut { 0 } else { num_output - 1 };
        text += &format!("{}<|im_end|>\n", pair[1]);
    }
}

#[test]
fn a_named_conversation_goes_on() {
    let place = Place::new();
    let args = ["--session", "trip", "--temperature", "1", "--max-tokens", "20"];
    let at_once = place.json(&[&args[2..], &["--session", "other"]].concat(), "one\ntwo\nthree\n");
    place.text(&args, "one\ntwo\n");
    let report = place.json(&args, "three\n");
    assert_eq!(report["messages"], at_once["messages"]);
    assert_eq!(report["session"], "trip");
    // Keys and values of the first two turns come from the file.
    let (turn, whole) = (&report["turns"][0], &at_once["turns"][2]);
    assert_eq!(turn["prompt_tokens"], whole["prompt_tokens"]);
    assert_eq!(turn["cached_tokens"], whole["cached_tokens"]);
    assert!(turn["cached_tokens"].as_u64() > Some(0), "{turn}");

    // Without the file, and with a damaged one, they are computed again.
    let chats = place.home().join("chats");
    let file = chats.join("0000000000000000-trip.session");
    fs::write(&file, "damaged").unwrap();
    let output = place.run(&args, "four\n");
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && err.contains("computed again"), "{err}");
    fs::remove_file(&file).unwrap();
    place.text(&args, "five\n");
    let report = place.json(&args, "/reset\nsix\n");
    assert_eq!(contents(&report["messages"])[0], "six");
    let report = place.json(&args, "seven\n");
    assert_eq!(contents(&report["messages"])[0], "six");

    fs::write(chats.join("trip.json"), "{\"messages\": 3}").unwrap();
    place.check_error(&args, "", "trip.json");
    place.check_error(&["--session", "a/b"], "", "cannot name a session");
}

#[cfg(unix)]
#[test]
fn nobody_else_reads_conversations() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    place.text(&[&H[..], &["--session", "a", "--max-tokens", "3"]].concat(), "one\n");
    let mode = fs::metadata(place.home().join("chats")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_conversation_is_open_once() {
    let place = Place::new();
    let args = [&H[..], &["--session", "a", "--max-tokens", "3"]].concat();
    let mut first = place.start(&args);
    writeln!(first.stdin.as_ref().unwrap(), "one").unwrap();
    let mut line = String::new();
    BufReader::new(first.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "hhh\n");
    place.check_error(&args, "two\n", "the session a is open in another chat");
    drop(first.stdin.take());
    assert!(first.wait().unwrap().success());
    let report = place.json(&args, "two\n");
    assert_eq!(contents(&report["messages"]), ["one", "hhh", "two", "hhh"]);
}

#[test]
fn commands_change_the_conversation() {
    let place = Place::new();
    let file = place.path("saved.json");
    let file = file.to_str().unwrap();
    let lines = format!(
        "/system Be brief.\n/set max-tokens 2\none\n/undo\ntwo\n/set max-tokens 3\n/regen\n\
         //etc\n/save {file}\n/reset\nthree\n/load {file}\nfour\n/stats\n/set\n/system\n/help\n\
         /exit\nnever\n"
    );
    let (out, err) = place.text(&H, &lines);
    assert_eq!(out, "hh\nhh\nhhh\nhhh\nhhh\nhhh\n");
    for expected in [
        "taken back: one\n",
        "the temperature is 0",
        "going on after 5 messages",
        "in all: 6 answers, 16 tokens",
        "max-tokens          3\n",
        "\nBe brief.\n",
        "/regen              answer the last message anew",
    ] {
        assert!(err.contains(expected), "{expected}: {err}");
    }
    let saved: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(contents(&saved["messages"]), ["Be brief.", "two", "hhh", "/etc", "hhh"]);

    // Any list of messages can be gone on with.
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    fs::write(file, messages.to_string()).unwrap();
    let args = [&H[..], &["--max-tokens", "1"]].concat();
    let report = place.json(&args, &format!("/load {file}\nc\n"));
    assert_eq!(contents(&report["messages"]), ["a", "b", "c", "h"]);
}

#[test]
fn another_seed_answers_anew() {
    let place = Place::new();
    let args = ["--temperature", "1", "--max-tokens", "30", "--ignore-eos"];
    let report = |lines: &str| place.json(&args, lines)["messages"].clone();
    assert_eq!(report("one\n"), report("one\n"));
    assert_ne!(report("one\n"), report("one\n/regen\n"));
    assert_ne!(report("one\n"), report("/set seed 7\none\n"));
}

#[test]
fn what_cannot_be_done_is_said() {
    let place = Place::new();
    let check = |lines: &str, expected: &str| place.check_error(&H, lines, expected);
    check("/frobnicate\n", "there is no command /frobnicate");
    check("/undo\n", "there is no message to take back");
    check("/save\n", "/save needs the name of a file");
    check("/save x\n", "there is nothing to save yet");
    check("/load /no/such.json\n", "/no/such.json");
    check("/set temperature hot\n", "'hot'");
    let check = |args: &[&str], expected: &str| place.check_error(args, "one\n", expected);
    check(&["--temperature=-1"], "temperature is -1");
    check(&["--max-tokens", "0"], "max_tokens is 0");
    check(&["--stop", ""], "a stop string has 0 bytes");
    check(&["--json", "--top-logprobs", "2"], "no place in a chat");
    fs::write(place.path("model/tokenizer_config.json"), "{}").unwrap();
    check(&[], "the model has no chat template");
    fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    check(&[], "no tokenizer.json");
}

#[test]
fn a_full_context_leaves_the_oldest_out() {
    let place = Place::new();
    let args = [&H[..], &["--max-tokens", "20", "--max-context", "256", "--system", "S"]].concat();
    let lines = "a first question\nand a second one\na third\nfourth\nfifth\nsixth\n";
    let (out, err) = place.text(&args, lines);
    assert_eq!(out, format!("{}\n", "h".repeat(20)).repeat(6));
    assert!(err.contains("[the context of 256 tokens is full: the oldest "), "{err}");
    let report = place.json(&args, lines);
    assert_eq!(contents(&report["messages"]).len(), 13);
    for turn in report["turns"].as_array().unwrap() {
        assert!(turn["prompt_tokens"].as_u64() <= Some(236), "{turn}");
    }
    // An answer ends where the context does.
    let args = [&H[..], &["--max-context", "100"]].concat();
    let (_, err) = place.text(&args, "one\n");
    assert!(err.contains("[the context is full"), "{err}");
    place.check_error(&args, &"x".repeat(200), "the context of 100 leaves no room");
}

#[cfg(unix)]
#[test]
fn an_interrupt_stops_the_answer_and_not_the_chat() {
    let place = Place::new();
    let args = [&H[..], &["--max-tokens", "200000", "--session", "a"]].concat();
    let mut child = place.start(&args);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    writeln!(stdin, "one").unwrap();
    let first = interrupt_after_a_letter(&child, &mut stdout);
    assert!(first.len() < 200_000 && first.trim_matches('h') == "\n", "{}", first.len());
    writeln!(stdin, "/set max-tokens 3\ntwo").unwrap();
    let mut second = String::new();
    stdout.read_line(&mut second).unwrap();
    assert_eq!(second, "hhh\n");
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && err.contains("[stopped]\n"), "{err}");
    // What was there of the answer is part of the conversation.
    let text = fs::read_to_string(place.home().join("chats/a.json")).unwrap();
    let kept: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(contents(&kept["messages"]), ["one", first.trim_end(), "two", "hhh"]);
}

/// Sends SIGINT when an answer has begun, and gives the answer.
#[cfg(unix)]
fn interrupt_after_a_letter(child: &Child, stdout: &mut BufReader<ChildStdout>) -> String {
    let mut letter = [0];
    stdout.read_exact(&mut letter).unwrap();
    let process = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    let mut rest = String::new();
    stdout.read_line(&mut rest).unwrap();
    format!("{}{rest}", char::from(letter[0]))
}

#[cfg(unix)]
#[test]
fn an_interrupt_between_answers_ends_a_piped_chat() {
    let place = Place::new();
    let mut child = place.start(&[&H[..], &["--max-tokens", "3"]].concat());
    writeln!(child.stdin.as_ref().unwrap(), "one\ntwo").unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    (0..2).for_each(|_| assert_eq!(stdout.read_line(&mut line).unwrap(), 4));
    // NOTE: the second answer is printed, but may not have ended; one of a few signals finds the
    // chat between two lines.
    let process = rustix::process::Pid::from_child(&child);
    while child.try_wait().unwrap().is_none() {
        let _ = rustix::process::kill_process(process, rustix::process::Signal::INT);
        std::thread::yield_now();
    }
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// The conversations that a chat has kept.
pub(crate) fn kept(path: &Path) -> Vec<String> {
    let value: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    contents(&value["messages"]).into_iter().map(str::to_owned).collect()
}
