//! Machines whose memory lies on several nodes.
//!
//! Large maps are spread over all nodes page by page, as `numactl --interleave=all` does. Threads
//! are not pinned, and the matmuls of one model share out their columns by different numbers, so
//! that no node is nearer to what a thread will read; this way every thread reads with the
//! bandwidth of all nodes, and with the same one in every run.

/// Nodes that a mask has room for.
const NUM_NODES_MAX: usize = 1024;
const NUM_WORDS: usize = NUM_NODES_MAX / u64::BITS as usize;

/// One bit for each node.
type Mask = [u64; NUM_WORDS];

/// Spreads pages of `map` that were not touched yet over all nodes that have memory. Without
/// effect on machines with one node, and where the system does not allow it.
pub(super) fn interleave(map: &mut [u8]) {
    let Ok(list) = std::fs::read_to_string("/sys/devices/system/node/has_memory") else { return };
    if let Some(nodes) = mask(list.trim())
        && nodes.iter().map(|word| word.count_ones()).sum::<u32>() > 1
    {
        bind(map, &nodes);
    }
}

/// Asks the system to take the pages of `map` from `nodes` in turn; whether it does. `map` begins
/// with a page.
fn bind(map: &mut [u8], nodes: &Mask) -> bool {
    const MPOL_INTERLEAVE: libc::c_long = 3;
    // SAFETY: the system reads the mask, whose bits it is told, and changes where pages come from,
    // not what is in them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            map.as_mut_ptr(),
            map.len(),
            MPOL_INTERLEAVE,
            nodes.as_ptr(),
            // NOTE: the system takes one bit less than it is told.
            NUM_NODES_MAX + 1,
            0,
        )
    };
    result == 0
}

/// The nodes of a list such as `0-1,4`; `None` where it is none.
fn mask(list: &str) -> Option<Mask> {
    let mut mask = [0; NUM_WORDS];
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= NUM_NODES_MAX {
            return None;
        }
        for node in first..=last {
            mask[node / 64] |= 1 << (node % 64);
        }
    }
    Some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapMut;

    #[test]
    fn reads_lists_of_nodes() {
        let nodes = |list| mask(list).map(|mask| (mask[0], mask[1]));
        assert_eq!(nodes("0"), Some((1, 0)));
        assert_eq!(nodes("0-1,4"), Some((0b1_0011, 0)));
        assert_eq!(nodes("63-64"), Some((1 << 63, 1)));
        for wrong in ["", "a", "1-", "3-1", "0-1024", "0,,1"] {
            assert_eq!(nodes(wrong), None, "{wrong:?}");
        }
    }

    /// The pages of a map that was bound say so, as long as the system allows to bind at all.
    #[test]
    fn pages_are_taken_in_turn() {
        let mut map = MmapMut::map_anon(1 << 20).unwrap();
        let start = map.as_ptr().addr();
        if bind(&mut map, &mask("0").unwrap()) {
            map.fill(1);
            let Ok(maps) = std::fs::read_to_string("/proc/self/numa_maps") else { return };
            let line = maps.lines().find(|line| line.starts_with(&format!("{start:x} ")));
            assert!(line.is_some_and(|line| line.contains("interleave")), "{line:?}");
        }
    }
}
