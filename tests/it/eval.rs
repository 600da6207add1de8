//! Multiple-choice questions, against a naive reading of the logits.

use std::path::{Path, PathBuf};

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::eval::{Evaluation, TokenizedQuestion, measure, parse, tokenize};
use bespoke::kernels::{KernelTable, generated};
use bespoke::tokenizer::{SpecialTokens, Tokenizer};

use crate::golden::smollm2;
use crate::tokenizer::byte_tokenizer;

fn questions_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("eval/questions.jsonl")
}

fn questions() -> String {
    std::fs::read_to_string(questions_file()).expect("the questions")
}

fn bytes() -> Tokenizer {
    let dir = tempfile::tempdir().expect("a folder");
    let text = byte_tokenizer().to_string();
    std::fs::write(dir.path().join("tokenizer.json"), text).expect("a file");
    Tokenizer::load(dir.path()).expect("a tokenizer")
}

/// A tiny model with room for questions whose bytes are tokens.
fn tiny(prefix_cache: bool) -> Engine {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/tiny/llama-gqa2");
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::copy(golden.join("model.safetensors"), dir.path().join("model.safetensors"))
        .expect("a copy");
    let config = std::fs::read_to_string(golden.join("config.json")).expect("a file");
    let longer = config.replace("embeddings\": 256", "embeddings\": 512");
    assert_ne!(config, longer);
    std::fs::write(dir.path().join("config.json"), longer).expect("a file");
    let options = EngineOptions {
        backend: BackendChoice::Reference,
        prefix_cache,
        ..EngineOptions::new(KernelTable::default())
    };
    Engine::load(dir.path(), &options, &mut |_| {}).expect("a model")
}

fn log_softmax(logits: &[f32], token: u32) -> f64 {
    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    f64::from(logits[token as usize]) - sum.ln()
}

/// Right by sum and right by sum a byte, each choice computed from its first token on.
fn naive(engine: &mut Engine, question: &TokenizedQuestion) -> (bool, bool) {
    let mut scores = Vec::new();
    for choice in &question.choices {
        let mut sum = 0.0;
        engine
            .logits(&choice.ids, &mut |position, logits| {
                if position + 1 >= choice.context_len && position + 1 < choice.ids.len() {
                    sum += log_softmax(logits, choice.ids[position + 1]);
                }
            })
            .expect("logits");
        scores.push((sum, sum / choice.num_bytes as f64));
    }
    let is_best = |score: &dyn Fn(&(f64, f64)) -> f64| {
        let right = score(&scores[question.answer]);
        scores.iter().enumerate().all(|(idx, s)| idx == question.answer || score(s) < right)
    };
    (is_best(&|score| score.0), is_best(&|score| score.1))
}

#[test]
fn answers_are_those_of_the_logits() {
    let questions = parse(&questions(), None).expect("questions");
    assert_eq!(questions.len(), 22);
    let questions = tokenize(&questions, &bytes(), None, 512).expect("tokens");
    let mut plain = tiny(false);
    let right: Vec<_> = questions.iter().map(|question| naive(&mut plain, question)).collect();
    let share = |num: usize| num as f64 / right.len() as f64;
    let accuracy = share(right.iter().filter(|right| right.0).count());
    let accuracy_norm = share(right.iter().filter(|right| right.1).count());
    assert_ne!(accuracy, accuracy_norm, "the questions do not tell the two apart");

    let mut engine = tiny(true);
    let mut done = Vec::new();
    let found = measure(&mut engine, &questions, &mut |num| done.push(num)).expect("answers");
    assert_eq!(done, (1..=22).collect::<Vec<_>>());
    assert_eq!((found.accuracy, found.accuracy_norm), (accuracy, accuracy_norm));
    assert_eq!(found.stderr, Some((accuracy * (1.0 - accuracy) / 21.0).sqrt()));
    let choices = questions.iter().flat_map(|question| &question.choices);
    let scored: usize = choices.map(|choice| choice.ids.len() - choice.context_len).sum();
    assert_eq!((found.num_questions, found.tokens_scored), (22, scored));
    assert_eq!(measure(&mut plain, &questions, &mut |_| {}).expect("answers"), found);
}

