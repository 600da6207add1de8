//! The tests of the server, a module per area.

mod bench;
mod chat;
mod drain;
mod faults;
mod frame;
mod grammar;
mod kills;
mod numbers;
mod openai;
mod page;
mod process;
mod prompts;
mod sockets;
mod tenants;
mod terminal;
