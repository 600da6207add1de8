//! From a [`GrammarSpec`] to a [`Grammar`], by llguidance.
//!
//! Grammars come from strangers. Their size and depth are bounded before llguidance sees them, its
//! work by its own limits of items and states, its recursion by a thread with a large stack, and
//! its panics end in an error of the request that caused them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use serde_json::{Map, Value, json};

use super::cache::{Cache, Key};
use super::{
    Grammar, GrammarSpec, IsComplete, Matcher, MayEnd, Rules, TooComplex, limits, with_options,
};
use crate::error::Error;
use crate::sampling::TokenMask;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::vocabulary::{Token, Vocabulary};

/// Stack of the thread that compiles. Memory is taken only as far as the recursion goes.
const STACK_BYTES: usize = 256 << 20;

/// Compiled grammars that are kept, by their estimated sizes.
const CACHE_BYTES_MAX: usize = 64 << 20;

/// Longest reason of llguidance that is passed on, in characters: it may quote the grammar.
const REASON_LEN_MAX: usize = 300;

/// Compiles grammars for the tokens of one model. Shared between threads.
pub struct GrammarCompiler {
    vocabulary: Vocabulary,
    factory: OnceLock<Result<Factory, String>>,
    cache: Mutex<Cache>,
}

/// What all grammars of one model share.
struct Factory {
    inner: ParserFactory,
    /// A token of no model that stands for the end of the answer.
    end: u32,
}

struct Compiled {
    start: llguidance::Matcher,
    end: u32,
}

struct Follower {
    matcher: llguidance::Matcher,
    end: u32,
}

impl GrammarCompiler {
    /// For the tokens of `tokenizer` and a model with `vocab_size` tokens. The tokens are looked at
    /// when the first grammar is compiled; [`GrammarCompiler::prepare`] does it earlier.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<GrammarCompiler, Error> {
        tokenizer.check_vocab_size(vocab_size)?;
        Ok(GrammarCompiler {
            vocabulary: tokenizer.vocabulary()?,
            factory: OnceLock::new(),
            cache: Mutex::new(Cache::new(CACHE_BYTES_MAX)),
        })
    }

    /// Builds what all grammars share, a fraction of a second of work. Further calls do nothing.
    pub fn prepare(&self) -> Result<(), Error> {
        self.factory().map(|_| ())
    }

    /// Compiles a grammar, or finds it compiled. Takes milliseconds, for the largest grammars some
    /// tenths of a second: not for a thread that others wait for. [`Error::Request`] says what the
    /// grammar has that is too large, wrong or not supported.
    pub fn compile(&self, spec: &GrammarSpec) -> Result<Grammar, Error> {
        limits::check(spec)?;
        let (key, spec_bytes) = key(spec);
        if let Some(grammar) = self.cache().get(&key) {
            return Ok(grammar);
        }
        let factory = self.factory()?;
        let start = on_large_stack(|| factory.compile(spec))?;
        let grammar = Grammar::new(Arc::new(Compiled { start, end: factory.end }));
        self.cache().insert(key, grammar.clone(), estimated_bytes(spec_bytes));
        Ok(grammar)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // NOTE: nothing panics while it holds the lock, so a poisoned one is whole too.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn factory(&self) -> Result<&Factory, Error> {
        let factory = self.factory.get_or_init(|| {
            let tokens = self.vocabulary.tokens().map_err(|error| error.to_string())?;
            contain(|| Factory::new(&tokens).map_err(|error| error.to_string()))
        });
        factory.as_ref().map_err(|reason| {
            Error::Unsupported(format!("answers cannot be held to a grammar: {reason}"))
        })
    }
}

/// What a compiled grammar is counted as: it has a part that does not depend on its source.
fn estimated_bytes(spec_bytes: usize) -> usize {
    (256 << 10) + 64 * spec_bytes
}

/// Names a grammar; says how long its source is.
fn key(spec: &GrammarSpec) -> (Key, usize) {
    let (kind, text) = match spec {
        GrammarSpec::JsonObject => ("object", String::new()),
        GrammarSpec::JsonSchema(schema) => ("schema", schema.to_string()),
        GrammarSpec::Regex(regex) => ("regex", regex.clone()),
        GrammarSpec::Lark(grammar) => ("lark", grammar.clone()),
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind.as_bytes());
    hasher.update(&[0]);
    hasher.update(text.as_bytes());
    (*hasher.finalize().as_bytes(), text.len())
}

/// Runs `compile` where deep recursion does no harm. Its panics become errors.
fn on_large_stack<T: Send>(compile: impl FnOnce() -> Result<T, String> + Send) -> Result<T, Error> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
        let thread = builder
            .spawn_scoped(scope, || contain(compile))
            .map_err(|error| Error::Resources(format!("no thread for a grammar: {error}")))?;
        let result = thread.join().unwrap_or_else(|_| Err("it cannot be compiled".to_owned()));
        result.map_err(|reason| Error::Request(format!("the grammar is refused: {reason}")))
    })
}

fn contain<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let result = catch_unwind(AssertUnwindSafe(work));
    result.unwrap_or_else(|_| Err("it cannot be compiled; make it simpler".to_owned()))
}

