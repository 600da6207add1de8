//! Messages of the API to messages of chat templates.

use serde_json::{Map, Value, json};

use super::openai::chat::{GivenToolCall, Message, Tool};
use crate::tokenizer::chat;

/// Whether the chat template knows of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tools {
    InTemplate,
    /// Tools are described, calls and results written, in the text of messages, as Hermes models
    /// learned it.
    InText,
}

/// The messages that the template is given.
pub(super) fn template_messages(
    messages: &[Message],
    tools: &[Tool],
    by: Tools,
) -> Vec<chat::Message> {
    let mut out: Vec<_> = messages.iter().map(|message| template_message(message, by)).collect();
    if by == Tools::InText && !tools.is_empty() {
        let text = description(tools);
        match out.first_mut() {
            Some(first) if first.role == "system" => {
                first.content = format!("{}\n\n{text}", first.content);
            }
            _ => out.insert(0, chat::Message::new("system", text)),
        }
    }
    out
}

/// The tools as chat templates expect them; null where there are none.
pub(super) fn template_tools(tools: &[Tool]) -> Value {
    match tools.is_empty() {
        true => Value::Null,
        // NOTE: names and schemas are JSON already.
        false => serde_json::to_value(tools).unwrap_or_default(),
    }
}

fn template_message(message: &Message, by: Tools) -> chat::Message {
    let new = |role: &str, content: &str, name: &Option<String>| {
        let mut message = chat::Message::new(role, content);
        insert(&mut message.rest, "name", name);
        message
    };
    match message {
        Message::System { content, name } | Message::Developer { content, name } => {
            new("system", &content.0, name)
        }
        Message::User { content, name } => new("user", &content.0, name),
        Message::Tool { content, tool_call_id } => match by {
            Tools::InText => {
                let text = format!("<tool_response>\n{}\n</tool_response>", content.0);
                chat::Message::new("user", text)
            }
            Tools::InTemplate => {
                let mut message = chat::Message::new("tool", content.0.as_str());
                insert(&mut message.rest, "tool_call_id", &Some(tool_call_id.clone()));
                message
            }
        },
        Message::Assistant { content, name, refusal, reasoning_content, tool_calls } => {
            let text = content.as_ref().map(|content| content.0.as_str());
            let text = text.or(refusal.as_deref()).unwrap_or_default();
            let mut message = new("assistant", text, name);
            insert(&mut message.rest, "reasoning_content", reasoning_content);
            let calls = tool_calls.as_deref().unwrap_or_default();
            match by {
                Tools::InTemplate if calls.is_empty() => {}
                Tools::InTemplate => {
                    let calls = calls.iter().map(template_call).collect();
                    message.rest.insert("tool_calls".to_owned(), calls);
                }
                Tools::InText => calls.iter().for_each(|call| append(&mut message.content, call)),
            }
            message
        }
    }
}

fn insert(rest: &mut Map<String, Value>, key: &str, value: &Option<String>) {
    if let Some(value) = value {
        rest.insert(key.to_owned(), value.as_str().into());
    }
}

/// Templates write arguments as JSON, so that they want them as values and not as JSON text. Text
/// that is no object is left as the model wrote it.
fn arguments(call: &GivenToolCall) -> Value {
    let text = &call.function.arguments;
    match serde_json::from_str(text) {
        Ok(Value::Object(arguments)) => Value::Object(arguments),
        _ => text.as_str().into(),
    }
}

fn template_call(call: &GivenToolCall) -> Value {
    json!({
        "id": call.id,
        "type": "function",
        "function": { "name": call.function.name, "arguments": arguments(call) },
    })
}

fn append(content: &mut String, call: &GivenToolCall) {
    if !content.is_empty() {
        content.push('\n');
    }
    let call = json!({ "name": call.function.name, "arguments": arguments(call) });
    content.push_str(&format!("<tool_call>\n{call}\n</tool_call>"));
}

/// What a model is told of its tools whose template does not.
fn description(tools: &[Tool]) -> String {
    let mut text = "You can call these functions. Each line describes one as JSON:\n".to_owned();
    for tool in tools {
        let function = serde_json::to_string(&tool.function).unwrap_or_default();
        text.push_str(&function);
        text.push('\n');
    }
    text.push_str(
        "To call a function, answer with its name and its arguments as JSON:\n\
         <tool_call>\n{\"name\": \"NAME\", \"arguments\": {…}}\n</tool_call>",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Vec<Message> {
        serde_json::from_value(value).expect("messages")
    }

    fn conversation() -> Vec<Message> {
        read(json!([
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Wea"},
                {"type": "text", "text": "ther?"}], "name": "Ann"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
                "function": {"name": "weather", "arguments": "{\"at\": \"Rome\"}"}}]},
            {"role": "tool", "content": "sun", "tool_call_id": "c1"},
        ]))
    }

    fn tools() -> Vec<Tool> {
        let tool = json!({"type": "function", "function": {"name": "weather", "strict": true,
            "parameters": {"type": "object"}}});
        serde_json::from_value(json!([tool])).expect("a tool")
    }

    #[test]
    fn templates_that_know_tools_get_them_as_values() {
        let messages = template_messages(&conversation(), &tools(), Tools::InTemplate);
        assert_eq!(
            serde_json::to_value(&messages).unwrap(),
            json!([
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather?", "name": "Ann"},
                {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function",
                    "function": {"name": "weather", "arguments": {"at": "Rome"}}}]},
                {"role": "tool", "content": "sun", "tool_call_id": "c1"},
            ])
        );
        assert_eq!(
            template_tools(&tools()),
            json!([{"type": "function", "function": {"name": "weather",
                "parameters": {"type": "object"}}}])
        );
        assert_eq!(template_tools(&[]), Value::Null);
    }

    #[test]
    fn others_read_of_them_in_the_text() {
        let messages = template_messages(&conversation(), &tools(), Tools::InText);
        let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
        assert!(messages[0].content.starts_with("Be brief.\n\nYou can call"));
        assert!(
            messages[0].content.contains(r#"{"name":"weather","parameters":{"type":"object"}}"#)
        );
        assert_eq!(
            messages[2].content,
            "<tool_call>\n{\"name\":\"weather\",\"arguments\":{\"at\":\"Rome\"}}\n</tool_call>"
        );
        assert_eq!(messages[3].content, "<tool_response>\nsun\n</tool_response>");
        let alone = template_messages(&conversation()[1..2], &tools(), Tools::InText);
        assert_eq!((alone[0].role.as_str(), alone.len()), ("system", 2));
    }
}
