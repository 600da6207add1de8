//! Which page holds the keys and values of which tokens after which other tokens.
//!
//! A full page is known by a hash over its tokens and the hash of the page before it, so that equal
//! tokens after different beginnings are different pages. Hashes are keyed BLAKE3 with a key of the
//! process, so that nobody outside can aim for a collision, and a hit compares the tokens as well.

use std::collections::BTreeMap;

use crate::fault::{Fault, is_planted};

/// Requests of one namespace may use each other's pages; those of different ones never do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Namespace(pub u64);

/// Names a page's tokens together with all tokens before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageHash([u8; 32]);

/// Full pages by the hash of their tokens.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    key: [u8; 32],
    page_size: usize,
    pages: BTreeMap<PageHash, u32>,
    /// `[num_pages]`
    parents: Vec<PageHash>,
    /// `[num_pages, page_size]`
    tokens: Vec<u32>,
}

impl PrefixIndex {
    pub(super) fn new(num_pages: usize, page_size: usize, key: [u8; 32]) -> PrefixIndex {
        PrefixIndex {
            key,
            page_size,
            pages: BTreeMap::new(),
            parents: vec![PageHash([0; 32]); num_pages],
            tokens: vec![0; num_pages * page_size],
        }
    }

    /// The hash before a sequence's first page. Sequences whose keys and values differ for equal
    /// tokens, because their rotary base does, have different `variant`s.
    pub(super) fn root(&self, namespace: Namespace, variant: u64) -> PageHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(b"root");
        let namespace = if is_planted(Fault::NamespaceIgnored) { 0 } else { namespace.0 };
        hasher.update(&namespace.to_le_bytes());
        hasher.update(&variant.to_le_bytes());
        PageHash(*hasher.finalize().as_bytes())
    }

    /// The hash of a page with `tokens` behind the page `parent`.
    pub(super) fn hash(&self, parent: &PageHash, tokens: &[u32]) -> PageHash {
        assert_eq!(tokens.len(), self.page_size, "only full pages have hashes");
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        // NOTE: the bug still knows the root, whose last bytes it hands on.
        let is_bug = is_planted(Fault::HashIgnoresParent);
        let (history, root) = parent.0.split_at(24);
        hasher.update(if is_bug { &[] } else { history });
        hasher.update(root);
        tokens.iter().for_each(|token| {
            hasher.update(&token.to_le_bytes());
        });
        let mut hash = *hasher.finalize().as_bytes();
        if is_bug {
            hash[24..].copy_from_slice(root);
        }
        PageHash(hash)
    }

    /// The page with exactly these `tokens` behind `parent`.
    pub(super) fn get(&self, hash: &PageHash, parent: &PageHash, tokens: &[u32]) -> Option<u32> {
        let page = *self.pages.get(hash)?;
        let is_same = self.parents[page as usize] == *parent && self.tokens_of(page) == tokens;
        (is_same || is_planted(Fault::HashIgnoresParent)).then_some(page)
    }

    /// Whether a page is known by `hash`.
    pub(super) fn contains(&self, hash: &PageHash) -> bool {
        self.pages.contains_key(hash)
    }

    pub(super) fn insert(&mut self, page: u32, hash: PageHash, parent: PageHash, tokens: &[u32]) {
        let start = page as usize * self.page_size;
        self.tokens[start..start + self.page_size].copy_from_slice(tokens);
        self.parents[page as usize] = parent;
        let before = self.pages.insert(hash, page);
        assert_eq!(before, None, "one page for each hash");
    }

    pub(super) fn remove(&mut self, hash: &PageHash) {
        self.pages.remove(hash).expect("a page's hash is in the index");
    }

    /// Hashes and the pages they stand for.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&PageHash, u32)> {
        self.pages.iter().map(|(hash, page)| (hash, *page))
    }

    fn tokens_of(&self, page: u32) -> &[u32] {
        let start = page as usize * self.page_size;
        &self.tokens[start..start + self.page_size]
    }
}
