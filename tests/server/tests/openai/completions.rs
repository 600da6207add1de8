//! `/v1/completions`.

use serde_json::{Value, json};

use super::{COMPLETIONS, completion, events, post, served};

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn texts_and_tokens_are_continued_alike() {
    let (_server, client) = served();
    let ask = |prompt: Value, n: usize| {
        let fields = json!({"prompt": prompt, "temperature": 0, "ignore_eos": true, "n": n});
        post(&client, COMPLETIONS, &completion(fields))
    };
    let one = ask(json!("ab"), 1);
    assert_eq!(one["object"], "text_completion");
    assert_eq!(one["choices"][0]["finish_reason"], "length");
    assert_eq!(one["usage"]["prompt_tokens"], 2);
    assert_eq!(one["usage"]["completion_tokens"], 16);
    let (ab, c) = (texts(&one), texts(&ask(json!("c"), 1)));
    assert_eq!(texts(&ask(json!([97, 98]), 1)), ab);
    let both = ask(json!(["ab", "c"]), 1);
    assert_eq!(texts(&both), [ab.clone(), c.clone()].concat());
    assert_eq!(both["usage"]["prompt_tokens"], 3);
    assert_eq!(both["usage"]["completion_tokens"], 32);
    assert_eq!(texts(&ask(json!([[97, 98], [99]]), 1)), [ab.clone(), c.clone()].concat());
    // Greedy choices are equal.
    let twice = ask(json!(["ab", "c"]), 2);
    assert_eq!(texts(&twice), [ab.clone(), ab, c.clone(), c].concat());
    let indices: Vec<u64> =
        twice["choices"].as_array().unwrap().iter().filter_map(|c| c["index"].as_u64()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
}

#[test]
fn the_prompt_comes_first_where_it_is_echoed() {
    let (_server, client) = served();
    let fields = json!({"prompt": "a\u{e9}b", "temperature": 0, "ignore_eos": true,
        "max_tokens": 4, "logprobs": 2});
    let plain = post(&client, COMPLETIONS, &completion(fields.clone()));
    let mut fields = fields;
    fields["echo"] = json!(true);
    let echoed = post(&client, COMPLETIONS, &completion(fields.clone()));
    let text = format!("a\u{e9}b{}", texts(&plain)[0]);
    assert_eq!(texts(&echoed), [text.as_str()]);
    let logprobs = &echoed["choices"][0]["logprobs"];
    let len = |key: &str| logprobs[key].as_array().unwrap().len();
    // A token for each byte.
    assert_eq!([len("tokens"), len("token_logprobs"), len("text_offset")], [8, 8, 8]);
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert!(logprobs["token_logprobs"][4].is_f64());
    assert_eq!(logprobs["top_logprobs"][3], Value::Null);
    let num_top = logprobs["top_logprobs"][5].as_object().unwrap().len();
    assert!((1..=3).contains(&num_top), "{logprobs}");
    assert_eq!(logprobs["text_offset"][0], 0);
    assert_eq!(
        plain["choices"][0]["logprobs"]["tokens"].as_array().unwrap()[..],
        logprobs["tokens"].as_array().unwrap()[4..]
    );
    let streamed: String = events(&client, COMPLETIONS, &completion(fields))
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(streamed, text);
}

#[test]
fn the_best_of_several_is_the_likeliest() {
    let (_server, client) = served();
    let ask = |fields: Value| post(&client, COMPLETIONS, &completion(fields));
    let mut fields = json!({"seed": 4, "temperature": 1.5, "ignore_eos": true, "n": 5,
        "max_tokens": 6, "logprobs": 0});
    let all = ask(fields.clone());
    let mean = |choice: &Value| -> f64 {
        let list = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        list.iter().filter_map(Value::as_f64).sum::<f64>() / list.len() as f64
    };
    let mut means: Vec<f64> = all["choices"].as_array().unwrap().iter().map(mean).collect();
    means.sort_by(|a, b| b.total_cmp(a));
    fields["n"] = json!(2);
    fields["best_of"] = json!(5);
    let best = ask(fields);
    let best_means: Vec<f64> = best["choices"].as_array().unwrap().iter().map(mean).collect();
    assert_eq!(best_means, means[..2]);
    assert_eq!(best["usage"]["completion_tokens"], 30);
}
