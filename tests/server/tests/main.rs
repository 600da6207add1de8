//! The tests of the server, a module per area.

mod chat;
mod frame;
mod grammar;
#[cfg(unix)]
mod terminal;
