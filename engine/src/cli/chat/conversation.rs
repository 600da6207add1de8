//! A conversation, and the tokens that the model sees of it.

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};

use crate::tokenizer::chat::Message;

/// Messages, of which the oldest may no longer fit the model's context.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Conversation {
    /// What the system prompt says; the template may have one of its own where it is `None`.
    pub(super) system: Option<String>,
    entries: Vec<Entry>,
    /// Entries at the beginning that the model no longer sees.
    num_dropped: usize,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    message: Message,
    generated: Option<Generated>,
}

/// The tokens that an answer came as.
///
/// The text of an answer may be written with other tokens than those that the model chose. Where
/// the tokens are put back, the keys and values of the whole conversation are found again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Generated {
    /// Tokens of the prompt that was answered.
    pub(super) prompt_len: usize,
    /// What the tokenizer makes of the text.
    pub(super) text_ids: Vec<u32>,
    /// What the model generated, without the token that ended it.
    pub(super) output_ids: Vec<u32>,
}

/// Text to tokens, as far as a conversation needs it.
pub(super) trait Encode {
    /// The prompt of a chat, ready for an answer.
    fn chat(&self, messages: &[Message]) -> anyhow::Result<Vec<u32>>;
}

/// A prompt for the model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prompt {
    /// With the tokens of earlier answers as they were generated.
    pub(super) ids: Vec<u32>,
    /// Tokens of the rendered text.
    pub(super) rendered_len: usize,
}

impl Conversation {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All messages, the system prompt first.
    pub(super) fn messages(&self) -> Vec<Message> {
        self.messages_from(0)
    }

    /// How the answers came, for each message behind the system prompt.
    pub(super) fn generated(&self) -> Vec<Option<Generated>> {
        self.entries.iter().map(|entry| entry.generated.clone()).collect()
    }

    pub(super) fn num_dropped(&self) -> usize {
        self.num_dropped
    }

    /// A conversation that was kept elsewhere. It may begin with a system prompt, and ends with an
    /// answer, if it has messages at all.
    pub(super) fn restore(
        mut messages: Vec<Message>,
        generated: Vec<Option<Generated>>,
        num_dropped: usize,
    ) -> anyhow::Result<Conversation> {
        let system = match messages.first() {
            Some(first) if first.role == "system" => Some(messages.remove(0).content),
            _ => None,
        };
        if let Some(last) = messages.last().filter(|last| last.role != "assistant") {
            bail!(
                "the last message is one of the {}; a conversation to go on with ends with an \
                 answer of the assistant",
                last.role
            );
        }
        ensure!(
            num_dropped == 0 || num_dropped < messages.len(),
            "{num_dropped} of {} messages are left out; some must be there",
            messages.len()
        );
        let generated = generated.into_iter().chain(std::iter::repeat(None));
        let entry = |(message, generated)| Entry { message, generated };
        let entries = messages.into_iter().zip(generated).map(entry).collect();
        Ok(Conversation { system, entries, num_dropped })
    }

    /// The same without the tokens that `is_sound` refuses for the text of their answer.
    pub(super) fn checked(mut self, is_sound: impl Fn(&str, &Generated) -> bool) -> Conversation {
        for Entry { message, generated } in &mut self.entries {
            *generated = generated.take().filter(|generated| is_sound(&message.content, generated));
        }
        self
    }

    /// Forgets everything but the system prompt.
    pub(super) fn reset(&mut self) {
        self.entries.clear();
        self.num_dropped = 0;
    }

    pub(super) fn ask(&mut self, text: String) {
        self.entries.push(Entry { message: Message::new("user", text), generated: None });
    }

    pub(super) fn answer(&mut self, text: String, generated: Option<Generated>) {
        self.entries.push(Entry { message: Message::new("assistant", text), generated });
    }

    /// Takes the last question and what follows it back; returns the question, `None` where there
    /// is none that the model still sees.
    pub(super) fn take_back(&mut self) -> Option<String> {
        let is_question = |entry: &Entry| entry.message.role == "user";
        let idx = self.entries.iter().rposition(is_question)?;
        if idx < self.num_dropped {
            return None;
        }
        let question = self.entries[idx].message.content.clone();
        self.entries.truncate(idx);
        Some(question)
    }

    /// Leaves out the oldest question and its answer from now on; false where there is none before
    /// the last question.
    pub(super) fn drop_oldest(&mut self) -> bool {
        let mut rest = self.entries.iter().enumerate().skip(self.num_dropped + 1);
        match rest.find(|(_, entry)| entry.message.role == "user") {
            Some((idx, _)) => {
                self.num_dropped = idx;
                true
            }
            None => false,
        }
    }

