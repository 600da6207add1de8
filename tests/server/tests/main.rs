//! The tests of the server, a module per area.

mod faults;
mod frame;
mod numbers;
mod page;
mod process;
mod tenants;
