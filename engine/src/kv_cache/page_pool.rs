//! The pages of one KV cache: free, active or cached.
//!
//! ```text
//!            allocate                    release
//!   free ───────────────► active ──────────────────────► free     nobody will want the content
//!    ▲                     ▲  │ release, content kept
//!    │ evict, forget       │  ▼
//!    └───────────────────  cached      revive, find: active again
//! ```
//!
//! Content is append-only: a slot that was written is not written again until the page is handed
//! out anew, so that stamps and hashes of a page stay true while it lives. Whoever wants to write
//! elsewhere than at the end, or beside somebody else, copies the page.

use std::collections::BTreeMap;

use super::prefix::{Namespace, PageHash, PrefixIndex};
use crate::fault::{Fault, is_planted};

/// A page that somebody owns, alone or with others. It cannot be copied, and giving it back
/// consumes it, so that no page is given back twice.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a page that is dropped is lost to its pool"]
pub struct Page(u32);

/// Remembers a page's content without holding the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageStamp {
    id: u32,
    generation: u64,
}

/// What becomes of a page's content when its last owner gives it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It stays until the page is needed, for those who have a stamp.
    Content,
    /// It is given up, unless the prefix index knows it or somebody else kept it.
    Nothing,
}

/// Pages by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    pub free: usize,
    /// Owned by sequences.
    pub active: usize,
    /// Owned by nobody, with content that may be used again.
    pub cached: usize,
}

/// The pages of one KV cache.
#[derive(Debug)]
pub struct PagePool {
    page_size: usize,
    pages: Vec<PageState>,
    /// Ids of free pages; the last is handed out next.
    free: Vec<u32>,
    /// Cached pages by the time they were given back; the first is evicted next.
    cached: BTreeMap<u64, u32>,
    /// Counts releases.
    time: u64,
    prefix: PrefixIndex,
}

#[derive(Clone, Debug, Default)]
struct PageState {
    num_owners: u32,
    /// Changes when the content is given up.
    generation: u64,
    /// Key in `PagePool::cached` of a cached page.
    released_at: Option<u64>,
    is_kept: bool,
    /// The first slot not written, where nobody is about to write it.
    open_at: Option<usize>,
    hash: Option<PageHash>,
}

impl Page {
    /// The page's place in the cache.
    pub fn id(&self) -> u32 {
        self.0
    }
}

impl PagePool {
    /// `hash_key` keys the hashes of the prefix index.
    pub fn new(num_pages: usize, page_size: usize, hash_key: [u8; 32]) -> PagePool {
        assert!(u32::try_from(num_pages).is_ok(), "page ids are 32 bits");
        assert!(page_size > 0, "a page holds at least a token");
        PagePool {
            page_size,
            pages: vec![PageState::default(); num_pages],
            free: (0..num_pages as u32).rev().collect(),
            cached: BTreeMap::new(),
            time: 0,
            prefix: PrefixIndex::new(num_pages, page_size, hash_key),
        }
    }

    pub fn num_pages(&self) -> usize {
        self.pages.len()
    }

    /// Token slots of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages that [`PagePool::allocate`] can hand out.
    pub fn num_available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    pub fn counts(&self) -> PageCounts {
        let (free, cached) = (self.free.len(), self.cached.len());
        PageCounts { free, active: self.pages.len() - free - cached, cached }
    }

    /// A page to write from its first slot on, or `None` where all are active. Where none is free,
    /// the cached page that was given back first loses its content.
    pub fn allocate(&mut self) -> Option<Page> {
        if self.free.is_empty() {
            let (_, id) = self.cached.pop_first()?;
            self.give_up_content(id);
        }
        let id = self.free.pop()?;
        self.pages[id as usize].num_owners = 1;
        Some(Page(id))
    }

    /// One more owner for a page.
    pub fn share(&mut self, page: &Page) -> Page {
        if !is_planted(Fault::ShareNotCounted) {
            self.pages[page.0 as usize].num_owners += 1;
        }
        Page(page.0)
    }

    /// Takes a page back from one of its owners.
    pub fn release(&mut self, page: Page, keep: Keep) {
        let state = self.pages.get_mut(page.0 as usize).expect("a page of this pool");
        assert!(state.num_owners > 0, "page {} comes back more often than it was given", page.0);
        state.num_owners -= 1;
        state.is_kept |= keep == Keep::Content;
        if state.num_owners > 0 {
            return;
        }
        if state.is_kept || state.hash.is_some() {
            state.released_at = Some(self.time);
            self.cached.insert(self.time, page.0);
            self.time += 1;
        } else {
            self.give_up_content(page.0);
        }
    }

    /// Remembers a page's present content.
    pub fn stamp(&self, page: &Page) -> PageStamp {
        PageStamp { id: page.0, generation: self.pages[page.0 as usize].generation }
    }

