//! Bounds on grammars, checked before anything is made of them: those who read them recurse.

use std::io;

use serde_json::Value;

use super::{GrammarSpec, options};
use crate::error::Error;

/// Largest JSON schema, as text without white space.
pub const SCHEMA_BYTES_MAX: usize = 64 << 10;
/// Deepest nesting of objects and arrays in a schema.
pub const SCHEMA_DEPTH_MAX: usize = 32;
/// Most values in a schema.
pub const SCHEMA_NODES_MAX: usize = 4096;
/// Longest regular expression, also within a schema or Lark grammar.
pub const REGEX_BYTES_MAX: usize = 4 << 10;
/// Longest Lark grammar.
pub const LARK_BYTES_MAX: usize = 64 << 10;
/// Deepest nesting of brackets in a regular expression or Lark grammar.
pub const NESTING_MAX: usize = 64;
/// Most definitions in a Lark grammar.
pub const LARK_DEFINITIONS_MAX: usize = 1024;

/// Largest count that a schema may ask for, and largest one of a repetition.
pub const COUNT_MAX: u64 = 1 << 14;

/// Most patterns of property names in a schema: all are compared with each other.
pub const PATTERN_PROPERTIES_MAX: usize = 32;
/// Largest `multipleOf`, in units of its last digit: it takes as many states.
pub const MULTIPLE_OF_MAX: f64 = 1e4;

/// What a value in a schema is.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Schema,
    /// Schemas by names of the user's own.
    Named,
    /// Schemas by regular expressions.
    Patterned,
    /// Something that is only compared, or not looked at.
    Data,
}

/// Refuses with [`Error::Request`] what is too large or too deep to compile.
pub(super) fn check(spec: &GrammarSpec) -> Result<(), Error> {
    match spec {
        GrammarSpec::JsonObject => Ok(()),
        GrammarSpec::JsonSchema(schema) => check_schema(schema),
        GrammarSpec::Regex(regex) => check_regex(regex),
        GrammarSpec::Lark(grammar) => check_lark(grammar),
    }
}

fn refuse<T>(message: String) -> Result<T, Error> {
    Err(Error::Request(message))
}

fn check_schema(schema: &Value) -> Result<(), Error> {
    let (mut num_nodes, mut num_patterns) = (0, 0);
    let mut open = vec![(schema, Place::Schema, 1)];
    while let Some((value, place, depth)) = open.pop() {
        num_nodes += 1;
        if num_nodes > SCHEMA_NODES_MAX {
            return refuse(format!(
                "the JSON schema has more than {SCHEMA_NODES_MAX} values; make it smaller"
            ));
        }
        if depth > SCHEMA_DEPTH_MAX && (value.is_object() || value.is_array()) {
            return refuse(format!(
                "the JSON schema is nested deeper than {SCHEMA_DEPTH_MAX} levels; make it flatter"
            ));
        }
        match value {
            Value::Object(object) => {
                num_patterns += if place == Place::Patterned { object.len() } else { 0 };
                if num_patterns > PATTERN_PROPERTIES_MAX {
                    return refuse(format!(
                        "the JSON schema has more than {PATTERN_PROPERTIES_MAX} \
                         patternProperties; leave some out"
                    ));
                }
                for (key, value) in object {
                    let place = check_keyword(place, key, value)?;
                    open.push((value, place, depth + 1));
                }
            }
            Value::Array(items) => open.extend(items.iter().map(|item| (item, place, depth + 1))),
            _ => {}
        }
        if num_nodes + open.len() > 2 * SCHEMA_BYTES_MAX {
            return refuse_schema_bytes();
        }
    }
    // NOTE: no deeper than was just found, so that writing it may recurse.
    let mut text = Counter(0);
    match serde_json::to_writer(&mut text, schema) {
        Ok(()) => Ok(()),
        Err(_) => refuse_schema_bytes(),
    }
}

fn refuse_schema_bytes<T>() -> Result<T, Error> {
    refuse(format!("the JSON schema has more than {SCHEMA_BYTES_MAX} bytes; make it smaller"))
}

/// Says what the value of a key is, and refuses a keyword that asks for too much.
fn check_keyword(place: Place, key: &str, value: &Value) -> Result<Place, Error> {
    match place {
        Place::Data => return Ok(Place::Data),
        Place::Named => return Ok(Place::Schema),
        Place::Patterned => return check_regex(key).map(|()| Place::Schema),
        Place::Schema => {}
    }
    match key {
        "const" | "enum" | "default" | "examples" => return Ok(Place::Data),
        "properties" | "$defs" | "definitions" => return Ok(Place::Named),
        "patternProperties" => return Ok(Place::Patterned),
        "pattern" => value.as_str().map_or(Ok(()), check_regex)?,
        "minItems" | "maxItems" | "minLength" | "maxLength" | "minProperties" | "maxProperties"
            if value.as_f64().is_some_and(|count| count > COUNT_MAX as f64) =>
        {
            return refuse(format!(
                "the JSON schema has {key} {value}; the largest count is {COUNT_MAX}"
            ));
        }
        "multipleOf" if value.as_f64().is_some_and(|step| digits(step) > MULTIPLE_OF_MAX) => {
            return refuse(format!(
                "the JSON schema has multipleOf {value}; it must have at most 4 digits"
            ));
        }
        // Options of the compiler, which are not the user's to change.
        "x-guidance" if *value != options() => {
            return refuse("the JSON schema has the keyword x-guidance; leave it out".to_owned());
        }
        _ => {}
    }
    Ok(Place::Schema)
}