#[test]
fn choices_follow_their_context() {
    let check = |context: &str, choice: &str, context_text: &str, choice_text: &str| {
        let line = serde_json::json!({"context": context, "choices": [choice, "?"], "answer": 0});
        let questions = parse(&line.to_string(), None).expect("a question");
        let tokenizer = bytes();
        let tokenized = tokenize(&questions, &tokenizer, Some(258), 64).expect("tokens");
        let found = &tokenized[0].choices[0];
        let (before, behind) = found.ids.split_at(found.context_len);
        let ids = |text| tokenizer.encode(text, SpecialTokens::Omit).expect("tokens");
        assert_eq!((before, behind), (ids(context_text).as_slice(), ids(choice_text).as_slice()));
        assert_eq!(found.num_bytes, choice.len());
    };
    check("Ice is", "cold", "Ice is", " cold");
    check("Ice is ", "cold", "Ice is", " cold");
    check("Ice is", " cold", "Ice is", " cold");
    check("Ice:\n", "é", "Ice:", "\né");
    // A context without tokens starts with the given one, which is the tokenizer's end.
    check("", "cold", "<|end|>", "cold");
}

#[test]
fn what_does_not_fit_is_refused_with_its_line() {
    let text = "\n{\"context\": \"abc\", \"choices\": [\"defg\", \"h\"], \"answer\": 0}";
    let questions = parse(text, None).expect("a question");
    let refusal = |start, len_max, questions: &[_]| {
        tokenize(questions, &bytes(), start, len_max).expect_err("too long").to_string()
    };
    let message = refusal(None, 7, &questions);
    assert!(message.contains("line 2: 8 tokens do not fit the context of 7"), "{message}");
    let empty = parse(&text.replace("abc", ""), None).expect("a question");
    let message = refusal(None, 64, &empty);
    assert!(message.contains("line 2: the context is empty"), "{message}");
}

/// Full pages before the wanted positions are taken from the cache, to the last bit.
#[test]
fn logits_are_the_same_with_a_prefix_cache() {
    let ids: Vec<u32> = (0..150).map(|i| (i * 37 + 11) % 512).collect();
    let rows = |engine: &mut Engine, len: usize, wanted: std::ops::Range<usize>| {
        let mut all = Vec::new();
        engine
            .logits_of(&ids[..len], wanted, &mut |position, logits| {
                all.push((position, logits.iter().map(|l| l.to_bits()).collect::<Vec<_>>()));
            })
            .expect("logits");
        all
    };
    let (mut plain, mut cached) = (tiny(false), tiny(true));
    for (len, wanted) in
        [(150, 0..150), (150, 64..149), (150, 63..66), (96, 95..96), (64, 0..64), (40, 32..40)]
    {
        let expected = rows(&mut plain, len, wanted.clone());
        assert_eq!(expected.len(), wanted.len());
        assert!(rows(&mut cached, len, wanted.clone()) == expected, "{len} {wanted:?}");
        cached.check().expect("sound pages");
    }
    assert_eq!((plain.status().pages.cached, cached.status().pages.cached), (0, 4));
}

/// The questions are easy: a real model answers most of them.
#[test]
fn smollm2_knows_the_answers() {
    let Some(dir) = smollm2::model_dir() else { return };
    let tokenizer = Tokenizer::load(&dir).expect("a tokenizer");
    let questions = parse(&questions(), None).expect("questions");
    let questions = tokenize(&questions, &tokenizer, None, 2048).expect("tokens");
    let options =
        EngineOptions { max_context: Some(512), ..EngineOptions::new(generated::table()) };
    let mut engine = Engine::load(&dir, &options, &mut |_| {}).expect("a model");
    let Evaluation { accuracy, accuracy_norm, .. } =
        measure(&mut engine, &questions, &mut |_| {}).expect("answers");
    // One in four by chance.
    assert!(accuracy > 0.7 && accuracy_norm > 0.7, "{accuracy} {accuracy_norm}");
}
