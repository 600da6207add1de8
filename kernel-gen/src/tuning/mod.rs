//! Choices by measurement: on which devices they hold (`device`), and what was decided (`lock`).

pub mod device;
pub mod lock;
