//! The engine: requests, scheduling, sampling.

mod determinism;
mod handle;
mod null;
mod requests;
mod sampling;
mod servings;
mod sessions;
mod usage;
