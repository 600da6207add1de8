//! Answers held to a format, and answers that call tools.

use serde_json::{Value, json};

use super::{CHAT, chat, events, post, served};

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"], "additionalProperties": false}}},
        {"type": "function", "function": {"name": "time"}},
    ])
}

#[test]
fn answers_fit_their_format() {
    let (_server, client) = served();
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1,
        "maximum": 99}, "b": {"type": "boolean"}}, "required": ["n", "b"],
        "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    for seed in 0..5 {
        let fields = json!({"response_format": format, "seed": seed, "max_tokens": 2000});
        let choice = post(&client, CHAT, &chat(fields))["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        let content = choice["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(content).expect("JSON");
        assert!((1..=99).contains(&value["n"].as_i64().unwrap()), "{value}");
        assert!(value["b"].is_boolean(), "{value}");
    }
    for (format, is_fine) in [
        (
            json!({"type": "regex", "regex": "[ab]{3}-[0-9]"}),
            Box::new(|text: &str| text.len() == 5 && &text[3..4] == "-")
                as Box<dyn Fn(&str) -> bool>,
        ),
        (
            json!({"type": "grammar", "grammar": "start: \"yes\" | \"no\""}),
            Box::new(|text: &str| ["yes", "no"].contains(&text)),
        ),
    ] {
        let body = chat(json!({"response_format": format, "max_tokens": 99}));
        let content = post(&client, CHAT, &body)["choices"][0]["message"]["content"].clone();
        assert!(is_fine(content.as_str().unwrap()), "{format}: {content}");
    }
}

#[test]
fn a_required_tool_is_called() {
    let (_server, client) = served();
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "weather"}})]
    {
        let body = chat(json!({"tools": tools(), "tool_choice": choice, "seed": 2,
            "max_tokens": 3000, "parallel_tool_calls": false}));
        let whole = post(&client, CHAT, &body)["choices"][0].clone();
        assert_eq!(whole["finish_reason"], "tool_calls", "{whole}");
        let [call] = whole["message"]["tool_calls"].as_array().unwrap().as_slice() else {
            panic!("{whole}");
        };
        assert_eq!(whole["message"]["content"], Value::Null);
        assert_eq!(call["type"], "function");
        assert!(call["id"].as_str().unwrap().starts_with("call_"), "{call}");
        let name = call["function"]["name"].as_str().unwrap();
        let arguments = call["function"]["arguments"].as_str().unwrap();
        let value: Value = serde_json::from_str(arguments).expect("JSON");
        match name {
            "weather" => assert!(["Rome", "Oslo"].contains(&value["city"].as_str().unwrap())),
            _ => assert!(name == "time" && value.is_object()),
        }
        let mut streamed = (String::new(), String::new());
        for event in events(&client, CHAT, &body) {
            for call in event["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten()
            {
                assert_eq!(call["index"], 0);
                streamed.0.push_str(call["function"]["name"].as_str().unwrap_or_default());
                streamed.1.push_str(call["function"]["arguments"].as_str().unwrap_or_default());
            }
        }
        assert_eq!((streamed.0.as_str(), streamed.1.as_str()), (name, arguments));
    }
}

#[test]
fn tools_are_called_only_where_they_may() {
    let (_server, client) = served();
    // The grammar makes an answer that looks like a call.
    let text = "<tool_call>{\"name\": \"time\", \"arguments\": {}}</tool_call>";
    let grammar = format!("start: {}", json!(text));
    let format = json!({"type": "grammar", "grammar": grammar});
    for choice in ["none", "auto"] {
        let body = chat(json!({"tools": tools(), "tool_choice": choice, "max_tokens": 99,
            "response_format": format}));
        let message = post(&client, CHAT, &body)["choices"][0]["message"].clone();
        assert_eq!(message["content"], text, "{choice}");
        assert!(message.get("tool_calls").is_none(), "{choice}");
    }
}
