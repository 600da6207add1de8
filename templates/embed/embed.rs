//! `embed`
