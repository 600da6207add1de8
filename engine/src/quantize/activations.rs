//! The residual stream of the calibration samples between two layers, in memory or in a file.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// float32 `[num_samples, sample_len, width]`, read and written sample by sample.
pub(super) struct Activations {
    /// Numbers of one sample.
    len: usize,
    store: Store,
}

enum Store {
    Memory(Vec<f32>),
    File(SpillFile),
}

/// A file that goes when it is closed.
struct SpillFile {
    path: PathBuf,
    file: File,
}

impl Activations {
    /// Zeros: `num_samples` times `len` numbers, in a file `name` of the folder `spill` where one
    /// is given.
    ///
    /// # Errors
    /// There is no memory, or the file cannot be made.
    pub(super) fn new(
        num_samples: usize,
        len: usize,
        spill: Option<&Path>,
        name: &str,
    ) -> Result<Activations, Error> {
        let num_values = num_samples.checked_mul(len).ok_or_else(|| too_many(num_samples, len))?;
        let store = match spill {
            Some(dir) => Store::File(SpillFile::create(dir, name, num_values as u64 * 4)?),
            None => {
                let mut values = Vec::new();
                values.try_reserve_exact(num_values).map_err(|_| too_many(num_samples, len))?;
                values.resize(num_values, 0.0);
                Store::Memory(values)
            }
        };
        Ok(Activations { len, store })
    }

    /// Fills `out` with one sample.
    pub(super) fn read(&mut self, sample_idx: usize, out: &mut [f32]) -> Result<(), Error> {
        assert_eq!(out.len(), self.len);
        match &mut self.store {
            Store::Memory(values) => {
                out.copy_from_slice(&values[sample_idx * self.len..][..self.len]);
                Ok(())
            }
            Store::File(file) => file.read(sample_idx, out),
        }
    }

    pub(super) fn write(&mut self, sample_idx: usize, sample: &[f32]) -> Result<(), Error> {
        assert_eq!(sample.len(), self.len);
        match &mut self.store {
            Store::Memory(values) => {
                values[sample_idx * self.len..][..self.len].copy_from_slice(sample);
                Ok(())
            }
            Store::File(file) => file.write(sample_idx, sample),
        }
    }
}

impl SpillFile {
    fn create(dir: &Path, name: &str, num_bytes: u64) -> Result<SpillFile, Error> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let path = dir.join(name);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&path).map_err(|e| Error::io(&path, e))?;
        let file = SpillFile { path, file };
        file.file.set_len(num_bytes).map_err(|e| Error::io(&file.path, e))?;
        Ok(file)
    }

    fn read(&mut self, sample_idx: usize, out: &mut [f32]) -> Result<(), Error> {
        let mut bytes = vec![0; out.len() * 4];
        self.seek(sample_idx * bytes.len())?;
        self.file.read_exact(&mut bytes).map_err(|e| Error::io(&self.path, e))?;
        for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }

    fn write(&mut self, sample_idx: usize, sample: &[f32]) -> Result<(), Error> {
        self.seek(sample_idx * sample.len() * 4)?;
        let bytes: Vec<u8> = sample.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.file.write_all(&bytes).map_err(|e| Error::io(&self.path, e))
    }

    fn seek(&mut self, at: usize) -> Result<(), Error> {
        let at = SeekFrom::Start(at as u64);
        self.file.seek(at).map(|_| ()).map_err(|e| Error::io(&self.path, e))
    }
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        // Whoever made the folder removes what cannot be removed now.
        let _ = fs::remove_file(&self.path);
    }
}

fn too_many(num_samples: usize, len: usize) -> Error {
    Error::Resources(format!(
        "no memory for the activations of {num_samples} samples of {len} numbers; take fewer or \
         shorter samples, or keep activations in files"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_hold_what_memory_holds() {
        let dir = tempfile::tempdir().unwrap();
        let spill = dir.path().join("activations");
        let mut memory = Activations::new(3, 4, None, "a").unwrap();
        let mut file = Activations::new(3, 4, Some(&spill), "a").unwrap();
        for (idx, sample) in [[1.0f32, -2.5, 3e-30, 4e30], [5.0; 4]].iter().enumerate() {
            memory.write(2 * idx, sample).unwrap();
            file.write(2 * idx, sample).unwrap();
        }
        for idx in 0..3 {
            let (mut a, mut b) = ([9.0; 4], [8.0; 4]);
            memory.read(idx, &mut a).unwrap();
            file.read(idx, &mut b).unwrap();
            assert_eq!(a, b);
        }
        drop(file);
        assert_eq!(fs::read_dir(&spill).unwrap().count(), 0);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        for len in [usize::MAX / 8, usize::MAX] {
            let error = Activations::new(3, len, None, "a").err().unwrap().to_string();
            assert!(error.contains("3 samples"), "{error}");
        }
    }
}
