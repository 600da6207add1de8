//! The tests of the server, a module per area.

mod frame;
mod page;
