//! What the served model's tokenizer and chat template make of requests and answers.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use serde_json::{Map, Value};

use super::error::ApiError;
use super::openai::chat::TokenLogprob;
use crate::answer::AnswerFormat;
use crate::error::Error;
use crate::grammar::{Grammar, GrammarCompiler, GrammarSpec};
use crate::sampling;
use crate::tokenizer::chat::{ChatOptions, ChatTemplate, Message};
use crate::tokenizer::vocabulary::Token;
use crate::tokenizer::{self, Tokenizer};

/// The language of one model. Its methods take milliseconds and more: they are for workers.
pub struct Language {
    pub tokenizer: Arc<Tokenizer>,
    /// How answers write tool calls and reasoning, as far as the template shows it.
    pub format: AnswerFormat,
    /// Or why there are no grammars.
    grammars: Result<GrammarCompiler, String>,
    tokens: OnceLock<Vec<Token>>,
}

/// A prompt, and what it was made of.
pub struct Prompt {
    pub text: String,
    pub ids: Vec<u32>,
}

/// Logits of tokens that are excluded have no finite logarithm, and JSON has no infinity.
const LOGPROB_MIN: f32 = -9999.0;

impl Language {
    /// Of a model with this tokenizer and `vocab_size` logits.
    pub fn new(tokenizer: &Arc<Tokenizer>, vocab_size: usize) -> Language {
        let template = tokenizer.chat_template();
        Language {
            tokenizer: Arc::clone(tokenizer),
            format: template.map(ChatTemplate::answer_format).unwrap_or_default(),
            grammars: GrammarCompiler::new(tokenizer, vocab_size)
                .map_err(|error| error.to_string()),
            tokens: OnceLock::new(),
        }
    }

    /// Puts messages into the chat template.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<Prompt, ApiError> {
        self.check_template()?;
        let prompt = self.tokenizer.render_chat(messages, options).map_err(about)?;
        self.encode(&prompt)
    }

    /// The text between an answer and the answer to `turn`, as the chat template writes it: the
    /// end of the first answer, the turn, and the beginning of the second.
    pub fn continuation(&self, turn: &[Message]) -> Result<Prompt, ApiError> {
        // NOTE: private characters, which no template treats in a special way.
        const ANSWER: &str = "\u{e0f0}\u{e0f1}\u{e0f2}";
        self.check_template()?;
        let mut messages = vec![Message::new("user", "-"), Message::new("assistant", ANSWER)];
        messages.extend_from_slice(turn);
        let whole = self.tokenizer.render_chat(&messages, &chat_options()).map_err(about)?;
        match whole.behind(ANSWER) {
            Some(prompt) => self.encode(&prompt),
            None => {
                let message = "the model's chat template cannot go on behind an answer; send the \
                               whole conversation to /v1/chat/completions";
                Err(ApiError::bad_request("session_id".to_owned(), message))
            }
        }
    }

    /// Compiles what an answer is held to, which the field `param` asks for.
    pub fn compile(&self, spec: &GrammarSpec, param: &str) -> Result<Grammar, ApiError> {
        let refuse = |message: String| {
            ApiError::bad_request(param.to_owned(), format!("{param}: {message}"))
        };
        let compiler = self.grammars.as_ref().map_err(|reason| refuse(reason.clone()))?;
        compiler.compile(spec).map_err(|error| match error {
            Error::Request(message) | Error::Unsupported(message) => refuse(message),
            other => other.into(),
        })
    }

    /// Lists the tokens once, for [`Language::logprob`].
    pub fn list_tokens(&self) {
        self.tokens.get_or_init(|| {
            // NOTE: without them, tokens that are parts of characters have no bytes.
            let vocabulary = self.tokenizer.vocabulary();
            vocabulary.and_then(|vocabulary| vocabulary.tokens()).unwrap_or_default()
        });
    }

    /// A token and its log-probability, as clients see them.
    pub fn logprob(&self, token: u32, logprob: f32) -> TokenLogprob {
        let listed = self.tokens.get().and_then(|tokens| tokens.get(token as usize));
        let (text, bytes) = match listed {
            Some(Token::Text(bytes)) => {
                (String::from_utf8_lossy(bytes).into_owned(), Some(bytes.clone()))
            }
            Some(Token::Special(name)) => (name.clone(), None),
            Some(Token::Unused) | None => {
                (self.tokenizer.decode(&[token]).unwrap_or_default(), None)
            }
        };
        TokenLogprob { token: text, logprob: logprob.max(LOGPROB_MIN), bytes }
    }

    /// As [`Language::logprob`] for several.
    pub fn logprobs(&self, of: &[sampling::TokenLogprob]) -> Vec<TokenLogprob> {
        of.iter().map(|top| self.logprob(top.token, top.logprob)).collect()
    }

    fn encode(&self, prompt: &tokenizer::prompt::Prompt) -> Result<Prompt, ApiError> {
        Ok(Prompt { text: prompt.text(), ids: self.tokenizer.encode_prompt(prompt)? })
    }

    fn check_template(&self) -> Result<(), ApiError> {
        match self.tokenizer.chat_template() {
            Some(_) => Ok(()),
            None => {
                let message = "the model has no chat template; use /v1/completions";
                Err(ApiError::bad_request(None, message).with_code("no_chat_template"))
            }
        }
    }
}

/// For an answer to messages, without tools.
pub(super) fn chat_options() -> ChatOptions {
    ChatOptions {
        add_generation_prompt: true,
        tools: Value::Null,
        now: SystemTime::now(),
        kwargs: Map::new(),
    }
}

/// What a template refuses is about the messages.
fn about(error: Error) -> ApiError {
    match error {
        Error::Request(message) => {
            let is_of_variables = message.starts_with("chat_template_kwargs");
            let param = if is_of_variables { "chat_template_kwargs" } else { "messages" };
            ApiError::bad_request(param.to_owned(), message)
        }
        other => other.into(),
    }
}
