//! `bespoke eval`.

use std::fs;

use bespoke::cli::Exit;

use super::{REFERENCE, check_error, json, keys, run, tiny_with_tokenizer};

#[test]
fn counts_right_answers() {
    let dir = tiny_with_tokenizer();
    let file = dir.path().join("questions.jsonl");
    let line = |answer: &str| {
        format!("{{\"context\": \"ab\", \"choices\": [\"c\", \"de\"], \"answer\": {answer}}}\n")
    };
    // The same question with either answer: one of them is right.
    fs::write(&file, line("0") + &line("\"B\"")).unwrap();
    let (model, file) = (dir.path().to_str().unwrap(), file.to_str().unwrap());
    let args = [&["eval", "--model", model, "--file", file][..], &REFERENCE].concat();
    let report = json(&[&args[..], &["--json"]].concat());
    let expected = [
        "model",
        "file",
        "accuracy",
        "accuracy_norm",
        "stderr",
        "stderr_norm",
        "questions",
        "tokens",
    ];
    assert_eq!(keys(&report), expected);
    assert_eq!((&report["accuracy"], &report["stderr"]), (&0.5.into(), &0.5.into()));
    // A space and a byte or two behind it, of two questions.
    assert_eq!((&report["questions"], &report["tokens"]), (&2.into(), &10.into()));
    let one = json(&[&args[..], &["--json", "--limit", "1"]].concat());
    assert!(one["questions"] == 1 && one["stderr"].is_null(), "{one}");
    let shown = run(&args);
    assert!(shown.out.starts_with("accuracy 50.0 % ± 50.0, by byte "), "{}", shown.out);
}

#[test]
fn names_the_file_and_line_of_a_bad_question() {
    let dir = tiny_with_tokenizer();
    let file = dir.path().join("questions.jsonl");
    let model = dir.path().to_str().unwrap();
    let args = ["eval", "--model", model, "--file", file.to_str().unwrap()];
    let check = |text: &str, expect: &str| {
        fs::write(&file, text).unwrap();
        check_error(&args, Exit::Failed, expect);
    };
    let good = "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 0}\n";
    check(&format!("{good}{{}}"), "questions.jsonl: line 2: not a question");
    let long = good.replace("\"a\"", &format!("\"{}\"", "x".repeat(300)));
    check(&long, "questions.jsonl: line 1: 302 tokens do not fit the context of 256");
    check("", "questions.jsonl: there are no questions");
    fs::remove_file(&file).unwrap();
    check_error(&args, Exit::Failed, "questions.jsonl");
    check_error(&[&args[..], &["--limit", "0"]].concat(), Exit::WrongUsage, "--limit");
}
