//! Rows of the embedding table as float32.
//!
//! Bound: reads one table row and writes one float32 row per token.

use super::abi::{EmbedArgs, Share};
use super::simd::{Element, Simd};

/// Copies the rows of `share`.
///
/// # Safety
/// `args` as documented on its fields; the instruction set of `S`.
#[inline(always)]
pub unsafe fn run<S: Simd, E: Element, const HIDDEN: usize>(args: &EmbedArgs, share: Share) {
    let (mut row, end) = share.range(args.rows);
    while row < end {
        // SAFETY: row < rows, and every token lies below the vocabulary size.
        unsafe {
            let token = *args.tokens.add(row) as usize;
            let x = args.table.add(token * HIDDEN * E::SIZE);
            let out = args.out.add(row * HIDDEN);
            let mut i = 0;
            while i + S::LANES <= HIDDEN {
                S::store(out.add(i), E::load::<S>(x.add(i * E::SIZE)));
                i += S::LANES;
            }
            while i < HIDDEN {
                *out.add(i) = E::get(x.add(i * E::SIZE));
                i += 1;
            }
        }
        row += 1;
    }
}
