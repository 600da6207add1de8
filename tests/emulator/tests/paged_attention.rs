//! `paged_attention` against plain loops in float64.

use bespoke_emulator::{Access, Emulator, Library};
use bespoke_kernel_gen::cuda::attention_plan::{Item, Plan, Shape, Span};
use bespoke_kernel_gen::cuda::{
    Arch, Choice, KvType, PagedAttention, Regime, RowType, Spec, Variant,
};

use crate::common::kv_cache::{Cache, Part, hadamard};
use crate::common::{
    Params, Random, SEEDS, emulator, generated, launch, models, round, to_u16, to_u32, tolerance,
    upload, widen,
};

/// Both kernels of an op.
struct Kernels {
    op: PagedAttention,
    decode: (Variant, Library),
    prefill: (Variant, Library),
}

impl Kernels {
    fn new(op: PagedAttention) -> Kernels {
        let kernel = |regime| {
            let variant = Spec::from(op).variant(regime, Arch::Sm90a);
            variant.is_feasible().unwrap();
            let library = generated(&variant);
            (variant, library)
        };
        Kernels { op, decode: kernel(Regime::Decode), prefill: kernel(Regime::Prefill) }
    }

    fn shape(&self, parts_max: usize) -> Shape {
        let Choice::PagedAttention(kernel) = self.prefill.0.choice else { unreachable!() };
        Shape { window: self.op.window, rows_max: self.op.rows_max(&kernel.config), parts_max }
    }
}

/// Sequences with random keys and values in shuffled pages.
struct Sequences {
    cache: Cache,
    /// Of each sequence.
    pages: Vec<Vec<u32>>,
    /// Of each sequence and token: its query heads.
    queries: Vec<Vec<Vec<u16>>>,
}

impl Sequences {
    fn new(op: &PagedAttention, lens: &[usize], random: &mut Random) -> Sequences {
        let num_pages: usize = lens.iter().map(|len| len.div_ceil(op.page_size)).sum();
        let mut free: Vec<u32> = (0..num_pages as u32 + 2).collect();
        let mut cache = Cache::poisoned(op.pages(), op.rows, free.len());
        let mut all = Vec::new();
        let mut queries = Vec::new();
        for &len in lens {
            let take = |_| free.swap_remove(random.below(free.len()));
            let pages: Vec<u32> = (0..len.div_ceil(op.page_size)).map(take).collect();
            let mut rows = Vec::new();
            for token in 0..len {
                let page = pages[token / op.page_size] as usize;
                let slot = page * op.page_size + token % op.page_size;
                for kv_head in 0..op.num_kv_heads {
                    for part in [Part::K, Part::V] {
                        let x = random.floats(op.head_dim, 2.0);
                        cache.set_head(slot, kv_head, part, &x);
                    }
                }
                let q = random.floats(op.num_heads * op.head_dim, 2.0);
                rows.push(q.iter().map(|v| round(op.rows, *v)).collect());
            }
            all.push(pages);
            queries.push(rows);
        }
        Sequences { cache, pages: all, queries }
    }

    fn slot(&self, op: &PagedAttention, sequence: usize, token: usize) -> usize {
        let page = self.pages[sequence][token / op.page_size] as usize;
        page * op.page_size + token % op.page_size
    }

    /// A query head of a token: its output, and the size of the summands.
    fn expected(
        &self,
        op: &PagedAttention,
        (sequence, token, head): (usize, usize, usize),
        heads: &mut impl FnMut(usize, usize, Part) -> Vec<f64>,
    ) -> (Vec<f64>, f64) {
        let kv_head = head / (op.num_heads / op.num_kv_heads);
        let q = &self.queries[sequence][token][head * op.head_dim..][..op.head_dim];
        let q: Vec<f64> = q.iter().map(|b| f64::from(widen(op.rows, *b))).collect();
        let first = if op.window > 0 { (token + 1).saturating_sub(op.window) } else { 0 };
        let scale = scale(op);
        let score = |key: &[f64]| key.iter().zip(&q).map(|(k, q)| k * q).sum::<f64>() * scale;
        let slots: Vec<usize> = (first..=token).map(|key| self.slot(op, sequence, key)).collect();
        let scores: Vec<f64> =
            slots.iter().map(|slot| score(&heads(*slot, kv_head, Part::K))).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let (mut out, mut size) = (vec![0.0; op.head_dim], 0.0);
        for (slot, score) in slots.iter().zip(&scores) {
            let p = (score - max).exp() / sum;
            for (out, v) in out.iter_mut().zip(heads(*slot, kv_head, Part::V)) {
                *out += p * v;
                size += p * v.abs() / op.head_dim as f64;
            }
        }
        if op.kv == KvType::I4 {
            hadamard(&mut out);
        }
        (out, size)
    }
}

