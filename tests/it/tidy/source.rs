//! Reading Rust text without a parser: enough to count lines of functions and to find names.

/// A Rust file, and its code alone.
pub(crate) struct Source {
    /// Relative to the repository root, with `/`.
    pub(crate) path: String,
    pub(crate) text: String,
    /// `text` with comments, strings and characters blanked; every line and column stays in place.
    pub(crate) code: String,
}

/// A name that code uses, as a path of identifiers.
#[derive(Debug, PartialEq)]
pub(crate) struct NamedPath {
    /// From 1.
    pub(crate) line: usize,
    pub(crate) path: String,
}

/// A function and the lines from its `fn` to its closing brace.
#[derive(Debug, PartialEq)]
pub(crate) struct Function {
    /// Of `fn`, from 1.
    pub(crate) line: usize,
    pub(crate) name: String,
    pub(crate) num_lines: usize,
}

impl Source {
    pub(crate) fn new(path: String, text: String) -> Source {
        let code = code_only(&text);
        Source { path, text, code }
    }

    /// The code without its `#[cfg(test)]` modules and without what `quote!` will emit elsewhere.
    pub(crate) fn own_code(&self) -> String {
        let mut code: Vec<char> = self.code.chars().collect();
        for start in find_word(&code, "cfg") {
            if code[start..].iter().take(9).collect::<String>() == "cfg(test)" {
                blank_block(&mut code, start);
            }
        }
        for start in find_word(&code, "quote") {
            if code.get(start + 5) == Some(&'!') {
                blank_block(&mut code, start);
            }
        }
        code.into_iter().collect()
    }
}

/// Blanks comments, strings and characters.
pub(crate) fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// Where the comment, string or character that starts at `at` ends; `at` itself if none does.
fn literal_end(chars: &[char], at: usize) -> usize {
    match (chars[at], chars.get(at + 1)) {
        ('/', Some('/')) => find_from(chars, at, |c| c == '\n'),
        ('/', Some('*')) => block_comment_end(chars, at),
        ('"', _) => string_end(chars, at),
        ('r', Some('"' | '#')) if !is_identifier_end(chars, at) => raw_string_end(chars, at),
        ('b' | 'c', Some('r')) if !is_identifier_end(chars, at) => {
            match raw_string_end(chars, at + 1) {
                end if end == at + 1 => at,
                end => end,
            }
        }
        ('\'', Some('\\')) => find_from(chars, at + 3, |c| c == '\'') + 1,
        ('\'', Some(_)) if chars.get(at + 2) == Some(&'\'') => at + 3,
        _ => at,
    }
}

fn find_from(chars: &[char], from: usize, wanted: impl Fn(char) -> bool) -> usize {
    (from..chars.len()).find(|idx| wanted(chars[*idx])).unwrap_or(chars.len())
}

/// Block comments nest.
fn block_comment_end(chars: &[char], at: usize) -> usize {
    let mut depth = 0;
    let mut idx = at;
    while idx + 1 < chars.len() {
        match (chars[idx], chars[idx + 1]) {
            ('/', '*') => (depth, idx) = (depth + 1, idx + 2),
            ('*', '/') => (depth, idx) = (depth - 1, idx + 2),
            _ => idx += 1,
        }
        if depth == 0 {
            return idx;
        }
    }
    chars.len()
}

fn string_end(chars: &[char], at: usize) -> usize {
    let mut idx = at + 1;
    while idx < chars.len() && chars[idx] != '"' {
        idx += if chars[idx] == '\\' { 2 } else { 1 };
    }
    (idx + 1).min(chars.len())
}

/// `at` is the `r`; returned as it is if no string follows (`r#type`).
fn raw_string_end(chars: &[char], at: usize) -> usize {
    let quote = find_from(chars, at + 1, |c| c != '#');
    if chars.get(quote) != Some(&'"') {
        return at;
    }
    let num_hashes = quote - at - 1;
    let closes = |idx: usize| {
        chars[idx] == '"'
            && chars[idx + 1..].iter().take(num_hashes).filter(|c| **c == '#').count() == num_hashes
    };
    match (quote + 1..chars.len()).find(|idx| closes(*idx)) {
        Some(idx) => idx + 1 + num_hashes,
        None => chars.len(),
    }
}

