//! The engine: requests, scheduling, sampling.

mod null;
mod requests;
mod sampling;
