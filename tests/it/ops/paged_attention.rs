//! `paged_attention`: decode and prefill against a naive softmax, and against each other bit by
//! bit.

use bespoke::kernels::abi::{PagedAttentionArgs, SequenceSpan};
use bespoke::kernels::paged_attention;
use bespoke::kernels::pages::{KvF16, KvF32, KvI4, KvI8, page_bytes};
use half::f16;

use super::{Instance, Random, assert_close, assert_same_bits, hadamard, instances, run};

/// Values, queries and keys lie in −1..1, and the naive loop reads the stored K and V, so that one
/// bound holds for all types of them. A score sums `head_dim` products within 2⁻²⁴ each; with
/// random signs its error is about √128 · 2⁻²⁴ · max score, twice that in the output, and the
/// exponentials add 2e-7 each.
const TOLERANCE: f64 = 1e-5;

const DECODE_SCRATCH_BYTES: usize = 64 * 1024;
const PREFILL_SCRATCH_BYTES: usize = 256 * 1024;

#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
    page: usize,
    kv: &'static str,
}

/// Tokens of one sequence and where they are stored.
struct Sequence {
    /// `[tokens, heads, head_dim]`
    q: Vec<f32>,
    /// `[tokens, kv_heads, head_dim]` as stored.
    k: Vec<f32>,
    v: Vec<f32>,
    pages: Vec<u32>,
}

/// Sequences and their KV cache.
struct World {
    shape: Shape,
    pages: Vec<u8>,
    sequences: Vec<Sequence>,
}

/// One sequence's part in a step: these rows of it, as if later tokens did not exist.
#[derive(Clone, Copy, Debug)]
struct Part {
    sequence: usize,
    first: usize,
    num: usize,
}

