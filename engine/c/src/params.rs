//! What a caller asks of the engine, as a request.

use std::ffi::c_char;
use std::time::SystemTime;

use ::engine::handle::EngineHandle;
use ::engine::kv_cache::Namespace;
use ::engine::request::Request;
use ::engine::sampling::SamplingParams;
use ::engine::session::{SessionId, SessionTurn};
use ::engine::tokenizer::chat::{ChatOptions, Message, parse_messages};
use ::engine::tokenizer::prompt::Prompt;
use ::engine::tokenizer::{SpecialTokens, Tokenizer};

use crate::engine::OpenEngine;
use crate::input::{IDS_MAX, SizedStruct, TEXT_BYTES_MAX, items, read_sized, text, text_if_any};
use crate::session;
use crate::status::Failure;

/// Tokens of an answer where the caller names no number.
const MAX_TOKENS_DEFAULT: usize = 256;
const STOP_IDS_MAX: usize = 1024;
const SESSION_FLAGS_ALL: u32 = BespokeSessionFlags::Start as u32 | BespokeSessionFlags::End as u32;

/// How a request takes part in a session; to be added up.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BespokeSessionFlags {
    /// Goes on behind what the session has.
    Continue = 0,
    /// Starts the session anew; an older one of this name is dropped.
    Start = 1,
    /// Ends the session with this request.
    End = 2,
}

/// What is asked of an engine: one of `prompt`, `messages` and `prompt_ids`, and how to go on from
/// it. Zeros are the defaults, which take the likeliest token each time. The library keeps nothing
/// of it once the function has returned.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BespokeParams {
    /// sizeof(BespokeParams)
    pub size: usize,
    /// Text to continue as it is, 64 MiB at most.
    pub prompt: *const c_char,
    /// A JSON array of chat messages, `[{"role": "user", "content": "Hello"}]`, for the model's
    /// chat template. With a session that goes on, the new messages alone.
    pub messages: *const c_char,
    /// Token ids to continue.
    pub prompt_ids: *const u32,
    pub num_prompt_ids: usize,
    /// Tokens to generate at most; 0 for 256.
    pub max_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps the likeliest tokens up to this share of the probability; 0 for all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the likeliest one's probability.
    pub min_p: f32,
    /// Divides the logits of tokens that were there, above 0; 0 for 1, which changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens in the answer, -2 to 2.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens in the answer each time they are there, -2 to 2.
    pub frequency_penalty: f32,
    /// Keeps this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Start of the random numbers: equal ones give equal answers.
    pub seed: u64,
    /// Texts that end the answer and are no part of it, 16 at most, of 1024 bytes at most.
    pub stop_strings: *const *const c_char,
    pub num_stop_strings: usize,
    /// Tokens that end the answer besides the model's own, 1024 at most.
    pub stop_ids: *const u32,
    pub num_stop_ids: usize,
    /// The session that the request belongs to; null for none. 1 to 64 letters, digits, '-', '_'
    /// and '.', the first one no '.'.
    pub session: *const c_char,
    /// Of `BespokeSessionFlags`.
    pub session_flags: u32,
    /// Whether the model's end tokens do not end the answer.
    pub ignore_eos: i32,
}

// SAFETY: numbers and pointers.
unsafe impl SizedStruct for BespokeParams {
    const NAME: &'static str = "BespokeParams";
}

/// The request that `params` stands for.
///
/// # Safety
/// `params` is as the header says.
pub(crate) unsafe fn request(
    engine: &OpenEngine,
    params: *const BespokeParams,
) -> Result<Request, Failure> {
    if params.is_null() {
        return Err(Failure::argument("params is null"));
    }
    // SAFETY: the caller's promise, for all that is read here.
    let (params, turn, stop_strings, stop_ids) = unsafe {
        let params = read_sized(params)?;
        let stop_ids = items(params.stop_ids, params.num_stop_ids, STOP_IDS_MAX, "stop_ids")?;
        (params, session_turn(&params)?, stop_strings(&params)?, stop_ids)
    };
    if !stop_strings.is_empty() {
        engine.tokenizer()?;
    }
    let or = |value: f32, default: f32| if value == 0.0 { default } else { value };
    Ok(Request {
        // SAFETY: as above.
        prompt_ids: unsafe { prompt_ids(engine, &params, turn.as_ref()) }?,
        max_tokens: if params.max_tokens == 0 { MAX_TOKENS_DEFAULT } else { params.max_tokens },
        sampling: SamplingParams {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: or(params.top_p, 1.0),
            min_p: params.min_p,
            repetition_penalty: or(params.repetition_penalty, 1.0),
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            seed: params.seed,
            ..SamplingParams::default()
        },
        ignore_eos: params.ignore_eos != 0,
        stop_token_ids: stop_ids.to_vec(),
        stop_strings,
        session: turn,
        ..Request::default()
    })
}

