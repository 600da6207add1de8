//! Causal attention over KV pages with an online softmax, page by page.
//!
//! A unit of work is a run of query rows of one sequence. Those of one KV head lie together, token
//! by token, so that a page is read once for all; a unit of several tokens has one KV head, a
//! decoding unit several, whose keys and values lie side by side in a page.
//!
//! Reduction order: a row visits its pages in ascending order from the first it sees; scores add
//! over dimensions, outputs over tokens, one after the other in separate lanes. A token that a row
//! does not see gets probability 0, which changes no bit. So decode and prefill, any chunking and
//! any split over threads give a row the same bits.
//!
//! Bound: decode reads every page once (memory bandwidth); prefill does `4 · head_dim` operations
//! per row and visible token (peak of f32 multiply-add). Decode asks for nothing ahead: a page is
//! read forward, which the processor's own prefetchers follow faster than instructions can ask,
//! because those wait for a free miss buffer each.

use std::marker::PhantomData;

use super::abi::{PagedAttentionArgs, SequenceSpan, Share};
use super::pages::{KvElement, KvF32, PageLayout, hadamard, row_bytes};
use super::simd::Simd;

/// Score of a token that a row does not see: its probability underflows to 0.
const MASKED: f32 = -3.0e38;
/// Running maximum before the first page: above `MASKED`, below any score.
const NO_MAX: f32 = -1.0e30;
/// Scratch memory that `Share` brings.
const DECODE_SCRATCH_BYTES: usize = 64 * 1024;
const PREFILL_SCRATCH_BYTES: usize = 256 * 1024;

/// Attention of spans of one row each. `WINDOW` 0 is full attention.
///
/// # Safety
/// `args` as documented on its fields, 64 KiB of scratch; the instruction set of `S`.
#[inline(always)]
pub unsafe fn decode<
    S: Simd,
    KV: KvElement,
    const HEADS: usize,
    const KV_HEADS: usize,
    const HEAD_DIM: usize,
    const WINDOW: usize,
    const PAGE: usize,
>(
    args: &PagedAttentionArgs,
    share: Share,
) {
    // SAFETY: as the caller promises.
    unsafe {
        Attention::<S, KV, HEADS, KV_HEADS, HEAD_DIM, WINDOW, PAGE>::run::<false>(args, share)
    }
}

/// Attention of spans of any number of rows.
///
/// # Safety
/// As [`decode`], with 256 KiB of scratch.
#[inline(always)]
pub unsafe fn prefill<
    S: Simd,
    KV: KvElement,
    const HEADS: usize,
    const KV_HEADS: usize,
    const HEAD_DIM: usize,
    const WINDOW: usize,
    const PAGE: usize,
>(
    args: &PagedAttentionArgs,
    share: Share,
) {
    // SAFETY: as the caller promises.
    unsafe { Attention::<S, KV, HEADS, KV_HEADS, HEAD_DIM, WINDOW, PAGE>::run::<true>(args, share) }
}

/// The constants of one instance.
struct Attention<
    S,
    KV,
    const HEADS: usize,
    const KV_HEADS: usize,
    const HEAD_DIM: usize,
    const WINDOW: usize,
    const PAGE: usize,
>(PhantomData<(S, KV)>);

/// Query rows `first..first + num` of one sequence, counted from the KV head `kv_head` on.
#[derive(Clone, Copy)]
struct Rows {
    span: SequenceSpan,
    kv_head: usize,
    first: usize,
    num: usize,
}

impl Rows {
    /// Before the first unit of a span.
    #[inline(always)]
    fn new(span: SequenceSpan) -> Rows {
        Rows { span, kv_head: 0, first: 0, num: 0 }
    }
}

/// What a unit of work keeps between pages, in scratch memory.
#[derive(Clone, Copy)]
struct State {
    /// `[rows, HEAD_DIM]`, scaled.
    q: *mut f32,
    /// `[rows, VECS · LANES]`: sums of probability · value.
    o: *mut f32,
    /// `[rows, PAGE]`: the page's scores, then its probabilities.
    p: *mut f32,
    /// `[rows, LANES]`: sums of probabilities.
    sum: *mut f32,
    /// `[rows, LANES]`: sums of probability · minimum of V, where the type has minima.
    min_sum: *mut f32,
    /// `[rows]`: sum of the scaled query, which is what the minimum of K is multiplied with.
    q_sum: *mut f32,
    /// `[rows]`: maximum of the scores so far.
    max: *mut f32,
    /// `[rows]`: the page's maximum, then the factor to older sums.
    factor: *mut f32,
    /// `[heads, 4, PAGE]`: the page's scales and minima.
    params: *mut f32,
    /// `[PAGE · HEAD_DIM]`: K or V of one head of the page in float32.
    kv: *mut f32,
}

