//! Answers in every format, cut in every way.

use serde_json::{Value, json};

use super::*;

const HERMES: AnswerFormat = AnswerFormat { tools: Some(ToolFormat::Hermes), has_reasoning: false };
const QWEN3: AnswerFormat = AnswerFormat { tools: Some(ToolFormat::Hermes), has_reasoning: true };
const LLAMA: AnswerFormat = AnswerFormat { tools: Some(ToolFormat::Llama), has_reasoning: false };

fn options() -> AnswerOptions {
    AnswerOptions {
        tool_names: vec!["f".to_owned(), "get_weather".to_owned()],
        starts_in_reasoning: false,
        call_id_seed: 7,
    }
}

/// The deltas of one text as one value: reasoning, content in pieces between calls, calls.
fn read<'a>(
    format: AnswerFormat,
    options: AnswerOptions,
    pieces: impl Iterator<Item = &'a str>,
) -> Value {
    let mut parser = format.parser(options);
    let (mut reasoning, mut content) = (String::new(), String::new());
    let mut calls: Vec<(String, String, String)> = Vec::new();
    let mut take = |out: &mut Vec<AnswerDelta>| {
        for delta in out.drain(..) {
            match delta {
                AnswerDelta::Reasoning(text) => {
                    assert!(content.is_empty() && calls.is_empty(), "reasoning comes first");
                    reasoning.push_str(&text);
                }
                AnswerDelta::Content(text) => content.push_str(&text),
                AnswerDelta::ToolCallStart { idx, id, name } => {
                    assert_eq!(idx, calls.len());
                    calls.push((id, name, String::new()));
                }
                AnswerDelta::ToolCallArguments { idx, text } => {
                    assert_eq!(idx + 1, calls.len());
                    calls[idx].2.push_str(&text);
                }
            }
        }
    };
    let mut out = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut out);
        take(&mut out);
    }
    parser.finish(&mut out);
    take(&mut out);
    assert_eq!(parser.has_tool_calls(), !calls.is_empty());
    let calls: Vec<Value> = calls.iter().map(|(_, name, text)| json!([name, text])).collect();
    json!({"reasoning": reasoning, "content": content, "calls": calls})
}

/// Compares the whole text, and all ways to cut it in two and into characters.
fn check_with(
    format: AnswerFormat,
    options: AnswerOptions,
    text: &str,
    expect: [&str; 2],
    calls: Value,
) {
    let expect = json!({"reasoning": expect[0], "content": expect[1], "calls": calls});
    let check = |pieces: &[&str]| {
        let found = read(format, options.clone(), pieces.iter().copied());
        assert_eq!(found, expect, "{pieces:?}");
    };
    check(&[text]);
    let cuts: Vec<usize> = text.char_indices().map(|(idx, _)| idx).collect();
    for cut in &cuts {
        check(&[&text[..*cut], &text[*cut..]]);
    }
    let chars: Vec<&str> = text.split("").collect();
    check(&chars);
}

fn check(format: AnswerFormat, text: &str, content: &str, calls: Value) {
    check_with(format, options(), text, ["", content], calls);
}

#[test]
fn templates_tell_the_format() {
    let check = |source: &str, tools, has_reasoning| {
        assert_eq!(AnswerFormat::detect(source), AnswerFormat { tools, has_reasoning });
    };
    check("{% for m in messages %}{{ m.content }}{% endfor %}", None, false);
    check("<tool_call>\\n{\"name\": <function-name>}", Some(ToolFormat::Hermes), false);
    check("<tool_call>\n<function={{ name }}>", None, false);
    check("'<think>\\n' + x ~ '<tool_call>'", Some(ToolFormat::Hermes), true);
    let llama = "<|start_header_id|>{{ '{\"name\": \"' + name + '\", \"parameters\": ' }}";
    check(llama, Some(ToolFormat::Llama), false);
    check("<|start_header_id|>{{ role }}", None, false);
}

