//! Page-aligned memory for weights, activations and the KV cache.

use memmap2::MmapMut;

use crate::error::Error;

/// Zeroed memory that lives as long as its backend.
pub struct Memory {
    map: MmapMut,
    len: usize,
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
        Ok(Memory { map, len })
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
        self.map.as_ptr().cast()
    }

    pub fn ptr_mut<T>(&mut self) -> *mut T {
        self.map.as_mut_ptr().cast()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map[..self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[..self.len]
    }

    /// The memory as float32 values.
    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: a map is page-aligned, and every bit pattern is a float32.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len / 4) }
    }

    /// The memory as float32 values.
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_f32`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr_mut(), self.len / 4) }
    }
}
