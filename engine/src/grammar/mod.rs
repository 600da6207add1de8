//! Answers held to a grammar: a JSON schema, a regular expression, or rules of their own.
//!
//! A [`Grammar`] is compiled once, away from the engine. Each answer follows it with a state of its
//! own, which is a function of the answer's tokens alone: neither neighbours nor preemptions change
//! what it allows.

#[cfg(feature = "grammar")]
mod cache;
#[cfg(feature = "grammar")]
mod compiler;
#[cfg(feature = "grammar")]
mod limits;

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::request::{Failure, FinishReason};
use crate::sampling::TokenMask;

#[cfg(feature = "grammar")]
pub use compiler::GrammarCompiler;
#[cfg(feature = "grammar")]
pub use limits::{
    COUNT_MAX, LARK_BYTES_MAX, LARK_DEFINITIONS_MAX, MULTIPLE_OF_MAX, NESTING_MAX,
    PATTERN_PROPERTIES_MAX, REGEX_BYTES_MAX, SCHEMA_BYTES_MAX, SCHEMA_DEPTH_MAX, SCHEMA_NODES_MAX,
};

/// White space between the parts of JSON: none, a space, or a line break with its indentation. Not
/// any more, or a model might write white space without end.
const JSON_SPACE: &str = r"\x20|\x0A\x20{0,32}";

/// What an answer is to look like.
#[derive(Clone, Debug, PartialEq)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema accepts. Properties come in the schema's order.
    JsonSchema(Value),
    /// Text that a regular expression matches as a whole, in the syntax of the `regex` crate
    /// without look-around and back-references.
    Regex(String),
    /// Text that the rule `start` of a Lark grammar derives, in the dialect of llguidance.
    Lark(String),
}

/// A compiled grammar at its start. Clones share it.
#[derive(Clone)]
pub struct Grammar(Arc<dyn Rules>);

/// What grammars are made of.
pub trait Rules: Send + Sync {
    /// A matcher that has seen no token. It shares nothing that changes with any other.
    fn start(&self) -> Box<dyn Matcher>;
}

/// Follows one answer.
pub trait Matcher: Send {
    /// Sets `mask` to the tokens that may follow, end tokens aside, and says whether the answer may
    /// end here.
    fn fill_mask(&mut self, mask: &mut TokenMask) -> Result<MayEnd, TooComplex>;

    /// Goes on behind `token`, which the last mask allowed. Says whether the answer is complete:
    /// nothing can follow.
    fn push(&mut self, token: u32) -> Result<IsComplete, TooComplex>;
}

/// The work that a grammar may cause within one step is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooComplex;

/// Whether what was matched so far is a whole answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MayEnd(pub bool);

/// Whether what was matched so far is a whole answer that nothing can follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsComplete(pub bool);

/// The grammar of one answer, and what it allows next.
pub struct GrammarState {
    matcher: Box<dyn Matcher>,
    mask: TokenMask,
    is_complete: bool,
    is_too_complex: bool,
}

/// `schema` with what the compiler is told besides.
pub(crate) fn with_options(mut schema: Map<String, Value>) -> Value {
    schema.insert("x-guidance".to_owned(), options());
    Value::Object(schema)
}

fn options() -> Value {
    serde_json::json!({"whitespace_pattern": JSON_SPACE})
}

impl Grammar {
    pub fn new(rules: Arc<dyn Rules>) -> Grammar {
        Grammar(rules)
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

impl GrammarState {
    /// Before the first token of an answer.
    pub fn new(grammar: &Grammar, vocab_size: usize) -> GrammarState {
        GrammarState {
            matcher: grammar.0.start(),
            mask: TokenMask::new(vocab_size),
            is_complete: false,
            is_too_complex: false,
        }
    }

    /// Works out what may follow: `end_tokens` too, where the answer may end.
    pub fn fill_mask(&mut self, end_tokens: &[u32]) {
        match self.matcher.fill_mask(&mut self.mask) {
            Ok(MayEnd(may_end)) => {
                self.is_complete = may_end && self.mask.is_empty();
                if may_end {
                    end_tokens.iter().for_each(|token| self.mask.allow(*token));
                }
            }
            Err(TooComplex) => {
                self.is_too_complex = true;
                self.mask.clear();
            }
        }
    }

    /// What the last [`GrammarState::fill_mask`] found.
    pub fn mask(&self) -> &TokenMask {
        &self.mask
    }

    /// Goes on behind a token that the mask allows and that is no end token; returns how the answer
    /// ends, if it does.
    pub fn push(&mut self, token: u32) -> Option<FinishReason> {
        match self.matcher.push(token) {
            Ok(IsComplete(true)) => Some(FinishReason::Stop),
            Ok(IsComplete(false)) => None,
            Err(TooComplex) => Some(FinishReason::Failed(Failure::GrammarTooComplex)),
        }
    }

    /// How an answer ends for which no token was found.
    pub fn end_without_token(&self) -> FinishReason {
        match (self.is_too_complex, self.is_complete) {
            (true, _) => FinishReason::Failed(Failure::GrammarTooComplex),
            // Only end tokens may follow, and they are banned or unknown.
            (false, true) => FinishReason::Stop,
            (false, false) => FinishReason::Failed(Failure::NoAllowedToken),
        }
    }
}
