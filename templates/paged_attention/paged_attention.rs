//! `paged_attention`
