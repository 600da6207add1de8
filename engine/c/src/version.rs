//! Which library this is.

use std::ffi::c_char;

/// The version of the interface that this header describes. It goes up when a program that was
/// built for it would have to be built anew; new functions, and new fields at the end of structs,
/// leave it alone.
pub const BESPOKE_ABI_VERSION: u32 = 1;

/// The version of the interface that the library has: compare it with `BESPOKE_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn bespoke_abi_version() -> u32 {
    BESPOKE_ABI_VERSION
}

/// The version of the library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn bespoke_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}
