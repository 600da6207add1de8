//! `/v1/chat/completions` in one piece.

use bespoke_server_tests::MODEL;
use serde_json::{Value, json};

use super::{CHAT, chat, post, served};

#[test]
fn an_answer_has_the_shape_of_openai() {
    let (_server, client) = served();
    let answer = post(&client, CHAT, &chat(json!({"max_tokens": 9, "ignore_eos": true})));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"), "{answer}");
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], MODEL);
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    assert!(answer["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    let [choice] = answer["choices"].as_array().unwrap().as_slice() else {
        panic!("{answer}");
    };
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string());
    assert_eq!(choice["logprobs"], Value::Null);
    // The template's text, a token for each byte but for special tokens.
    let text = "user\nSay something.\nassistant\n";
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": text.len() + 3, "completion_tokens": 9,
            "total_tokens": text.len() + 12, "prompt_tokens_details": {"cached_tokens": 0}})
    );
}

#[test]
fn equal_seeds_give_equal_answers_and_choices_differ() {
    let (_server, client) = served();
    let ask = |fields: Value| -> Vec<Value> {
        let answer = post(&client, CHAT, &chat(fields));
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["message"]["content"].clone()).collect()
    };
    let fields = json!({"seed": 5, "n": 3, "max_tokens": 20, "ignore_eos": true,
        "temperature": 2, "min_tokens": 3});
    let first = ask(fields.clone());
    assert_eq!(first.len(), 3);
    assert_eq!(first, ask(fields));
    assert!(first[0] != first[1] && first[1] != first[2], "{first:?}");
}

#[test]
fn repeated_prompts_are_found_in_the_cache() {
    let (_server, client) = served();
    let long = json!([{"role": "user", "content": "x".repeat(300)}]);
    let ask = || post(&client, CHAT, &chat(json!({"messages": long, "max_tokens": 2})));
    assert_eq!(ask()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let cached = ask()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= 256, "{cached}");
}

#[test]
fn stop_strings_are_cut_out() {
    let (_server, client) = served();
    let whole = chat(json!({"max_tokens": 400, "ignore_eos": true, "seed": 3, "temperature": 0}));
    let text = post(&client, CHAT, &whole)["choices"][0]["message"]["content"].clone();
    let text = text.as_str().unwrap();
    let is_plain = |pair: &[(usize, char)]| pair.iter().all(|(_, c)| c.is_ascii_graphic());
    let chars: Vec<(usize, char)> = text.char_indices().collect();
    let pair = chars[40..].windows(2).find(|pair| is_plain(pair)).expect("two letters");
    let stop: String = pair.iter().map(|(_, c)| *c).collect();
    let expect = &text[..text.find(&stop).unwrap()];
    for stop in [json!(stop), json!([stop]), json!(["never there \u{1f600}", stop])] {
        let mut body = whole.clone();
        body["stop"] = stop;
        let choice = &post(&client, CHAT, &body)["choices"][0];
        assert_eq!(choice["message"]["content"], expect);
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[test]
fn stop_tokens_end_the_answer_and_are_no_part_of_it() {
    let (_server, client) = served();
    let whole = chat(json!({"max_tokens": 60, "ignore_eos": true, "temperature": 0,
        "logprobs": true}));
    let answer = post(&client, CHAT, &whole);
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let byte = |token: &Value| token["bytes"].get(0).and_then(Value::as_u64);
    let stop = byte(&tokens[30]).expect("a byte");
    let num = tokens.iter().position(|token| byte(token) == Some(stop)).unwrap();
    let mut body = whole;
    body["stop_token_ids"] = json!([stop]);
    let answer = post(&client, CHAT, &body);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], num + 1);
    let bytes: Vec<u8> = tokens[..num].iter().filter_map(byte).map(|byte| byte as u8).collect();
    assert_eq!(
        answer["choices"][0]["message"]["content"],
        String::from_utf8_lossy(&bytes).as_ref()
    );
}

#[test]
fn log_probabilities_come_with_bytes() {
    let (_server, client) = served();
    let fields = json!({"max_tokens": 50, "ignore_eos": true, "logprobs": true, "top_logprobs": 3,
        "temperature": 0});
    let choice = post(&client, CHAT, &chat(fields))["choices"][0].clone();
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 50);
    let mut bytes = Vec::new();
    for token in tokens {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token"], token["token"]);
        assert!(top[0]["logprob"].as_f64().unwrap() >= top[2]["logprob"].as_f64().unwrap());
        match token["bytes"].as_array() {
            Some(of) => bytes.extend(of.iter().map(|byte| byte.as_u64().unwrap() as u8)),
            None => assert!(token["token"].as_str().unwrap().starts_with("<|")),
        }
    }
    assert_eq!(choice["message"]["content"], String::from_utf8_lossy(&bytes).as_ref());
}

#[test]
fn biases_choose_tokens() {
    let (_server, client) = served();
    let fields = json!({"max_tokens": 5, "logit_bias": {"65": 100, "66": 0.5}, "temperature": 0});
    let answer = post(&client, CHAT, &chat(fields));
    assert_eq!(answer["choices"][0]["message"]["content"], "AAAAA");
    let fields = json!({"max_tokens": 5, "logit_bias": {"257": 100}, "min_tokens": 2});
    let answer = post(&client, CHAT, &chat(fields));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[test]
fn every_field_of_the_api_is_taken() {
    let (_server, client) = served();
    for fields in [
        json!({"max_completion_tokens": 3}),
        json!({"max_completion_tokens": 3, "max_tokens": 1000}),
        json!({"max_tokens": 3.0, "top_p": 0, "top_k": -1, "min_p": 0.1}),
        json!({"max_tokens": 3, "top_k": 0, "repetition_penalty": 1.3, "seed": -9}),
        json!({"max_tokens": 3, "presence_penalty": -2, "frequency_penalty": 2}),
        json!({"max_tokens": 3, "user": "u", "metadata": {"a": "b"}, "store": false}),
        json!({"max_tokens": 3, "response_format": {"type": "text"}, "tools": [],
            "tool_choice": "auto", "parallel_tool_calls": false}),
        json!({"max_tokens": 3, "stream": false}),
        json!({"max_tokens": 3, "chat_template_kwargs": {"enable_thinking": false}}),
        json!({"max_tokens": 3, "messages": [
            {"role": "system", "content": "s"}, {"role": "developer", "content": "d", "name": "n"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "r", "tool_call_id": "c"},
            {"role": "assistant", "content": "x", "refusal": null, "reasoning_content": "y"}]}),
        json!({"max_tokens": 3, "temperature": null, "top_p": null, "n": null, "stop": null,
            "stream": null, "stream_options": null, "seed": null, "logprobs": null,
            "top_logprobs": null, "logit_bias": null, "presence_penalty": null,
            "frequency_penalty": null, "response_format": null, "tools": null,
            "tool_choice": null, "parallel_tool_calls": null, "user": null, "metadata": null,
            "store": null, "top_k": null, "min_p": null, "repetition_penalty": null,
            "ignore_eos": null, "min_tokens": null, "stop_token_ids": null,
            "chat_template_kwargs": null, "max_completion_tokens": null}),
    ] {
        let answer = post(&client, CHAT, &chat(fields.clone()));
        let num = answer["usage"]["completion_tokens"].as_u64().unwrap();
        assert!((1..=3).contains(&num), "{fields}: {answer}");
    }
}
