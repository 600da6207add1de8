//! One tool call in JSON, read while it arrives.

/// Names of the member that holds the arguments, in one or another format.
const ARGUMENTS: [&str; 2] = ["arguments", "parameters"];

/// Deepest nesting of arguments; what is deeper is no call.
const DEPTH_MAX: usize = 64;

/// Longest name of a tool or member, in bytes.
const NAME_BYTES_MAX: usize = 256;

/// Reads an object with the members `name` and `arguments`, up to its closing brace.
#[derive(Debug, Default)]
pub(super) struct CallReader {
    place: Place,
    /// The JSON text of the key or value at hand.
    text: String,
    key: String,
    name: Option<String>,
    /// The JSON text of the arguments so far, or the whole of them.
    arguments: Option<String>,
}

/// What comes next.
#[derive(Debug, Default, PartialEq)]
enum Place {
    #[default]
    Start,
    /// A key, or the end of an object without members.
    FirstKey,
    Key,
    InKey(Escape),
    Colon,
    Value,
    InString(Escape),
    /// Within an object or array.
    InNested {
        /// The brackets that are open.
        open: Vec<char>,
        string: Option<Escape>,
    },
    /// Within a number or a name such as `true`.
    InScalar,
    Comma,
    End,
}

/// Whether a character of a string follows a backslash.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Escape {
    No,
    Yes,
}

/// How a character fits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    More,
    /// The object ended with this character.
    End,
    /// The text is no call. The reader can only be dropped.
    Malformed,
}

impl Escape {
    /// Takes a character of a string; `None` behind its end.
    fn next(self, char: char) -> Option<Escape> {
        match (self, char) {
            (Escape::Yes, _) => Some(Escape::No),
            (Escape::No, '\\') => Some(Escape::Yes),
            (Escape::No, '"') => None,
            (Escape::No, _) => Some(Escape::No),
        }
    }
}

impl CallReader {
    /// The tool's name, once it is there.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The JSON text of the arguments as far as it has come.
    pub(super) fn arguments(&self) -> Option<&str> {
        match (&self.arguments, &self.place) {
            (Some(arguments), _) => Some(arguments),
            // NOTE: no list is announced as arguments.
            (None, Place::InNested { .. }) if self.is_at_arguments() => {
                self.text.starts_with('{').then_some(&self.text)
            }
            _ => None,
        }
    }

    pub(super) fn push(&mut self, char: char) -> Fit {
        let is_space = matches!(char, ' ' | '\n' | '\r' | '\t');
        match &mut self.place {
            Place::Start if char == '{' => self.place = Place::FirstKey,
            Place::FirstKey | Place::Key if char == '"' => {
                self.begin(Place::InKey(Escape::No), char)
            }
            Place::InKey(escape) => {
                self.text.push(char);
                match escape.next(char) {
                    Some(next) => *escape = next,
                    None => return self.end_key(),
                }
            }
            Place::Colon if char == ':' => self.place = Place::Value,
            Place::Value if char == '"' => self.begin(Place::InString(Escape::No), char),
            Place::Value if matches!(char, '{' | '[') => {
                self.begin(Place::InNested { open: vec![char], string: None }, char);
            }
            Place::Value if char == '-' || char.is_ascii_alphanumeric() => {
                self.begin(Place::InScalar, char);
            }
            Place::InString(escape) => {
                self.text.push(char);
                match escape.next(char) {
                    Some(next) => *escape = next,
                    None => return self.end_value(),
                }
            }
            Place::InNested { .. } => return self.push_nested(char),
            Place::InScalar if matches!(char, ',' | '}') || is_space => match self.end_value() {
                Fit::More => return self.push(char),
                fit => return fit,
            },
            Place::InScalar if char.is_ascii_alphanumeric() || "+-.".contains(char) => {
                self.text.push(char);
            }
            Place::Comma if char == ',' => self.place = Place::Key,
            Place::Comma | Place::FirstKey if char == '}' => return self.end(),
            Place::Start
            | Place::FirstKey
            | Place::Key
            | Place::Colon
            | Place::Value
            | Place::Comma
                if is_space => {}
            _ => return Fit::Malformed,
        }
        self.check_len()
    }

    fn push_nested(&mut self, char: char) -> Fit {
        let Place::InNested { open, string } = &mut self.place else { return Fit::Malformed };
        self.text.push(char);
        if let Some(escape) = string {
            *string = escape.next(char);
            return Fit::More;
        }
        match char {
            '"' => *string = Some(Escape::No),
            '{' | '[' if open.len() == DEPTH_MAX => return Fit::Malformed,
            '{' | '[' => open.push(char),
            '}' | ']' => {
                let expected = if char == '}' { '{' } else { '[' };
                if open.pop() != Some(expected) {
                    return Fit::Malformed;
                }
                if open.is_empty() {
                    return self.end_value();
                }
            }
            _ => {}
        }
        Fit::More
    }

    fn begin(&mut self, place: Place, char: char) {
        self.place = place;
        self.text.clear();
        self.text.push(char);
    }

    /// Bounds what is held back, which the arguments are not once the name is known.
    fn check_len(&self) -> Fit {
        let is_held = matches!(self.place, Place::InKey(_) | Place::InScalar)
            || (matches!(self.place, Place::InString(_)) && self.key == "name");
        match is_held && self.text.len() > NAME_BYTES_MAX {
            true => Fit::Malformed,
            false => Fit::More,
        }
    }

    fn is_at_arguments(&self) -> bool {
        ARGUMENTS.contains(&self.key.as_str())
    }

    fn end_key(&mut self) -> Fit {
        let Ok(key) = serde_json::from_str(&self.text) else { return Fit::Malformed };
        self.key = key;
        self.place = Place::Colon;
        Fit::More
    }

    fn end_value(&mut self) -> Fit {
        self.place = Place::Comma;
        if self.key == "name" && self.name.is_none() {
            let Ok(name) = serde_json::from_str(&self.text) else { return Fit::Malformed };
            self.name = Some(name);
        } else if self.is_at_arguments() && self.arguments.is_none() {
            // Some models write the arguments' text as a string.
            let arguments = match self.text.starts_with('"') {
                true => serde_json::from_str(&self.text).ok(),
                false => Some(std::mem::take(&mut self.text)),
            };
            match arguments {
                Some(arguments) if arguments.starts_with('{') => self.arguments = Some(arguments),
                _ => return Fit::Malformed,
            }
        }
        Fit::More
    }

    fn end(&mut self) -> Fit {
        self.place = Place::End;
        if self.name.is_none() {
            return Fit::Malformed;
        }
        // A tool without parameters needs no arguments.
        self.arguments.get_or_insert_with(|| "{}".to_owned());
        Fit::End
    }
}
