//! How text is cut before byte-pair merging: GGUF's names for it, and `pre_tokenizer` of
//! `tokenizer.json`.

use serde_json::{Value as Json, json};

/// The split of GPT-4's tokenizer, up to three digits together.
const LLAMA3_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\
    \\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
/// The same with every digit alone.
const QWEN2_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\
    \\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// A rule that cuts text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// The byte-level rule of GPT-2.
    Gpt2,
    /// Every digit alone, then the rule of GPT-2.
    DigitsThenGpt2,
    Llama3,
    Qwen2,
}

/// `tokenizer.ggml.pre`, its split, and whether a whole word in the vocabulary skips merging. The
/// first name of a pair is the one that is written.
pub(crate) const SPLITS: [(&str, Split, bool); 12] = [
    ("gpt-2", Split::Gpt2, false),
    ("default", Split::Gpt2, false),
    ("smollm", Split::DigitsThenGpt2, false),
    ("llama-bpe", Split::Llama3, true),
    ("llama3", Split::Llama3, true),
    ("llama-v3", Split::Llama3, true),
    ("dbrx", Split::Llama3, false),
    ("smaug-bpe", Split::Llama3, false),
    ("qwen2", Split::Qwen2, false),
    ("deepseek-r1-qwen", Split::Qwen2, false),
    ("megrez", Split::Qwen2, false),
    ("hunyuan", Split::Qwen2, false),
];

impl Split {
    /// The split of a `tokenizer.json`, where it is one of these.
    pub(crate) fn of(tokenizer: &Json) -> Option<Split> {
        let given = steps(&tokenizer["pre_tokenizer"])?;
        let all = [Split::Gpt2, Split::DigitsThenGpt2, Split::Llama3, Split::Qwen2];
        let split = all.into_iter().find(|s| steps(&s.pre_tokenizer()).as_ref() == Some(&given))?;
        let normalizer = &tokenizer["normalizer"];
        // GGUF says nothing of normalizers; whoever reads the name of Qwen2 may apply its.
        let is_known = normalizer.is_null()
            || (split == Split::Qwen2 && normalizer["type"] == split.normalizer()["type"]);
        is_known.then_some(split)
    }

    pub(crate) fn normalizer(self) -> Json {
        match self {
            Split::Qwen2 => json!({"type": "NFC"}),
            _ => Json::Null,
        }
    }

    pub(crate) fn pre_tokenizer(self) -> Json {
        let by_regex = |pattern: &str| {
            json!({
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": pattern},
                        "behavior": "Isolated",
                        "invert": false,
                    },
                    byte_level(false),
                ],
            })
        };
        match self {
            Split::Gpt2 => byte_level(true),
            Split::DigitsThenGpt2 => json!({
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": true},
                    byte_level(true),
                ],
            }),
            Split::Llama3 => by_regex(LLAMA3_SPLIT),
            Split::Qwen2 => by_regex(QWEN2_SPLIT),
        }
    }
}

pub(crate) fn byte_level(use_regex: bool) -> Json {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

/// What decides where a pre-tokenizer cuts.
#[derive(Debug, PartialEq)]
enum Step<'a> {
    Digits,
    Regex(&'a str),
    ByteLevel { use_regex: bool },
}

/// The steps of a pre-tokenizer; `None` where there is another one among them.
fn steps(json: &Json) -> Option<Vec<Step<'_>>> {
    let list = match json["type"].as_str()? {
        "Sequence" => json["pretokenizers"].as_array()?.as_slice(),
        _ => std::slice::from_ref(json),
    };
    list.iter().map(step).collect()
}

fn step(json: &Json) -> Option<Step<'_>> {
    match json["type"].as_str()? {
        "Digits" if json["individual_digits"] == true => Some(Step::Digits),
        "ByteLevel" if json["add_prefix_space"] == false => {
            Some(Step::ByteLevel { use_regex: json["use_regex"].as_bool().unwrap_or(true) })
        }
        "Split" if json["behavior"] == "Isolated" && json["invert"] == false => {
            json["pattern"]["Regex"].as_str().map(Step::Regex)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_split_is_found_again() {
        for (name, split, _) in SPLITS {
            let tokenizer = json!({
                "pre_tokenizer": split.pre_tokenizer(), "normalizer": split.normalizer(),
            });
            assert_eq!(Split::of(&tokenizer), Some(split), "{name}");
        }
    }

    #[test]
    fn other_rules_are_not_taken_for_these() {
        let spaces = json!({"type": "Metaspace", "replacement": "_"});
        let mut prefixed = byte_level(true);
        prefixed["add_prefix_space"] = json!(true);
        let regex = json!({
            "type": "Split", "pattern": {"Regex": "\\d"}, "behavior": "Isolated", "invert": false,
        });
        for pre_tokenizer in [spaces, prefixed, regex, Json::Null] {
            assert_eq!(Split::of(&json!({"pre_tokenizer": pre_tokenizer})), None);
        }
        let normalized = json!({
            "pre_tokenizer": byte_level(true), "normalizer": {"type": "Lowercase"},
        });
        assert_eq!(Split::of(&normalized), None);
    }
}