unsafe fn session_turn(params: &BespokeParams) -> Result<Option<SessionTurn>, Failure> {
    let flags = params.session_flags;
    if flags & !SESSION_FLAGS_ALL != 0 {
        return Err(Failure::argument(format!(
            "session_flags is {flags}; it can be {SESSION_FLAGS_ALL} at most"
        )));
    }
    // SAFETY: the caller's promise.
    let name = unsafe { text_if_any(params.session, session::NAME_BYTES_MAX, "session") }?;
    let Some(name) = name else {
        return match flags {
            0 => Ok(None),
            _ => Err(Failure::argument("session_flags are set, and session is null; name one")),
        };
    };
    Ok(Some(SessionTurn {
        start: flags & BespokeSessionFlags::Start as u32 != 0,
        end: flags & BespokeSessionFlags::End as u32 != 0,
        ..SessionTurn::of(SessionId::new(Namespace::default(), name)?)
    }))
}

unsafe fn stop_strings(params: &BespokeParams) -> Result<Vec<String>, Failure> {
    let BespokeParams { stop_strings, num_stop_strings, .. } = *params;
    // SAFETY: the caller's promise.
    let pointers = unsafe {
        items(stop_strings, num_stop_strings, Request::STOP_STRINGS_MAX, "stop_strings")
    }?;
    let read = |pointer: &*const c_char| {
        // SAFETY: the caller's promise.
        let stop = unsafe { text(*pointer, Request::STOP_STRING_BYTES_MAX, "a stop string") }?;
        Ok(stop.to_owned())
    };
    pointers.iter().map(read).collect()
}

unsafe fn prompt_ids(
    engine: &OpenEngine,
    params: &BespokeParams,
    turn: Option<&SessionTurn>,
) -> Result<Vec<u32>, Failure> {
    let BespokeParams { prompt_ids, num_prompt_ids, .. } = *params;
    // SAFETY: the caller's promise.
    let (prompt, messages, ids) = unsafe {
        let prompt = text_if_any(params.prompt, TEXT_BYTES_MAX, "prompt")?;
        let messages = text_if_any(params.messages, TEXT_BYTES_MAX, "messages")?;
        let ids = items(prompt_ids, num_prompt_ids, IDS_MAX, "prompt_ids")?;
        (prompt, messages, (!ids.is_empty()).then_some(ids))
    };
    let continued = turn.filter(|turn| !turn.start);
    match (prompt, messages, ids) {
        (Some(text), None, None) => {
            // A session that goes on does not begin again.
            let special =
                if continued.is_some() { SpecialTokens::Omit } else { SpecialTokens::Add };
            Ok(engine.tokenizer()?.encode(text, special)?)
        }
        (None, Some(json), None) => {
            let messages = parse_messages(json)?;
            let tokenizer = engine.tokenizer()?;
            let last = match continued {
                Some(turn) => last_token(&engine.handle, &turn.id)?,
                None => None,
            };
            match last {
                Some(last) => continuation(tokenizer, messages, last),
                None => {
                    let prompt = tokenizer.render_chat(&messages, &chat_options())?;
                    Ok(tokenizer.encode_prompt(&prompt)?)
                }
            }
        }
        (None, None, Some(ids)) => Ok(ids.to_vec()),
        (None, None, None) => {
            Err(Failure::argument("there is no prompt; set one of prompt, messages, prompt_ids"))
        }
        _ => Err(Failure::argument("set one of prompt, messages and prompt_ids, not several")),
    }
}

/// The last token of a session; `None` where it has none.
fn last_token(handle: &EngineHandle, id: &SessionId) -> Result<Option<u32>, Failure> {
    let id = id.clone();
    let read = move |engine: &mut ::engine::engine::Engine| {
        engine.session_tokens(&id).map(|tokens| tokens.last().copied())
    };
    Ok(handle.call(read)??)
}

/// What stands between an answer that ended with the token `last` and the answer to `turn`, as the
/// chat template writes it.
fn continuation(tokenizer: &Tokenizer, turn: Vec<Message>, last: u32) -> Result<Vec<u32>, Failure> {
    // NOTE: private characters, which no template treats in a special way.
    const ANSWER: &str = "\u{e0f0}\u{e0f1}\u{e0f2}";
    let before = [Message::new("user", "-"), Message::new("assistant", ANSWER)];
    let messages: Vec<Message> = before.into_iter().chain(turn).collect();
    let whole = tokenizer.render_chat(&messages, &chat_options())?;
    let rest: Option<Prompt> = whole.behind(ANSWER);
    let Some(rest) = rest else {
        return Err(Failure::argument(
            "the model's chat template cannot go on behind an answer; start the session anew with \
             the whole conversation",
        ));
    };
    let mut ids = tokenizer.encode_prompt(&rest)?;
    // The answer's end may be there already.
    if ids.first() == Some(&last) && tokenizer.eos_ids().contains(&last) {
        ids.remove(0);
    }
    Ok(ids)
}

/// For an answer to messages, without tools.
fn chat_options() -> ChatOptions {
    ChatOptions {
        add_generation_prompt: true,
        tools: Default::default(),
        now: SystemTime::now(),
        kwargs: Default::default(),
    }
}
