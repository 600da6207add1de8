//! Matmuls and attention without an engine, against plain loops.

use bespoke::kernel_gen::spec::KvDType;
use bespoke::slices::{AttentionOptions, AwqWeights, KvCache, Runner, Span};
use bespoke_embedding::model;
use half::f16;

const NUM_ROWS: [usize; 5] = [0, 1, 2, 9, 40];
const HIDDEN: usize = model::HIDDEN_SIZE;
const HEAD_DIM: usize = model::HEAD_DIM;
const OUT: usize = model::NUM_HEADS * HEAD_DIM;
const QKV: usize = OUT + 2 * model::NUM_KV_HEADS * HEAD_DIM;

/// Numbers from −1 to 1 (Steele and others, "Fast splittable pseudorandom number generators").
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn rows<const K: usize>(&mut self, num_rows: usize) -> Vec<[f32; K]> {
        (0..num_rows).map(|_| std::array::from_fn(|_| self.float())).collect()
    }
}

fn runner(num_threads: usize) -> Runner<model::Kernels> {
    Runner::new(Some(num_threads)).unwrap()
}

/// Sums of a few hundred products below 1 in float32.
fn assert_close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (idx, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*found) - expected).abs();
        assert!(difference < 1e-4, "{what}, element {idx}: {found}, expected {expected}");
    }
}

/// `x · weightᵀ + bias` with `weight(n, k)`.
fn plain<const N: usize, const K: usize>(
    x: &[[f32; K]],
    weight: impl Fn(usize, usize) -> f64,
    bias: &[f32; N],
) -> Vec<f64> {
    let output = |row: &[f32; K], n: usize| {
        let products = row.iter().enumerate().map(|(k, x)| f64::from(*x) * weight(n, k));
        products.sum::<f64>() + f64::from(bias[n])
    };
    x.iter().flat_map(|row| (0..N).map(move |n| (row, n))).map(|(row, n)| output(row, n)).collect()
}

#[test]
fn dense_weights() {
    const N: usize = model::VOCAB_SIZE;
    let mut random = Random(1);
    let weight: Vec<[f32; HIDDEN]> = random.rows(N);
    let weight: &[[f32; HIDDEN]; N] = weight.as_slice().try_into().unwrap();
    let bias = random.rows::<N>(1)[0];
    for num_threads in [1, 3] {
        let mut runner = runner(num_threads);
        let head = model::Head::new(&runner, weight, Some(&bias)).unwrap();
        for num_rows in NUM_ROWS {
            let x = random.rows(num_rows);
            let mut out = vec![[f32::NAN; N]; num_rows];
            head.run(&mut runner, &x, &mut out).unwrap();
            let expected = plain(&x, |n, k| f64::from(weight[n][k]), &bias);
            assert_close(out.as_flattened(), &expected, &format!("{num_rows} rows"));
        }
    }
}

/// Nibble positions of the eight outputs of a word.
const NIBBLES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