fn scale(op: &PagedAttention) -> f64 {
    f64::from(1.0 / (op.head_dim as f32).sqrt())
}

/// A span of a step: of a sequence, the rows of tokens `first..end`.
#[derive(Clone, Copy, Debug)]
struct Rows {
    sequence: usize,
    first: usize,
    end: usize,
}

/// Runs a step; the outputs of its rows, one after the other.
fn run(
    kernels: &Kernels,
    sequences: &Sequences,
    step: &[Rows],
    parts_max: usize,
    seed: u64,
) -> Vec<Vec<u16>> {
    let op = &kernels.op;
    let mut device = emulator(seed);
    let width = (op.num_heads + 2 * op.num_kv_heads) * op.head_dim;
    let (mut spans, mut qkv, mut table) = (Vec::new(), Vec::new(), Vec::new());
    for rows in step {
        spans.push(Span {
            first_row: (qkv.len() / width) as u32,
            num_rows: (rows.end - rows.first) as u32,
            first_page: table.len() as u32,
            context_len: rows.end as u32,
        });
        for token in rows.first..rows.end {
            qkv.extend(&sequences.queries[rows.sequence][token]);
            // NOTE: keys and values come from the pages.
            qkv.resize(qkv.len().next_multiple_of(width), 0xffff);
        }
        // NOTE: what lies before every row's window may be anything.
        let window = if op.window > 0 { op.window } else { usize::MAX };
        let unseen = (rows.first + 1).saturating_sub(window) / op.page_size;
        let pages = sequences.pages[rows.sequence].iter().enumerate();
        table.extend(pages.map(|(i, page)| if i < unseen { u32::MAX } else { *page }));
    }
    let num_rows = qkv.len() / width;
    let mut plan = Plan::default();
    plan.fill(&kernels.shape(parts_max), &spans).unwrap();
    let span_words: Vec<u32> =
        spans.iter().flat_map(|s| [s.first_row, s.num_rows, s.first_page, s.context_len]).collect();
    let row_bytes = op.num_heads * op.head_dim * 2;
    let out = device.alloc(num_rows * row_bytes, Access::ReadWrite);
    let buffers = Buffers {
        qkv: upload(&mut device, &qkv, Access::ReadOnly),
        cache: device.upload(&sequences.cache.bytes, Access::ReadOnly),
        spans: upload(&mut device, &span_words, Access::ReadOnly),
        table: upload(&mut device, &table, Access::ReadOnly),
        out,
        scale: scale(op) as f32,
        // NOTE: counters are indexed by row.
        counters: num_rows.max(parts_max),
    };
    for range in &plan.decode_launches {
        launch_items(&mut device, &kernels.decode, &buffers, &plan.decode[range.clone()]);
    }
    if !plan.prefill.is_empty() {
        launch_items(&mut device, &kernels.prefill, &buffers, &plan.prefill);
    }
    let bytes = device.read(out, num_rows * row_bytes).unwrap();
    bytes.chunks(row_bytes).map(to_u16).collect()
}

struct Buffers {
    qkv: u64,
    cache: u64,
    spans: u64,
    table: u64,
    out: u64,
    scale: f32,
    counters: usize,
}

