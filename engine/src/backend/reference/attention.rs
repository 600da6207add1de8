//! Rotary embedding, KV append and causal attention in plain loops.

use bespoke_kernel_gen::spec::ModelShape;

use super::LayerKv;
use super::math::{dot, rms_norm};
use crate::batch::Batch;

/// Multiplications below which attention stays on one thread.
const THREAD_WORK_MIN: usize = 1 << 18;

/// QK-norm and rotation of the q and k heads of one row.
pub(super) fn rope_row(
    shape: &ModelShape,
    eps: f32,
    qkv: &mut [f32],
    cos_sin: &[f32],
    qk_norm: Option<(&[f32], &[f32])>,
) {
    let (cos, sin) = cos_sin.split_at(shape.rotary_dim / 2);
    let num_rotated = shape.num_heads + shape.num_kv_heads;
    let heads = qkv.chunks_exact_mut(shape.head_dim).take(num_rotated);
    let mut normed = vec![0.0; shape.head_dim];
    for (head_idx, head) in heads.enumerate() {
        if let Some((q_norm, k_norm)) = qk_norm {
            let weight = if head_idx < shape.num_heads { q_norm } else { k_norm };
            rms_norm(head, weight, eps, &mut normed);
            head.copy_from_slice(&normed);
        }
        let (low, high) = head[..shape.rotary_dim].split_at_mut(shape.rotary_dim / 2);
        for i in 0..low.len() {
            let (x, y) = (low[i], high[i]);
            low[i] = x * cos[i] - y * sin[i];
            high[i] = y * cos[i] + x * sin[i];
        }
    }
}

/// Stores k and v of one row in their slot.
pub(super) fn append_row(shape: &ModelShape, qkv: &[f32], slot: usize, kv: &mut LayerKv) {
    let width = shape.num_kv_heads * shape.head_dim;
    let k_start = shape.num_heads * shape.head_dim;
    kv.keys[slot * width..(slot + 1) * width].copy_from_slice(&qkv[k_start..k_start + width]);
    let value = &qkv[k_start + width..k_start + 2 * width];
    kv.values[slot * width..(slot + 1) * width].copy_from_slice(value);
}

/// One call of paged attention.
pub(super) struct Attention<'a> {
    pub(super) shape: &'a ModelShape,
    pub(super) batch: &'a Batch,
    /// `[rows, (num_heads + 2 num_kv_heads) · head_dim]`
    pub(super) qkv: &'a [f32],
    pub(super) kv: &'a LayerKv,
}

impl Attention<'_> {
    /// Fills `out`, `[num_rows, num_heads · head_dim]`.
    pub(super) fn run(&self, out: &mut [f32], num_threads: usize) {
        let width = self.shape.num_heads * self.shape.head_dim;
        let num_rows = out.len() / width;
        let num_keys: usize = self
            .batch
            .spans
            .iter()
            .map(|span| span.num_rows as usize * span.context_len as usize)
            .sum();
        let num_threads = num_threads.min(num_keys * width / THREAD_WORK_MIN).clamp(1, num_rows);
        if num_threads == 1 {
            return self.run_rows(0, out);
        }
        let share = num_rows.div_ceil(num_threads);
        std::thread::scope(|scope| {
            for (idx, out) in out.chunks_mut(share * width).enumerate() {
                scope.spawn(move || self.run_rows(idx * share, out));
            }
        });
    }

    /// The rows from `first_row` on that fit `out`.
    fn run_rows(&self, first_row: usize, out: &mut [f32]) {
        let width = self.shape.num_heads * self.shape.head_dim;
        let mut scores = Vec::new();
        for (idx, out) in out.chunks_exact_mut(width).enumerate() {
            let row = first_row + idx;
            for (head, out) in out.chunks_exact_mut(self.shape.head_dim).enumerate() {
                self.run_head(row, head, &mut scores, out);
            }
        }
    }

    /// One query head of one row.
    fn run_head(&self, row: usize, head: usize, scores: &mut Vec<f32>, out: &mut [f32]) {
        let ModelShape { head_dim, num_heads, num_kv_heads, page_size, .. } = *self.shape;
        // Spans are in row order, so the one that holds a row is the last that starts before it.
        let span_idx = self.batch.spans.partition_point(|span| span.first_row as usize <= row) - 1;
        let span = &self.batch.spans[span_idx];
        let row_in_span = row - span.first_row as usize;
        let end = (span.context_len - span.num_rows) as usize + row_in_span + 1;
        let start = self.shape.sliding_window.map_or(0, |window| end.saturating_sub(window));
        let row_start = row * (num_heads + 2 * num_kv_heads) * head_dim;
        let query = &self.qkv[row_start + head * head_dim..][..head_dim];
        let kv_head = head / (num_heads / num_kv_heads);
        let pages = &self.batch.page_table[span.first_page as usize..];
        let place = |token: usize| {
            let slot = pages[token / page_size] as usize * page_size + token % page_size;
            (slot * num_kv_heads + kv_head) * head_dim
        };
        let scale = 1.0 / (head_dim as f32).sqrt();
        scores.clear();
        scores.extend(
            (start..end).map(|token| dot(query, &self.kv.keys[place(token)..][..head_dim]) * scale),
        );
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        out.fill(0.0);
        for (token, score) in (start..end).zip(scores.iter()) {
            let weight = (score - max).exp();
            sum += weight;
            let value = &self.kv.values[place(token)..][..head_dim];
            out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
        }
        out.iter_mut().for_each(|value| *value /= sum);
    }
}
