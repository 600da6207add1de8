//! Programs that use the library: the examples, and `programs/abi.c`.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use engine::config::BackendChoice;
use engine::import::environment;
use engine::request::Request;
use engine::tokenizer::SpecialTokens;

use crate::compiler::{Linking, Program, SANITIZERS, compile, shared_library};
use crate::models::{Oracle, null, tiny};

const PROMPT: &str = "Once upon a \"time\"";

fn check_abi(program: &Program) {
    let (tiny, null) = (tiny(), null());
    for test in ["misuse", "text", "sessions", "cancel", "threads"] {
        run(Command::new(&program.path).arg(test).arg(null.path()));
    }
    let output = run(Command::new(&program.path).arg("tokens").arg(tiny.path()));
    let ids: Vec<u32> = text(&output).lines().map(|line| line.parse().unwrap()).collect();
    let request = Request {
        prompt_ids: vec![5, 6, 7],
        max_tokens: 20,
        ignore_eos: true,
        ..Request::default()
    };
    let mut oracle = Oracle::new(tiny.path(), BackendChoice::Reference);
    assert_eq!(ids, oracle.answer(request).0);
}

#[test]
fn programs_may_do_wrong() {
    for linking in [Linking::Shared, Linking::Static] {
        compile("tests/programs/abi.c", linking, &[]).iter().for_each(check_abi);
    }
}

#[test]
fn sanitizers_find_nothing() {
    let program = compile("tests/programs/abi.c", Linking::Shared, SANITIZERS);
    program.iter().for_each(check_abi);
}

#[test]
fn c_example_continues_a_text() {
    let Some(program) = compile("examples/generate.c", Linking::Shared, &[]) else { return };
    let dir = tiny();
    let args = [dir.path().to_str().unwrap(), PROMPT];
    let output = run(Command::new(&program.path).args(args).arg("reference"));
    assert_eq!(text(&output), continuation(dir.path(), BackendChoice::Reference));
    // The library's kernels are those of another model.
    let output = Command::new(&program.path).args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.starts_with("error: ") && errors.contains("missing: "), "{errors}");
}

#[test]
fn python_example_continues_a_text() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: no python3");
        return;
    }
    let dir = tiny();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/generate.py");
    let mut command = Command::new("python3");
    command.arg("-B").arg(example).arg(shared_library()).arg(dir.path()).arg(PROMPT);
    let output = run(command.arg("reference"));
    assert_eq!(text(&output), continuation(dir.path(), BackendChoice::Reference));
}

#[test]
fn cpp_example_chats() {
    let Some(program) = compile("examples/chat.cpp", Linking::Shared, &[]) else { return };
    let dir = tiny();
    let mut command = Command::new(&program.path);
    command.arg(dir.path()).arg("reference");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Say \"a\\b\"\nAgain\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");

    let mut oracle = Oracle::new(dir.path(), BackendChoice::Reference);
    let turn = |text: &str| format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
    let mut history = oracle.ids_of(&turn("Say \"a\\b\""), SpecialTokens::Omit);
    let (ids, first) = oracle.answer(request(history.clone()));
    let mut between = oracle.ids_of(&format!("<|im_end|>\n{}", turn("Again")), SpecialTokens::Omit);
    if ids.last() == between.first() {
        between.remove(0);
    }
    history.extend(ids.into_iter().chain(between));
    let (_, second) = oracle.answer(request(history));
    assert_eq!(text(&output), format!("> {first}\n> {second}\n> "));
}

/// The kernels of a default build are SmolLM2's.
#[test]
fn c_example_runs_kernels() {
    let dir = environment::cache().unwrap().models_dir().join("smollm2-135m");
    if !dir.join("config.json").is_file() {
        let required = std::env::var("BESPOKE_REQUIRE_MODEL").is_ok_and(|value| value == "1");
        assert!(!required, "BESPOKE_REQUIRE_MODEL is 1, but {} holds no model", dir.display());
        println!("skipped: no model");
        return;
    }
    let Some(program) = compile("examples/generate.c", Linking::Shared, &[]) else { return };
    let output = run(Command::new(&program.path).arg(&dir).arg(PROMPT));
    assert_eq!(text(&output), continuation(&dir, BackendChoice::Cpu));
}

/// What the examples print for [`PROMPT`].
fn continuation(dir: &Path, backend: BackendChoice) -> String {
    let mut oracle = Oracle::new(dir, backend);
    let prompt_ids = oracle.ids_of(PROMPT, SpecialTokens::Add);
    oracle.answer(request(prompt_ids)).1
}

fn request(prompt_ids: Vec<u32>) -> Request {
    Request { prompt_ids, max_tokens: 64, ..Request::default() }
}

/// The output of a program that has to succeed.
fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
    output
}

fn text(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}
