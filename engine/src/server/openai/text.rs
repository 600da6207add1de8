//! Texts of requests: one or several, in whole or in parts.

use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, SchemaType, Type};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::number::TokenId;

/// Texts that end the answer, which does not have them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stop(pub Vec<String>);

impl Stop {
    /// Most stop strings, and characters of each.
    pub const NUM_MAX: usize = 4;
    pub const LEN_MAX: usize = 256;

    fn check<E: Error>(text: String) -> Result<String, E> {
        let len = text.chars().count();
        match (1..=Stop::LEN_MAX).contains(&len) {
            true => Ok(text),
            false => Err(E::custom(format!(
                "a stop string has {len} characters, it must have 1 to {}",
                Stop::LEN_MAX
            ))),
        }
    }
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Stop, D::Error> {
        struct Stops;

        impl<'de> Visitor<'de> for Stops {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a string or a list of at most {} strings", Stop::NUM_MAX)
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Stop, E> {
                Ok(Stop(vec![Stop::check(text)?]))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Stop, E> {
                self.visit_string(text.to_owned())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Stop, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = items.next_element()? {
                    if texts.len() == Stop::NUM_MAX {
                        let message = format!("more than {} stop strings", Stop::NUM_MAX);
                        return Err(A::Error::custom(message));
                    }
                    texts.push(Stop::check(text)?);
                }
                Ok(Stop(texts))
            }
        }

        deserializer.deserialize_any(Stops)
    }
}

impl PartialSchema for Stop {
    fn schema() -> RefOr<Schema> {
        let text = || string().min_length(Some(1)).max_length(Some(Stop::LEN_MAX));
        one_of("Texts that end the answer, which does not have them.")
            .item(text())
            .item(ArrayBuilder::new().items(text()).max_items(Some(Stop::NUM_MAX)))
            .into()
    }
}

impl ToSchema for Stop {}

/// A message's text: a string, or parts that make one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content(pub String);

/// A part of a message's text.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ContentPart {
    #[serde(rename = "type")]
    #[schema(value_type = ContentKind)]
    _kind: ContentKind,
    text: String,
}

/// Models of text read text only.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ContentKind {
    Text,
}

/// Most parts of one message.
const PARTS_MAX: usize = 1024;

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct Text;

        impl<'de> Visitor<'de> for Text {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of text parts")
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Content, E> {
                Ok(Content(text))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
                let mut text = String::new();
                let mut num_parts = 0;
                while let Some(part) = parts.next_element::<ContentPart>()? {
                    num_parts += 1;
                    if num_parts > PARTS_MAX {
                        return Err(A::Error::custom(format!("more than {PARTS_MAX} parts")));
                    }
                    text.push_str(&part.text);
                }
                match num_parts {
                    0 => Err(A::Error::invalid_length(0, &"at least one part")),
                    _ => Ok(Content(text)),
                }
            }
        }

        deserializer.deserialize_any(Text)
    }
}

impl PartialSchema for Content {
    fn schema() -> RefOr<Schema> {
        one_of("A message's text: a string, or parts that make one.")
            .item(string())
            .item(
                ArrayBuilder::new()
                    .items(Ref::from_schema_name("ContentPart"))
                    .min_items(Some(1))
                    .max_items(Some(PARTS_MAX)),
            )
            .into()
    }
}

impl ToSchema for Content {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push(("ContentPart".to_owned(), ContentPart::schema()));
        ContentPart::schemas(schemas);
    }
}

/// What is to be continued: texts or tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<TokenId>>),
}

/// Most prompts of one request.
pub const PROMPTS_MAX: usize = 64;

