//! A model's weights in a file, as the CPU's kernels read them: mapped, not loaded.
//!
//! [`PackedFile`] is an opened file, [`write`] makes one of a loaded model, and [`PackedCache`]
//! keeps those of the models that were loaded lately.

mod cache;
mod checksum;
mod format;
mod parts;
mod write;

pub use cache::{BYTES_MAX, PackedCache};
pub use format::{PackedFile, VERSION};
pub use parts::PackedParts;
pub use write::{packed_bytes, write};
