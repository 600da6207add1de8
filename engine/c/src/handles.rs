//! What the numbers stand for that callers hold.
//!
//! A number is given out once and never again, so a freed one cannot come to mean something else.
//! The table is all that is global; its lock is held for a look-up, never while anything waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::engine::OpenEngine;
use crate::request::OpenRequest;
use crate::status::{BespokeStatus, Failure};

/// Handles that are open at once.
const HANDLES_MAX: usize = 1 << 16;

/// What a handle stands for.
#[derive(Clone)]
enum Object {
    Engine(Arc<OpenEngine>),
    Request(Arc<OpenRequest>),
}

struct Handles {
    objects: BTreeMap<u64, Object>,
    /// Handles given out so far.
    num_given: u64,
}

static HANDLES: Mutex<Handles> = Mutex::new(Handles { objects: BTreeMap::new(), num_given: 0 });

/// A new handle of an engine.
pub(crate) fn add_engine(engine: OpenEngine) -> Result<u64, Failure> {
    add(Object::Engine(Arc::new(engine)))
}

/// A new handle of a request.
pub(crate) fn add_request(request: OpenRequest) -> Result<u64, Failure> {
    add(Object::Request(Arc::new(request)))
}

/// The engine of a handle.
pub(crate) fn engine(handle: u64) -> Result<Arc<OpenEngine>, Failure> {
    let handles = lock();
    match handles.objects.get(&handle) {
        Some(Object::Engine(engine)) => Ok(Arc::clone(engine)),
        _ => Err(handles.refusal(handle, "engine")),
    }
}

/// The request of a handle.
pub(crate) fn request(handle: u64) -> Result<Arc<OpenRequest>, Failure> {
    let handles = lock();
    match handles.objects.get(&handle) {
        Some(Object::Request(request)) => Ok(Arc::clone(request)),
        _ => Err(handles.refusal(handle, "request")),
    }
}

/// Takes the engine of a handle, which is none from now on.
pub(crate) fn remove_engine(handle: u64) -> Result<Arc<OpenEngine>, Failure> {
    let mut handles = lock();
    match handles.objects.get(&handle).cloned() {
        Some(Object::Engine(engine)) => {
            handles.objects.remove(&handle);
            Ok(engine)
        }
        _ => Err(handles.refusal(handle, "engine")),
    }
}

/// Takes the request of a handle, which is none from now on.
pub(crate) fn remove_request(handle: u64) -> Result<Arc<OpenRequest>, Failure> {
    let mut handles = lock();
    match handles.objects.get(&handle).cloned() {
        Some(Object::Request(request)) => {
            handles.objects.remove(&handle);
            Ok(request)
        }
        _ => Err(handles.refusal(handle, "request")),
    }
}

impl Handles {
    /// Why `handle` is no handle of a `kind`.
    fn refusal(&self, handle: u64, kind: &str) -> Failure {
        let what = match self.objects.get(&handle) {
            Some(Object::Engine(_)) => "is an engine",
            Some(Object::Request(_)) => "is a request",
            None if handle == 0 => "is null",
            None if handle <= self.num_given => "was closed or freed",
            None => "was never given out",
        };
        let message = format!("the handle {handle} {what}; expected an open {kind}");
        Failure::new(BespokeStatus::InvalidHandle, message)
    }
}

fn add(object: Object) -> Result<u64, Failure> {
    let mut handles = lock();
    if handles.objects.len() >= HANDLES_MAX {
        // NOTE: not while the lock is held, as the object may have to wait for a thread.
        drop(handles);
        drop(object);
        let message = format!("{HANDLES_MAX} handles are open; free some of them first");
        return Err(Failure::new(BespokeStatus::Resources, message));
    }
    handles.num_given += 1;
    let handle = handles.num_given;
    handles.objects.insert(handle, object);
    Ok(handle)
}

fn lock() -> MutexGuard<'static, Handles> {
    // NOTE: nothing panics while it holds the lock, so a poisoned one is whole too.
    HANDLES.lock().unwrap_or_else(PoisonError::into_inner)
}
