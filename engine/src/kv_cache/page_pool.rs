//! Free pages of the KV cache.

/// A page that somebody owns. It cannot be copied, and giving it back consumes it, so that no page
/// is free twice or used by two.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a page that is dropped is lost to its pool"]
pub struct Page(u32);

/// The pages of one KV cache.
#[derive(Debug)]
pub struct PagePool {
    num_pages: usize,
    /// Ids of free pages; the last is handed out next.
    free: Vec<u32>,
}

impl Page {
    /// The page's place in the cache.
    pub fn id(&self) -> u32 {
        self.0
    }
}

impl PagePool {
    pub fn new(num_pages: usize) -> PagePool {
        assert!(u32::try_from(num_pages).is_ok(), "page ids are 32 bits");
        PagePool { num_pages, free: (0..num_pages as u32).rev().collect() }
    }

    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// A free page, or `None` where all are taken.
    pub fn allocate(&mut self) -> Option<Page> {
        self.free.pop().map(Page)
    }

    /// Appends `count` pages to `pages`, or takes none and returns false where fewer are free.
    pub fn allocate_many(&mut self, count: usize, pages: &mut Vec<Page>) -> bool {
        if count > self.free.len() {
            return false;
        }
        let first = self.free.len() - count;
        pages.extend(self.free.drain(first..).rev().map(Page));
        true
    }

    /// Takes a page back.
    pub fn free(&mut self, page: Page) {
        assert!((page.0 as usize) < self.num_pages, "page {} of another pool", page.0);
        assert!(self.free.len() < self.num_pages, "more pages come back than there are");
        self.free.push(page.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exhaustion_is_a_value() {
        let mut pool = PagePool::new(2);
        let first = pool.allocate().unwrap();
        let second = pool.allocate().unwrap();
        assert_ne!(first, second);
        assert_eq!(pool.allocate(), None);
        pool.free(first);
        assert_eq!(pool.num_free(), 1);
        assert_eq!(pool.allocate().unwrap().id(), 0);
        pool.free(second);
    }

    #[test]
    fn many_pages_come_all_or_not_at_all() {
        let mut pool = PagePool::new(5);
        let mut pages = Vec::new();
        assert!(pool.allocate_many(3, &mut pages));
        assert_eq!(pages.iter().map(Page::id).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(!pool.allocate_many(3, &mut pages));
        assert_eq!((pages.len(), pool.num_free()), (3, 2));
        assert!(pool.allocate_many(0, &mut pages));
        pages.drain(..).for_each(|page| pool.free(page));
        assert_eq!(pool.num_free(), pool.num_pages());
    }

    #[test]
    #[should_panic(expected = "another pool")]
    fn a_foreign_page_is_refused() {
        let page = PagePool::new(9).allocate_last();
        PagePool::new(2).free(page);
    }

    impl PagePool {
        fn allocate_last(mut self) -> Page {
            self.free.swap_remove(0);
            Page(self.num_pages as u32 - 1)
        }
    }
}
