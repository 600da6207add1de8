//! Weights that threads ask for while they wait.
//!
//! Between two matmuls of a few rows memory would lie idle: while threads wait for each other or
//! for a norm that one of them computes, and again until the processor's own prefetchers have
//! found the next stream. So a thread that waits asks for the beginning of its share of the next
//! matmul's weights, and finds it in its second cache level.

use super::memory::Memory;

/// Bytes that a thread asks for in one wait: what a wait has time for, and a small part of a
/// second cache level.
const WAIT_BYTES: usize = 64 << 10;
/// Bytes that are asked for even where there is nothing to wait for: as many lines as a core can
/// miss at once, and some more.
const LEAST_BYTES: usize = 4 << 10;
const LINE: usize = 64;

/// Rows up to which weights are what a matmul waits for.
pub(super) const ROWS_MAX: usize = 16;

/// The arrays that a matmul will read, each shared out to the threads in equal parts; scales come
/// first, because the first group of weights ends with them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Ahead {
    arrays: [Array; 3],
}

/// An address that nothing is read from, and a length.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Array {
    start: usize,
    len: usize,
}

/// The lines that a thread has still to ask for.
#[derive(Debug, Default)]
pub(super) struct Asking {
    parts: [Array; 3],
    asked: usize,
}

impl Ahead {
    pub(super) fn new(arrays: [Option<&Memory>; 3]) -> Ahead {
        Ahead {
            arrays: arrays.map(|memory| match memory {
                Some(memory) => Array { start: memory.ptr::<u8>().addr(), len: memory.len() },
                None => Array::default(),
            }),
        }
    }

    /// What thread `idx` of `count` asks for: of each array its first bytes of the thread's share,
    /// together [`WAIT_BYTES`].
    pub(super) fn share(&self, idx: usize, count: usize) -> Asking {
        let total: usize = self.arrays.iter().map(|array| array.len).sum();
        let part = |array: Array| {
            let (first, last) = (array.len * idx / count, array.len * (idx + 1) / count);
            let len = (WAIT_BYTES * (array.len >> 10) / (total >> 10).max(1)).min(last - first);
            Array { start: (array.start + first) / LINE * LINE, len }
        };
        Asking { parts: self.arrays.map(part), asked: 0 }
    }
}

impl Asking {
    /// Asks for one line; false: there is none left.
    #[inline]
    pub(super) fn ask(&mut self) -> bool {
        for part in &mut self.parts {
            if part.len > 0 {
                prefetch(part.start);
                part.start += LINE;
                part.len = part.len.saturating_sub(LINE);
                self.asked += LINE;
                return true;
            }
        }
        false
    }

    /// Asks for what is left of [`LEAST_BYTES`].
    pub(super) fn ask_least(&mut self) {
        while self.asked < LEAST_BYTES && self.ask() {}
    }
}

/// Brings the line at an address into the second cache level. Nothing is read, and any address
/// will do.
#[inline]
fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch has no effect but on caches, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// The matmuls of the last step, in the order of their calls, which is that of the next one, too.
pub(super) struct Order {
    matmuls: Vec<Ahead>,
    place: usize,
}

impl Order {
    /// Of steps with up to `len` matmuls; others beyond are not kept.
    pub(super) fn new(len: usize) -> Order {
        Order { matmuls: Vec::with_capacity(len), place: 0 }
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.place = 0;
    }

    /// Notes that `matmul` is computed now; what came after it, as far as that is known.
    pub(super) fn next(&mut self, matmul: Ahead) -> Ahead {
        let Order { matmuls, place } = self;
        if *place < matmuls.len() {
            matmuls[*place] = matmul;
        } else if *place < matmuls.capacity() {
            matmuls.push(matmul);
        } else {
            return Ahead::default();
        }
        *place += 1;
        // NOTE: behind the last one comes the next step.
        matmuls.get(*place).or(matmuls.first()).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(start: usize, len: usize) -> Ahead {
        Ahead { arrays: [Array { start, len }, Array::default(), Array::default()] }
    }

    #[test]
    fn each_thread_asks_for_the_beginning_of_its_share() {
        let ahead = array(1 << 20, 3 * WAIT_BYTES);
        for (idx, first) in [(0, 1 << 20), (1, (1 << 20) + 3 * WAIT_BYTES / 2)] {
            let mut asking = ahead.share(idx, 2);
            assert_eq!((asking.parts[0].start, asking.parts[0].len), (first, WAIT_BYTES));
            asking.ask_least();
            assert_eq!(asking.asked, LEAST_BYTES);
            while asking.ask() {}
            assert_eq!(asking.asked, WAIT_BYTES);
        }
    }

    #[test]
    fn arrays_share_the_bytes_by_their_lengths() {
        let arrays = [(0, 1 << 20), (4 << 20, 2 << 20), (8 << 20, 13 << 20)];
        let ahead = Ahead { arrays: arrays.map(|(start, len)| Array { start, len }) };
        let lens = ahead.share(0, 4).parts.map(|part| part.len);
        assert_eq!(lens, [WAIT_BYTES / 16, WAIT_BYTES / 8, WAIT_BYTES / 16 * 13]);
        assert!(!Ahead::default().share(1, 2).ask(), "nothing to ask for");
    }

    #[test]
    fn a_step_is_as_the_last_one() {
        let mut order = Order::new(3);
        let matmuls = [array(1, 1), array(2, 1), array(3, 1)];
        let mut step = |matmuls: &[Ahead]| {
            order.begin();
            matmuls.iter().map(|matmul| order.next(*matmul)).collect::<Vec<_>>()
        };
        let [a, b, c] = matmuls;
        assert_eq!(step(&[a, b, c]), [a, a, a]);
        assert_eq!(step(&[a, b, c]), [b, c, a]);
        // Without the last one, then with one too many.
        assert_eq!(step(&[a, b]), [b, c]);
        assert_eq!(step(&[b, b, c, a]), [b, c, b, Ahead::default()]);
    }
}
