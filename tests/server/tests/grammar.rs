//! Answers held to grammars. The null engine's tokens are hashes: whatever sense an answer makes
//! comes from its grammar.

mod hostile;
mod schema;
mod tools;

use std::sync::OnceLock;

use bespoke::backend::null::NullOptions;
use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::grammar::{Grammar, GrammarCompiler, GrammarSpec};
use bespoke::kernels::KernelTable;
use bespoke::request::{Failure, FinishReason, Generation, Request, RequestId};
use bespoke::sampling::{SamplingParams, choice_seed};
use serde_json::{Value, json};

use bespoke_server_tests::{END, VOCAB, tokenizer};

/// One compiler for all tests, as in a server.
fn compiler() -> &'static GrammarCompiler {
    static COMPILER: OnceLock<GrammarCompiler> = OnceLock::new();
    COMPILER.get_or_init(|| GrammarCompiler::new(&tokenizer(), VOCAB).unwrap())
}

fn compile(spec: GrammarSpec) -> Grammar {
    compiler().compile(&spec).unwrap_or_else(|error| panic!("{spec:?}: {error}"))
}

/// An engine whose pages are enough for one long answer and a few short ones.
fn engine(num_pages: usize) -> Engine {
    let null = NullOptions { vocab_size: VOCAB, page_size: 4, ..NullOptions::default() };
    let options = EngineOptions {
        max_context: Some(2000),
        num_pages: Some(num_pages),
        max_sequences: 32,
        hash_key: Some([3; 32]),
        ..EngineOptions::new(KernelTable::default())
    };
    let mut engine = Engine::null(&null, &options).unwrap();
    engine.set_tokenizer(tokenizer());
    engine
}

fn request(grammar: Option<&Grammar>, seed: u64) -> Request {
    Request {
        prompt_ids: vec![seed as u32 % 256, 7, 9],
        max_tokens: 1500,
        stop_token_ids: vec![END],
        grammar: grammar.cloned(),
        sampling: SamplingParams {
            temperature: if seed.is_multiple_of(4) { 0.0 } else { 1.0 },
            seed,
            ..SamplingParams::default()
        },
        ..Request::default()
    }
}

/// Runs requests side by side to their ends.
fn run(engine: &mut Engine, requests: Vec<Request>) -> Vec<Vec<Generation>> {
    let mut all: Vec<Vec<Generation>> = Vec::new();
    let mut ids: Vec<RequestId> = Vec::new();
    for request in requests {
        all.push(vec![Generation::default(); request.num_choices]);
        ids.push(engine.add_request(request).unwrap());
    }
    let mut outputs = Vec::new();
    while !engine.is_idle() {
        outputs.clear();
        engine.step(&mut outputs).unwrap();
        engine.check().unwrap();
        for output in &outputs {
            let request_idx = ids.iter().position(|id| *id == output.id).unwrap();
            all[request_idx][output.choice_idx].push(output);
        }
    }
    all
}

fn run_one(request: Request) -> Generation {
    run(&mut engine(510), vec![request]).remove(0).remove(0)
}

/// The text of an answer, which must be UTF-8; end tokens are none of it.
fn text(generation: &Generation) -> String {
    let ids = generation.output_ids.iter().filter(|id| **id != END);
    let bytes: Vec<u8> = ids.map(|id| u8::try_from(*id).expect("no special token")).collect();
    match generation.finish_reason {
        // It may break off within a character.
        Some(FinishReason::Length) => String::from_utf8_lossy(&bytes).into_owned(),
        _ => String::from_utf8(bytes).expect("whole characters"),
    }
}

#[test]
fn a_regular_expression_shapes_the_text() {
    let is_match = |text: &str| {
        let (word, number) = text.split_once('-').expect("a dash");
        let is_word = (3..=20).contains(&word.len()) && word.chars().all(|c| "abc".contains(c));
        let digits = number.strip_suffix('!').unwrap_or(number);
        is_word && digits.len() == 4 && digits.chars().all(|c| c.is_ascii_digit())
    };
    let grammar = compile(GrammarSpec::Regex("^[abc]{3,20}-[0-9]{4}!?$".to_owned()));
    let requests = (0..200).map(|seed| request(Some(&grammar), seed)).collect();
    let mut texts: Vec<String> = Vec::new();
    for generation in run(&mut engine(510), requests).into_iter().flatten() {
        assert_eq!(generation.finish_reason, Some(FinishReason::Stop));
        texts.push(text(&generation));
    }
    assert!(texts.iter().all(|text| is_match(text)), "{texts:?}");
    assert!(texts.iter().any(|text| text.ends_with('!')), "{texts:?}");
    assert!(texts.iter().any(|text| !text.ends_with('!')), "{texts:?}");
    texts.sort();
    texts.dedup();
    assert!(texts.len() > 100, "the model chooses within the grammar: {}", texts.len());
}

