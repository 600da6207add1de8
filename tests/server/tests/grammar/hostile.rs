//! Grammars from those who want the server to stop.

use std::mem::ManuallyDrop;
use std::time::Instant;

use bespoke::error::Error;
use bespoke::grammar::GrammarSpec;
use serde_json::{Map, Value, json};

use super::{compiler, engine, request, run, run_one};

fn nested(depth: usize, wrap: impl Fn(Value) -> Value) -> Value {
    (0..depth).fold(json!({"type": "null"}), |inner, _| wrap(inner))
}

fn schemas() -> Vec<(&'static str, GrammarSpec)> {
    let schema = |name, schema: Value| (name, GrammarSpec::JsonSchema(schema));
    let either = |idx: usize| {
        json!({"anyOf": [
            {"type": "object", "properties": {format!("a{idx}"): {"type": "integer"}}},
            {"type": "object", "properties": {format!("b{idx}"): {"type": "string"}}}
        ]})
    };
    let properties = |count: usize, value: Value| -> Map<String, Value> {
        (0..count).map(|idx| (format!("k{idx}"), value.clone())).collect()
    };
    vec![
        schema("product", json!({"allOf": (0..24).map(either).collect::<Vec<_>>()})),
        schema("long strings", json!({"type": "string", "minLength": 16_000, "maxLength": 16_384})),
        schema(
            "many items",
            json!({"type": "array", "items": {"type": "array", "minItems": 16_000},
                                    "minItems": 16_000}),
        ),
        schema(
            "many properties",
            json!({"type": "object", "properties":
            properties(1300, json!({"type": "string"}))}),
        ),
        schema("counted properties", json!({"type": "object", "minProperties": 16_000})),
        schema(
            "patterns",
            json!({"type": "object", "patternProperties": (0..32)
            .map(|idx| (format!("^[a-z]*{idx}[a-z]*$"), json!({"type": "integer"})))
            .collect::<Map<String, Value>>()}),
        ),
        schema(
            "pattern and length",
            json!({"type": "string", "pattern": "^(a|b|ab)*c{1,1000}$",
                                            "minLength": 9000}),
        ),
        schema("itself", json!({"$ref": "#"})),
        schema("all of itself", json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]})),
        schema(
            "circle",
            json!({"$ref": "#/$defs/a", "$defs": {
            "a": {"anyOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/b"}]},
            "b": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}),
        ),
        schema(
            "wide enum",
            json!({"enum": (0..4000).map(|idx| format!("value {}", idx * 7919))
            .collect::<Vec<_>>()}),
        ),
        schema("multiples", json!({"type": "integer", "multipleOf": 9_973})),
        schema(
            "tiny multiples",
            json!({"type": "number", "multipleOf": 1e-12, "minimum": -1e300,
                                        "maximum": 1e300}),
        ),
        schema(
            "one of",
            json!({"oneOf": (0..300).map(|idx| json!({"type": "object", "properties":
            {format!("p{idx}"): {"type": "string"}}})).collect::<Vec<_>>()}),
        ),
    ]
}