/// `step` in units of its last decimal digit.
fn digits(step: f64) -> f64 {
    let text = format!("{:e}", step.abs());
    let digits: String = text.chars().take_while(|c| *c != 'e').filter(|c| *c != '.').collect();
    let whole = digits.parse().unwrap_or(f64::INFINITY);
    whole.max(step.abs())
}

fn check_regex(regex: &str) -> Result<(), Error> {
    if regex.len() > REGEX_BYTES_MAX {
        return refuse(format!(
            "a regular expression has {} bytes, the limit is {REGEX_BYTES_MAX}",
            regex.len()
        ));
    }
    let (mut num_groups, mut num_classes) = (0, 0);
    let mut chars = regex.chars();
    while let Some(char) = chars.next() {
        match char {
            // The next character stands for itself.
            '\\' if chars.next().is_some() => {}
            '\\' => return refuse("a regular expression ends with a lone \\".to_owned()),
            '[' => num_classes += 1,
            ']' if num_classes > 0 => num_classes -= 1,
            '(' if num_classes == 0 => num_groups += 1,
            ')' if num_classes == 0 => num_groups -= 1,
            _ => {}
        }
        if num_groups + num_classes > NESTING_MAX as i64 {
            return refuse_nesting("a regular expression");
        }
    }
    Ok(())
}

fn refuse_nesting<T>(what: &str) -> Result<T, Error> {
    refuse(format!("{what} is nested deeper than {NESTING_MAX} levels; make it flatter"))
}

/// Follows just as much of the syntax as it takes to know which brackets nest.
fn check_lark(grammar: &str) -> Result<(), Error> {
    if grammar.len() > LARK_BYTES_MAX {
        return refuse(format!(
            "the Lark grammar has {} bytes, the limit is {LARK_BYTES_MAX}",
            grammar.len()
        ));
    }
    let (mut depth, mut num_definitions) = (0_i64, 0);
    let mut rest = grammar;
    while let Some(char) = rest.chars().next() {
        let mut len = char.len_utf8();
        match char {
            '"' => len = quoted_len(rest, '"')?,
            '/' if rest.starts_with("//") => len = line_len(rest),
            '#' => len = line_len(rest),
            '/' => {
                len = quoted_len(rest, '/')?;
                check_regex(&rest[1..len - 1])?;
            }
            '%' if rest.starts_with("%json") => len = check_inner_schema(rest)?,
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ':' => num_definitions += 1,
            _ => {}
        }
        if depth > NESTING_MAX as i64 {
            return refuse_nesting("the Lark grammar");
        }
        if num_definitions > LARK_DEFINITIONS_MAX {
            return refuse(format!(
                "the Lark grammar has more than {LARK_DEFINITIONS_MAX} definitions"
            ));
        }
        rest = &rest[len..];
    }
    Ok(())
}

/// Bytes up to the end of the line.
fn line_len(text: &str) -> usize {
    text.find('\n').unwrap_or(text.len())
}

/// Bytes of a literal with its marks. Literals end within their line.
fn quoted_len(text: &str, mark: char) -> Result<usize, Error> {
    let mut chars = text.char_indices().skip(1);
    while let Some((idx, char)) = chars.next() {
        match char {
            '\\' => drop(chars.next()),
            '\n' => break,
            _ if char == mark => return Ok(idx + char.len_utf8()),
            _ => {}
        }
    }
    let line = &text[..line_len(text)];
    let start: String = line.chars().take(40).collect();
    refuse(format!("the Lark grammar has a literal without an end: {start}"))
}

/// Checks the schema behind `%json`; returns the bytes of both.
fn check_inner_schema(text: &str) -> Result<usize, Error> {
    let keyword = "%json".len();
    let mut schemas = serde_json::Deserializer::from_str(&text[keyword..]).into_iter::<Value>();
    match schemas.next() {
        Some(Ok(schema)) => {
            check_schema(&schema)?;
            Ok(keyword + schemas.byte_offset())
        }
        Some(Err(error)) => refuse(format!("the Lark grammar has %json without JSON: {error}")),
        None => refuse("the Lark grammar has %json without a schema behind it".to_owned()),
    }
}

/// Takes at most [`SCHEMA_BYTES_MAX`] bytes.
struct Counter(usize);

impl io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        match self.0 > SCHEMA_BYTES_MAX {
            true => Err(io::ErrorKind::FileTooLarge.into()),
            false => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
