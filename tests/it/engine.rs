//! The engine: requests, scheduling, sampling.

mod determinism;
mod handle;
mod null;
mod requests;
mod sampling;
mod sessions;
mod usage;
