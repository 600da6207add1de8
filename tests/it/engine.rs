//! The engine: requests, scheduling, sampling.

mod handle;
mod null;
mod requests;
mod sampling;
mod simulation;