impl Shape {
    fn page_bytes(&self) -> usize {
        page_bytes(super::kv_bits(self.kv), self.kv_heads, self.head_dim, self.page)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

impl World {
    /// Sequences of the given lengths. Slots without a token are NaN in every type.
    fn new(shape: Shape, lengths: &[usize], random: &mut Random) -> World {
        let num_pages: usize = lengths.iter().map(|length| length.div_ceil(shape.page)).sum();
        let mut free: Vec<u32> = (0..num_pages as u32).collect();
        let pages = vec![u8::MAX; num_pages * shape.page_bytes()];
        let mut world = World { shape, pages, sequences: Vec::new() };
        for length in lengths {
            let width = shape.kv_heads * shape.head_dim;
            let pages = (0..length.div_ceil(shape.page))
                .map(|_| free.swap_remove(random.below(free.len())))
                .collect();
            let mut sequence = Sequence {
                q: random.floats(length * shape.heads * shape.head_dim),
                k: random.floats(length * width),
                v: random.floats(length * width),
                pages,
            };
            for token in 0..*length {
                for head in 0..shape.kv_heads {
                    let at = (token * shape.kv_heads + head) * shape.head_dim;
                    let page = sequence.pages[token / shape.page] as usize;
                    let range = at..at + shape.head_dim;
                    world.store(page, token % shape.page, head, 0, &mut sequence.k[range.clone()]);
                    let v = &mut sequence.v[range];
                    world.store(page, token % shape.page, head, 1, v);
                    if shape.kv == "int4" {
                        // What is held of V stands for another head.
                        let held: Vec<f64> = v.iter().map(|x| f64::from(*x)).collect();
                        v.iter_mut().zip(hadamard(&held)).for_each(|(v, x)| *v = x as f32);
                    }
                }
            }
            world.sequences.push(sequence);
        }
        world
    }

    /// Stores K (`part` 0) or V (1) of a token and head, and gives back what the bytes mean. For
    /// int4, `x` is a head as the cache holds it.
    fn store(&mut self, page: usize, place: usize, head: usize, part: usize, x: &mut [f32]) {
        let shape = self.shape;
        let bits = super::kv_bits(shape.kv);
        let block = &mut self.pages[page * shape.page_bytes()..][..shape.page_bytes()];
        let min = f16::from_f32(x.iter().fold(f32::MAX, |min, x| min.min(*x)));
        let max = x.iter().fold(f32::MIN, |max, x| max.max(*x));
        let levels_max = if bits == 4 { 15.0 } else { 255.0 };
        let scale = f16::from_f32((max - min.to_f32()) / levels_max);
        let v_row = if bits == 4 { x.len().div_ceil(16) * 8 } else { x.len() * bits / 8 };
        let (k_bytes, v_bytes) = (x.len() * shape.page * bits / 8, shape.page * v_row);
        let v = shape.kv_heads * k_bytes + head * v_bytes;
        let params = shape.kv_heads * (k_bytes + v_bytes);
        for (dim, x) in x.iter_mut().enumerate() {
            let (row, idx) = match part {
                0 => (head * k_bytes + dim * shape.page * bits / 8, place),
                _ => (v + place * v_row, dim),
            };
            if shape.kv == "f32" {
                block[row + idx * 4..][..4].copy_from_slice(&x.to_le_bytes());
                continue;
            }
            if shape.kv == "f16" {
                let half = f16::from_f32(*x);
                block[row + idx * 2..][..2].copy_from_slice(&half.to_le_bytes());
                *x = half.to_f32();
                continue;
            }
            let level = ((*x - min.to_f32()) / scale.to_f32()).round().clamp(0.0, levels_max);
            *x = level * scale.to_f32() + min.to_f32();
            let level = level as u8;
            if bits == 8 {
                block[row + idx] = level;
            } else {
                let byte = &mut block[row + idx / 16 * 8 + idx % 8];
                *byte = if idx % 16 < 8 { *byte & 0xf0 | level } else { *byte & 15 | level << 4 };
            }
        }
        if bits <= 8 {
            for (i, param) in [scale, min].into_iter().enumerate() {
                let at = params + ((4 * head + 2 * part + i) * shape.page + place) * 2;
                block[at..at + 2].copy_from_slice(&param.to_le_bytes());
            }
        }
    }

    /// Runs one step of the given parts and returns the output rows, `[rows, heads · head_dim]`.
    fn attend(
        &self,
        instance: unsafe fn(&PagedAttentionArgs, bespoke::kernels::abi::Share),
        parts: &[Part],
        shares: usize,
        scratch_bytes: usize,
    ) -> Vec<f32> {
        let Shape { heads, kv_heads, head_dim, .. } = self.shape;
        let (mut spans, mut page_table, mut qkv) = (Vec::new(), Vec::new(), Vec::new());
        let mut num_rows = 0;
        for part in parts {
            let sequence = &self.sequences[part.sequence];
            spans.push(SequenceSpan {
                first_row: num_rows as u32,
                num_rows: part.num as u32,
                context_len: (part.first + part.num) as u32,
                first_page: page_table.len() as u32,
            });
            num_rows += part.num;
            page_table.extend(&sequence.pages);
            for token in part.first..part.first + part.num {
                qkv.extend(&sequence.q[token * heads * head_dim..][..heads * head_dim]);
                // K and V come from the pages alone.
                qkv.extend(vec![f32::NAN; 2 * kv_heads * head_dim]);
            }
        }
        let mut out = vec![f32::NAN; num_rows * heads * head_dim];
        let args = PagedAttentionArgs {
            spans: spans.as_ptr(),
            num_spans: spans.len(),
            qkv: qkv.as_ptr(),
            kv: self.pages.as_ptr(),
            page_table: page_table.as_ptr(),
            softmax_scale: self.shape.scale(),
            out: out.as_mut_ptr(),
        };
        run(instance, &args, shares, scratch_bytes);
        out
    }

    /// The naive result of one row.
    fn expected(&self, sequence: usize, token: usize) -> Vec<f64> {
        let Shape { heads, kv_heads, head_dim, window, .. } = self.shape;
        let Sequence { q, k, v, .. } = &self.sequences[sequence];
        let first = if window > 0 { (token + 1).saturating_sub(window) } else { 0 };
        let mut out = Vec::new();
        for head in 0..heads {
            let q = &q[(token * heads + head) * head_dim..][..head_dim];
            let kv = |x: &[f32], token: usize, dim: usize| {
                let head = head / (heads / kv_heads);
                f64::from(x[(token * kv_heads + head) * head_dim + dim])
            };
            let score = |token: usize| {
                let dot = |dim: usize| f64::from(q[dim]) * kv(k, token, dim);
                (0..head_dim).map(dot).sum::<f64>() * f64::from(self.shape.scale())
            };
            let scores: Vec<f64> = (first..=token).map(score).collect();
            let max = scores.iter().fold(f64::MIN, |max, x| max.max(*x));
            let weights: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let value = |dim: usize| {
                let terms = weights.iter().zip(first..).map(|(w, token)| w * kv(v, token, dim));
                terms.sum::<f64>() / sum
            };
            out.extend((0..head_dim).map(value));
        }
        out
    }
}

/// The two entries on one vector type.
struct Pair {
    vectors: &'static str,
    decode: Instance<PagedAttentionArgs>,
    prefill: Instance<PagedAttentionArgs>,
}

fn pairs(
    decode: Vec<Instance<PagedAttentionArgs>>,
    prefill: Vec<Instance<PagedAttentionArgs>>,
) -> Vec<Pair> {
    let pairs = decode.into_iter().zip(prefill);
    pairs.map(|(decode, prefill)| Pair { vectors: decode.0, decode, prefill }).collect()
}

fn check(pairs: Vec<Pair>, shape: Shape) {
    let page = shape.page;
    let lengths = [1, page - 1, page, page + 1, 3 * page + 7, 2];
    for (pair, seed) in pairs.iter().flat_map(|pair| [(pair, 1), (pair, 2)]) {
        let mut random = Random(seed);
        let world = World::new(shape, &lengths, &mut random);
        let what = format!(
            "{}, {}, heads {}/{}, head_dim {}, window {}, page {page}, seed {seed}",
            pair.vectors, shape.kv, shape.heads, shape.kv_heads, shape.head_dim, shape.window
        );
        let whole: Vec<Part> = (lengths.iter().enumerate())
            .map(|(sequence, num)| Part { sequence, first: 0, num: *num })
            .collect();
        let all = world.attend(pair.prefill.1, &whole, 1, PREFILL_SCRATCH_BYTES);
        let width = shape.heads * shape.head_dim;
        let mut rows = Vec::new();
        for part in &whole {
            rows.extend((0..part.num).map(|token| (part.sequence, token)));
        }
        for ((sequence, token), got) in rows.iter().zip(all.chunks(width)) {
            let what = format!("{what}, sequence {sequence}, token {token}");
            assert_close(got, &world.expected(*sequence, *token), TOLERANCE, &what);
        }
        let row_of = |part: &Part, token: usize| {
            let at = lengths[..part.sequence].iter().sum::<usize>() + token;
            &all[at * width..][..width]
        };
        check_decode(pair, &world, &mut random, &row_of, &what);
        check_chunks(pair, &world, &mut random, &row_of, &what);
    }
}

/// Every row alone gives the same bits as among all the others.
fn check_decode<'a>(
    pair: &Pair,
    world: &World,
    random: &mut Random,
    row_of: &dyn Fn(&Part, usize) -> &'a [f32],
    what: &str,
) {
    for step in 0..world.sequences.iter().map(|sequence| sequence.q.len()).max().unwrap() {
        let mut parts = Vec::new();
        for (sequence, tokens) in world.sequences.iter().enumerate() {
            let width = world.shape.heads * world.shape.head_dim;
            if step < tokens.q.len() / width && random.below(4) > 0 {
                parts.push(Part { sequence, first: step, num: 1 });
            }
        }
        let shares = 1 + random.below(3);
        let got = world.attend(pair.decode.1, &parts, shares, DECODE_SCRATCH_BYTES);
        let width = world.shape.heads * world.shape.head_dim;
        for (part, got) in parts.iter().zip(got.chunks(width)) {
            let what = format!("{what}, decode {part:?}, shares {shares}");
            assert_same_bits(got, row_of(part, part.first), &what);
        }
    }
}

/// Sequences cut into random chunks give the same bits.
fn check_chunks<'a>(
    pair: &Pair,
    world: &World,
    random: &mut Random,
    row_of: &dyn Fn(&Part, usize) -> &'a [f32],
    what: &str,
) {
    let width = world.shape.heads * world.shape.head_dim;
    let mut done = vec![0; world.sequences.len()];
    loop {
        let mut parts = Vec::new();
        for (sequence, tokens) in world.sequences.iter().enumerate() {
            let left = tokens.q.len() / width - done[sequence];
            if left > 0 {
                let most = [1, 5, 60][random.below(3)];
                let num = 1 + random.below(left.min(most));
                parts.push(Part { sequence, first: done[sequence], num });
                done[sequence] += num;
            }
        }
        if parts.is_empty() {
            return;
        }
        let shares = 1 + random.below(3);
        let got = world.attend(pair.prefill.1, &parts, shares, PREFILL_SCRATCH_BYTES);
        let mut got = got.chunks(width);
        for part in &parts {
            for token in part.first..part.first + part.num {
                let what = format!("{what}, chunk {part:?}, token {token}, shares {shares}");
                assert_same_bits(got.next().unwrap(), row_of(part, token), &what);
            }
        }
    }
}