    /// What the model goes on from.
    pub(super) fn prompt(&self, encode: &impl Encode) -> anyhow::Result<Prompt> {
        let rendered = encode.chat(&self.messages_from(self.num_dropped))?;
        let mut ids = Vec::with_capacity(rendered.len());
        let mut num_done = 0;
        let seen = self.entries[self.num_dropped..].iter();
        for generated in seen.filter_map(|entry| entry.generated.as_ref()) {
            let Generated { prompt_len, text_ids, output_ids } = generated;
            let place = *prompt_len..prompt_len.saturating_add(text_ids.len());
            // NOTE: a template may write an answer in another way once it is past.
            if *prompt_len >= num_done && rendered.get(place.clone()) == Some(text_ids) {
                ids.extend_from_slice(&rendered[num_done..place.start]);
                ids.extend_from_slice(output_ids);
                num_done = place.end;
            }
        }
        ids.extend_from_slice(&rendered[num_done..]);
        Ok(Prompt { ids, rendered_len: rendered.len() })
    }

    fn messages_from(&self, first: usize) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        let entries = self.entries[first..].iter().map(|entry| entry.message.clone());
        system.chain(entries).collect()
    }
}

/// Leading tokens that two lists have in common.
pub(super) fn common_len(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `<role text …>` with a token for each character.
    struct Characters;

    impl Encode for Characters {
        fn chat(&self, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
            let text = |m: &Message| format!("<{}{}>", &m.role[..1], m.content);
            let text: String = messages.iter().map(text).chain(["<a".to_owned()]).collect();
            Ok(text.chars().map(u32::from).collect())
        }
    }

    fn ids(text: &str) -> Vec<u32> {
        text.chars().map(u32::from).collect()
    }

    fn prompt(conversation: &Conversation) -> Vec<u32> {
        conversation.prompt(&Characters).unwrap().ids
    }

    /// Asks, and answers with one token, 1000, that stands for the text.
    fn talk(conversation: &mut Conversation, question: &str, answer: &str) {
        conversation.ask(question.to_owned());
        let prompt_len = conversation.prompt(&Characters).unwrap().rendered_len;
        let generated = Generated { prompt_len, text_ids: ids(answer), output_ids: vec![1000] };
        conversation.answer(answer.to_owned(), Some(generated));
    }

    fn example() -> Conversation {
        let mut conversation = Conversation { system: Some("S".to_owned()), ..Default::default() };
        talk(&mut conversation, "one", "yes");
        talk(&mut conversation, "two", "no");
        conversation.ask("three".to_owned());
        conversation
    }

    #[test]
    fn answers_keep_their_tokens() {
        let mut conversation = example();
        let expected =
            [ids("<sS><uone><a"), vec![1000], ids("><utwo><a"), vec![1000], ids("><uthree><a")];
        assert_eq!(prompt(&conversation), expected.concat());
        assert_eq!(conversation.prompt(&Characters).unwrap().rendered_len, 37);
        // Elsewhere the text counts.
        conversation.system = Some("other".to_owned());
        let text = "<sother><uone><ayes><utwo><ano><uthree><a";
        assert_eq!(prompt(&conversation), ids(text));
    }

    #[test]
    fn the_oldest_questions_are_left_out() {
        let mut conversation = example();
        assert!(conversation.drop_oldest());
        assert_eq!(prompt(&conversation), ids("<sS><utwo><ano><uthree><a"));
        assert!(conversation.drop_oldest());
        assert_eq!(prompt(&conversation), ids("<sS><uthree><a"));
        assert!(!conversation.drop_oldest());
        assert_eq!(conversation.messages().len(), 6);
        assert_eq!(conversation.take_back().as_deref(), Some("three"));
        // What the model does not see cannot be asked again.
        assert_eq!(conversation.take_back(), None);
        conversation.reset();
        assert_eq!(prompt(&conversation), ids("<sS><a"));
        assert!(conversation.is_empty() && !conversation.drop_oldest());
    }

    #[test]
    fn questions_are_taken_back() {
        let mut conversation = example();
        assert_eq!(conversation.take_back().as_deref(), Some("three"));
        assert_eq!(conversation.take_back().as_deref(), Some("two"));
        assert_eq!(prompt(&conversation), [ids("<sS><uone><a"), vec![1000], ids("><a")].concat());
        assert_eq!(conversation.take_back().as_deref(), Some("one"));
        assert_eq!(conversation.take_back(), None);
    }

    #[test]
    fn what_was_kept_is_restored() {
        let mut conversation = example();
        conversation.take_back();
        assert!(conversation.drop_oldest());
        let (messages, generated) = (conversation.messages(), conversation.generated());
        let restored = Conversation::restore(messages, generated, conversation.num_dropped());
        assert_eq!(restored.unwrap(), conversation);
        let check = |roles: &[&str], num_dropped, expected: &str| {
            let messages = roles.iter().map(|role| Message::new(*role, "x")).collect();
            let error = Conversation::restore(messages, Vec::new(), num_dropped).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        };
        check(&["user"], 0, "one of the user");
        check(&["user", "assistant"], 2, "2 of 2 messages");
        assert_eq!(common_len(&[1, 2, 3], &[1, 2, 4]), 2);
    }
}
