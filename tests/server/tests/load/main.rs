//! The server under load. A binary of its own: its tests count the process's file descriptors and
//! memory, so nothing else may run in it, and they run one after the other.

mod body;
mod client;
mod endurance;
mod oracle;
mod process;
mod streams;
