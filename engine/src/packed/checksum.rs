//! A checksum that runs at the speed of memory.
//!
//! Eight lanes of FNV-1a over 64-bit words (Fowler, Noll, Vo; the multiplier is theirs), so that
//! the machine has eight multiplications under way. A lane's step can be undone, so two arrays
//! that differ in one word never agree. It finds accidents, not forgers.

#[cfg(unix)]
use std::fs::File;
#[cfg(unix)]
use std::io;

const PRIME: u64 = 0x0000_0100_0000_01b3;
const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const LANES: usize = 8;

/// The checksum of `bytes`, their number included.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    let mut lanes = Lanes::default();
    let rest = lanes.add(bytes);
    lanes.finish(rest, bytes.len() as u64)
}

/// That of the `len` bytes from `offset` on of a file, which stay out of this process's memory.
///
/// # Errors
/// The file cannot be read, or ends before.
#[cfg(unix)]
pub(super) fn checksum_in_file(file: &File, offset: u64, len: u64) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;

    let mut buffer = vec![0; BUFFER_LEN];
    let (mut lanes, mut at) = (Lanes::default(), 0);
    loop {
        let part = &mut buffer[..(len - at).min(BUFFER_LEN as u64) as usize];
        file.read_exact_at(part, offset + at)?;
        at += part.len() as u64;
        let rest = lanes.add(part);
        if at == len {
            return Ok(lanes.finish(rest, len));
        }
    }
}

/// Bytes that are read at a time: whole lines, and no more than a second cache level holds.
#[cfg(unix)]
const BUFFER_LEN: usize = 256 << 10;

struct Lanes([u64; LANES]);

impl Default for Lanes {
    fn default() -> Lanes {
        Lanes(std::array::from_fn(|lane| BASIS ^ lane as u64))
    }
}

impl Lanes {
    /// Takes whole lines of `bytes`; what is left of them.
    fn add<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (lines, rest) = bytes.as_chunks::<{ LANES * 8 }>();
        for line in lines {
            let (words, _) = line.as_chunks::<8>();
            for (lane, word) in self.0.iter_mut().zip(words) {
                *lane = step(*lane, u64::from_le_bytes(*word));
            }
        }
        rest
    }

    fn finish(self, rest: &[u8], len: u64) -> u64 {
        let ends = rest.iter().map(|byte| u64::from(*byte)).chain([len]);
        self.0.into_iter().chain(ends).fold(BASIS, step)
    }
}

fn step(state: u64, word: u64) -> u64 {
    (state ^ word).wrapping_mul(PRIME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_and_the_length_count() {
        let bytes: Vec<u8> = (0..197u8).collect();
        let expected = checksum(&bytes);
        for bit in 0..bytes.len() * 8 {
            let mut other = bytes.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(checksum(&other), expected, "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert_ne!(checksum(&bytes[..len]), expected);
            assert_ne!(checksum(&vec![0; len]), checksum(&vec![0; len + 1]));
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_file_has_the_checksum_of_its_bytes() {
        use std::io::Write;

        let bytes: Vec<u8> = (0..2 * BUFFER_LEN + 777).map(|idx| (idx % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for (offset, len) in [(0, bytes.len()), (64, 2 * BUFFER_LEN), (100, 63), (5, 0)] {
            let expected = checksum(&bytes[offset..offset + len]);
            let found = checksum_in_file(&file, offset as u64, len as u64).unwrap();
            assert_eq!(found, expected, "{len} bytes from {offset} on");
        }
        assert!(checksum_in_file(&file, 100, bytes.len() as u64).is_err());
    }
}