#[test]
fn reads_calls_of_hermes() {
    let call = r#"<tool_call>
{"name": "f", "arguments": {"a": [1, "}\"{"], "b": {"c": null}}}
</tool_call>"#;
    let arguments = r#"{"a": [1, "}\"{"], "b": {"c": null}}"#;
    check(HERMES, call, "", json!([["f", arguments]]));
    let twice = format!("Well:\n\n{call}\n{call}\n");
    check(HERMES, &twice, "Well:", json!([["f", arguments], ["f", arguments]]));
    // The arguments first, as text, not at all; no closing mark; text behind.
    check(
        HERMES,
        r#"<tool_call>{"arguments":{"x":1},"id":[{}],"name":"f"}</tool_call> done"#,
        " done",
        json!([["f", r#"{"x":1}"#]]),
    );
    check(
        HERMES,
        r#"<tool_call>{"name": "f", "arguments": "{\"x\": \"é\"}"}"#,
        "",
        json!([["f", r#"{"x": "é"}"#]]),
    );
    check(HERMES, "a <tool_call>{\"name\": \"f\"}</tool_call>", "a", json!([["f", "{}"]]));
    check(
        HERMES,
        r#"<tool_call>{"name":"f","arguments":{}}<tool_call>{"name":"f","parameters":{}}"#,
        "",
        json!([["f", "{}"], ["f", "{}"]]),
    );
}

#[test]
fn what_is_no_call_is_content() {
    for text in [
        "plain text < tags <tool <tool_callx>",
        "  spaces stay \n",
        "<tool_call>no JSON</tool_call>",
        "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": 5}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"argu",
        "<tool_call>",
        "x <tool_ca",
        "<tool_call>{\"name\": 5}</tool_call>",
        "<tool_call>{\"a\" 5}</tool_call>",
        "</think> <think>",
        "日本 <tool_call>語",
    ] {
        check(HERMES, text, text, json!([]));
    }
    let none = AnswerOptions { tool_names: Vec::new(), ..options() };
    let call = "<tool_call>{\"name\": \"f\"}</tool_call> ";
    check_with(HERMES, none.clone(), call, ["", call], json!([]));
    let call = r#"{"name": "f", "parameters": {}} "#;
    check_with(LLAMA, none, call, ["", call], json!([]));
    check(AnswerFormat::default(), call, call, json!([]));
    // A mark in the middle of what is no call begins anew.
    check(
        HERMES,
        "<tool_call> <tool_call>{\"name\":\"f\"}</tool_call>",
        "<tool_call> ",
        json!([["f", "{}"]]),
    );
}

#[test]
fn calls_that_break_keep_what_they_have() {
    let check_f = |text: &str, arguments: &str, content: &str| {
        check(HERMES, text, content, json!([["f", arguments]]));
    };
    let start = r#"<tool_call>{"name": "f", "arguments": "#;
    check_f(&format!("{start}{{\"a\": \"b"), "{\"a\": \"b", "");
    check_f(&format!("{start}{{\"a\": [1}}"), "{\"a\": [1", "}");
    check_f(&format!("{start}{{}} oops}}</tool_call>"), "{}", "oops}</tool_call>");
    check_f(&format!("{start}{{}}}}</tool> x"), "{}", "</tool> x");
}

#[test]
fn reads_calls_of_llama() {
    let call = r#"{"name": "get_weather", "parameters": {"city": "Bern; \"CH\""}}"#;
    let arguments = r#"{"city": "Bern; \"CH\""}"#;
    let expect = json!(["get_weather", arguments]);
    check(LLAMA, call, "", json!([expect]));
    check(LLAMA, &format!(" <|python_tag|>\n{call}\n"), "", json!([expect]));
    check(LLAMA, &format!("{call}; {call};{call}"), "", json!([expect, expect, expect]));
    let typed = r#"{"type": "function", "name": "f", "parameters": {"x": 1}}"#;
    check(LLAMA, typed, "", json!([["f", "{\"x\": 1}"]]));
    for text in [
        "Hello {\"name\": \"f\", \"parameters\": {}}",
        "{\"name\": \"Bob\", \"parameters\": {}}",
        "{\"city\": \"Bern\"}",
        "<|python_tag|>print(1)",
        "<|python",
        "{",
        "  ",
    ] {
        check(LLAMA, text, text, json!([]));
    }
    check(LLAMA, &format!("{call} and more {call}"), &format!(" and more {call}"), json!([expect]));
}

#[test]
fn reads_reasoning() {
    let check = |is_open: bool, text: &str, expect: [&str; 2], calls: Value| {
        let options = AnswerOptions { starts_in_reasoning: is_open, ..options() };
        check_with(QWEN3, options, text, expect, calls);
    };
    check(false, "<think>\nHm.\n\nSo.\n</think>\n\nYes. ", ["Hm.\n\nSo.", "Yes. "], json!([]));
    check(false, " \n<think></think>Yes", ["", "Yes"], json!([]));
    check(true, "Hm. </thin </think> Yes", ["Hm. </thin", "Yes"], json!([]));
    check(true, "Hm. </thin", ["Hm. </thin", ""], json!([]));
    check(true, "Hm. \n", ["Hm.", ""], json!([]));
    check(false, "<thin air", ["", "<thin air"], json!([]));
    check(false, "No <think>x</think>", ["", "No <think>x</think>"], json!([]));
    check(
        true,
        "I call <tool_call>.</think>\n<tool_call>{\"name\": \"f\"}</tool_call>",
        ["I call <tool_call>.", ""],
        json!([["f", "{}"]]),
    );
    assert!(QWEN3.opens_reasoning("<|im_start|>assistant\n<think>\n"));
    assert!(!QWEN3.opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
    assert!(!HERMES.opens_reasoning("<think>"));
}

#[test]
fn ids_differ() {
    let call = "<tool_call>{\"name\": \"f\"}</tool_call>";
    let mut out = Vec::new();
    HERMES.parser(options()).push(&call.repeat(3), &mut out);
    let ids: std::collections::BTreeSet<&str> = out
        .iter()
        .filter_map(|delta| match delta {
            AnswerDelta::ToolCallStart { id, .. } => Some(id.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(ids.len(), 3);
    assert!(ids.iter().all(|id| id.starts_with("call_")));
}

/// Random texts of pieces that mean something, and of random characters.
#[test]
fn cuts_change_nothing() {
    const PIECES: [&str; 16] = [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<|python_tag|>",
        "{\"name\": \"f\"",
        ", \"arguments\": {\"a\": \"",
        "\"}",
        "}",
        "{",
        " ",
        "\n",
        ";",
        "<",
        "日",
        "\\",
    ];
    let mut state = 1_u64;
    let mut below = |end: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % end
    };
    let mut num_calls = 0;
    for _ in 0..20_000 {
        let text: String = (0..below(14)).map(|_| PIECES[below(PIECES.len())]).collect();
        let format = [HERMES, QWEN3, LLAMA][below(3)];
        let options = AnswerOptions { starts_in_reasoning: below(2) == 0, ..options() };
        let whole = read(format, options.clone(), std::iter::once(text.as_str()));
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let len = 1 + below(12);
            let end = (len..=rest.len()).find(|end| rest.is_char_boundary(*end));
            let (piece, after) = rest.split_at(end.unwrap_or(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        assert_eq!(read(format, options, pieces.into_iter()), whole, "{text:?}");
        num_calls += whole["calls"].as_array().map_or(0, Vec::len);
    }
    assert!(num_calls > 50, "{num_calls} calls");
}