    /// The page with the content that was stamped, if it still has it.
    pub fn revive(&mut self, stamp: PageStamp) -> Option<Page> {
        let state = self.pages.get(stamp.id as usize)?;
        (state.generation == stamp.generation).then(|| self.own(stamp.id))
    }

    /// Frees a page that only the holder of `stamp` could have used again.
    pub fn forget(&mut self, stamp: PageStamp) {
        let Some(state) = self.pages.get(stamp.id as usize) else { return };
        if state.generation != stamp.generation || state.hash.is_some() {
            return;
        }
        if let Some(time) = state.released_at {
            self.cached.remove(&time);
            self.give_up_content(stamp.id);
        }
    }

    /// Whether a page can be appended to at slot `num_filled`. Otherwise something was written
    /// there, or somebody is about to, and the page has to be copied.
    pub fn is_open(&self, page: &Page, num_filled: usize) -> bool {
        let open_at = self.pages[page.0 as usize].open_at;
        open_at == Some(num_filled) || is_planted(Fault::NoCopyOnWrite)
    }

    /// Takes the right to append to a page.
    pub fn open(&mut self, page: &Page) {
        self.pages[page.0 as usize].open_at = None;
    }

    /// Gives up the right to append, `num_filled` slots being written.
    pub fn close(&mut self, page: &Page, num_filled: usize) {
        self.pages[page.0 as usize].open_at = Some(num_filled);
    }

    /// The hash before the first page of a sequence, see [`PageHash`].
    pub fn root_hash(&self, namespace: Namespace, variant: u64) -> PageHash {
        self.prefix.root(namespace, variant)
    }

    /// The hash of a full page of `tokens` behind the page or root `parent`.
    pub fn page_hash(&self, parent: &PageHash, tokens: &[u32]) -> PageHash {
        self.prefix.hash(parent, tokens)
    }

    /// Enters a full page into the prefix index, unless another one has the same tokens.
    pub fn register(&mut self, page: &Page, hash: PageHash, parent: PageHash, tokens: &[u32]) {
        let state = &mut self.pages[page.0 as usize];
        if state.hash.is_none() && !self.prefix.contains(&hash) {
            state.hash = Some(hash);
            self.prefix.insert(page.0, hash, parent, tokens);
        }
    }

    /// The page of these tokens, if the prefix index has it.
    pub fn find(&mut self, hash: &PageHash, parent: &PageHash, tokens: &[u32]) -> Option<Page> {
        let id = self.prefix.get(hash, parent, tokens)?;
        Some(self.own(id))
    }

    /// One more owner for a page that is active or cached.
    fn own(&mut self, id: u32) -> Page {
        let state = &mut self.pages[id as usize];
        state.num_owners += 1;
        if let Some(time) = state.released_at.take() {
            self.cached.remove(&time);
        }
        Page(id)
    }

    /// Frees a page without owners that is no longer listed as cached.
    fn give_up_content(&mut self, id: u32) {
        let state = &mut self.pages[id as usize];
        if !is_planted(Fault::StaleStamp) {
            state.generation += 1;
        }
        state.released_at = None;
        state.is_kept = false;
        state.open_at = None;
        if !is_planted(Fault::StaleHash)
            && let Some(hash) = state.hash.take()
        {
            self.prefix.remove(&hash);
        }
        self.free.push(id);
    }

