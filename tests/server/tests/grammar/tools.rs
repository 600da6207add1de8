//! Answers that have to call tools: what the grammar lets through is what the parser reads.

use bespoke::answer::{AnswerDelta, AnswerFormat, AnswerOptions, ToolChoice, ToolFormat, ToolSpec};
use bespoke::grammar::{Grammar, GrammarSpec};
use bespoke::request::FinishReason;
use serde_json::{Value, json};

use super::{compile, engine, request, run, text};

fn tools() -> Vec<ToolSpec> {
    let weather = json!({"type": "object", "properties": {
        "city": {"type": "string", "maxLength": 9}, "unit": {"$ref": "#/$defs/unit"}
    }, "required": ["city"], "additionalProperties": false,
       "$defs": {"unit": {"enum": ["C", "F"]}}});
    let nothing = json!({"type": "object", "properties": {}, "additionalProperties": false});
    vec![ToolSpec::new("get_weather", weather).unwrap(), ToolSpec::new("stop", nothing).unwrap()]
}

/// Calls of an answer by name, with their arguments, and its other text.
fn read(
    format: AnswerFormat,
    options: AnswerOptions,
    text: &str,
) -> (Vec<(String, Value)>, String) {
    let mut out = Vec::new();
    let mut parser = format.parser(options);
    parser.push(text, &mut out);
    parser.finish(&mut out);
    let mut calls: Vec<(String, String)> = Vec::new();
    let mut other = String::new();
    for delta in out {
        match delta {
            AnswerDelta::ToolCallStart { name, .. } => calls.push((name, String::new())),
            AnswerDelta::ToolCallArguments { idx, text } => calls[idx].1.push_str(&text),
            AnswerDelta::Content(text) | AnswerDelta::Reasoning(text) => other.push_str(&text),
        }
    }
    let parse = |text: String| {
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    };
    (calls.into_iter().map(|(name, text)| (name, parse(text))).collect(), other)
}

fn check(format: ToolFormat, choice: &ToolChoice, is_fine: impl Fn(&[(String, Value)]) -> bool) {
    let format = AnswerFormat { tools: Some(format), has_reasoning: false };
    let spec = format.tool_grammar(&tools(), choice, false).unwrap().unwrap();
    let grammar: Grammar = compile(spec);
    let names = || vec!["get_weather".to_owned(), "stop".to_owned()];
    let mut num_whole = 0;
    let requests = (0..60).map(|seed| request(Some(&grammar), seed)).collect();
    for generation in run(&mut engine(510), requests).into_iter().flatten() {
        if generation.finish_reason != Some(FinishReason::Stop) {
            continue;
        }
        num_whole += 1;
        let text = text(&generation);
        let options = AnswerOptions { tool_names: names(), ..AnswerOptions::default() };
        let (calls, other) = read(format, options, &text);
        assert!(is_fine(&calls) && other.is_empty(), "{choice:?}: {text}: {calls:?}");
        for (name, arguments) in calls {
            let arguments = arguments.as_object().expect("an object");
            match name.as_str() {
                "stop" => assert!(arguments.is_empty(), "{text}"),
                _ => {
                    assert!(
                        arguments["city"].as_str().is_some_and(|city| city.chars().count() < 10)
                    );
                    let unit = arguments.get("unit").and_then(Value::as_str);
                    assert!(unit.is_none_or(|unit| unit == "C" || unit == "F"), "{text}");
                }
            }
        }
    }
    assert!(num_whole >= 40, "{choice:?}: {num_whole} of 60");
}

#[test]
fn grammars_of_calls_fit_the_formats() {
    for format in [ToolFormat::Hermes, ToolFormat::Llama] {
        check(format, &ToolChoice::One, |calls| calls.len() == 1);
        check(format, &ToolChoice::OneOrMore, |calls| !calls.is_empty());
        let named = ToolChoice::Named("stop".to_owned());
        check(format, &named, |calls| calls.len() == 1 && calls[0].0 == "stop");
    }
    let format = AnswerFormat { tools: Some(ToolFormat::Hermes), has_reasoning: false };
    let missing = ToolChoice::Named("missing".to_owned());
    let error = format.tool_grammar(&tools(), &missing, false).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
    let plain = AnswerFormat::default();
    assert_eq!(plain.tool_grammar(&tools(), &ToolChoice::One, false).unwrap(), None);
    for name in ["", "a b", "é", "a\"", &"x".repeat(65)] {
        assert!(ToolSpec::new(name, Value::Null).is_err(), "{name:?}");
    }
    assert!(ToolSpec::new("f", json!([])).is_err());
}

#[test]
fn reasoning_comes_before_what_is_held_to_a_grammar() {
    let format = AnswerFormat { tools: Some(ToolFormat::Hermes), has_reasoning: true };
    let schema = json!({"type": "object", "properties": {"a": {"type": "boolean"}},
                        "required": ["a"], "additionalProperties": false});
    for starts_in_reasoning in [false, true] {
        let spec = GrammarSpec::JsonSchema(schema.clone());
        let grammar = compile(format.after_reasoning(spec, starts_in_reasoning));
        // Reasoning of a model that hashes never ends: it is led to the closing mark.
        let follow = |answer: &str| {
            let mut held = request(Some(&grammar), 0);
            held.sampling.bad_words = Vec::new();
            held.max_tokens = answer.len();
            let bytes = answer.bytes().map(u32::from);
            follow_bytes(&grammar, &bytes.collect::<Vec<u32>>())
        };
        let body = "Hm. {\"a\": 1} <tool_call>";
        let (open, closed) = (format!("{body}</think>\n\n{{\"a\": true}}"), "{\"a\": true}");
        if starts_in_reasoning {
            assert!(follow(&open));
            assert!(!follow(&format!("{open} more")));
        } else {
            assert!(follow(&format!("<think>\n{open}")));
            assert!(follow(closed));
            assert!(!follow(&open));
        }
    }
    let spec = format.tool_grammar(&tools(), &ToolChoice::OneOrMore, true).unwrap().unwrap();
    let grammar = compile(spec);
    let call = "<tool_call>\n{\"name\": \"stop\", \"arguments\": {}}\n</tool_call>";
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
    assert!(follow_bytes(&grammar, &bytes(&format!("Let me stop.</think>\n\n{call}\n{call}"))));
    assert!(!follow_bytes(&grammar, &bytes(call)));
}

/// Whether the grammar allows these tokens and may end behind them.
fn follow_bytes(grammar: &Grammar, tokens: &[u32]) -> bool {
    use bespoke::grammar::GrammarState;
    use bespoke_server_tests::{END, VOCAB};
    let mut state = GrammarState::new(grammar, VOCAB);
    for (idx, token) in tokens.iter().enumerate() {
        state.fill_mask(&[END]);
        if !state.mask().is_allowed(*token) {
            return false;
        }
        if state.push(*token).is_some() {
            return idx + 1 == tokens.len();
        }
    }
    state.fill_mask(&[END]);
    state.mask().is_allowed(END)
}
