//! Nothing but a status crosses the border to C: no panic, and of errors a text on request.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::status::{BespokeStatus, Failure};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// What went wrong in the calling thread's last call that failed, as UTF-8: the value that is at
/// fault and what to do; empty where none has failed. The text is valid until the thread's next
/// call of this library, and never null.
#[unsafe(no_mangle)]
pub extern "C" fn bespoke_last_error() -> *const c_char {
    // NOTE: a thread that ends has no such memory any more.
    LAST_ERROR.try_with(|error| error.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs what a function of the library does, and keeps the reason where that fails.
pub(crate) fn guard(work: impl FnOnce() -> Result<BespokeStatus, Failure>) -> BespokeStatus {
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = format!("a bug of the library: {}; please report it", words(&*panic));
        Err(Failure::new(BespokeStatus::Panic, message))
    });
    result.unwrap_or_else(|failure| {
        keep(failure.message);
        failure.status
    })
}

fn keep(message: String) {
    let text = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // NOTE: a thread that ends asks for no reasons.
    let _ = LAST_ERROR.try_with(|error| error.replace(text));
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words")
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::thread;

    use super::*;

    /// As every function of the library is made.
    extern "C" fn panics() -> BespokeStatus {
        guard(|| panic!("index \0 {} of a test", 7))
    }

    fn last_error() -> String {
        // SAFETY: never null, and of this thread.
        unsafe { CStr::from_ptr(bespoke_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn panics_stop_at_the_border() {
        assert_eq!(panics(), BespokeStatus::Panic);
        let expected = "a bug of the library: index   7 of a test; please report it";
        assert_eq!(last_error(), expected);
        assert_eq!(guard(|| Ok(BespokeStatus::Timeout)), BespokeStatus::Timeout);
        assert_eq!(last_error(), expected, "it is the last error that is told");
        thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
        assert_eq!(guard(|| Err(Failure::argument("x"))), BespokeStatus::InvalidArgument);
        assert_eq!(last_error(), "x");
    }
}
