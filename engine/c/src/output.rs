//! Values into the caller's memory.

use std::cell::RefCell;
use std::ffi::{c_char, c_void};
use std::mem::size_of;
use std::ptr;

use crate::input::{SizedStruct, check_pointer, size_of_struct};
use crate::request::News;
use crate::status::{BespokeStatus, Failure};

/// Why an answer ended.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BespokeFinishReason {
    /// It has not ended.
    None = 0,
    /// An end token, a stop token or a stop string.
    Stop = 1,
    /// `max_tokens`, or the end of the context.
    Length = 2,
    /// It was cancelled, or its engine was closed.
    Cancelled = 3,
}

/// News of a request: what was generated, and in the last event how it ended.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BespokeEvent {
    /// sizeof(BespokeEvent)
    pub size: usize,
    /// The text that became certain, as UTF-8, in whole characters and without stop strings. A zero
    /// byte stands behind it. Empty while characters are incomplete, and without a tokenizer.
    pub text: *const c_char,
    /// Bytes of the text.
    pub text_len: usize,
    /// The tokens that were generated. The last one may be the end token, which has no text.
    pub ids: *const u32,
    pub num_ids: usize,
    /// Tokens of the request's prompt, without those of a session's history.
    pub num_prompt_tokens: usize,
    /// Tokens of history and prompt that were found in the KV cache.
    pub num_cached_tokens: usize,
    /// Tokens generated so far.
    pub num_output_tokens: usize,
    /// A `BespokeFinishReason`: other than `BESPOKE_FINISH_REASON_NONE` in the last event.
    pub finish_reason: i32,
    pub reserved: i32,
}

/// Takes the events of `bespoke_generate`, on the thread that called it. What the event points to
/// is valid until the callback returns. It may call any function of the library, and has to return:
/// no exception and no longjmp may leave it. Anything but 0 cancels the request.
pub type BespokeCallback =
    Option<unsafe extern "C" fn(user: *mut c_void, event: *const BespokeEvent) -> i32>;

// SAFETY: numbers and pointers.
unsafe impl SizedStruct for BespokeEvent {
    const NAME: &'static str = "BespokeEvent";
}

/// What the last event of `bespoke_next` on this thread points to.
#[derive(Default)]
struct Kept {
    text: Vec<u8>,
    ids: Vec<u32>,
}

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::default();
}

/// Writes a struct as far as the caller has room for it; fields that are unknown here become zeros.
///
/// # Safety
/// The struct's first field says how many bytes can be written.
pub(crate) unsafe fn write_sized<T: SizedStruct>(to: *mut T, mut value: T) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_struct(to) }?;
    let from = (&raw mut value).cast::<u8>();
    // SAFETY: the first field is the size, which stays the caller's.
    unsafe { from.cast::<usize>().write_unaligned(size) };
    let num_known = size.min(size_of::<T>());
    let to = to.cast::<u8>();
    // SAFETY: both have so many bytes, and the value is a copy.
    unsafe { from.copy_to_nonoverlapping(to, num_known) };
    // SAFETY: the struct has `size` bytes.
    unsafe { to.add(num_known).write_bytes(0, size - num_known) };
    Ok(())
}

/// Writes one number.
///
/// # Safety
/// `to` is null, misaligned, or can be written.
pub(crate) unsafe fn write<T: Copy>(to: *mut T, value: T, name: &str) -> Result<(), Failure> {
    check_pointer(to, name)?;
    // SAFETY: neither null nor misaligned, and the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes as many items as there are, or none where `len_max` is too small; null asks for the
/// number alone. `num` is the number in any case.
///
/// # Safety
/// `to` is null or has room for `len_max` items; `num` is as for [`write()`].
pub(crate) unsafe fn write_items<T: Copy>(
    items: &[T],
    (to, len_max): (*mut T, usize),
    num: *mut usize,
    num_items: usize,
) -> Result<BespokeStatus, Failure> {
    // SAFETY: the caller's promise.
    unsafe { write(num, num_items, "the pointer to the length") }?;
    if to.is_null() {
        return Ok(BespokeStatus::Ok);
    }
    check_pointer(to, "the buffer")?;
    if items.len() > len_max {
        let message = format!("the buffer has room for {len_max}; {} are needed", items.len());
        return Err(Failure::new(BespokeStatus::BufferTooSmall, message));
    }
    // SAFETY: there is room, as was just checked, and C's memory is none of ours.
    unsafe { items.as_ptr().copy_to_nonoverlapping(to, items.len()) };
    Ok(BespokeStatus::Ok)
}

/// The event of `news`, which it points into; `text` is given a zero byte at its end.
pub(crate) fn event(news: &News, text: &mut Vec<u8>, ids: &[u32]) -> BespokeEvent {
    let text_len = text.len();
    text.push(0);
    BespokeEvent {
        size: size_of::<BespokeEvent>(),
        text: text.as_ptr().cast(),
        text_len,
        ids: if ids.is_empty() { ptr::null() } else { ids.as_ptr() },
        num_ids: ids.len(),
        num_prompt_tokens: news.usage.num_prompt,
        num_cached_tokens: news.usage.num_cached,
        num_output_tokens: news.usage.num_output,
        finish_reason: news.finish_reason as i32,
        reserved: 0,
    }
}

/// Writes the event of `news`, which stays valid until the thread's next call of this.
///
/// # Safety
/// As of [`write_sized`].
pub(crate) unsafe fn write_event(to: *mut BespokeEvent, mut news: News) -> Result<(), Failure> {
    let kept = Kept {
        text: std::mem::take(&mut news.text).into_bytes(),
        ids: std::mem::take(&mut news.ids),
    };
    let write = |cell: &RefCell<Kept>| {
        let mut place = cell.borrow_mut();
        *place = kept;
        let Kept { text, ids } = &mut *place;
        // SAFETY: the caller's promise.
        unsafe { write_sized(to, event(&news, text, ids)) }
    };
    KEPT.try_with(write).unwrap_or_else(|_| {
        let message = "the thread is ending and can take no events any more";
        Err(Failure::new(BespokeStatus::Resources, message))
    })
}