impl Prompt {
    /// Refuses prompts without anything to go on from.
    fn checked<E: Error>(self) -> Result<Prompt, E> {
        let has_empty = match &self {
            Prompt::Text(text) => text.is_empty(),
            Prompt::Tokens(tokens) => tokens.is_empty(),
            Prompt::Texts(texts) => texts.iter().any(String::is_empty),
            Prompt::TokenLists(lists) => lists.iter().any(Vec::is_empty),
        };
        match has_empty {
            true => Err(E::custom("a prompt is empty, it needs at least a character or a token")),
            false => Ok(self),
        }
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Prompt, D::Error> {
        struct Prompts;

        /// What a list holds.
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a text, a token or a list of tokens")]
        enum Item {
            Text(String),
            Token(TokenId),
            Tokens(Vec<TokenId>),
        }

        impl<'de> Visitor<'de> for Prompts {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of strings, a list of tokens or a list of these")
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Prompt, E> {
                Prompt::Text(text).checked()
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
                self.visit_string(text.to_owned())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompt, A::Error> {
                let mixed = || A::Error::custom("texts, tokens and lists of tokens do not mix");
                let mut prompt = match items.next_element()? {
                    None => return Err(A::Error::invalid_length(0, &"at least one item")),
                    Some(Item::Text(text)) => Prompt::Texts(vec![text]),
                    Some(Item::Token(token)) => Prompt::Tokens(vec![token]),
                    Some(Item::Tokens(tokens)) => Prompt::TokenLists(vec![tokens]),
                };
                while let Some(item) = items.next_element()? {
                    match (&mut prompt, item) {
                        (Prompt::Texts(texts), Item::Text(text)) => texts.push(text),
                        (Prompt::Tokens(tokens), Item::Token(token)) => tokens.push(token),
                        (Prompt::TokenLists(lists), Item::Tokens(tokens)) => lists.push(tokens),
                        _ => return Err(mixed()),
                    }
                    let num_prompts = match &prompt {
                        Prompt::Texts(texts) => texts.len(),
                        Prompt::TokenLists(lists) => lists.len(),
                        Prompt::Text(_) | Prompt::Tokens(_) => 1,
                    };
                    if num_prompts > PROMPTS_MAX {
                        return Err(A::Error::custom(format!("more than {PROMPTS_MAX} prompts")));
                    }
                }
                prompt.checked()
            }
        }

        deserializer.deserialize_any(Prompts)
    }
}

impl PartialSchema for Prompt {
    fn schema() -> RefOr<Schema> {
        let array = |items: RefOr<Schema>| ArrayBuilder::new().items(items).min_items(Some(1));
        let text = || string().min_length(Some(1));
        let tokens = || array(Ref::from_schema_name("TokenId").into());
        one_of("A text, a list of tokens, or several of either.")
            .item(text())
            .item(tokens())
            .item(array(text().into()).max_items(Some(PROMPTS_MAX)))
            .item(array(tokens().into()).max_items(Some(PROMPTS_MAX)))
            .into()
    }
}

impl ToSchema for Prompt {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push(("TokenId".to_owned(), TokenId::schema()));
    }
}

pub(super) fn string() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(SchemaType::new(Type::String))
}

pub(super) fn one_of(doc: &str) -> OneOfBuilder {
    OneOfBuilder::new().description(Some(doc))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn stops_are_one_or_several() {
        let check = |value: Value, expect: &[&str]| {
            assert_eq!(read::<Stop>(value).unwrap().0, expect);
        };
        check(json!("a"), &["a"]);
        check(json!([]), &[]);
        check(json!(["a", "b"]), &["a", "b"]);
        check(json!("ä".repeat(256)), &[&"ä".repeat(256)]);
        for value in [
            json!(""),
            json!([""]),
            json!("a".repeat(257)),
            json!(["a", "b", "c", "d", "e"]),
            json!(1),
            json!([1]),
            json!(null),
            json!({}),
        ] {
            assert!(read::<Stop>(value.clone()).is_err(), "{value}");
        }
    }

    #[test]
    fn contents_are_whole_or_in_parts() {
        let part = |text: &str| json!({"type": "text", "text": text});
        assert_eq!(read(json!("a")), Ok(Content("a".to_owned())));
        assert_eq!(read(json!([part("a"), part("b")])), Ok(Content("ab".to_owned())));
        for value in [
            json!([]),
            json!(["a"]),
            json!(1),
            json!({"type": "text", "text": "a"}),
            json!([{"type": "text"}]),
            json!([{"type": "text", "text": "a", "x": 1}]),
        ] {
            assert!(read::<Content>(value.clone()).is_err(), "{value}");
        }
        let image = json!([{"type": "image_url", "image_url": {"url": "http://a"}}]);
        let error = read::<Content>(image).unwrap_err();
        assert!(error.contains("image_url"), "{error}");
    }

    #[test]
    fn prompts_are_texts_or_tokens() {
        let lens = |value: Value| match read::<Prompt>(value).unwrap() {
            Prompt::Text(text) => vec![text.len()],
            Prompt::Tokens(tokens) => vec![tokens.len()],
            Prompt::Texts(texts) => texts.iter().map(String::len).collect(),
            Prompt::TokenLists(lists) => lists.iter().map(Vec::len).collect(),
        };
        assert_eq!(lens(json!("abc")), [3]);
        assert_eq!(lens(json!(["abc", "d"])), [3, 1]);
        assert_eq!(lens(json!([1, 2])), [2]);
        assert_eq!(lens(json!([[1, 2], [3]])), [2, 1]);
        for value in [
            json!(""),
            json!(["a", ""]),
            json!([]),
            json!([[]]),
            json!(["a", 1]),
            json!([1, "a"]),
            json!([1, [1]]),
            json!([-1]),
            json!([1.5]),
            json!(1),
            json!(null),
            json!([[["a"]]]),
            json!(vec!["a"; 65]),
        ] {
            assert!(read::<Prompt>(value.clone()).is_err(), "{value}");
        }
    }
}
