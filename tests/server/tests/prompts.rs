//! Prompts of chats: what users write is text, whatever it spells.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

use bespoke::error::Error;
use bespoke::tokenizer::chat::{ChatOptions, Message};
use bespoke::tokenizer::stream::TextStream;
use bespoke::tokenizer::vocabulary::Token;
use bespoke::tokenizer::{SpecialTokens, Tokenizer};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Texts side by side, trimmed, in JSON of both kinds, and roles within a token.
const MIXED: &str = "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|' + m.role + '|>' }}\
    {{ m.content }}{{ m.note }}{{ m.content | trim }}>{{ m.call | tojson }}\
    {{ m.call | tojson(ensure_ascii=True) }}<{{ m.note }}<|im_end|>{% endfor %}\
    {{ tools | tojson(indent=2) }}{{ extra }}";

/// The fixture's tokenizer with another template and other strips of its special tokens.
fn tokenizer(template: &'static str, strips: bool) -> Arc<Tokenizer> {
    static LOADED: Mutex<BTreeMap<(&str, bool), Arc<Tokenizer>>> = Mutex::new(BTreeMap::new());
    let mut loaded = LOADED.lock().unwrap();
    Arc::clone(loaded.entry((template, strips)).or_insert_with(|| load(template, strips)))
}

fn load(template: &str, strips: bool) -> Arc<Tokenizer> {
    let dir = tempfile::tempdir().unwrap();
    bespoke_server_tests::tokenizer::write(dir.path());
    edit(&dir.path().join("tokenizer_config.json"), |config| {
        config["chat_template"] = template.into();
    });
    edit(&dir.path().join("tokenizer.json"), |json| {
        json["added_tokens"][0]["rstrip"] = strips.into();
        json["added_tokens"][1]["lstrip"] = strips.into();
    });
    Arc::new(Tokenizer::load(dir.path()).unwrap())
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn options(tools: Value, extra: &str) -> ChatOptions {
    let kwargs = json!({"extra": extra}).as_object().unwrap().clone();
    ChatOptions { add_generation_prompt: true, tools, now: UNIX_EPOCH, kwargs }
}

fn message(texts: &[String]) -> Message {
    let mut message = Message::new("im_start", texts[0].clone());
    message.rest.insert("note".to_owned(), texts[1].clone().into());
    message
        .rest
        .insert("call".to_owned(), json!({"name": texts[2], texts[3].as_str(): [texts[0]]}));
    message
}

/// The ids of a chat, and its text.
fn encode(tokenizer: &Tokenizer, texts: &[String], tool: &str) -> (Vec<u32>, String) {
    let messages: Vec<Message> = texts.chunks_exact(4).map(message).collect();
    let options = options(json!([{"name": tool}]), tool);
    let prompt = tokenizer.render_chat(&messages, &options).unwrap();
    (tokenizer.encode_prompt(&prompt).unwrap(), prompt.text())
}

fn special_ids(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u32> {
    let tokens = tokenizer.vocabulary().unwrap().tokens().unwrap();
    let is_special = |id: &u32| matches!(tokens[*id as usize], Token::Special(_));
    ids.iter().copied().filter(is_special).collect()
}

/// The text of ids, special tokens spelled out.
fn spell(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let tokens = tokenizer.vocabulary().unwrap().tokens().unwrap();
    let bytes = ids.iter().flat_map(|id| match &tokens[*id as usize] {
        Token::Text(bytes) => bytes.clone(),
        Token::Special(name) => name.clone().into_bytes(),
        Token::Unused => panic!("{id} is no token"),
    });
    String::from_utf8(bytes.collect()).unwrap()
}

/// Texts of what could become a special token, and of anything else.
fn hostile() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("<|im_start|>"),
        Just("<|im_end|>"),
        Just("<|endoftext|>"),
        Just("<|im_"),
        Just("end|>"),
        Just("<"),
        Just("|>"),
        Just(">"),
        Just("<|"),
        Just(" "),
        Just("\n"),
        Just("é"),
        Just("a"),
        Just("\u{fdd0}"),
        Just("\u{fdd1}"),
        Just("im_start"),
        Just("\""),
    ];
    prop_oneof![
        4 => prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat()),
        1 => any::<String>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn users_write_no_special_tokens(
        texts in prop::collection::vec(hostile(), 8),
        tool in hostile(),
        template in prop_oneof![Just(CHATML), Just(MIXED)],
    ) {
        let plain: Vec<String> = texts.iter().map(|_| "x".to_owned()).collect();
        for strips in [false, true] {
            let tokenizer = tokenizer(template, strips);
            let (ids, text) = encode(&tokenizer, &texts, &tool);
            let (plain_ids, _) = encode(&tokenizer, &plain, "x");
            prop_assert_eq!(special_ids(&tokenizer, &ids), special_ids(&tokenizer, &plain_ids));
            if !strips {
                prop_assert_eq!(spell(&tokenizer, &ids), text);
            }
        }
    }

    /// Where nothing spells a special token, the ids are those of the whole text.
    #[test]
    fn other_prompts_are_encoded_as_ever(texts in prop::collection::vec("[^<]*", 8)) {
        for strips in [false, true] {
            let tokenizer = tokenizer(MIXED, strips);
            let (ids, text) = encode(&tokenizer, &texts, "tool");
            prop_assert_eq!(ids, tokenizer.encode(&text, SpecialTokens::Omit).unwrap());
        }
    }
}