fn is_identifier(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether the character before `at` belongs to the same identifier.
fn is_identifier_end(chars: &[char], at: usize) -> bool {
    at > 0 && is_identifier(chars[at - 1])
}

/// Where `word` stands as a whole identifier.
fn find_word(code: &[char], word: &str) -> Vec<usize> {
    let word: Vec<char> = word.chars().collect();
    let mut found = Vec::new();
    for at in 0..code.len() {
        let whole = code[at..].starts_with(&word)
            && !is_identifier_end(code, at)
            && !code.get(at + word.len()).is_some_and(|c| is_identifier(*c));
        if whole {
            found.push(at);
        }
    }
    found
}

/// Blanks from `from` to the end of the next `{…}` or to a `;` that comes before it.
fn blank_block(code: &mut [char], from: usize) {
    let end = item_end(code, from).end;
    for c in &mut code[from..end] {
        if *c != '\n' {
            *c = ' ';
        }
    }
}

/// Where an item ends, and whether it ended with a body.
struct ItemEnd {
    end: usize,
    has_body: bool,
}

/// The end of the next `{…}` outside parentheses and brackets, or of a `;` that comes before it.
fn item_end(code: &[char], from: usize) -> ItemEnd {
    let mut depth = 0;
    let mut has_body = false;
    for (idx, c) in code.iter().enumerate().skip(from) {
        match c {
            '(' | '[' if !has_body => depth += 1,
            ')' | ']' if !has_body => depth -= 1,
            ';' if !has_body && depth <= 0 => return ItemEnd { end: idx + 1, has_body },
            '{' if !has_body && depth <= 0 => (depth, has_body) = (1, true),
            '{' if has_body => depth += 1,
            '}' if has_body => depth -= 1,
            _ => {}
        }
        if has_body && depth == 0 {
            return ItemEnd { end: idx + 1, has_body };
        }
    }
    ItemEnd { end: code.len(), has_body: false }
}

fn line_of(code: &[char], at: usize) -> usize {
    1 + code[..at].iter().filter(|c| **c == '\n').count()
}

/// Every function with a body.
pub(crate) fn functions(code: &str) -> Vec<Function> {
    let code: Vec<char> = code.chars().collect();
    let mut functions = Vec::new();
    for at in find_word(&code, "fn") {
        let name_at = find_from(&code, at + 2, |c| !c.is_whitespace());
        let name: String = code[name_at..].iter().take_while(|c| is_identifier(**c)).collect();
        let ItemEnd { end, has_body } = item_end(&code, at);
        // `fn(…)` without a name is a type.
        if has_body && !name.is_empty() {
            let line = line_of(&code, at);
            functions.push(Function { line, name, num_lines: line_of(&code, end - 1) - line + 1 });
        }
    }
    functions
}

/// Lines (from 1) where `word` stands as a whole identifier, followed by `next` after spaces.
pub(crate) fn lines_with(code: &str, word: &str, next: &[&str]) -> Vec<usize> {
    let code: Vec<char> = code.chars().collect();
    let follows = |at: usize| {
        let rest_at = find_from(&code, at + word.chars().count(), |c| !c.is_whitespace());
        let rest: String = code[rest_at..].iter().take(16).collect();
        next.is_empty() || next.iter().any(|next| rest.starts_with(next))
    };
    find_word(&code, word)
        .into_iter()
        .filter(|at| follows(*at))
        .map(|at| line_of(&code, at))
        .collect()
}

/// Every path of two or more identifiers, the trees of `use` items spelled out.
pub(crate) fn named_paths(code: &str) -> Vec<NamedPath> {
    let mut paths = Vec::new();
    let mut prefixes: Vec<String> = Vec::new();
    let mut current = String::new();
    let mut line = 1;
    let mut chars = code.chars().peekable();
    while let Some(c) = chars.next() {
        if is_identifier(c) {
            current.push(c);
        } else if c == ':' && chars.peek() == Some(&':') {
            chars.next();
            current.push_str("::");
        } else if c == '{' && current.ends_with("::") {
            prefixes.push(std::mem::take(&mut current));
        } else {
            let is_named = !current.is_empty();
            let path = prefixes.concat() + &std::mem::take(&mut current);
            let path = path.trim_matches(':');
            if is_named && path.contains("::") {
                paths.push(NamedPath { line, path: path.to_owned() });
            }
            match c {
                '{' if !prefixes.is_empty() => prefixes.push(String::new()),
                '}' => drop(prefixes.pop()),
                ';' => prefixes.clear(),
                _ => {}
            }
        }
        line += usize::from(c == '\n');
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_comments_strings_and_characters_only() {
        let check = |text: &str, code: &str| assert_eq!(code_only(text), code, "{text}");
        check("a // b\nc", "a     \nc");
        check("a /* b /* c */ d\n */ e", "a               \n    e");
        check(r#"f("x \" } // y") + g"#, "f(             ) + g");
        check("r#\"a \" b\"# c", "           c");
        check("br\"a\\\" c", "       c");
        check("r#type", "r#type");
        check("'{' '\\'' &'a str", "         &'a str");
        check("'\\\\' '\\u{7b}' 'b", "              'b");
    }

    #[test]
    fn counts_lines_of_functions() {
        let check = |text: &str, expected: &[(usize, &str, usize)]| {
            let expected: Vec<Function> = expected
                .iter()
                .map(|(line, name, num_lines)| Function {
                    line: *line,
                    name: (*name).to_owned(),
                    num_lines: *num_lines,
                })
                .collect();
            assert_eq!(functions(&code_only(text)), expected, "{text}");
        };
        check("fn a() {}", &[(1, "a", 1)]);
        check("trait T {\n  fn a(x: [u8; 4]);\n  fn b() {\n  }\n}", &[(3, "b", 2)]);
        check("fn a(f: fn(u8)) {\n  // }\n  let s = \"}\";\n}", &[(1, "a", 4)]);
        check("fn a() {\n  fn b() {\n  }\n}", &[(1, "a", 4), (2, "b", 2)]);
        check("type F = unsafe fn(u8);\nfn_like!(x);", &[]);
    }

    #[test]
    fn spells_out_use_trees() {
        let check = |text: &str, expected: &[(usize, &str)]| {
            let expected: Vec<NamedPath> = expected
                .iter()
                .map(|(line, path)| NamedPath { line: *line, path: (*path).to_owned() })
                .collect();
            assert_eq!(named_paths(&code_only(text)), expected, "{text}");
        };
        check("use a::b;", &[(1, "a::b")]);
        check(
            "use std::{\n  env,\n  fs::{self, File},\n};",
            &[(2, "std::env"), (3, "std::fs::self"), (3, "std::fs::File")],
        );
        check("use a::b::*; c::<d::e>()", &[(1, "a::b"), (1, "d::e")]);
        check("x = a::b::c(d::e);\n{ f::g }", &[(1, "a::b::c"), (1, "d::e"), (2, "f::g")]);
    }

    #[test]
    fn own_code_leaves_out_tests_and_quoted_code() {
        let text = "#[cfg(test)]\nuse x::y;\nfn a() {}\n\
            #[cfg(test)]\nmod tests { fn b() {} }\nlet c = quote! { d::e };\n";
        let source = Source::new(String::new(), text.to_owned());
        let own = source.own_code();
        assert!(own.contains("fn a") && own.contains("let c"), "{own}");
        assert!(!own.contains("fn b") && !own.contains("d::e"), "{own}");
        assert!(!own.contains("x::y"), "{own}");
        assert_eq!(own.lines().count(), text.lines().count());
    }

    #[test]
    fn finds_words_by_what_follows() {
        let code = "unsafe fn(u8);\nunsafe  { }\nunsafe fn a() {}\nnot_unsafe {}";
        assert_eq!(lines_with(code, "unsafe", &["{", "fn "]), [2, 3]);
        assert_eq!(lines_with(code, "unsafe", &[]), [1, 2, 3]);
    }
}
