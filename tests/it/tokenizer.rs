//! Tokenizer, incremental text and chat templates.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bespoke::Error;
use bespoke::tokenizer::chat::{ChatOptions, ChatTemplate, Message, parse_messages};
use bespoke::tokenizer::stream::TextStream;
use bespoke::tokenizer::{SpecialTokens, Tokenizer};
use serde_json::{Map, Value, json};

use crate::golden::{golden_dir, smollm2};

/// The character that stands for `byte` in byte-level vocabularies.
fn byte_char(byte: u8) -> char {
    let is_plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_plain(byte) {
        return char::from(byte);
    }
    let num_before = (0..byte).filter(|byte| !is_plain(*byte)).count();
    char::from_u32(256 + num_before as u32).unwrap()
}

/// A byte-level tokenizer: ids 0 to 255 are bytes, then "he" and "ll", then `<|end|>`.
pub(crate) fn byte_tokenizer() -> Value {
    let mut vocab: Map<String, Value> =
        (0..=255u8).map(|byte| (byte_char(byte).to_string(), byte.into())).collect();
    vocab.insert("he".into(), 256.into());
    vocab.insert("ll".into(), 257.into());
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    json!({
        "version": "1.0",
        "truncation": {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
        },
        "padding": null,
        "added_tokens": [{
            "id": 258, "content": "<|end|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": [["h", "e"], ["l", "l"]],
        },
    })
}

fn write(dir: &Path, name: &str, text: impl AsRef<[u8]>) {
    fs::write(dir.join(name), text).unwrap();
}

fn load(tokenizer: &Value) -> Result<Tokenizer, Error> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "tokenizer.json", tokenizer.to_string());
    Tokenizer::load(dir.path())
}

#[test]
fn encodes_and_decodes() {
    let tokenizer = load(&byte_tokenizer()).unwrap();
    let ids = tokenizer.encode("hello é<|end|>", SpecialTokens::Add).unwrap();
    assert_eq!(ids, [256, 257, 111, 32, 0xC3, 0xA9, 258]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "hello é");
    assert_eq!(tokenizer.decode(&[104, 9999, 105]).unwrap(), "hi");
    assert_eq!(tokenizer.encode("", SpecialTokens::Add).unwrap(), [0u32; 0]);
    assert_eq!(tokenizer.num_ids(), 259);
    assert!(tokenizer.check_vocab_size(259).is_ok());
    let error = tokenizer.check_vocab_size(258).unwrap_err().to_string();
    assert!(error.contains("token id 258") && error.contains("258 (vocab_size"), "{error}");
}

