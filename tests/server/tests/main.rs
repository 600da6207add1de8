//! The tests of the server, a module per area.

mod chat;
mod frame;
#[cfg(unix)]
mod grammar;
mod terminal;