    /// Checks what must hold between any two calls; `num_owned` is the number of page handles that
    /// are around.
    pub fn check(&self, num_owned: usize) -> Result<(), String> {
        let owners: usize = self.pages.iter().map(|state| state.num_owners as usize).sum();
        if owners != num_owned {
            return Err(format!("{num_owned} handles of pages, but {owners} are counted"));
        }
        let mut seen = vec![false; self.pages.len()];
        for id in self.free.iter().chain(self.cached.values()) {
            let state = &self.pages[*id as usize];
            if std::mem::replace(&mut seen[*id as usize], true) {
                return Err(format!("page {id} is listed twice"));
            }
            if state.num_owners > 0 {
                return Err(format!("page {id} is listed, but has {} owners", state.num_owners));
            }
        }
        for (time, id) in &self.cached {
            let state = &self.pages[*id as usize];
            if state.released_at != Some(*time) || !(state.is_kept || state.hash.is_some()) {
                return Err(format!("cached page {id} has no content worth keeping"));
            }
        }
        if let Some(id) = self.free.iter().find(|id| self.pages[**id as usize].hash.is_some()) {
            return Err(format!("free page {id} is in the prefix index"));
        }
        let num_ownerless = self.pages.iter().filter(|state| state.num_owners == 0).count();
        if num_ownerless != self.num_available() {
            let num_available = self.num_available();
            return Err(format!("{num_ownerless} pages without owners, {num_available} listed"));
        }
        for (hash, id) in self.prefix.iter() {
            if self.pages[id as usize].hash != Some(*hash) {
                return Err(format!("the prefix index knows page {id} by a hash it does not have"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(num_pages: usize) -> PagePool {
        PagePool::new(num_pages, 2, [7; 32])
    }

    #[test]
    fn exhaustion_is_a_value() {
        let mut pool = pool(2);
        let first = pool.allocate().unwrap();
        let second = pool.allocate().unwrap();
        assert_ne!(first, second);
        assert_eq!(pool.allocate(), None);
        pool.release(first, Keep::Nothing);
        assert_eq!(pool.counts(), PageCounts { free: 1, active: 1, cached: 0 });
        assert_eq!(pool.allocate().unwrap().id(), 0);
        pool.release(second, Keep::Nothing);
        pool.check(1).unwrap();
    }

    #[test]
    fn kept_content_lives_until_its_page_is_needed_oldest_first() {
        let mut pool = pool(3);
        let pages: Vec<Page> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        let stamps: Vec<PageStamp> = pages.iter().map(|page| pool.stamp(page)).collect();
        pages.into_iter().rev().for_each(|page| pool.release(page, Keep::Content));
        assert_eq!(pool.counts(), PageCounts { free: 0, active: 0, cached: 3 });
        let taken = pool.allocate().unwrap();
        assert_eq!(taken.id(), 2, "the tail goes first");
        assert_eq!(pool.revive(stamps[2]), None);
        let head = pool.revive(stamps[0]).unwrap();
        let again = pool.revive(stamps[0]).unwrap();
        assert_eq!(head, again);
        pool.check(3).unwrap();
        pool.forget(stamps[1]);
        assert_eq!(pool.counts(), PageCounts { free: 1, active: 2, cached: 0 });
        pool.forget(stamps[0]);
        assert_eq!(pool.counts(), PageCounts { free: 1, active: 2, cached: 0 }, "in use");
        for page in [head, again, taken] {
            pool.release(page, Keep::Nothing);
        }
        assert_eq!(pool.counts(), PageCounts { free: 2, active: 0, cached: 1 }, "kept before");
        pool.check(0).unwrap();
    }

    #[test]
    fn pages_are_found_by_all_tokens_up_to_their_end() {
        let mut pool = pool(4);
        let root = pool.root_hash(Namespace(1), 0);
        let first = pool.allocate().unwrap();
        let first_hash = pool.page_hash(&root, &[5, 6]);
        pool.register(&first, first_hash, root, &[5, 6]);
        let second = pool.allocate().unwrap();
        let second_hash = pool.page_hash(&first_hash, &[5, 6]);
        assert_ne!(first_hash, second_hash);
        pool.register(&second, second_hash, first_hash, &[5, 6]);
        let duplicate = pool.allocate().unwrap();
        pool.register(&duplicate, second_hash, first_hash, &[5, 6]);
        pool.release(duplicate, Keep::Nothing);
        pool.release(second, Keep::Nothing);
        assert_eq!(pool.counts(), PageCounts { free: 2, active: 1, cached: 1 });
        let found = pool.find(&second_hash, &first_hash, &[5, 6]).unwrap();
        assert_eq!(found.id(), 1);
        assert_eq!(pool.find(&second_hash, &root, &[5, 6]), None);
        assert_eq!(pool.find(&second_hash, &first_hash, &[5, 7]), None);
        assert_ne!(pool.root_hash(Namespace(2), 0), root);
        assert_ne!(pool.root_hash(Namespace(1), 1), root);
        pool.check(2).unwrap();
        pool.release(found, Keep::Nothing);
        pool.release(first, Keep::Nothing);
    }

    #[test]
    fn only_the_end_of_a_page_can_be_appended_to_and_by_one() {
        let mut pool = pool(1);
        let page = pool.allocate().unwrap();
        assert!(!pool.is_open(&page, 0), "who allocates a page appends to it");
        pool.close(&page, 1);
        assert!(!pool.is_open(&page, 0));
        let other = pool.share(&page);
        assert!(pool.is_open(&page, 1) && pool.is_open(&other, 1));
        pool.open(&page);
        assert!(!pool.is_open(&other, 1));
        pool.release(page, Keep::Nothing);
        pool.release(other, Keep::Nothing);
        pool.check(0).unwrap();
    }

    #[test]
    #[should_panic(expected = "a page of this pool")]
    fn a_foreign_page_is_refused() {
        let mut large = pool(9);
        let page = (0..9).map(|_| large.allocate().unwrap()).last().unwrap();
        pool(2).release(page, Keep::Nothing);
    }
}