#[test]
fn a_lark_grammar_shapes_the_text() {
    let source = "start: sum\nsum: term (\"+\" term){0,5}\nterm: NUMBER | \"(\" sum \")\"\n\
                  NUMBER: /[0-9]{1,3}/\n";
    let grammar = compile(GrammarSpec::Lark(source.to_owned()));
    let requests = (0..100).map(|seed| request(Some(&grammar), seed)).collect();
    let mut num_whole = 0;
    for generation in run(&mut engine(510), requests).into_iter().flatten() {
        let text = text(&generation);
        let mut depth = 0;
        for char in text.chars() {
            depth += i32::from(char == '(') - i32::from(char == ')');
            assert!(depth >= 0 && "0123456789+()".contains(char), "{text}");
        }
        assert!(!text.contains("++") && !text.contains("()") && !text.contains(")("), "{text}");
        if generation.finish_reason == Some(FinishReason::Stop) {
            assert_eq!(depth, 0, "{text}");
            num_whole += 1;
        }
    }
    assert!(num_whole > 50, "{num_whole} of 100");
}

#[test]
fn neighbours_and_preemption_change_nothing() {
    let schema = json!({"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 30},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", 3]}, "maxItems": 9}
    }, "required": ["name", "tags"], "additionalProperties": false});
    let grammar = compile(GrammarSpec::JsonSchema(schema));
    let requests: Vec<Request> = (0..24)
        .map(|seed| match seed % 3 {
            0 => Request { max_tokens: 60, ..request(None, seed) },
            _ => Request { max_tokens: 300, ..request(Some(&grammar), seed) },
        })
        .collect();
    let alone: Vec<Generation> = requests.iter().cloned().map(run_one).collect();
    let mut crowded = engine(120);
    let together = run(&mut crowded, requests);
    assert!(crowded.status().num_preemptions > 10, "{:?}", crowded.status());
    for (alone, together) in alone.iter().zip(together.iter().flatten()) {
        assert_eq!(alone, together);
    }
}

#[test]
fn choices_are_held_each_on_its_own() {
    let grammar = compile(GrammarSpec::Regex("[a-z]{5,40}".to_owned()));
    let several = Request { num_choices: 6, ..request(Some(&grammar), 5) };
    let choices = run(&mut engine(510), vec![several]).remove(0);
    for (idx, choice) in choices.iter().enumerate() {
        let mut alone = request(Some(&grammar), 5);
        alone.sampling.seed = choice_seed(5, idx);
        assert_eq!(*choice, run_one(alone));
        let text = text(choice);
        assert!((5..=40).contains(&text.len()) && text.chars().all(|c| c.is_ascii_lowercase()));
    }
}

