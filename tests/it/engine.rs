//! The engine: requests, scheduling, sampling.

mod requests;
mod sampling;
