//! The caller's memory as values. Everything is checked that can be, and every length is bounded.

use std::ffi::c_char;
use std::mem::{MaybeUninit, size_of};
use std::slice;
use std::str;

use crate::status::{BespokeStatus, Failure};

/// Bytes of a text at most; its tokens take about forty times that.
pub(crate) const TEXT_BYTES_MAX: usize = 64 << 20;
/// Token ids in one call at most.
pub(crate) const IDS_MAX: usize = 1 << 24;
/// Bytes of a path at most.
pub(crate) const PATH_BYTES_MAX: usize = 4096;
/// Bytes of a struct at most, as a newer program may have it.
const STRUCT_BYTES_MAX: usize = 4096;

/// A struct of C that begins with its own size, as a `usize`.
///
/// # Safety
/// Every pattern of bits is a value of it, zeros too, which stand for the defaults.
pub(crate) unsafe trait SizedStruct: Copy {
    /// As the header calls it.
    const NAME: &'static str;
}

/// Reads a struct of an older program, whose missing fields are zeros, or of a newer one, as far as
/// it sets no fields that are unknown here. All zeros where `from` is null.
///
/// # Safety
/// `from` is null, or the struct's first field says how many bytes there are.
pub(crate) unsafe fn read_sized<T: SizedStruct>(from: *const T) -> Result<T, Failure> {
    let mut value = MaybeUninit::<T>::zeroed();
    if !from.is_null() {
        let name = T::NAME;
        // SAFETY: the caller's promise.
        let size = unsafe { size_of_struct(from) }?;
        let from = from.cast::<u8>();
        // SAFETY: both have so many bytes, and the value is new memory.
        unsafe { from.copy_to_nonoverlapping(value.as_mut_ptr().cast(), size.min(size_of::<T>())) };
        let mut rest = size_of::<T>()..size;
        // SAFETY: the struct has `size` bytes.
        if rest.any(|at| unsafe { from.add(at).read() } != 0) {
            return Err(Failure::new(
                BespokeStatus::Unsupported,
                format!(
                    "{name} has {size} bytes, and fields are set behind the {} that this version \
                     of the library knows; use a newer library",
                    size_of::<T>()
                ),
            ));
        }
    }
    // SAFETY: every pattern of bits is a value, as the trait promises.
    Ok(unsafe { value.assume_init() })
}

/// What the struct says of its size.
///
/// # Safety
/// The struct's first field can be read.
pub(crate) unsafe fn size_of_struct<T: SizedStruct>(of: *const T) -> Result<usize, Failure> {
    let name = T::NAME;
    if of.is_null() {
        return Err(Failure::argument(format!("{name} is null")));
    }
    // SAFETY: the caller's promise; C may have put it anywhere.
    let size = unsafe { of.cast::<usize>().read_unaligned() };
    match (size_of::<usize>()..=STRUCT_BYTES_MAX).contains(&size) {
        true => Ok(size),
        false => Err(Failure::argument(format!(
            "the size of {name} is {size}; set it to sizeof({name}), which is {} here",
            size_of::<T>()
        ))),
    }
}

/// A text that ends with a zero byte; `None` where `from` is null.
///
/// # Safety
/// `from` is null, or bytes up to a zero can be read, and stay as they are for `'a`.
pub(crate) unsafe fn text_if_any<'a>(
    from: *const c_char,
    bytes_max: usize,
    name: &str,
) -> Result<Option<&'a str>, Failure> {
    if from.is_null() {
        return Ok(None);
    }
    let from = from.cast::<u8>();
    // SAFETY: no byte is read behind the first zero.
    let len = (0..=bytes_max).find(|at| unsafe { from.add(*at).read() } == 0);
    let len = len.ok_or_else(|| {
        Failure::argument(format!("{name} has no end within {bytes_max} bytes; give less"))
    })?;
    // SAFETY: so many bytes were read just now.
    utf8(unsafe { slice::from_raw_parts(from, len) }, name).map(Some)
}

/// As [`text_if_any`], where there has to be one.
///
/// # Safety
/// As there.
pub(crate) unsafe fn text<'a>(
    from: *const c_char,
    bytes_max: usize,
    name: &str,
) -> Result<&'a str, Failure> {
    // SAFETY: the caller's promise.
    let text = unsafe { text_if_any(from, bytes_max, name) }?;
    text.ok_or_else(|| Failure::argument(format!("{name} is null")))
}

/// A text of `len` bytes, zeros included.
///
/// # Safety
/// `len` bytes can be read, and stay as they are for `'a`.
pub(crate) unsafe fn text_of_len<'a>(
    from: *const c_char,
    len: usize,
    name: &str,
) -> Result<&'a str, Failure> {
    // SAFETY: the caller's promise.
    utf8(unsafe { items(from.cast::<u8>(), len, TEXT_BYTES_MAX, name) }?, name)
}

/// `len` items; null is allowed where there are none.
///
/// # Safety
/// `len` items can be read, and stay as they are for `'a`.
pub(crate) unsafe fn items<'a, T: Copy>(
    from: *const T,
    len: usize,
    len_max: usize,
    name: &str,
) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    check_pointer(from, name)?;
    if len > len_max {
        return Err(Failure::argument(format!("{name} has {len} items; give at most {len_max}")));
    }
    // SAFETY: neither null nor misaligned, and the caller's promise.
    Ok(unsafe { slice::from_raw_parts(from, len) })
}

/// Refuses what no item can be at.
pub(crate) fn check_pointer<T>(pointer: *const T, name: &str) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::argument(format!("{name} is null")));
    }
    match pointer.is_aligned() {
        true => Ok(()),
        false => Err(Failure::argument(format!("{name} is not aligned to {}", align_of::<T>()))),
    }
}

fn utf8<'a>(bytes: &'a [u8], name: &str) -> Result<&'a str, Failure> {
    str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        Failure::argument(format!("{name} is no UTF-8: byte {at} belongs to no character"))
    })
}