#[test]
fn pieces_of_marked_prompts_are_encoded_as_the_whole() {
    for strips in [false, true] {
        let tokenizer = tokenizer(CHATML, strips);
        let encode = |text: &str| {
            let prompt =
                tokenizer.render_chat(&[Message::new("user", text)], &options(Value::Null, ""));
            tokenizer.encode_prompt(&prompt.unwrap()).unwrap()
        };
        // The mark behind the last character changes nothing but the way that is taken.
        let (marked, plain) = (encode("  x \n <"), encode("  x \n >"));
        let swap = |id: &u32| if *id == u32::from(b'<') { u32::from(b'>') } else { *id };
        assert_eq!(marked.iter().map(swap).collect::<Vec<u32>>(), plain);
    }
}

#[test]
fn every_mark_in_use_is_refused() {
    let tokenizer = tokenizer(CHATML, false);
    let marks: String = ('\u{fdd0}'..='\u{fdef}').collect();
    let render = |text: &str| {
        tokenizer.render_chat(&[Message::new("user", text)], &options(Value::Null, ""))
    };
    assert_eq!(render(&marks).unwrap().text().matches(&marks).count(), 1);
    let error = render(&format!("{marks}<|im_end|>")).unwrap_err().to_string();
    assert!(error.contains("U+FDD0"), "{error}");
}

#[test]
fn variables_are_the_templates_alone() {
    let source =
        "{{ messages | length }}{{ extra }}{{ enable_thinking is defined }}{{ eos_token }}";
    let tokenizer = tokenizer(source, false);
    let render = |kwargs: Value| -> Result<String, Error> {
        let kwargs = kwargs.as_object().unwrap().clone();
        let options = ChatOptions { kwargs, ..options(Value::Null, "") };
        Ok(tokenizer.render_chat(&[Message::new("user", "-")], &options)?.text())
    };
    let text = render(json!({"extra": [1, "a"], "enable_thinking": false})).unwrap();
    assert_eq!(text, "1[1, 'a']True<|im_end|>");
    for name in ["messages", "tools", "tokenize", "add_generation_prompt", "eos_token", "range"] {
        let error = render(json!({name: 1})).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    let many: Map<String, Value> = (0..65).map(|idx| (format!("v{idx}"), idx.into())).collect();
    assert!(render(Value::Object(many)).is_err());
    for role in ["", "a|b", "user>", "<", &"x".repeat(65)] {
        let messages = [Message::new(role, "-")];
        let error = tokenizer.render_chat(&messages, &options(Value::Null, "")).unwrap_err();
        assert!(error.to_string().contains("role"), "{error}");
    }
}

#[test]
fn prompts_can_be_cut() {
    let tokenizer = tokenizer(CHATML, false);
    let messages = [Message::new("assistant", "ANSWER"), Message::new("user", "<|im_end|>")];
    let prompt = tokenizer.render_chat(&messages, &options(Value::Null, "")).unwrap();
    let rest = prompt.behind("ANSWER").unwrap();
    let turn = "<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(rest.text(), turn);
    let ids = tokenizer.encode_prompt(&rest).unwrap();
    assert_eq!(special_ids(&tokenizer, &ids), [257, 256, 257, 256]);
    assert_eq!(prompt.behind("missing"), None);
}

#[test]
fn streams_show_the_markers_that_they_are_asked_for() {
    let tokenizer = tokenizer(CHATML, false);
    let ids = tokenizer.encode("a<|im_start|>b<|endoftext|>\u{e9}", SpecialTokens::Omit).unwrap();
    let text = |mut stream: TextStream| {
        let mut text: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        text.push_str(&stream.flush().unwrap());
        text
    };
    assert_eq!(text(TextStream::new(tokenizer.clone())), "ab\u{e9}");
    let shown = TextStream::showing(tokenizer.clone(), &["<|im_start|>", "<think>"]);
    assert_eq!(text(shown), "a<|im_start|>b\u{e9}");
}
