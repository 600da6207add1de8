//! The tests of the server, a module per area.

mod bench;
mod chat;
mod frame;
mod grammar;
mod prompts;
#[cfg(unix)]
mod terminal;