impl Factory {
    fn new(tokens: &[Token]) -> anyhow::Result<Factory> {
        let mut words: Vec<Vec<u8>> = tokens.iter().map(word).collect();
        let end = words.len() as u32;
        words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], "end of the answer".as_bytes()].concat());
        let info = TokRxInfo::new(words.len() as u32, end);
        // NOTE: it calls its way of splitting text not canonical, so that nothing is forced on the
        // model but the text itself.
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut inner = ParserFactory::new_simple(&env)?;
        inner.quiet();
        *inner.limits_mut() = ParserLimits {
            max_items_in_row: 2000,
            initial_lexer_fuel: 200_000,
            step_lexer_fuel: 100_000,
            step_max_items: 25_000,
            max_lexer_states: 20_000,
            max_grammar_size: 200_000,
            precompute_large_lexemes: true,
            verbose_errors: false,
        };
        Ok(Factory { inner, end })
    }

    fn compile(&self, spec: &GrammarSpec) -> Result<llguidance::Matcher, String> {
        let grammar = match spec {
            GrammarSpec::JsonObject => json_grammar(json!({"type": "object"}))?,
            GrammarSpec::JsonSchema(schema) => json_grammar(schema.clone())?,
            GrammarSpec::Regex(regex) => regex_grammar(regex)?,
            GrammarSpec::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        };
        let mut matcher = llguidance::Matcher::new(self.inner.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(reason(&error));
        }
        // NOTE: it tells whether an answer can begin at all, and every clone starts with the states
        // that were found on the way.
        match matcher.compute_mask() {
            Ok(_) => Ok(matcher),
            Err(error) if is_dead_end(&error) => Err("no text fits it".to_owned()),
            Err(_) => Err("it takes too much work; make it simpler".to_owned()),
        }
    }
}

/// The bytes of a token as the trie has them: what is no text starts with a byte that no text has.
fn word(token: &Token) -> Vec<u8> {
    match token {
        Token::Text(bytes) => bytes.clone(),
        Token::Special(name) => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
        Token::Unused => Vec::new(),
    }
}

fn json_grammar(schema: Value) -> Result<TopLevelGrammar, String> {
    let object = match schema {
        Value::Object(object) => object,
        Value::Bool(true) => Map::new(),
        Value::Bool(false) => return Err("no value fits the JSON schema `false`".to_owned()),
        other => return Err(format!("a JSON schema is an object, not {other}")),
    };
    Ok(TopLevelGrammar::from_json_schema(with_options(object)))
}

/// A regular expression that the whole answer matches: anchors around it say nothing new.
fn regex_grammar(regex: &str) -> Result<TopLevelGrammar, String> {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    let regex = match regex.strip_suffix('$') {
        Some(rest) if num_backslashes(rest).is_multiple_of(2) => rest,
        _ => regex,
    };
    match regex.is_empty() {
        true => Err("the regular expression is empty".to_owned()),
        false => Ok(TopLevelGrammar::from_regex(regex)),
    }
}

fn num_backslashes(text: &str) -> usize {
    text.len() - text.trim_end_matches('\\').len()
}

/// The part of an error of llguidance that is for the one who wrote the grammar.
fn reason(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    let line = line.trim_end_matches("<non-verbose/>").trim();
    if line.starts_with("panic:") {
        return "it cannot be compiled; make it simpler".to_owned();
    }
    if let Some(keys) = line.strip_prefix("Unimplemented keys: ") {
        return format!("keywords of the JSON schema that are not supported: {keys}");
    }
    if line.starts_with("oneOf constraints are not supported") {
        return "oneOf is supported only where no value fits two of its schemas; use anyOf"
            .to_owned();
    }
    match line.char_indices().nth(REASON_LEN_MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// Whether nothing can follow, though the answer may not end.
fn is_dead_end(error: &anyhow::Error) -> bool {
    error.to_string().starts_with("NoExtensionBias")
}

impl Rules for Compiled {
    fn start(&self) -> Box<dyn Matcher> {
        Box::new(Follower { matcher: self.start.deep_clone(), end: self.end })
    }
}

impl Matcher for Follower {
    fn fill_mask(&mut self, mask: &mut TokenMask) -> Result<MayEnd, TooComplex> {
        match self.matcher.compute_mask() {
            Ok(mut allowed) => {
                let may_end = allowed.is_allowed(self.end);
                // NOTE: a model may have a token of this id, behind those of its tokenizer.
                allowed.disallow_token(self.end);
                mask.set(allowed.as_slice());
                Ok(MayEnd(may_end))
            }
            // The vocabulary cannot spell what has to follow.
            Err(error) if is_dead_end(&error) => {
                mask.clear();
                Ok(MayEnd(false))
            }
            Err(_) => Err(TooComplex),
        }
    }

    fn push(&mut self, token: u32) -> Result<IsComplete, TooComplex> {
        self.matcher.consume_token(token).map_err(|_| TooComplex)?;
        Ok(IsComplete(self.matcher.is_stopped()))
    }
}
