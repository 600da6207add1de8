//! How a call went.

use std::ffi::{CStr, c_char};

use ::engine::Error;

/// How a call went. Negative values are errors, which `bespoke_last_error` explains.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BespokeStatus {
    /// Done.
    Ok = 0,
    /// Nothing came within the time; try again.
    Timeout = 1,
    /// The request has had its last event.
    Ended = 2,
    /// The callback asked for the end.
    Cancelled = 3,
    /// A null pointer, text that is no UTF-8, an unknown number, or a request that is impossible.
    InvalidArgument = -1,
    /// A handle that is 0, was closed or freed, is of the other kind, or was never given out.
    InvalidHandle = -2,
    /// What is needed is in use; it can be had later.
    Busy = -3,
    /// The model's files are missing, damaged or contradict each other.
    Model = -4,
    /// This library cannot run the model, or does not know what is asked for.
    Unsupported = -5,
    /// Not enough memory, threads or handles.
    Resources = -6,
    /// The operating system refused an operation on a file.
    Io = -7,
    /// The engine has died; close it and open another one.
    EngineDead = -8,
    /// The answer could not go on.
    GenerationFailed = -9,
    /// The caller's buffer is too small; the needed size was written.
    BufferTooSmall = -10,
    /// A bug of the library. The call was given up; other handles are not affected.
    Panic = -11,
}

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: BespokeStatus,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(status: BespokeStatus, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into() }
    }

    pub(crate) fn argument(message: impl Into<String>) -> Failure {
        Failure::new(BespokeStatus::InvalidArgument, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match &error {
            Error::Request(_) => BespokeStatus::InvalidArgument,
            Error::Busy(_) => BespokeStatus::Busy,
            Error::Model { .. } => BespokeStatus::Model,
            Error::Unsupported(_) | Error::MissingKernels { .. } | Error::KernelGen(_) => {
                BespokeStatus::Unsupported
            }
            Error::Resources(_) => BespokeStatus::Resources,
            Error::Io { .. } | Error::Download(_) => BespokeStatus::Io,
            Error::Engine(_) => BespokeStatus::EngineDead,
        };
        Failure::new(status, error.to_string())
    }
}

/// The name of a status, such as "busy"; "unknown" for a number that is none.
#[unsafe(no_mangle)]
pub extern "C" fn bespoke_status_name(status: i32) -> *const c_char {
    const NAMES: [(BespokeStatus, &CStr); 15] = [
        (BespokeStatus::Ok, c"ok"),
        (BespokeStatus::Timeout, c"timeout"),
        (BespokeStatus::Ended, c"ended"),
        (BespokeStatus::Cancelled, c"cancelled"),
        (BespokeStatus::InvalidArgument, c"invalid argument"),
        (BespokeStatus::InvalidHandle, c"invalid handle"),
        (BespokeStatus::Busy, c"busy"),
        (BespokeStatus::Model, c"model"),
        (BespokeStatus::Unsupported, c"unsupported"),
        (BespokeStatus::Resources, c"resources"),
        (BespokeStatus::Io, c"io"),
        (BespokeStatus::EngineDead, c"engine dead"),
        (BespokeStatus::GenerationFailed, c"generation failed"),
        (BespokeStatus::BufferTooSmall, c"buffer too small"),
        (BespokeStatus::Panic, c"panic"),
    ];
    let found = NAMES.iter().find(|(named, _)| *named as i32 == status);
    found.map_or(c"unknown", |(_, name)| name).as_ptr()
}
