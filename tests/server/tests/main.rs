//! The tests of the server, a module per area.

mod bench;
mod chat;
mod faults;
mod frame;
mod grammar;
mod numbers;
mod openai;
mod page;
mod process;
mod prompts;
mod tenants;
#[cfg(unix)]
mod terminal;