/// One line an instance: the sizes go to the kernels and to the test.
macro_rules! check {
    ($kv:ty, $name:literal, $heads:literal, $kv_heads:literal, $head_dim:literal,
     $window:literal, $page:literal) => {
        check(
            pairs(
                instances!(
                    PagedAttentionArgs,
                    paged_attention::decode::<S, $kv, $heads, $kv_heads, $head_dim, $window, $page>
                ),
                instances!(
                    PagedAttentionArgs,
                    paged_attention::prefill::<S, $kv, $heads, $kv_heads, $head_dim, $window, $page>
                ),
            ),
            Shape {
                heads: $heads,
                kv_heads: $kv_heads,
                head_dim: $head_dim,
                window: $window,
                page: $page,
                kv: $name,
            },
        )
    };
}

#[test]
fn paged_attention_f32() {
    check!(KvF32, "f32", 3, 3, 64, 0, 32);
    check!(KvF32, "f32", 4, 2, 24, 7, 16);
    check!(KvF32, "f32", 2, 1, 8, 0, 16);
}

#[test]
fn paged_attention_f16() {
    check!(KvF16, "f16", 9, 3, 64, 0, 32);
    check!(KvF16, "f16", 7, 1, 80, 20, 16);
    check!(KvF16, "f16", 2, 2, 16, 0, 64);
}

#[test]
fn paged_attention_int8() {
    check!(KvI8, "int8", 7, 1, 128, 0, 32);
    check!(KvI8, "int8", 6, 2, 24, 33, 32);
    check!(KvI8, "int8", 20, 1, 8, 0, 16);
    check!(KvI8, "int8", 4, 2, 64, 0, 64);
}

#[test]
fn paged_attention_int4() {
    check!(KvI4, "int4", 9, 3, 64, 0, 32);
    check!(KvI4, "int4", 7, 1, 128, 0, 16);
    check!(KvI4, "int4", 6, 2, 24, 33, 64);
    check!(KvI4, "int4", 20, 1, 8, 0, 32);
    check!(KvI4, "int4", 2, 2, 64, 20, 64);
}
