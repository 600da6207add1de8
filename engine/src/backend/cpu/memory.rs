//! Page-aligned memory for weights, activations and the KV cache.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::error::Error;

/// Memory that lives as long as its backend: its own, zeroed at first, or a part of a file that is
/// mapped and only read.
pub struct Memory {
    store: Store,
    len: usize,
}

enum Store {
    Own(MmapMut),
    Mapped { map: Arc<MappedFile>, start: usize },
}

/// Bytes of a file, mapped for reading.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
}

/// Where parts of a [`MappedFile`] begin that kernels read: at a multiple of a cache line.
pub const ALIGNMENT: usize = 64;

impl MappedFile {
    /// Maps `len` bytes from `offset` on of `file`, whose name an error tells. Bytes behind the
    /// file's end must not be read: the system ends the process for it.
    pub fn open(file: &File, path: &Path, offset: u64, len: usize) -> Result<MappedFile, Error> {
        let mut options = MmapOptions::new();
        options.offset(offset).len(len);
        // SAFETY: the callers map files that appear whole under their names and are never written
        // again: packed weights, and a program while it runs.
        let map = unsafe { options.map(file) }.map_err(|error| Error::io(path, error))?;
        Ok(MappedFile { map })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

impl Memory {
    /// `len` zeroed bytes for `what`, which an error names.
    pub fn new(len: usize, what: &str) -> Result<Memory, Error> {
        // NOTE: a map of no bytes is refused by the system.
        let map = MmapMut::map_anon(len.max(1)).map_err(|error| {
            Error::Resources(format!(
                "cannot allocate {len} bytes for {what}: {error}; free memory or choose a smaller \
                 context or batch"
            ))
        })?;
        // Large maps are streamed through: fewer TLB misses. A system without them only says no.
        #[cfg(target_os = "linux")]
        if len >= 4 << 20 {
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Memory { store: Store::Own(map), len })
    }

    /// `len` bytes of `map` from `start` on, a multiple of [`ALIGNMENT`]. They can only be read.
    pub fn mapped(map: &Arc<MappedFile>, start: usize, len: usize) -> Memory {
        let end = start.checked_add(len);
        assert!(end.is_some_and(|end| end <= map.bytes().len()), "a part of the map");
        assert!(map.bytes()[start..].as_ptr().addr().is_multiple_of(ALIGNMENT), "aligned");
        Memory { store: Store::Mapped { map: map.clone(), start }, len }
    }

    /// `len` zeroed elements of 4 bytes.
    pub fn floats(len: usize, what: &str) -> Result<Memory, Error> {
        let bytes = len.checked_mul(4).ok_or_else(|| {
            Error::Resources(format!("{len} elements for {what} do not fit an address space"))
        })?;
        Memory::new(bytes, what)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn ptr<T>(&self) -> *const T {
        self.bytes().as_ptr().cast()
    }

    pub fn ptr_mut<T>(&mut self) -> *mut T {
        self.bytes_mut().as_mut_ptr().cast()
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.store {
            Store::Own(map) => &map[..self.len],
            Store::Mapped { map, start } => &map.bytes()[*start..*start + self.len],
        }
    }

    /// Panics for a mapped file's bytes: weights are not written once they are packed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.store {
            Store::Own(map) => &mut map[..self.len],
            Store::Mapped { .. } => panic!("packed weights are only read"),
        }
    }

    /// The memory as float32 values.
    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: a map is page-aligned, a part of a file lies at a multiple of `ALIGNMENT`, and
        // every bit pattern is a float32.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len / 4) }
    }

    /// The memory as float32 values.
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_f32`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr_mut(), self.len / 4) }
    }
}
