//! What a line that was typed means: a message, or a command.

use anyhow::{bail, ensure};

/// A line, or several that belong together.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Input {
    Nothing,
    Message(String),
    Command(Command),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    Help,
    Exit,
    Reset,
    Regen,
    Undo,
    Stats,
    /// Sets the system prompt; shows it where there is no text.
    System(Option<String>),
    /// Sets an option; shows all where there is none.
    Set(Option<(String, String)>),
    Save(String),
    Load(String),
}

/// Begins and ends a message of several lines.
const FENCE: &str = "\"\"\"";

pub(super) const HELP: &str = "\
/help               this text
/reset              forget the conversation; the system prompt stays
/undo               take the last message and its answer back
/regen              answer the last message anew
/system [TEXT]      show or set the system prompt; \"\" removes it
/set [NAME VALUE]   show or set an option: temperature, top-p, top-k, min-p, repetition-penalty,
                    presence-penalty, frequency-penalty, seed, max-tokens
/save FILE          write the conversation as JSON, which `generate --messages` reads as well
/load FILE          go on with the conversation of a file
/stats              tokens and times
/exit               end, as Ctrl-D does

A line that ends with \\ goes on in the next one, as does Alt-Enter; \"\"\" begins and ends a
message of several lines. //text sends /text. Ctrl-C stops an answer, and clears the line at the
prompt.
";

/// Names of the commands, for completion.
pub(super) const NAMES: [&str; 10] =
    ["/exit", "/help", "/load", "/regen", "/reset", "/save", "/set", "/stats", "/system", "/undo"];

/// Whether no further line belongs to `text`.
pub(super) fn is_complete(text: &str) -> bool {
    let is_fenced = text.starts_with(FENCE) || text.starts_with('/');
    let is_open = is_fenced && text.matches(FENCE).count() % 2 == 1;
    !is_open && !text.ends_with('\\')
}

/// Reads what [`is_complete`] accepted, or what was left when the input ended.
pub(super) fn parse(text: &str) -> anyhow::Result<Input> {
    let text = text.trim();
    if let Some(rest) = text.strip_prefix("//") {
        return Ok(Input::Message(format!("/{}", unwrap(rest))));
    }
    let Some(line) = text.strip_prefix('/') else {
        let message = unwrap(text);
        return Ok(match message.trim().is_empty() {
            true => Input::Nothing,
            false => Input::Message(message),
        });
    };
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    command(name, rest.trim()).map(Input::Command)
}

fn command(name: &str, rest: &str) -> anyhow::Result<Command> {
    let command = match name {
        "help" | "?" => Command::Help,
        "exit" | "quit" | "bye" => Command::Exit,
        "reset" | "clear" => Command::Reset,
        "regen" => Command::Regen,
        "undo" => Command::Undo,
        "stats" => Command::Stats,
        "system" => {
            return Ok(Command::System((!rest.is_empty()).then(|| match rest {
                "\"\"" => String::new(),
                text => unwrap(text),
            })));
        }
        "set" if rest.is_empty() => return Ok(Command::Set(None)),
        "set" => {
            let Some((name, value)) = rest.split_once(char::is_whitespace) else {
                bail!("/set {rest}: the value is missing, as in /set temperature 0.7");
            };
            return Ok(Command::Set(Some((name.to_owned(), value.trim().to_owned()))));
        }
        "save" | "load" => {
            ensure!(!rest.is_empty(), "/{name} needs the name of a file");
            let path = rest.to_owned();
            return Ok(if name == "save" { Command::Save(path) } else { Command::Load(path) });
        }
        _ => bail!("there is no command /{name}; /help lists them, //{name} sends it as text"),
    };
    ensure!(rest.is_empty(), "/{name} takes nothing after it, got '{rest}'");
    Ok(command)
}

/// The text without the marks of several lines.
fn unwrap(text: &str) -> String {
    let fenced = text.strip_prefix(FENCE);
    if let Some(inner) = fenced {
        let inner = inner.strip_suffix(FENCE).unwrap_or(inner);
        let inner = inner.strip_prefix('\n').unwrap_or(inner);
        return inner.strip_suffix('\n').unwrap_or(inner).to_owned();
    }
    let text = text.replace("\\\n", "\n");
    text.strip_suffix('\\').unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Input) {
        assert_eq!(parse(text).unwrap(), expected, "{text:?}");
    }

    fn message(text: &str) -> Input {
        Input::Message(text.to_owned())
    }

    #[test]
    fn lines_that_go_on_are_known() {
        for text in ["", "hi", "/help", "a \"\"\" b", "\"\"\"a\nb\"\"\"", "/system \"\"\"a\n\"\"\""]
        {
            assert!(is_complete(text), "{text:?}");
        }
        for text in ["a\\", "a\\\nb\\", "\"\"\"", "\"\"\"a\nb", "/system \"\"\"a"] {
            assert!(!is_complete(text), "{text:?}");
        }
    }

    #[test]
    fn messages_lose_their_marks() {
        check("  ", Input::Nothing);
        check("\"\"\"\n\"\"\"", Input::Nothing);
        check(" hello ", message("hello"));
        check("a\\\nb\\\n c", message("a\nb\n c"));
        check("a\\", message("a"));
        check("\"\"\"\n a\n\nb\n\"\"\"", message(" a\n\nb"));
        check("\"\"\"a", message("a"));
        check("//etc is", message("/etc is"));
    }

    #[test]
    fn commands_are_read() {
        let check = |text: &str, command| check(text, Input::Command(command));
        check("/help", Command::Help);
        check("/quit ", Command::Exit);
        check("/system", Command::System(None));
        check("/system Be  brief.", Command::System(Some("Be  brief.".to_owned())));
        check("/system \"\"", Command::System(Some(String::new())));
        check("/system \"\"\"a\nb\"\"\"", Command::System(Some("a\nb".to_owned())));
        check("/set", Command::Set(None));
        check("/set top-p  0.5", Command::Set(Some(("top-p".to_owned(), "0.5".to_owned()))));
        check("/save a b.json", Command::Save("a b.json".to_owned()));
        for (text, expected) in [
            ("/tmp/x", "there is no command /tmp/x"),
            ("/set top-p", "the value is missing"),
            ("/save", "/save needs the name of a file"),
            ("/undo 2", "/undo takes nothing after it, got '2'"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn help_names_every_command() {
        assert!(NAMES.iter().all(|name| HELP.contains(name)) && NAMES.is_sorted());
        for name in NAMES {
            let known = parse(name).map_or_else(|error| error.to_string(), |_| String::new());
            assert!(!known.contains("there is no command"), "{known}");
        }
    }
}
