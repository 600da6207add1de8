//! The tests of the server, a module per area.

mod bench;
mod chat;
mod frame;
#[cfg(unix)]
mod terminal;