#[test]
fn ends_come_where_the_grammar_lets_them() {
    let grammar = compile(GrammarSpec::Regex("[a-z]{5,40}".to_owned()));
    let check = |change: &dyn Fn(&mut Request), expect: &dyn Fn(&Generation) -> bool| {
        for seed in 0..40 {
            let mut request = request(Some(&grammar), seed);
            change(&mut request);
            let generation = run_one(request);
            assert!(expect(&generation), "{seed}: {:?} {generation:?}", text(&generation));
        }
    };
    let ended = |generation: &Generation| generation.finish_reason == Some(FinishReason::Stop);
    // Of 27 equal tokens one ends.
    check(&|_| {}, &|it| ended(it) && (5..=40).contains(&text(it).len()));
    // Nothing ends it but the grammar, which is full at 40 letters.
    check(&|request| request.stop_token_ids.clear(), &|it| {
        ended(it) && it.output_ids.len() == 40 && text(it).len() == 40
    });
    check(&|request| request.sampling.min_tokens = 400, &|it| ended(it) && text(it).len() == 40);
    check(&|request| request.max_tokens = 4, &|it| {
        it.finish_reason == Some(FinishReason::Length) && it.output_ids.len() == 4
    });
    check(&|request| request.stop_strings = vec!["e".to_owned()], &|it| {
        ended(it) && text(it).find('e').is_none_or(|at| at + 1 == text(it).len())
    });
    check(&|request| request.stop_token_ids = vec![END, u32::from(b'q')], &|it| {
        ended(it) && text(it).find('q').is_none_or(|at| at + 1 == text(it).len())
    });
    // Biases choose among what is allowed and lift no ban.
    let bias = |request: &mut Request| {
        request.sampling.logit_bias = vec![(u32::from(b'A'), 100.0), (u32::from(b'k'), 99.0)];
        request.sampling.temperature = 0.0;
    };
    check(&bias, &|it| text(it) == "k".repeat(40));
}

#[test]
fn bans_that_leave_nothing_end_one_answer_only() {
    let grammar = compile(GrammarSpec::Regex("ab[cd]e".to_owned()));
    let mut banned = request(Some(&grammar), 1);
    banned.sampling.bad_words = vec![vec![u32::from(b'c')], vec![u32::from(b'd')]];
    let other = request(Some(&grammar), 2);
    let both = run(&mut engine(510), vec![banned, other.clone()]);
    let reason = FinishReason::Failed(Failure::NoAllowedToken);
    assert_eq!(both[0][0].finish_reason, Some(reason));
    assert_eq!(text(&both[0][0]), "ab");
    assert_eq!(both[1][0], run_one(other));
    assert!(["abce", "abde"].contains(&text(&both[1][0]).as_str()));
}

#[test]
fn log_probabilities_are_the_models_own() {
    let grammar = compile(GrammarSpec::Regex("[a-z]{20}".to_owned()));
    let mut asked = request(Some(&grammar), 3);
    asked.sampling.num_top_logprobs = 4;
    let generation = run_one(asked);
    let is_letter = |token: u32| token < 256 && (token as u8).is_ascii_lowercase();
    let tops = generation.top_logprobs.iter().flatten();
    assert!(tops.clone().any(|top| !is_letter(top.token)), "the model would say other things");
    let sum: f32 = generation.top_logprobs[0].iter().map(|top| top.logprob.exp()).sum();
    assert!(sum < 1.001 && sum > 0.9, "{sum}");
    assert!(generation.logprobs.iter().any(|logprob| *logprob < -15.0), "unlikely letters");
}

#[test]
fn any_json_object_is_one() {
    let grammar = compile(GrammarSpec::JsonObject);
    let requests = (0..200).map(|seed| request(Some(&grammar), seed)).collect();
    let mut num_whole = 0;
    for generation in run(&mut engine(510), requests).into_iter().flatten() {
        let text = text(&generation);
        assert!(text.starts_with('{'), "{text}");
        if generation.finish_reason == Some(FinishReason::Stop) {
            match serde_json::from_str::<Value>(&text) {
                Ok(value) => assert!(value.is_object()),
                // JSON has no largest number; this reader has.
                Err(error) => assert!(error.to_string().contains("out of range"), "{text}"),
            }
            num_whole += 1;
        }
    }
    assert!(num_whole > 20, "{num_whole} of 200");
}

#[test]
fn a_conversation_holds_each_answer_to_its_own_grammar() {
    use bespoke::kv_cache::Namespace;
    use bespoke::session::{SessionId, SessionTurn};
    let mut engine = engine(510);
    let id = SessionId::new(Namespace::default(), "talk").unwrap();
    for (turn, letters) in ["abc", "xyz", "abc"].into_iter().enumerate() {
        let grammar = compile(GrammarSpec::Regex(format!("[{letters}]{{10}}")));
        let session = SessionTurn { start: turn == 0, ..SessionTurn::of(id.clone()) };
        let request = Request { session: Some(session), ..request(Some(&grammar), turn as u64) };
        let answer = text(&run(&mut engine, vec![request])[0][0]);
        assert!(answer.len() == 10 && answer.chars().all(|c| letters.contains(c)), "{answer}");
    }
}
