//! The tests of the server, a module per area.

mod faults;
mod frame;
mod grammar;
mod numbers;
mod openai;
mod process;
mod prompts;
mod tenants;
