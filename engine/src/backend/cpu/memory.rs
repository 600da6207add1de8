//! Page-aligned memory for weights, activations and the KV cache.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapMut, MmapOptions};

#[cfg(target_os = "linux")]
use super::numa;
use crate::error::Error;
use crate::memory;

/// Memory that lives as long as its backend: its own, zeroed at first, or a part of a file that is
/// only read.
pub struct Memory {
    store: Store,
    len: usize,
}

enum Store {
    Own(MmapMut),
    Mapped { map: Arc<MappedFile>, start: usize },
}

/// Bytes of a file that are only read: mapped, or a copy in large pages.
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

    /// Reads the `len` bytes from `offset` on of `file` into large pages, on `num_threads` threads;
    /// `None` where the system has no large pages or not the memory.
    ///
    /// Those of a mapped file are small as a rule, from which a few rows decode 8 to 20 % slower.
    ///
    /// # Errors
    /// The file cannot be read, or ends before.
    #[cfg(target_os = "linux")]
    pub fn read(
        file: &File,
        offset: u64,
        len: usize,
        num_threads: usize,
    ) -> io::Result<Option<MappedFile>> {
        use std::os::unix::fs::FileExt;

        let has_room = memory::available_bytes().is_none_or(|bytes| bytes / 8 * 7 > len as u64);
        if len < LARGE_PAGE || !has_large_pages() || !has_room {
            return Ok(None);
        }
        let Ok(mut map) = MmapMut::map_anon(len) else { return Ok(None) };
        // NOTE: where it says no, the copy costs memory and is still right.
        let _ = map.advise(memmap2::Advice::HugePage);
        numa::interleave(&mut map);
        let part = len.div_ceil(num_threads.clamp(1, 64)).next_multiple_of(LARGE_PAGE);
        std::thread::scope(|scope| {
            let read = |(idx, bytes): (usize, &mut [u8])| {
                file.read_exact_at(bytes, offset + (idx * part) as u64)
            };
            let parts = map.chunks_mut(part).enumerate();
            let threads: Vec<_> = parts.map(|part| scope.spawn(move || read(part))).collect();
            let joined = threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload))
            });
            joined.collect::<io::Result<()>>()
        })?;
        Ok(Some(MappedFile { map: map.make_read_only()? }))
    }

    #[cfg(not(target_os = "linux"))]
    pub fn read(_: &File, _: u64, _: usize, _: usize) -> io::Result<Option<MappedFile>> {
        Ok(None)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// Bytes of a large page on the machines that we know.
const LARGE_PAGE: usize = 2 << 20;

/// Whether the system gives large pages to who asks for them, which it does unless it says no.
#[cfg(target_os = "linux")]
fn has_large_pages() -> bool {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    text.is_ok_and(|text| !text.contains("[never]"))
}

impl Memory {
    /// `len` zeroed bytes for `what`, which an error names.
    pub fn new(len: usize, what: &str) -> Result<Memory, Error> {
        // NOTE: a map of no bytes is refused by the system.
        #[cfg_attr(not(target_os = "linux"), allow(unused_mut))]
        let mut map = MmapMut::map_anon(len.max(1)).map_err(|error| {
            Error::Resources(format!(
                "cannot allocate {len} bytes for {what}: {error}; free memory or choose a smaller \
                 context or batch"
            ))
        })?;
        // Large maps are streamed through: fewer TLB misses. A system without them only says no.
        #[cfg(target_os = "linux")]
        if len >= 2 * LARGE_PAGE {
            let _ = map.advise(memmap2::Advice::HugePage);
            numa::interleave(&mut map);
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_part_of_a_file_is_read_by_any_number_of_threads() {
        let len = 3 * LARGE_PAGE + 777;
        let bytes: Vec<u8> = (0..len + 4096).map(|idx| (idx % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for num_threads in [1, 2, 3, 100] {
            // Nothing where the system has no large pages, or is short of memory.
            if let Some(read) = MappedFile::read(&file, 4096, len, num_threads).unwrap() {
                assert!(read.bytes() == &bytes[4096..]);
            }
        }
        assert!(MappedFile::read(&file, 4096, 777, 2).unwrap().is_none());
        if has_large_pages() {
            assert!(MappedFile::read(&file, 4096, len + 1, 2).is_err());
        }
    }
}
