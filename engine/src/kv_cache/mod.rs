//! The paged KV cache's bookkeeping: which pages belong to whom. The bytes are the backend's.

pub mod page_pool;
pub mod prefix;

pub use page_pool::{Keep, Page, PageCounts, PagePool, PageStamp};
pub use prefix::{Namespace, PageHash};

/// Pages that hold `num_tokens` tokens.
pub fn num_pages(num_tokens: usize, page_size: usize) -> usize {
    num_tokens.div_ceil(page_size)
}

/// The KV slot of the token at `position` of a sequence.
pub fn slot(pages: &[Page], position: usize, page_size: usize) -> u32 {
    let page = &pages[position / page_size];
    page.id() * page_size as u32 + (position % page_size) as u32
}
