//! `rope`