fn texts() -> Vec<(&'static str, GrammarSpec)> {
    let regex = |name, regex: &str| (name, GrammarSpec::Regex(regex.to_owned()));
    let lark = |name, grammar: String| (name, GrammarSpec::Lark(grammar));
    let chain: String = (0..1000).map(|idx| format!("r{idx}: r{} \"a\"\n", idx + 1)).collect();
    let tokens: String = (0..1000).map(|idx| format!("T{idx}: T{} \"a\"\n", idx + 1)).collect();
    let doubled: String = (0..60).map(|idx| format!("T{idx}: T{0} T{0}\n", idx + 1)).collect();
    let rules: String = (0..60).map(|idx| format!("r{idx}: r{0} r{0}\n", idx + 1)).collect();
    vec![
        regex("repetitions", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"),
        regex("huge count", "a{1,1000000000}"),
        regex("empty repetitions", "(((((()*)*)*)*)*){1000}"),
        regex("states", "(a|b)*a(a|b){2000}"),
        regex("alternatives", &"(a|aa|aaa|b?)*".repeat(200)),
        regex("unicode", &r"\w{1,500}\W{1,500}".repeat(20)),
        regex("stars", &format!("a{}", "*".repeat(4000))),
        regex("classes", &"[".repeat(4000)),
        regex("not this", r"(?=a)b"),
        regex("back", r"(a)\1"),
        lark("chain", format!("start: r0\n{chain}r1000: \"b\"\n")),
        lark("chain of terminals", format!("start: T0\n{tokens}T1000: \"b\"\n")),
        lark("doubled terminals", format!("start: T0\n{doubled}T60: \"b\"\n")),
        lark("doubled rules", format!("start: r0\n{rules}r60: \"b\"\n")),
        lark("left recursion", "start: start start | \"\"\n".to_owned()),
        lark("ambiguous", "start: a*\na: \"x\" | \"x\" a | a a\n".to_owned()),
        lark("nothing", "start: start\n".to_owned()),
        lark("repeated", "start: (\"a\" | \"b\"){1,1000000}\n".to_owned()),
        lark("repeated twice", "start: ((\"a\" | \"b\"){1,3000}){1,3000}\n".to_owned()),
        lark("no JSON", "start: %json {".to_owned()),
        lark("no rule", "this is no grammar".to_owned()),
        lark("empty", String::new()),
        lark("no end", "start: \"abc".to_owned()),
        lark("unknown", "start: missing".to_owned()),
        lark("special", "start: <|im_start|>".to_owned()),
    ]
}

/// Every one is compiled or refused, and what compiles can be followed; the others run on.
#[test]
fn bombs_end_their_own_request_only() {
    let neighbour = request(None, 3);
    let alone = run_one(neighbour.clone());
    for (name, spec) in schemas().into_iter().chain(texts()) {
        let start = Instant::now();
        let result = compiler().compile(&spec);
        let compiled = start.elapsed();
        let grammar = match result {
            Ok(grammar) => grammar,
            Err(Error::Request(reason)) => {
                println!("{name}: refused after {compiled:?}: {reason}");
                assert!(!reason.contains('\n') && reason.len() < 1000, "{reason}");
                continue;
            }
            Err(error) => panic!("{name}: {error}"),
        };
        let mut engine = engine(510);
        let start = Instant::now();
        let both = run(&mut engine, vec![request(Some(&grammar), 1), neighbour.clone()]);
        let answer = &both[0][0];
        let num_tokens = answer.output_ids.len();
        println!(
            "{name}: compiled in {compiled:?}, {num_tokens} tokens in {:?}: {:?}",
            start.elapsed(),
            answer.finish_reason
        );
        assert_eq!(both[1][0], alone, "{name}");
    }
}

#[test]
fn what_is_too_large_or_too_deep_is_refused_at_once() {
    let refused = |spec: GrammarSpec, expect: &str| {
        let error = compiler().compile(&spec).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    };
    let schema = |schema: Value, expect: &str| refused(GrammarSpec::JsonSchema(schema), expect);
    let list = |inner: Value| json!({"type": "array", "items": inner});
    assert!(compiler().compile(&GrammarSpec::JsonSchema(nested(31, list))).is_ok());
    schema(nested(32, list), "deeper than 32");
    // Deeper than any stack: neither the check nor the error may recurse; dropping it would.
    let deep = ManuallyDrop::new(GrammarSpec::JsonSchema(nested(100_000, |inner| {
        Value::Object(Map::from_iter([("items".to_owned(), inner)]))
    })));
    let error = compiler().compile(&deep).unwrap_err().to_string();
    assert!(error.contains("deeper than 32"), "{error}");
    schema(json!({"enum": (0..5000).collect::<Vec<_>>()}), "more than 4096 values");
    schema(json!({"title": "x".repeat(70_000)}), "more than 65536 bytes");
    schema(json!({"type": "array", "minItems": 100_000}), "minItems 100000");
    schema(json!({"type": "string", "maxLength": 1e300}), "maxLength");
    schema(json!({"pattern": "(".repeat(70)}), "deeper than 64");
    schema(json!({"patternProperties": {"x".repeat(5000): true}}), "5000 bytes");
    schema(json!({"type": "integer", "multipleOf": 99_991}), "multipleOf 99991");
    schema(json!({"type": "number", "multipleOf": 0.12345}), "multipleOf 0.12345");
    let patterns = (0..33).map(|idx| (format!("{idx}"), json!(true))).collect::<Map<_, _>>();
    schema(json!({"patternProperties": patterns}), "more than 32 patternProperties");
    // Names and constants may look like keywords.
    let harmless = json!({"type": "object", "properties": {"minItems": {"const": {"minItems": 1e9}},
        "x-guidance": {"type": "null"}}});
    assert!(compiler().compile(&GrammarSpec::JsonSchema(harmless)).is_ok());

    let regex = |regex: String, expect: &str| refused(GrammarSpec::Regex(regex), expect);
    regex("x".repeat(5000), "5000 bytes");
    regex("(".repeat(2000), "deeper than 64");
    regex("a\\".to_owned(), "lone");
    regex(String::new(), "empty");
    regex("a(".to_owned(), "regex");
    let deepest = format!("{}a{}", "(".repeat(64), ")".repeat(64));
    assert!(compiler().compile(&GrammarSpec::Regex(deepest)).is_ok());
    assert!(compiler().compile(&GrammarSpec::Regex(r"\((\[\()*[(\](]{70}".to_owned())).is_ok());

    let lark = |grammar: String, expect: &str| refused(GrammarSpec::Lark(grammar), expect);
    lark(format!("start: {}", "(".repeat(60_000)), "deeper than 64");
    lark("x".repeat(70_000), "70000 bytes");
    lark("a: \"a\"\n".repeat(2000), "definitions");
    lark("start: /a".to_owned(), "without an end");
    lark(format!("start: /{}/", "(".repeat(70)), "deeper than 64");
    lark("start: %json {\"type\": \"array\", \"minItems\": 1000000}".to_owned(), "minItems");
    lark(format!("start: %json {}", nested(40, list)), "deeper than 32");
    let quoted = format!("start: {}\n// (((\n", "\"(\" ".repeat(200));
    assert!(compiler().compile(&GrammarSpec::Lark(quoted)).is_ok());
}
