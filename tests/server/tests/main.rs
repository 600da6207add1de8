//! The tests of the server, a module per area.

mod drain;
mod faults;
mod frame;
mod numbers;
mod process;
mod sockets;
mod tenants;
