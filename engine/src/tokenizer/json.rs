//! JSON text as Python's `json.dumps` writes it: chat templates were made with it, and models are
//! sensitive to each space.

use serde_json::Value;

use super::prompt::MARKS;

/// Widest indentation of one level.
pub(super) const INDENT_MAX: usize = 16;

/// The arguments of `json.dumps`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) indent: Option<usize>,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
}

/// `value` as text.
pub(super) fn dump(value: &Value, style: Style) -> String {
    let mut out = String::new();
    write(value, style, 0, &mut out);
    out
}

fn write(value: &Value, style: Style, depth: usize, out: &mut String) {
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (idx, item) in items.iter().enumerate() {
                separate(idx, style, depth + 1, out);
                write(item, style, depth + 1, out);
            }
            close(']', style, depth, out);
        }
        Value::Object(object) if !object.is_empty() => {
            let mut entries: Vec<(&String, &Value)> = object.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(key, _)| *key);
            }
            out.push('{');
            for (idx, (key, item)) in entries.into_iter().enumerate() {
                separate(idx, style, depth + 1, out);
                write_string(key, style, out);
                out.push_str(": ");
                write(item, style, depth + 1, out);
            }
            close('}', style, depth, out);
        }
        Value::String(text) => write_string(text, style, out),
        other => out.push_str(&other.to_string()),
    }
}

fn separate(idx: usize, style: Style, depth: usize, out: &mut String) {
    match (style.indent, idx) {
        (None, 0) => {}
        (None, _) => out.push_str(", "),
        (Some(_), 0) => new_line(style, depth, out),
        (Some(_), _) => {
            out.push(',');
            new_line(style, depth, out);
        }
    }
}

fn close(bracket: char, style: Style, depth: usize, out: &mut String) {
    if style.indent.is_some() {
        new_line(style, depth, out);
    }
    out.push(bracket);
}

fn new_line(style: Style, depth: usize, out: &mut String) {
    out.push('\n');
    out.extend(std::iter::repeat_n(' ', style.indent.unwrap_or(0) * depth));
}

fn write_string(text: &str, style: Style, out: &mut String) {
    out.push('"');
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            char if char < ' ' => out.push_str(&format!("\\u{:04x}", char as u32)),
            // NOTE: marks have to be found again in the prompt.
            char if style.ensure_ascii && !char.is_ascii() && !MARKS.contains(&char) => {
                for unit in char.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            char => out.push(char),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(value: Value, style: Style, expect: &str) {
        assert_eq!(dump(&value, style), expect);
    }

    #[test]
    fn writes_what_python_writes() {
        let value =
            serde_json::json!({"b": [1, 2.5, null], "a": {"é<": "x\"\n🦀"}, "c": [], "d": {}});
        let plain = Style { indent: None, ensure_ascii: false, sort_keys: false };
        check(
            value.clone(),
            plain,
            "{\"b\": [1, 2.5, null], \"a\": {\"é<\": \"x\\\"\\n🦀\"}, \"c\": [], \"d\": {}}",
        );
        check(
            value.clone(),
            Style { ensure_ascii: true, sort_keys: true, ..plain },
            "{\"a\": {\"\\u00e9<\": \"x\\\"\\n\\ud83e\\udd80\"}, \"b\": [1, 2.5, null], \"c\": [], \
             \"d\": {}}",
        );
        check(
            serde_json::json!({"a": [1, {"b": true}]}),
            Style { indent: Some(2), ..plain },
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": true\n    }\n  ]\n}",
        );
    }
}