fn launch_items(
    device: &mut Emulator,
    (variant, library): &(Variant, Library),
    buffers: &Buffers,
    items: &[Item],
) {
    let words: Vec<u32> = items
        .iter()
        .flat_map(|i| {
            let keys = [i.first_key, i.num_keys, i.part, i.num_parts, i.first_part];
            [i.span, i.first_row, i.num_rows].into_iter().chain(keys)
        })
        .collect();
    let workspace = variant.workspace(items.len().max(buffers.counters));
    let counters = upload(device, &vec![0_u32; workspace.counters], Access::ReadWrite);
    let params = Params::default()
        .u64(buffers.qkv)
        .u64(buffers.cache)
        .u64(buffers.spans)
        .u64(upload(device, &words, Access::ReadOnly))
        .u64(upload(device, &[items.len() as u32], Access::ReadOnly))
        .u64(buffers.table)
        .u64(buffers.out)
        .u64(device.alloc(workspace.floats * 4, Access::ReadWrite))
        .u64(counters)
        .f32(buffers.scale)
        .u32(0);
    let report = launch(device, library, variant, items.len(), &params)
        .unwrap_or_else(|fault| panic!("{variant}: {fault}"));
    assert!(report.grid_waited);
    assert_eq!(report.bank_conflicts(), 0, "{variant}: {:?}", report.shared);
    let left = to_u32(&device.read(counters, workspace.counters * 4).unwrap());
    assert!(left.iter().all(|count| *count == 0), "{variant}: {left:?}");
}

/// Runs a step and compares it with the plain loop.
fn check(kernels: &Kernels, sequences: &Sequences, step: &[Rows], seed: u64) -> Vec<Vec<u16>> {
    let op = &kernels.op;
    let outs = run(kernels, sequences, step, 64, seed);
    let mut known = std::collections::HashMap::new();
    let mut heads = |slot, kv_head, part| {
        let key = (slot, kv_head, part == Part::K);
        known.entry(key).or_insert_with(|| sequences.cache.head(slot, kv_head, part)).clone()
    };
    let tokens = step.iter().flat_map(|rows| (rows.first..rows.end).map(|t| (rows.sequence, t)));
    for ((sequence, token), out) in tokens.zip(&outs) {
        for (head, bits) in out.chunks(op.head_dim).enumerate() {
            let at = (sequence, token, head);
            let (wanted, size) = sequences.expected(op, at, &mut heads);
            for (dim, (bits, wanted)) in bits.iter().zip(wanted).enumerate() {
                let value = f64::from(widen(op.rows, *bits));
                // NOTE: probabilities are rounded to 16 bits too.
                let slack = f64::from(tolerance(multiplied(op), size as f32)) * 1.2 + size * 1e-3;
                let error = (value - wanted).abs();
                assert!(
                    error <= slack + f64::from(tolerance(op.rows, wanted as f32)),
                    "{op:?} {step:?} seed {seed}: token {token} of {sequence}, head {head}, \
                     dimension {dim}: {value} instead of {wanted}"
                );
            }
        }
    }
    outs
}

/// The type of probabilities.
fn multiplied(op: &PagedAttention) -> RowType {
    if op.kv == KvType::Rows { op.rows } else { RowType::F16 }
}

fn attention(heads: (usize, usize), head_dim: usize, kv: KvType) -> PagedAttention {
    PagedAttention {
        num_heads: heads.0,
        num_kv_heads: heads.1,
        head_dim,
        window: 0,
        rows: RowType::F16,
        kv,
        page_size: 32,
    }
}

fn last_rows(lens: &[usize]) -> Vec<Rows> {
    let rows = |(sequence, &len): (usize, &usize)| Rows { sequence, first: len - 1, end: len };
    lens.iter().enumerate().map(rows).collect()
}