#[test]
fn collects_the_end_tokens() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "tokenizer.json", byte_tokenizer().to_string());
    write(dir.path(), "tokenizer_config.json", r#"{"eos_token": {"content": "<|end|>"}}"#);
    write(dir.path(), "generation_config.json", r#"{"eos_token_id": [7, 3]}"#);
    assert_eq!(Tokenizer::load(dir.path()).unwrap().eos_ids(), [3, 7, 258]);
    write(dir.path(), "generation_config.json", r#"{"eos_token_id": -1}"#);
    let error = Tokenizer::load(dir.path()).err().unwrap().to_string();
    assert!(error.contains("generation_config.json: eos_token_id: -1"), "{error}");
}

#[test]
fn refuses_broken_tokenizers() {
    let check = |edit: &dyn Fn(&mut Value), expect: &str| {
        let mut tokenizer = byte_tokenizer();
        edit(&mut tokenizer);
        let error = load(&tokenizer).err().expect(expect).to_string();
        assert!(error.contains("tokenizer.json: ") && error.contains(expect), "{error}");
    };
    check(&|json| json["model"]["merges"] = json!([["he", "ll"]]), "\"hell\" is not in the voc");
    check(&|json| json["model"]["merges"] = json!(["hell"]), "not two tokens");
    check(&|json| json["model"]["merges"] = json!([["h", "xyz"]]), "\"xyz\" is not in the voc");
    check(&|json| json["model"]["continuing_subword_prefix"] = json!("##"), "does not start with");
    check(&|json| json["model"] = Value::Null, "no \"model\"");
    check(&|json| json["model"]["type"] = json!("Psychic"), "no usable tokenizer");
    check(&|json| *json = json!([1, 2]), "not a tokenizer");
    let fixed =
        json!({"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]});
    check(&|json| json["pre_tokenizer"] = fixed.clone(), "FixedLength with length 0");

    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(dir.path()).err().unwrap().to_string();
    assert!(error.contains("the file is missing"), "{error}");
    assert!(Tokenizer::load_optional(dir.path()).unwrap().is_none());
    let whole = byte_tokenizer().to_string();
    for len in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        write(dir.path(), "tokenizer.json", &whole[..whole.floor_char_boundary(len)]);
        assert!(Tokenizer::load(dir.path()).is_err(), "{len} bytes");
    }
}

/// Streams `ids`: the pieces, then what the flush gives.
fn stream(ids: &[u32]) -> Vec<String> {
    let mut stream = TextStream::new(Arc::new(load(&byte_tokenizer()).unwrap()));
    let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    pieces.push(stream.flush().unwrap());
    pieces
}

#[test]
fn streams_whole_characters() {
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
    assert_eq!(stream(&bytes("aé🦀")), ["a", "", "é", "", "", "", "🦀", ""]);
    assert_eq!(stream(&[256, 257, 111, 258]), ["he", "ll", "o", "", ""]);
    // The end of the sequence in the middle of a character.
    assert_eq!(stream(&[0xF0, 0x9F]), ["", "", "\u{FFFD}"]);
    // A broken character shows when the next one is there.
    assert_eq!(stream(&[0xC3, 104]), ["", "\u{FFFD}h", ""]);
    let text = "Zwölf 👩‍👩‍👧 日本 done";
    assert_eq!(stream(&bytes(text)).concat(), text);
    assert_eq!(stream(&[]), [""]);
}

#[test]
fn streams_bytes_that_never_become_a_character() {
    let pieces = stream(&[0xFF; 100]);
    assert_eq!(pieces.concat(), "\u{FFFD}".repeat(100));
    let quiet = pieces.iter().take(100).map(String::is_empty).collect::<Vec<bool>>();
    assert!(quiet.chunks(9).all(|chunk| chunk.len() < 9 || !chunk.iter().all(|quiet| *quiet)));
    // A character that begins among the garbage stays whole.
    let mut ids = vec![0xFF; 7];
    ids.extend([0xF0, 0x9F, 0xA6, 0x80, 33]);
    let pieces = stream(&ids);
    assert_eq!(pieces.concat(), "\u{FFFD}".repeat(7) + "🦀!");
}

fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
    let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().unwrap().clone();
    let options = ChatOptions {
        add_generation_prompt: true,
        tools: Value::Null,
        now: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        kwargs: json!({"mood": "good"}).as_object().unwrap().clone(),
    };
    ChatTemplate::new(Path::new("tokenizer_config.json"), source, tokens)?
        .render(messages, &options)
}

#[track_caller]
fn check_render(source: &str, expect: &str) {
    let mut messages = vec![Message::new("user", "Hi <b>"), Message::new("assistant", "Yes: é")];
    messages[1]
        .rest
        .insert("tool_calls".into(), json!([{"name": "f", "arguments": {"x": [1, 2]}}]));
    assert_eq!(render(source, &messages).unwrap(), expect);
}

#[track_caller]
fn check_refused(source: &str, expect: &str) {
    let error = render(source, &[Message::new("user", "Hi")]).expect_err(source).to_string();
    assert!(error.contains(expect), "{error}");
}

/// The template of SmolLM2-Instruct.
const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != \
    'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
    Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

#[test]
fn renders_smollm2() {
    let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
                  Hugging Face<|im_end|>\n";
    assert_eq!(
        render(SMOLLM2, &[Message::new("user", "What is the capital of France?")]).unwrap(),
        format!(
            "{system}<|im_start|>user\nWhat is the capital of France?<|im_end|>\n\
             <|im_start|>assistant\n"
        )
    );
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Hi")];
    assert_eq!(
        render(SMOLLM2, &messages).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\n"
    );
}

#[test]
fn renders_as_hugging_face_does() {
    check_render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}\n", "<s>Hi <b></s>");
    check_render("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "Hi <b>"}"#);
    check_render(
        "{{ messages[1].tool_calls[0].arguments | tojson(indent=1) }}",
        "{\n \"x\": [\n  1,\n  2\n ]\n}",
    );
    check_render("{{ messages[1].content | tojson(ensure_ascii=true) }}", "\"Yes: \\u00e9\"");
    check_render("{{ tools is none }} {{ tools is defined }}", "True True");
    check_render("{{ strftime_now('%d %b %Y') }}", "14 Nov 2023");
    check_render(
        "{% for m in messages[::-1] %}{% generation %}{{ m.role }}\
         {%- endgeneration -%} {% endfor %}",
        "assistantuser",
    );
    check_render("{{ '{% generation %}' | length }}{% if '%}' == '%}' %}y{% endif %}", "16y");
    check_render(
        "{% set ns = namespace(n=0) %}\n{% for m in messages %}\n    {% if m.role == 'user' %}\n\
         {% set ns.n = ns.n + 1 %}\n    {% endif %}\n{% endfor %}\nn={{ ns.n }}",
        "n=1",
    );
    check_render(
        "{{ messages[1].content.split(':')[-1].strip() }} {{ messages[0].get('name', 'nobody') }} \
         {{ messages[0].content.startswith('Hi') }}{% for k, v in messages[0].items() %} {{ k }}\
         {% endfor %}",
        "é nobody True role content",
    );
    check_render(
        "{{ messages[0] is mapping }} {{ messages[1].tool_calls is defined }}",
        "True True",
    );
}

#[test]
fn refuses_hostile_templates() {
    check_refused(
        "a\n{{ raise_exception('roles must alternate') }}",
        "line 2: roles must alternate",
    );
    check_refused(
        "one\ntwo {% if %}",
        "tokenizer_config.json: chat template, line 2: syntax error",
    );
    check_refused("{% include 'other' %}", "chat template, line 1");
    check_refused("{{ nothing.at.all }}", "chat template, line 1: undefined value");
    check_refused(
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "it takes too many steps",
    );
    check_refused("{% for a in range(10000000000) %}{% endfor %}", "chat template, line 1");
    check_refused(
        "{% set x = 'a' * 1000000 %}{% for i in range(2000) %}{{ x }}{% endfor %}",
        "exceeds the limit of 16777216 bytes",
    );
    check_refused("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion limit");
    check_refused(&("(".repeat(100_000) + "{{ 1 }}" + &" ".repeat(200_000)), "the limit is 262144");
    check_refused(&format!("{{{{ {}1{} }}}}", "(".repeat(5_000), ")".repeat(5_000)), "line 1");
    check_refused("{{ messages | tojson(indent=1000000) }}", "indent 1000000 is not 0 to 16");
    check_refused("{{ strftime_now('%Q') }}", "directive that is not supported");
}

#[test]
fn finds_the_template() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "tokenizer.json", byte_tokenizer().to_string());
    let template = |config: Value| {
        write(dir.path(), "tokenizer_config.json", config.to_string());
        let options = ChatOptions {
            add_generation_prompt: false,
            tools: Value::Null,
            now: UNIX_EPOCH,
            kwargs: Map::new(),
        };
        Tokenizer::load(dir.path()).map(|tokenizer| {
            let template = tokenizer.chat_template()?;
            Some(template.render(&[Message::new("user", "x")], &options).unwrap())
        })
    };
    assert_eq!(template(json!({})).unwrap(), None);
    assert_eq!(template(json!({"chat_template": null})).unwrap(), None);
    let config = json!({"chat_template": "{{ eos_token }}", "eos_token": {"content": "E"}});
    assert_eq!(template(config).unwrap().as_deref(), Some("E"));
    let named = json!([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]);
    assert_eq!(template(json!({"chat_template": named})).unwrap().as_deref(), Some("d"));
    let named = json!([{"name": "rag", "template": "r"}, {"name": "tool", "template": "t"}]);
    let error = template(json!({"chat_template": named})).unwrap_err().to_string();
    assert!(error.contains("none of rag, tool is named"), "{error}");
    assert!(template(json!({"chat_template": 3})).is_err());
    write(dir.path(), "chat_template.jinja", "file {{ messages | length }}");
    assert_eq!(template(json!({"chat_template": "t"})).unwrap().as_deref(), Some("file 1"));
}