/// The order of all rows of a step, cut into `count` parts of equal cost.
struct Split {
    idx: u64,
    count: u64,
    total: u64,
    done: u64,
}

impl Split {
    /// Which of the next `num` rows, each of cost `cost`, this thread computes.
    #[inline(always)]
    fn next(&mut self, num: usize, cost: u64) -> (usize, usize) {
        let (low, high) = (2 * self.total * self.idx, 2 * self.total * (self.idx + 1));
        let (mut first, mut end) = (0, 0);
        let mut row = 0;
        while row < num {
            // NOTE: a row belongs to the part in which the middle of its cost lies.
            let middle = (2 * self.done + cost) * self.count;
            self.done += cost;
            row += 1;
            if middle < low {
                first = row;
            }
            if middle < high {
                end = row;
            }
        }
        (first, end)
    }
}

impl<
    S: Simd,
    KV: KvElement,
    const HEADS: usize,
    const KV_HEADS: usize,
    const HEAD_DIM: usize,
    const WINDOW: usize,
    const PAGE: usize,
> Attention<S, KV, HEADS, KV_HEADS, HEAD_DIM, WINDOW, PAGE>
{
    /// Query heads of a KV head.
    const GROUP: usize = HEADS / KV_HEADS;
    /// Vectors of a head.
    const VECS: usize = HEAD_DIM.div_ceil(S::LANES);
    const LAYOUT: PageLayout = PageLayout::new(KV::BITS, KV_HEADS, HEAD_DIM, PAGE);
    /// What scores are multiplied with, so that fewer instructions make exponentials of them.
    /// NOTE: int4 is not robust to how queries round: SmolLM2's perplexity was 18.21 with these
    /// units, 18.12 without.
    const SCORE_UNIT: f32 = if KV::QUANTIZED { 1.0 } else { std::f32::consts::LOG2_E };
    /// KV heads of a decoding unit: memory is faster where more is read in one run.
    const BUNDLE: usize = {
        let fits = Self::rows_max(false) / Self::GROUP;
        let most = if fits > 4 { 4 } else { fits };
        if most == 0 {
            1
        } else if most < KV_HEADS {
            most
        } else {
            KV_HEADS
        }
    };

    /// Most rows of a unit: the more, the more use is made of a page in cache.
    const fn rows_max(many: bool) -> usize {
        match (many, HEAD_DIM) {
            (true, ..=128) => 96,
            (true, _) => 48,
            (false, _) => 16,
        }
    }

    /// Whether pages are first converted to float32: where register tiles are too small to hide the
    /// conversion and scratch has room, and for heads whose last vector cannot be loaded in place.
    /// Nibbles take so many instructions that no tile of a prompt hides them.
    const fn copies(many: bool) -> bool {
        let tiles_min = match (many, KV::BITS) {
            (false, _) => 2,
            (true, 4) => usize::MAX,
            (true, _) => 4,
        };
        let fits = 8 * PAGE * HEAD_DIM <= if many { 64 * 1024 } else { 32 * 1024 };
        let converts = S::BLOCK_TILES < tiles_min && KV::BITS != KvF32::BITS;
        let partial = KV::BITS == 4 && !HEAD_DIM.is_multiple_of(S::LANES);
        (converts && fits) || HEAD_DIM < S::LANES || partial
    }

    #[inline(always)]
    unsafe fn run<const MANY: bool>(args: &PagedAttentionArgs, share: Share) {
        const {
            assert!(HEADS.is_multiple_of(KV_HEADS) && HEAD_DIM.is_multiple_of(8));
            assert!(PAGE.is_multiple_of(16) && PAGE > 0 && HEAD_DIM > 0);
            assert!(Self::state_floats(false) * 4 <= DECODE_SCRATCH_BYTES);
            assert!(Self::state_floats(true) * 4 <= PREFILL_SCRATCH_BYTES);
        };
        // SAFETY: as the caller promises; the parts of a split are disjoint rows.
        unsafe {
            let (idx, count) = (share.idx as u64, share.count as u64);
            let mut split = Split { idx, count, total: 0, done: 0 };
            let mut span_idx = 0;
            while span_idx < args.num_spans {
                let mut unit = Rows::new(*args.spans.add(span_idx));
                while Self::next_unit::<MANY>(&mut unit) {
                    split.total += unit.num as u64 * Self::row_cost(&unit);
                }
                span_idx += 1;
            }
            span_idx = 0;
            while span_idx < args.num_spans {
                let mut unit = Rows::new(*args.spans.add(span_idx));
                while Self::next_unit::<MANY>(&mut unit) {
                    let (first, end) = split.next(unit.num, Self::row_cost(&unit));
                    if first < end {
                        let rows = Rows { first: unit.first + first, num: end - first, ..unit };
                        Self::run_rows::<MANY>(args, &rows, share);
                    }
                }
                span_idx += 1;
            }
        }
    }

    /// Whether a span of a prompt's kernel is computed as in decoding.
    #[inline(always)]
    fn decodes<const MANY: bool>(span: SequenceSpan) -> bool {
        !MANY || (span.num_rows == 1 && S::BLOCK_TILES > 1)
    }

    /// Moves on to the next unit of a span.
    #[inline(always)]
    fn next_unit<const MANY: bool>(rows: &mut Rows) -> bool {
        let (heads, rows_max) = match (Self::decodes::<MANY>(rows.span), rows.span.num_rows) {
            (true, 1) => (Self::BUNDLE, Self::rows_max(false)),
            _ => (1, Self::rows_max(MANY)),
        };
        let num_rows = rows.span.num_rows as usize * Self::GROUP;
        rows.first += rows.num;
        if rows.first == num_rows * heads.min(KV_HEADS - rows.kv_head) {
            rows.first = 0;
            rows.kv_head += heads;
        }
        let heads = heads.min(KV_HEADS.saturating_sub(rows.kv_head));
        rows.num = (num_rows * heads - rows.first).min(rows_max);
        rows.num > 0
    }

    /// Pages that the last row of a unit visits.
    #[inline(always)]
    fn row_cost(rows: &Rows) -> u64 {
        let (first, end) = Self::visible(rows, rows.num - 1);
        (end.div_ceil(PAGE) - first / PAGE) as u64
    }

    /// The tokens that row `row` of a unit sees.
    #[inline(always)]
    fn visible(rows: &Rows, row: usize) -> (usize, usize) {
        let (token, _) = Self::place(rows, row);
        let end = (rows.span.context_len - rows.span.num_rows) as usize + token + 1;
        (if WINDOW > 0 { end.saturating_sub(WINDOW) } else { 0 }, end)
    }

    /// The token of a row of a unit, counted from the span's first, and its query head, counted
    /// from the first of the unit's first KV head.
    #[inline(always)]
    fn place(rows: &Rows, row: usize) -> (usize, usize) {
        let row = rows.first + row;
        match rows.span.num_rows {
            1 => (0, row),
            _ => (row / Self::GROUP, row % Self::GROUP),
        }
    }

    #[inline(always)]
    unsafe fn run_rows<const MANY: bool>(args: &PagedAttentionArgs, rows: &Rows, share: Share) {
        // NOTE: a few rows would leave most of prefill's large tiles empty.
        let many = S::BLOCK_TILES == 1 || (rows.num > 4 && rows.span.num_rows > 1);
        // SAFETY: as the caller promises.
        unsafe {
            if MANY && many {
                Self::attend::<true>(args, rows, share.scratch);
            } else {
                Self::attend::<false>(args, rows, share.scratch);
            }
        }
    }

    const fn state_floats(many: bool) -> usize {
        let rows = Self::rows_max(many);
        let row = HEAD_DIM + Self::VECS * S::LANES + PAGE + 2 * S::LANES + 3;
        4 * Self::BUNDLE * PAGE + rows * row + Self::copy_floats(many)
    }

    const fn copy_floats(many: bool) -> usize {
        if Self::copies(many) { PAGE * HEAD_DIM + S::LANES } else { 0 }
    }

    #[inline(always)]
    unsafe fn state<const MANY: bool>(scratch: *mut u8) -> State {
        let rows = Self::rows_max(MANY);
        // SAFETY: `state_floats` adds up these sizes.
        unsafe {
            let kv: *mut f32 = scratch.cast();
            let q = kv.add(Self::copy_floats(MANY));
            let o = q.add(rows * HEAD_DIM);
            let p = o.add(rows * Self::VECS * S::LANES);
            let sum = p.add(rows * PAGE);
            let min_sum = sum.add(rows * S::LANES);
            let q_sum = min_sum.add(rows * S::LANES);
            let max = q_sum.add(rows);
            let factor = max.add(rows);
            State { q, o, p, sum, min_sum, q_sum, max, factor, params: factor.add(rows), kv }
        }
    }

    /// Computes the rows of one unit.
    #[inline(always)]
    unsafe fn attend<const MANY: bool>(args: &PagedAttentionArgs, rows: &Rows, scratch: *mut u8) {
        // SAFETY: the page table holds the pages of all visible tokens.
        unsafe {
            let state = Self::state::<MANY>(scratch);
            Self::start::<MANY>(args, rows, &state);
            let table = args.page_table.add(rows.span.first_page as usize);
            let (first, _) = Self::visible(rows, 0);
            let (_, end) = Self::visible(rows, rows.num - 1);
            let mut begin = first / PAGE * PAGE;
            while begin < end {
                let page = *table.add(begin / PAGE) as usize;
                let page = args.kv.add(page * Self::LAYOUT.page_bytes());
                Self::page::<MANY>(rows, &state, begin, (end - begin).min(PAGE), page);
                begin += PAGE;
            }
            Self::finish(args, rows, &state);
        }
    }

    /// The KV heads that a unit reads.
    #[inline(always)]
    fn kv_heads(rows: &Rows) -> (usize, usize) {
        let Rows { kv_head, first, num, .. } = *rows;
        match rows.span.num_rows {
            1 => (kv_head + first / Self::GROUP, kv_head + (first + num - 1) / Self::GROUP + 1),
            _ => (kv_head, kv_head + 1),
        }
    }

    /// The rows of a unit that belong to a KV head.
    #[inline(always)]
    fn rows_of(rows: &Rows, kv_head: usize) -> (usize, usize) {
        let begin = (kv_head - rows.kv_head) * Self::GROUP;
        match rows.span.num_rows {
            1 => (
                begin.max(rows.first) - rows.first,
                (begin + Self::GROUP).min(rows.first + rows.num) - rows.first,
            ),
            _ => (0, rows.num),
        }
    }

    /// Where vector `vec` of a head lies: the last one reaches back to end with the head.
    #[inline(always)]
    const fn vec_offset(vec: usize) -> usize {
        if HEAD_DIM < S::LANES || (vec + 1) * S::LANES <= HEAD_DIM {
            vec * S::LANES
        } else {
            HEAD_DIM - S::LANES
        }
    }

    /// Offset of a row's query head among all heads of its tokens' rows, `row_heads` heads each.
    #[inline(always)]
    fn head_offset(rows: &Rows, row: usize, row_heads: usize) -> usize {
        let (token, head) = Self::place(rows, row);
        let token = rows.span.first_row as usize + token;
        (token * row_heads + rows.kv_head * Self::GROUP + head) * HEAD_DIM
    }

    /// Scales the queries and clears the sums.
    #[inline(always)]
    unsafe fn start<const MANY: bool>(args: &PagedAttentionArgs, rows: &Rows, state: &State) {
        // SAFETY: rows of the unit in qkv, rows below rows_max in scratch.
        unsafe {
            let scale = S::splat(args.softmax_scale * Self::SCORE_UNIT);
            // NOTE: tiles of a prompt reach beyond the rows, those of decoding do not.
            let end = if MANY { Self::rows_max(true) } else { rows.num };
            let mut row = 0;
            while row < end {
                let mut vec = 0;
                while vec < Self::VECS {
                    let mut x = S::zero();
                    if row < rows.num {
                        let offset = Self::head_offset(rows, row, HEADS + 2 * KV_HEADS);
                        let q = args.qkv.add(offset + Self::vec_offset(vec));
                        x = S::mul(Self::load_vec(q), scale);
                    }
                    Self::store_vec(state.q.add(row * HEAD_DIM + Self::vec_offset(vec)), x);
                    S::store(state.o.add((row * Self::VECS + vec) * S::LANES), S::zero());
                    vec += 1;
                }
                S::store(state.sum.add(row * S::LANES), S::zero());
                if KV::QUANTIZED {
                    S::store(state.min_sum.add(row * S::LANES), S::zero());
                    *state.q_sum.add(row) = Self::sum_of_head(state.q.add(row * HEAD_DIM));
                }
                *state.max.add(row) = NO_MAX;
                *state.factor.add(row) = NO_MAX;
                row += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn sum_of_head(x: *const f32) -> f32 {
        // SAFETY: x holds HEAD_DIM values.
        unsafe {
            let mut sums = S::zero();
            let mut i = 0;
            while i + S::LANES <= HEAD_DIM {
                sums = S::add(sums, S::load(x.add(i)));
                i += S::LANES;
            }
            let mut sum = S::reduce_add(sums);
            while i < HEAD_DIM {
                sum += *x.add(i);
                i += 1;
            }
            sum
        }
    }

    #[inline(always)]
    unsafe fn load_vec(p: *const f32) -> S::F32 {
        // SAFETY: a head has HEAD_DIM elements.
        unsafe { if HEAD_DIM < S::LANES { S::load_first(p, HEAD_DIM) } else { S::load(p) } }
    }

    #[inline(always)]
    unsafe fn store_vec(p: *mut f32, x: S::F32) {
        // SAFETY: a head has HEAD_DIM elements.
        unsafe { if HEAD_DIM < S::LANES { S::store_first(p, x, HEAD_DIM) } else { S::store(p, x) } }
    }

    /// Adds one page, whose first token is `begin` and of which `len` tokens are seen, to the rows
    /// of a unit: the keys of all its heads, then the values, as they lie in memory.
    #[inline(always)]
    unsafe fn page<const MANY: bool>(
        rows: &Rows,
        state: &State,
        begin: usize,
        len: usize,
        page: *const u8,
    ) {
        let (first, end) = Self::kv_heads(rows);
        // SAFETY: K, V and parameters of the heads in a page.
        unsafe {
            let mut kv_head = first;
            while kv_head < end {
                let k = page.add(Self::LAYOUT.k(kv_head));
                if KV::QUANTIZED {
                    let params = state.params.add((kv_head - rows.kv_head) * 4 * PAGE);
                    Self::params(page.add(Self::LAYOUT.params(kv_head)).cast(), len, params);
                }
                let tile_rows = Self::rows_of(rows, kv_head);
                if Self::copies(MANY) {
                    Self::convert(k, PAGE, HEAD_DIM, state.kv);
                    Self::scores::<MANY, KvF32>(tile_rows, state, state.kv.cast());
                } else {
                    Self::scores::<MANY, KV>(tile_rows, state, k);
                }
                kv_head += 1;
            }
            Self::probabilities(rows, state, begin);
            kv_head = first;
            while kv_head < end {
                let v = page.add(Self::LAYOUT.v(kv_head));
                let tile_rows = Self::rows_of(rows, kv_head);
                if Self::copies(MANY) {
                    Self::convert(v, HEAD_DIM, PAGE, state.kv);
                    Self::outputs::<MANY, KvF32>(rows, tile_rows, state, begin, state.kv.cast());
                } else {
                    Self::outputs::<MANY, KV>(rows, tile_rows, state, begin, v);
                }
                kv_head += 1;
            }
        }
    }

    /// Scales and minima of a head as float32, 0 for the tokens from `end` on, which may never have
    /// been written.
    #[inline(always)]
    unsafe fn params(params: *const u16, end: usize, out: *mut f32) {
        // SAFETY: four rows of PAGE each.
        unsafe {
            let mut i = 0;
            while i < 4 * PAGE {
                S::store(out.add(i), S::load_f16(params.add(i)));
                i += S::LANES;
            }
            let mut token = end;
            while token < PAGE {
                let mut param = 0;
                while param < 4 {
                    *out.add(param * PAGE + token) = 0.0;
                    param += 1;
                }
                token += 1;
            }
        }
    }

    /// `num_rows` rows of K or V of a page as float32, without scales and minima.
    #[inline(always)]
    unsafe fn convert(data: *const u8, row_len: usize, num_rows: usize, out: *mut f32) {
        // SAFETY: the rows are K's or V's; what a row's last vector stores too much, the next row
        // replaces, and scratch has room for the last.
        unsafe {
            let mut row = 0;
            while row < num_rows {
                let from = data.add(row * row_bytes(KV::BITS, row_len));
                let mut i = 0;
                while i < row_len {
                    S::store(out.add(row * row_len + i), KV::load::<S>(from, i));
                    i += S::LANES;
                }
                row += 1;
            }
        }
    }

    /// Scores of the rows `row..end` against a head's keys.
    #[inline(always)]
    unsafe fn scores<const MANY: bool, L: KvElement>(
        (mut row, end): (usize, usize),
        state: &State,
        block: *const u8,
    ) {
        // SAFETY: rows below rows_max.
        unsafe {
            while row < end {
                row += match (MANY, S::BLOCK_TILES, end - row) {
                    (true, 4.., _) => Self::score_tile::<L, 12>(state, row, block),
                    (true, 2.., _) => Self::score_tile::<L, 6>(state, row, block),
                    (false, _, 1) => Self::score_tile::<L, 1>(state, row, block),
                    (_, ..2, _) | (_, _, 2) => Self::score_tile::<L, 2>(state, row, block),
                    (_, _, 3) => Self::score_tile::<L, 3>(state, row, block),
                    _ => Self::score_tile::<L, 4>(state, row, block),
                };
            }
        }
    }

    /// Scores of `R` rows with all tokens of the page; returns `R`.
    #[inline(always)]
    unsafe fn score_tile<L: KvElement, const R: usize>(
        state: &State,
        row: usize,
        block: *const u8,
    ) -> usize {
        // SAFETY: offsets stay inside the page and the rows of scratch.
        unsafe {
            let mut token = 0;
            while token + 2 * S::LANES <= PAGE {
                Self::score_vecs::<L, R, 2>(state, row, block, token);
                token += 2 * S::LANES;
            }
            if token < PAGE {
                Self::score_vecs::<L, R, 1>(state, row, block, token);
            }
        }
        R
    }

    /// Scores of `R` rows with `C` vectors of tokens from `token` on.
    #[inline(always)]
    unsafe fn score_vecs<L: KvElement, const R: usize, const C: usize>(
        state: &State,
        row: usize,
        block: *const u8,
        token: usize,
    ) {
        // SAFETY: k is [HEAD_DIM, PAGE], q [rows, HEAD_DIM], p [rows, PAGE].
        unsafe {
            let (q, p) = (state.q.add(row * HEAD_DIM), state.p.add(row * PAGE));
            let mut sums = [[S::zero(); C]; R];
            let mut dim = 0;
            while dim < HEAD_DIM {
                let mut keys = [S::zero(); C];
                let mut c = 0;
                while c < C {
                    let place = token + c * S::LANES;
                    let k = block.add(dim * row_bytes(L::BITS, PAGE));
                    keys[c] = L::load::<S>(k, place);
                    c += 1;
                }
                let mut r = 0;
                while r < R {
                    let query = S::splat(*q.add(r * HEAD_DIM + dim));
                    let mut c = 0;
                    while c < C {
                        sums[r][c] = S::fma(query, keys[c], sums[r][c]);
                        c += 1;
                    }
                    r += 1;
                }
                dim += 1;
            }
            let mut r = 0;
            while r < R {
                let mut c = 0;
                while c < C {
                    S::store(p.add(r * PAGE + token + c * S::LANES), sums[r][c]);
                    c += 1;
                }
                r += 1;
            }
        }
    }

    /// Scores to probabilities relative to the running maximum; updates maximum and sum.
    #[inline(always)]
    unsafe fn probabilities(rows: &Rows, state: &State, begin: usize) {
        // SAFETY: rows below rows_max, tokens below PAGE.
        unsafe {
            let (_, first_end) = Self::visible(rows, 0);
            let (last_first, _) = Self::visible(rows, rows.num - 1);
            let partial = begin + PAGE > first_end || begin < last_first;
            let mut row = 0;
            while row < rows.num {
                let p = state.p.add(row * PAGE);
                if KV::QUANTIZED {
                    let params = Self::params_of(rows, state, row);
                    Self::scale_scores(p, *state.q_sum.add(row), params);
                }
                if partial {
                    Self::mask(rows, row, begin, p);
                }
                let mut max = S::load(p);
                let mut token = S::LANES;
                while token < PAGE {
                    max = S::max(S::load(p.add(token)), max);
                    token += S::LANES;
                }
                *state.factor.add(row) = S::reduce_max(max);
                row += 1;
            }
            row = 0;
            while row < rows.num {
                let old = S::load(state.max.add(row));
                let new = S::max(S::load(state.factor.add(row)), old);
                S::store(state.max.add(row), new);
                S::store(state.factor.add(row), Self::exponential(S::sub(old, new)));
                row += S::LANES;
            }
            row = 0;
            while row < rows.num {
                Self::exponentials(state, row);
                if KV::QUANTIZED {
                    Self::scale_probabilities(state, row, Self::params_of(rows, state, row));
                }
                row += 1;
            }
        }
    }

    /// The page's scales and minima for a row of a unit.
    #[inline(always)]
    unsafe fn params_of(rows: &Rows, state: &State, row: usize) -> *const f32 {
        let (_, head) = Self::place(rows, row);
        // SAFETY: four rows of PAGE for each KV head of the unit.
        unsafe { state.params.add(head / Self::GROUP * 4 * PAGE) }
    }

    /// e to the power of a difference of scores, in units of [`Self::SCORE_UNIT`].
    #[inline(always)]
    unsafe fn exponential(x: S::F32) -> S::F32 {
        // SAFETY: the caller has the instruction set.
        unsafe { if KV::QUANTIZED { S::exp(x) } else { S::exp2(x) } }
    }

    #[inline(always)]
    unsafe fn exponentials(state: &State, row: usize) {
        // SAFETY: rows below rows_max, tokens below PAGE.
        unsafe {
            let p = state.p.add(row * PAGE);
            let max = S::splat(*state.max.add(row));
            let sum_at = state.sum.add(row * S::LANES);
            let mut sum = S::mul(S::load(sum_at), S::splat(*state.factor.add(row)));
            let mut token = 0;
            while token < PAGE {
                let x = Self::exponential(S::sub(S::load(p.add(token)), max));
                sum = S::add(sum, x);
                S::store(p.add(token), x);
                token += S::LANES;
            }
            S::store(sum_at, sum);
        }
    }

    /// Scores of levels to scores of keys: the minimum of a key counts once for each element of
    /// the query.
    #[inline(always)]
    unsafe fn scale_scores(p: *mut f32, q_sum: f32, params: *const f32) {
        // SAFETY: rows of PAGE values.
        unsafe {
            let mut token = 0;
            while token < PAGE {
                let scale = S::load(params.add(token));
                let least = S::mul(S::load(params.add(PAGE + token)), S::splat(q_sum));
                S::store(p.add(token), S::fma(S::load(p.add(token)), scale, least));
                token += S::LANES;
            }
        }
    }

    /// Adds probability · minimum of V to the row's sums, and multiplies the probabilities by the
    /// scales of V.
    #[inline(always)]
    unsafe fn scale_probabilities(state: &State, row: usize, params: *const f32) {
        // SAFETY: rows below rows_max, tokens below PAGE.
        unsafe {
            let (p, params) = (state.p.add(row * PAGE), params.add(2 * PAGE));
            let sum_at = state.min_sum.add(row * S::LANES);
            let mut sum = S::mul(S::load(sum_at), S::splat(*state.factor.add(row)));
            let mut token = 0;
            while token < PAGE {
                let x = S::load(p.add(token));
                sum = S::fma(x, S::load(params.add(PAGE + token)), sum);
                S::store(p.add(token), S::mul(x, S::load(params.add(token))));
                token += S::LANES;
            }
            S::store(sum_at, sum);
        }
    }

    /// The part of the page from `begin` that a row sees, as places in the page.
    #[inline(always)]
    fn places(rows: &Rows, row: usize, begin: usize) -> (usize, usize) {
        let (first, end) = Self::visible(rows, row);
        (first.saturating_sub(begin).min(PAGE), end.saturating_sub(begin).min(PAGE))
    }

    #[inline(always)]
    unsafe fn mask(rows: &Rows, row: usize, begin: usize, p: *mut f32) {
        let (first, end) = Self::places(rows, row, begin);
        let mut token = 0;
        // SAFETY: tokens below PAGE.
        unsafe {
            while token < first {
                *p.add(token) = MASKED;
                token += 1;
            }
            token = end;
            while token < PAGE {
                *p.add(token) = MASKED;
                token += 1;
            }
        }
    }

    /// Adds probability · value of a head of the page from `begin` to the outputs of the rows
    /// `row..end`.
    #[inline(always)]
    unsafe fn outputs<const MANY: bool, L: KvElement>(
        rows: &Rows,
        (mut row, end): (usize, usize),
        state: &State,
        begin: usize,
        block: *const u8,
    ) {
        // SAFETY: rows below rows_max.
        unsafe {
            while row < end {
                row += match (MANY, S::BLOCK_TILES, end - row) {
                    (true, 2.., _) => Self::out_tile::<L, 6>(rows, state, row, begin, block),
                    (false, _, 1) => Self::out_tile::<L, 1>(rows, state, row, begin, block),
                    (_, ..2, _) | (_, _, 2) => {
                        Self::out_tile::<L, 2>(rows, state, row, begin, block)
                    }
                    (_, _, 3) => Self::out_tile::<L, 3>(rows, state, row, begin, block),
                    _ => Self::out_tile::<L, 4>(rows, state, row, begin, block),
                };
            }
        }
    }

    /// Outputs of `R` rows; returns `R`.
    #[inline(always)]
    unsafe fn out_tile<L: KvElement, const R: usize>(
        rows: &Rows,
        state: &State,
        row: usize,
        begin: usize,
        block: *const u8,
    ) -> usize {
        // NOTE: the tokens that any of the tile's rows sees; the others may never have been
        // written.
        let last = (row + R).min(rows.num) - 1;
        let (first, _) = Self::places(rows, row, begin);
        let (_, end) = Self::places(rows, last, begin);
        let tokens = (first, end);
        // SAFETY: vectors below VECS.
        unsafe {
            let mut vec = 0;
            while S::BLOCK_TILES >= 4 && vec + 4 <= Self::VECS {
                Self::out_vecs::<L, R, 4>(state, row, block, tokens, vec);
                vec += 4;
            }
            while vec + 2 <= Self::VECS {
                Self::out_vecs::<L, R, 2>(state, row, block, tokens, vec);
                vec += 2;
            }
            if vec < Self::VECS {
                Self::out_vecs::<L, R, 1>(state, row, block, tokens, vec);
            }
        }
        R
    }

    /// Outputs of `R` rows, `C` vectors of each from `vec` on.
    #[inline(always)]
    unsafe fn out_vecs<L: KvElement, const R: usize, const C: usize>(
        state: &State,
        row: usize,
        block: *const u8,
        tokens: (usize, usize),
        vec: usize,
    ) {
        // SAFETY: v is [PAGE, HEAD_DIM], p [rows, PAGE], o [rows, VECS · LANES].
        unsafe {
            let p = state.p.add(row * PAGE);
            let o = state.o.add((row * Self::VECS + vec) * S::LANES);
            let mut sums = [[S::zero(); C]; R];
            let mut r = 0;
            while r < R {
                let factor = S::splat(*state.factor.add(row + r));
                let mut c = 0;
                while c < C {
                    let old = S::load(o.add((r * Self::VECS + c) * S::LANES));
                    sums[r][c] = S::mul(old, factor);
                    c += 1;
                }
                r += 1;
            }
            let mut token = tokens.0;
            while token < tokens.1 {
                let mut values = [S::zero(); C];
                let mut c = 0;
                while c < C {
                    let v = block.add(token * row_bytes(L::BITS, HEAD_DIM));
                    let dim = Self::vec_offset(vec + c);
                    values[c] = L::load::<S>(v, dim);
                    c += 1;
                }
                let mut r = 0;
                while r < R {
                    let probability = S::splat(*p.add(r * PAGE + token));
                    let mut c = 0;
                    while c < C {
                        sums[r][c] = S::fma(probability, values[c], sums[r][c]);
                        c += 1;
                    }
                    r += 1;
                }
                token += 1;
            }
            let mut r = 0;
            while r < R {
                let mut c = 0;
                while c < C {
                    S::store(o.add((r * Self::VECS + c) * S::LANES), sums[r][c]);
                    c += 1;
                }
                r += 1;
            }
        }
    }

    /// Adds the minima of V, divides by the sums of probabilities and writes the rows.
    #[inline(always)]
    unsafe fn finish(args: &PagedAttentionArgs, rows: &Rows, state: &State) {
        // SAFETY: rows of the unit.
        unsafe {
            let mut row = 0;
            while row < rows.num {
                let out = args.out.add(Self::head_offset(rows, row, HEADS));
                let sum = S::reduce_add(S::load(state.sum.add(row * S::LANES)));
                let inverse = S::splat(1.0 / sum);
                let mut least = S::zero();
                if KV::QUANTIZED {
                    least = S::splat(S::reduce_add(S::load(state.min_sum.add(row * S::LANES))));
                }
                let mut vec = 0;
                while vec < Self::VECS {
                    let mut o = S::load(state.o.add((row * Self::VECS + vec) * S::LANES));
                    if KV::QUANTIZED {
                        o = S::add(o, least);
                    }
                    Self::store_vec(out.add(Self::vec_offset(vec)), S::mul(o, inverse));
                    vec += 1;
                }
                if KV::BITS == 4 {
                    hadamard::<HEAD_DIM>(out);
                }
                row += 1;
            }
        }
    }
}
