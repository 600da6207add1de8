//! Text to tokens and back.

use std::ffi::c_char;

use ::engine::tokenizer::SpecialTokens;

use crate::border::guard;
use crate::engine::BespokeEngine;
use crate::handles;
use crate::input::{self, IDS_MAX};
use crate::output;
use crate::status::{BespokeStatus, Failure};

/// The token ids of `text_len` bytes of UTF-8, 64 MiB at most.
///
/// `add_special` adds the tokens that the model has around a text, such as one at its beginning.
/// Writes their number to `num_ids`, and the ids to `ids` where there is room for all of them,
/// `ids_max`; `ids` may be null to ask for the number alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_tokenize(
    engine: BespokeEngine,
    text: *const c_char,
    text_len: usize,
    add_special: i32,
    ids: *mut u32,
    ids_max: usize,
    num_ids: *mut usize,
) -> BespokeStatus {
    guard(|| {
        // SAFETY: the caller's promise.
        let text = unsafe { input::text_of_len(text, text_len, "text") }?;
        let engine = handles::engine(engine)?;
        let special = if add_special == 0 { SpecialTokens::Omit } else { SpecialTokens::Add };
        let found = engine.tokenizer()?.encode(text, special)?;
        // SAFETY: as above.
        unsafe { output::write_items(&found, (ids, ids_max), num_ids, found.len()) }
    })
}

/// The text of tokens, without special ones, as UTF-8.
///
/// Writes its bytes to `text_len`, and the text with a zero byte behind it to `text` where there is
/// room for both, `text_max`; `text` may be null to ask for the length alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bespoke_detokenize(
    engine: BespokeEngine,
    ids: *const u32,
    num_ids: usize,
    text: *mut c_char,
    text_max: usize,
    text_len: *mut usize,
) -> BespokeStatus {
    guard(|| {
        // SAFETY: the caller's promise.
        let ids = unsafe { input::items(ids, num_ids, IDS_MAX, "ids") }?;
        let engine = handles::engine(engine)?;
        let vocab_size = engine.info.vocab_size;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            return Err(Failure::argument(format!(
                "token id {id} is outside the vocabulary of {vocab_size} tokens"
            )));
        }
        let mut found = engine.tokenizer()?.decode(ids)?.into_bytes();
        let len = found.len();
        found.push(0);
        // SAFETY: as above.
        unsafe { output::write_items(&found, (text.cast::<u8>(), text_max), text_len, len) }
    })
}
