//! JSON schemas: every answer parses and is what its schema says.

use bespoke::grammar::GrammarSpec;
use bespoke::request::FinishReason;
use serde_json::{Value, json};

use super::{compile, compiler, engine, request, run, text};

/// Checks a value against a schema, as far as the schemas below go.
fn is_valid(value: &Value, schema: &Value, root: &Value) -> bool {
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.strip_prefix("#/$defs/").expect("a definition of the schema");
        return is_valid(value, &root["$defs"][name], root);
    }
    if let Some(options) = schema["anyOf"].as_array() {
        return options.iter().any(|option| is_valid(value, option, root));
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    if schema.get("const").is_some() {
        return *value == schema["const"];
    }
    let count = |name: &str| schema[name].as_u64();
    let is_within = |len: usize, min: &str, max: &str| {
        let len = len as u64;
        count(min).is_none_or(|min| min <= len) && count(max).is_none_or(|max| len <= max)
    };
    match (schema["type"].as_str(), value) {
        (Some("null"), Value::Null) | (Some("boolean"), Value::Bool(_)) => true,
        (Some("integer"), Value::Number(number)) => {
            let is_between = |number: i64| {
                schema["minimum"].as_i64().is_none_or(|min| min <= number)
                    && schema["maximum"].as_i64().is_none_or(|max| number <= max)
                    && schema["multipleOf"].as_i64().is_none_or(|step| number % step == 0)
            };
            // NOTE: -0 is an integer, and serde_json has it as a float.
            number.as_f64().is_some_and(|it| it.fract() == 0.0 && is_between(it as i64))
        }
        (Some("number"), Value::Number(number)) => {
            let number = number.as_f64().expect("a number in float64");
            schema["exclusiveMinimum"].as_f64().is_none_or(|min| min < number)
                && schema["maximum"].as_f64().is_none_or(|max| number <= max)
        }
        (Some("string"), Value::String(text)) => {
            is_within(text.chars().count(), "minLength", "maxLength")
                && schema["format"].as_str().is_none_or(|_| text.len() == "2024-02-29".len())
                && schema["pattern"].as_str().is_none_or(|_| {
                    text.strip_prefix("id_").is_some_and(|rest| rest.parse::<u32>().is_ok())
                })
        }
        (Some("array"), Value::Array(items)) => {
            is_within(items.len(), "minItems", "maxItems")
                && items.iter().all(|item| is_valid(item, &schema["items"], root))
        }
        (Some("object"), Value::Object(object)) => {
            let required = schema["required"].as_array().into_iter().flatten();
            let has_required =
                required.filter_map(Value::as_str).all(|key| object.contains_key(key));
            has_required
                && object.iter().all(|(key, value)| {
                    let property = schema["properties"].get(key);
                    property.is_some_and(|schema| is_valid(value, schema, root))
                })
        }
        _ => false,
    }
}

/// Schemas whose values have bounded sizes, so that every answer comes to its end.
fn schemas() -> Vec<Value> {
    let string = json!({"type": "string", "maxLength": 12});
    let object = |properties: Value, required: Value| {
        json!({"type": "object", "properties": properties, "required": required,
               "additionalProperties": false})
    };
    vec![
        object(
            json!({"name": string, "age": {"type": "integer", "minimum": 0, "maximum": 130}}),
            json!(["name", "age"]),
        ),
        object(json!({"a": string, "b": {"type": "boolean"}, "c": {"type": "null"}}), json!([])),
        json!({"type": "array", "minItems": 2, "maxItems": 5,
               "items": {"type": "integer", "minimum": -3, "maximum": 1000, "multipleOf": 7}}),
        json!({"enum": ["red", "green", 5, null, {"x": [1]}]}),
        object(
            json!({"kind": {"const": "circle"},
                      "at": {"type": "array", "items": {"type": "integer", "minimum": 0,
                             "maximum": 9}, "minItems": 2, "maxItems": 2}}),
            json!(["kind", "at"]),
        ),
        object(
            json!({"v": {"anyOf": [{"type": "null"}, {"type": "boolean"},
                      object(json!({"w": string}), json!(["w"]))]}}),
            json!(["v"]),
        ),
        object(
            json!({"id": {"type": "string", "pattern": "^id_[0-9]{1,6}$"},
                      "day": {"type": "string", "format": "date"}}),
            json!(["id", "day"]),
        ),
        {
            let node = object(
                json!({"value": {"type": "integer", "minimum": 0, "maximum": 9},
                                     "leaf": {"anyOf": [{"type": "null"},
                                              {"$ref": "#/$defs/leaf"}]}}),
                json!(["value"]),
            );
            let leaf = object(json!({"text": string}), json!(["text"]));
            json!({"$ref": "#/$defs/node", "$defs": {"node": node, "leaf": leaf}})
        },
    ]
}

#[test]
fn answers_are_what_their_schemas_say() {
    let mut num_tokens = 0;
    for schema in schemas() {
        let grammar = compile(GrammarSpec::JsonSchema(schema.clone()));
        let requests = (0..60).map(|seed| request(Some(&grammar), seed)).collect();
        let mut texts = Vec::new();
        for generation in run(&mut engine(510), requests).into_iter().flatten() {
            let text = text(&generation);
            num_tokens += generation.output_ids.len();
            assert_eq!(generation.finish_reason, Some(FinishReason::Stop), "{schema}: {text}");
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!(is_valid(&value, &schema, &schema), "{schema}: {text}");
            texts.push(text);
        }
        texts.sort();
        texts.dedup();
        assert!(texts.len() > 3, "the model chooses: {texts:?}");
    }
    assert!(num_tokens > 10_000, "{num_tokens} tokens");
}

#[test]
fn keys_come_in_the_schemas_order() {
    let schema = json!({"type": "object", "properties": {
        "z": {"type": "boolean"}, "a": {"type": "boolean"}, "m": {"type": "boolean"}
    }, "required": ["a", "m", "z"], "additionalProperties": false});
    let grammar = compile(GrammarSpec::JsonSchema(schema));
    for generation in run(&mut engine(510), vec![request(Some(&grammar), 1)]).remove(0) {
        let text = text(&generation);
        let places: Vec<_> = ["\"z\"", "\"a\"", "\"m\""].map(|key| text.find(key)).into();
        assert!(places.is_sorted() && places[0].is_some(), "{text}");
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let check = |schema: Value, expect: &str| {
        let error = compiler().compile(&GrammarSpec::JsonSchema(schema)).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    };
    check(json!({"type": "object", "unevaluatedProperties": false}), "unevaluatedProperties");
    check(json!({"type": "array", "uniqueItems": true}), "uniqueItems");
    check(json!({"not": {"type": "string"}}), "not");
    check(json!({"type": "strin"}), "strin");
    check(json!({"$ref": "https://example.com/schema"}), "ref");
    check(json!({"$ref": "#/$defs/missing"}), "missing");
    check(json!({"type": "string", "format": "no-such-format"}), "no-such-format");
    check(json!({"type": "string", "pattern": "("}), "regex");
    check(json!({"type": "string", "x-guidance": {"lenient": true}}), "x-guidance");
    check(json!({"type": "integer", "minimum": 5, "maximum": 4}), "minimum");
    check(json!(false), "false");
    check(json!([1]), "[1]");
}