#[test]
fn reads_messages() {
    let parts = r#"{"messages": [{"role": "user", "name": "Ada", "content":
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}"#;
    let messages = parse_messages(parts).unwrap();
    assert_eq!((messages[0].content.as_str(), &messages[0].rest["name"]), ("ab", &json!("Ada")));
    let check = |text: &str, expect: &str| {
        let error = parse_messages(text).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    };
    check("[", "not valid JSON");
    check("[]", "0 messages");
    check("3", "expected an array");
    check("{}", "\"messages\"");
    check(r#"[{"content": "x"}]"#, "messages[0]: \"role\" must be a string");
    check(r#"[{"role": "user"}]"#, "\"content\" must be");
    check(r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#, "parts must be");
    check(r#"["x"]"#, "expected an object");
}

/// Text to ids and back as llama.cpp does it, for every published prompt and answer.
#[test]
fn agrees_on_smollm2() {
    let Some(dir) = smollm2::model_dir() else { return };
    let tokenizer = Arc::new(Tokenizer::load(&dir).unwrap());
    assert!(tokenizer.check_vocab_size(49_152).is_ok());
    let text = fs::read_to_string(golden_dir().join("smollm2-135m-greedy.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let options = ChatOptions {
        add_generation_prompt: true,
        tools: Value::Null,
        now: UNIX_EPOCH,
        kwargs: Map::new(),
    };
    for case in golden["cases"].as_array().unwrap() {
        let ids = match case["kind"].as_str().unwrap() {
            "chat" => {
                let messages = parse_messages(&case["messages"].to_string()).unwrap();
                let template = tokenizer.chat_template().unwrap();
                let prompt = template.render(&messages, &options).unwrap();
                assert_eq!(prompt, case["rendered"]);
                tokenizer.encode(&prompt, SpecialTokens::Omit).unwrap()
            }
            _ => tokenizer.encode(case["text"].as_str().unwrap(), SpecialTokens::Add).unwrap(),
        };
        assert_eq!(ids, smollm2::ids(&case["prompt_ids"]));
        let mut stream = TextStream::new(tokenizer.clone());
        let mut answer = String::new();
        for step in case["steps"].as_array().unwrap() {
            answer += &stream.push(step["id"].as_u64().unwrap() as u32).unwrap();
        }
        answer += &stream.flush().unwrap();
        // A case with a note has its steps from another program than its text.
        if case.get("note").is_none() {
            assert_eq!(answer, case["output_text"]);
        }
    }
}