/// Decode of many lengths at once; prefill of a prompt in one step and in several, whose last rows
/// are few enough for decode. A row has the same bits in all of them.
fn check_op(op: PagedAttention, lens: &[usize], prompt: usize, seeds: &[u64]) {
    let kernels = Kernels::new(op);
    for &seed in seeds {
        let mut random = Random(seed);
        let mut lens = lens.to_vec();
        lens.push(prompt);
        let sequences = Sequences::new(&op, &lens, &mut random);
        let together = check(&kernels, &sequences, &last_rows(&lens), seed);
        let alone = random.below(lens.len());
        let alone_rows = &last_rows(&lens)[alone..=alone];
        let out = run(&kernels, &sequences, alone_rows, 64, seed + 1);
        assert_eq!(out[0], together[alone], "{op:?}: row of {} alone", lens[alone]);
        let sequence = lens.len() - 1;
        let whole = Rows { sequence, first: 0, end: prompt };
        let whole = check(&kernels, &sequences, &[whole], seed);
        assert_eq!(whole[prompt - 1], together[sequence], "{op:?}: decode and prefill");
        let cut = 1 + random.below(prompt - 1);
        let later = Rows { sequence, first: cut, end: prompt };
        let others = last_rows(&lens[..1]);
        let mixed = run(&kernels, &sequences, &[others[0], later], 64, seed);
        assert_eq!(mixed[0], together[0], "{op:?}: beside a prompt");
        assert_eq!(&mixed[1..], &whole[cut..], "{op:?}: prompt cut at {cut} of {prompt}");
    }
}

const LENS: [usize; 10] = [1, 15, 16, 17, 63, 64, 65, 257, 600, 1030];

#[test]
fn every_cache_type_at_all_lengths() {
    for kv in KvType::ALL {
        check_op(attention((4, 2), 64, kv), &LENS, 70, &SEEDS);
    }
}

#[test]
fn every_group() {
    for (heads, kv) in [
        ((2, 2), KvType::I8),
        ((2, 1), KvType::Rows),
        ((3, 1), KvType::I4),
        ((8, 1), KvType::I8),
        ((12, 1), KvType::Rows),
        ((12, 1), KvType::I4),
        ((40, 1), KvType::Rows),
    ] {
        let op = PagedAttention { page_size: 16, ..attention(heads, 32, kv) };
        check_op(op, &[5, 300], 40, &SEEDS[..2]);
    }
}

#[test]
fn every_head_size() {
    for (head_dim, kv, page_size) in [
        (8, KvType::I4, 16),
        (48, KvType::Rows, 64),
        (48, KvType::I4, 32),
        (80, KvType::I8, 16),
        (96, KvType::Rows, 32),
        (96, KvType::I4, 32),
        (128, KvType::Rows, 32),
        (128, KvType::I8, 64),
        (128, KvType::I4, 16),
        (256, KvType::Rows, 32),
        (256, KvType::I4, 32),
    ] {
        let op = PagedAttention { page_size, ..attention((4, 1), head_dim, kv) };
        check_op(op, &[1, 257], 66, &SEEDS[..2]);
    }
}

#[test]
fn bfloat16_rows() {
    for kv in KvType::ALL {
        let op = PagedAttention { rows: RowType::BF16, ..attention((7, 1), 128, kv) };
        check_op(op, &[65, 513], 33, &SEEDS[..2]);
    }
}

#[test]
fn windows() {
    for (window, kv) in [(1, KvType::Rows), (100, KvType::I8), (300, KvType::I4)] {
        let op = PagedAttention { window, ..attention((4, 2), 32, kv) };
        check_op(op, &[1, 64, 99, 101, 300, 700], 150, &SEEDS[..2]);
    }
}

/// A long prompt crosses chunks, whose sums are added up.
#[test]
fn prompts_across_chunks() {
    for kv in KvType::ALL {
        check_op(attention((2, 1), 16, kv), &[20], 530, &SEEDS[..2]);
    }
}

/// A workspace that is too small for all rows at once takes several launches.
#[test]
fn several_launches() {
    let op = attention((4, 2), 32, KvType::Rows);
    let kernels = Kernels::new(op);
    let lens = [600, 10, 800, 300];
    let sequences = Sequences::new(&op, &lens, &mut Random(7));
    let once = check(&kernels, &sequences, &last_rows(&lens), 1);
    assert_eq!(run(&kernels, &sequences, &last_rows(&lens), 4, 2), once);
}

#[test]
fn kernels_of_the_models() {
    for spec in models::specs() {
        if let Spec::PagedAttention(op) = spec {
            check_op(op, &[1, 31, 258], 37, &SEEDS);
        }
    }
}
