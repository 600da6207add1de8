//! `/openapi.json`, `/docs`, and the small routes.

use bespoke::server::{Access, routes};
use serde_json::{Value, json};

use super::{post, served};

#[test]
fn the_description_is_what_it_was() {
    let (_server, client) = served();
    let mut description = client.get("/openapi.json").json();
    description["info"]["version"] = json!("0");
    insta::assert_snapshot!(serde_json::to_string_pretty(&description).unwrap());
}

#[test]
fn every_route_with_a_key_is_described() {
    let (_server, client) = served();
    let description = client.get("/openapi.json").json();
    for route in routes() {
        if route.access != Access::Key || OTHERS.contains(&route.path) {
            continue;
        }
        for method in &route.methods {
            let operation = &description["paths"][route.path][method.as_str().to_lowercase()];
            assert!(operation.is_object(), "{method} {}", route.path);
            let responses = operation["responses"].as_object().unwrap();
            assert!(responses.contains_key("401") && responses.contains_key("400"));
        }
    }
}

/// Routes that are no part of the API.
const OTHERS: [&str; 4] = ["/openapi.json", "/metrics", "/dashboard/data", "/health"];

#[test]
fn no_schema_is_referred_to_that_is_not_there() {
    let (_server, client) = served();
    let description = client.get("/openapi.json").json();
    let mut open = vec![&description];
    while let Some(value) = open.pop() {
        if let Some(path) = value.get("$ref").and_then(Value::as_str) {
            let pointer = path.strip_prefix('#').expect("a schema of this document");
            assert!(description.pointer(pointer).is_some(), "{path}");
        }
        match value {
            Value::Array(items) => open.extend(items),
            Value::Object(object) => open.extend(object.values()),
            _ => {}
        }
    }
}

#[test]
fn models_are_listed() {
    let (_server, client) = served();
    let list = client.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0], client.get("/v1/models/null").json());
    assert_eq!(list["data"][0]["max_model_len"], 4096);
}

#[test]
fn text_becomes_tokens_and_back() {
    let (_server, client) = served();
    let encode = |body: Value| post(&client, "/v1/encode", &body);
    let one = encode(json!({"input": "a\u{e9}"}));
    assert_eq!(one, json!({"input_ids": [97, 0xc3, 0xa9], "length": 3}));
    let several = encode(json!({"input": ["a", "", "bc"], "add_bos": false}));
    assert_eq!(several, json!({"input_ids": [[97], [], [98, 99]], "length": [1, 0, 2]}));
    let chat = encode(json!({"input": "hi<|im_end|>", "do_preprocess": true}));
    let ids: Vec<u64> =
        chat["input_ids"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
    assert_eq!(ids.iter().filter(|id| **id == 257).count(), 1, "{chat}");
    let text = post(&client, "/v1/decode", &json!({"ids": chat["input_ids"]}));
    assert_eq!(text["text"], "user\nhi<|im_end|>\nassistant\n");
    assert_eq!(post(&client, "/v1/decode", &json!({"ids": []}))["text"], "");
}

#[test]
fn the_documentation_is_a_page() {
    let (_server, client) = served();
    let page = client.get("/docs");
    assert_eq!(page.status, 200);
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    assert!(page.text().contains("/page/docs.js"));
    assert!(client.get("/page/docs.js").text().contains("/openapi.json"));
}