#[test]
fn four_bit_weights() {
    const N: usize = QKV;
    const GROUP: usize = model::GROUP_SIZE;
    let mut random = Random(2);
    let mut words = |num: usize| (0..num).map(|_| random.next() as u32).collect::<Vec<_>>();
    let (qweight, qzeros) = (words(HIDDEN * N / 8), words(HIDDEN / GROUP * N / 8));
    let scales: Vec<f16> =
        (0..HIDDEN / GROUP * N).map(|_| f16::from_f32(random.float() / 16.0)).collect();
    let weights = AwqWeights::new(&qweight, Some(&qzeros), &scales).unwrap();
    let nibble = |words: &[u32], row: usize, n: usize| {
        f64::from(words[row * (N / 8) + n / 8] >> (4 * NIBBLES[n % 8]) & 15)
    };
    let weight = |n: usize, k: usize| {
        let group = k / GROUP;
        (nibble(&qweight, k, n) - nibble(&qzeros, group, n)) * scales[group * N + n].to_f64()
    };
    let bias = random.rows::<N>(1)[0];
    for num_threads in [1, 3] {
        let mut runner = runner(num_threads);
        let qkv = model::Qkv::new(&runner, &weights, Some(&bias)).unwrap();
        for num_rows in NUM_ROWS {
            let x: Vec<[f32; HIDDEN]> = random.rows(num_rows);
            let mut out = vec![[f32::NAN; N]; num_rows];
            qkv.run(&mut runner, &x, &mut out).unwrap();
            let expected = plain(&x, weight, &bias);
            assert_close(out.as_flattened(), &expected, &format!("{num_rows} rows"));
        }
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let runner_ = runner(1);
    let (words, scales) = (vec![0; HIDDEN * QKV / 8], vec![f16::ONE; HIDDEN / 32 * QKV]);
    let weights = AwqWeights::<QKV, HIDDEN, 32>::new(&words, None, &scales).unwrap();
    let qkv = model::Qkv::new(&runner_, &weights, None).unwrap();
    let mut runner = runner_;
    let error = qkv.run(&mut runner, &[[0.0; HIDDEN]; 3], &mut [[0.0; QKV]; 2]).unwrap_err();
    assert!(error.to_string().contains("3 rows and room for 2 outputs"), "{error}");
    let short = AwqWeights::<QKV, HIDDEN, 32>::new(&words[1..], None, &scales).unwrap_err();
    assert!(short.to_string().contains("qweight has 4095 elements"), "{short}");
    let zeros = AwqWeights::<QKV, HIDDEN, 32>::new(&words, Some(&words), &scales).unwrap_err();
    assert!(zeros.to_string().contains("qzeros has 4096 elements"), "{zeros}");
    let group = AwqWeights::<QKV, HIDDEN, 48>::new(&words, None, &scales).unwrap_err();
    assert!(group.to_string().contains("in groups of 48"), "{group}");
    assert!(Runner::<model::Kernels>::new(Some(0)).is_err());
}

/// Cosines, then sines, of a token's place.
fn rotation(position: usize) -> [f32; model::ROTARY_DIM] {
    const HALF: usize = model::ROTARY_DIM / 2;
    std::array::from_fn(|idx| {
        let angle = position as f32 * 100f32.powf(-((idx % HALF) as f32) / HALF as f32);
        if idx < HALF { angle.cos() } else { angle.sin() }
    })
}

fn rotated(head: &[f32], position: usize) -> Vec<f64> {
    const HALF: usize = model::ROTARY_DIM / 2;
    let (turn, mut out) = (rotation(position).map(f64::from), Vec::new());
    for (idx, x) in head.iter().map(|x| f64::from(*x)).enumerate() {
        out.push(match idx {
            _ if idx < HALF => x * turn[idx] - f64::from(head[idx + HALF]) * turn[idx + HALF],
            _ => x * turn[idx - HALF] + f64::from(head[idx - HALF]) * turn[idx],
        });
    }
    out
}

/// Attention of the row at `position` of a sequence of rows as they were before rotation.
fn plain_attention(rows: &[[f32; QKV]], position: usize) -> Vec<f64> {
    let head = |row: usize, idx: usize| &rows[row][idx * HEAD_DIM..][..HEAD_DIM];
    let mut out = Vec::new();
    for query_head in 0..model::NUM_HEADS {
        let kv_head = query_head / (model::NUM_HEADS / model::NUM_KV_HEADS);
        let query = rotated(head(position, query_head), position);
        let score = |token: usize| {
            let key = rotated(head(token, model::NUM_HEADS + kv_head), token);
            let dot: f64 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
            (dot / (HEAD_DIM as f64).sqrt()).exp()
        };
        let scores: Vec<f64> = (0..=position).map(score).collect();
        let sum: f64 = scores.iter().sum();
        for idx in 0..HEAD_DIM {
            let value = |token: usize| {
                f64::from(head(token, model::NUM_HEADS + model::NUM_KV_HEADS + kv_head)[idx])
            };
            let total: f64 = scores.iter().enumerate().map(|(t, score)| score * value(t)).sum();
            out.push(total / sum);
        }
    }
    out
}

/// Two sequences in pages out of order: their prompts together, then both token by token.
#[test]
fn attention_over_pages() {
    const PROMPTS: [usize; 2] = [70, 5];
    const LENS: [usize; 2] = [75, 10];
    let sequences: Vec<Vec<[f32; QKV]>> = [Random(3).rows(LENS[0]), Random(4).rows(LENS[1])].into();
    let pages: [&[u32]; 2] = [&[4, 0, 2], &[3]];
    for num_threads in [1, 3] {
        let mut runner = runner(num_threads);
        let options = AttentionOptions { kv_dtype: KvDType::F32, ..AttentionOptions::default() };
        let attention = model::Attention::new(&runner, &options).unwrap();
        let mut cache = attention.kv_cache(5).unwrap();
        let mut step = |starts: [usize; 2], ends: [usize; 2]| {
            let (mut rows, mut turns, mut spans) = (Vec::new(), Vec::new(), Vec::new());
            for idx in 0..2 {
                rows.extend_from_slice(&sequences[idx][starts[idx]..ends[idx]]);
                turns.extend((starts[idx]..ends[idx]).map(rotation));
                let (context_len, num_rows) = (ends[idx], ends[idx] - starts[idx]);
                spans.push(Span { pages: pages[idx], context_len, num_rows });
            }
            let mut out = vec![[f32::NAN; OUT]; rows.len()];
            attention.rotate(&mut runner, &mut rows, &turns, &spans, &mut cache).unwrap();
            attention.attend(&mut runner, &rows, &spans, &cache, &mut out).unwrap();
            let places = (0..2).flat_map(|idx| (starts[idx]..ends[idx]).map(move |p| (idx, p)));
            for ((idx, position), out) in places.zip(&out) {
                let what = format!("sequence {idx}, position {position}");
                assert_close(out, &plain_attention(&sequences[idx], position), &what);
            }
        };
        step([0, 0], PROMPTS);
        for token in 0..5 {
            let starts = PROMPTS.map(|len| len + token);
            step(starts, starts.map(|start| start + 1));
        }
    }
}

#[test]
fn wrong_places_are_errors() {
    let mut runner = runner(1);
    let attention = model::Attention::new(&runner, &AttentionOptions::default()).unwrap();
    let int4 = AttentionOptions { kv_dtype: KvDType::I4, ..AttentionOptions::default() };
    let of_int4 = model::Attention::new(&runner, &int4).unwrap();
    let mut cache = attention.kv_cache(2).unwrap();
    let span = Span { pages: &[0, 1], context_len: 40, num_rows: 1 };
    let cases: [(&[Span<'_>], &str); 6] = [
        (&[Span { num_rows: 2, ..span }], "1 rows, and spans of 2 rows"),
        (&[Span { num_rows: 0, ..span }], "0 rows of 40 tokens"),
        (&[Span { context_len: 0, ..span }], "1 rows of 0 tokens"),
        (&[Span { context_len: 65, ..span }], "2 pages for 65 tokens, which take 3"),
        (&[Span { pages: &[0, 2], ..span }], "page 2 of a cache of 2"),
        (&[], "1 rows, and spans of 0 rows"),
    ];
    let mut rows = vec![[0.0; QKV]; 1];
    let turns = vec![rotation(39); 2];
    let mut rotate = |rows: &mut [[f32; QKV]], turns: &[_], spans: &[Span<'_>]| {
        let cache: &mut KvCache<model::Kernels> = &mut cache;
        attention.rotate(&mut runner, rows, turns, spans, cache).map_err(|error| error.to_string())
    };
    for (spans, reason) in cases {
        let error = rotate(&mut rows, &turns[..1], spans).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
    assert!(rotate(&mut rows, &turns, &[span]).unwrap_err().contains("1 rows and 2 rotations"));
    let error = rotate(&mut [[0.0; QKV]; 2], &turns, &[span, span]).unwrap_err();
    assert!(error.contains("page 1 would be written at two places"), "{error}");
    assert_eq!(rotate(&mut rows, &turns[..1], &[span]), Ok(()));
    let mut out = vec![[0.0; OUT]; 1];
    let error = of_int4.attend(&mut runner, &rows, &[span], &cache, &mut out).unwrap_err();
    assert!(error.to_string().contains("a cache of f16 for attention over int4"), "{error}");
    let error = attention.attend(&mut runner, &rows, &[span], &cache, &mut []).unwrap_err();
    assert!(error.to_string().contains("1 rows and room for 0 outputs"), "{error}");
    let norm = [1.0; HEAD_DIM];
    let options = AttentionOptions { qk_norm: Some((&norm, &norm)), ..Default::default() };
    let error = model::Attention::new(&runner, &options).err().unwrap();
    assert!(error.to_string().contains("wants no QK-norm"), "{error}");
    assert!(attention.kv_cache(1 << 40).is_err());
}
