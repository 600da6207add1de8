//! Every packed weight, read as the lanes of a warp read it, is the checkpoint's.

use bespoke_kernel_gen::spec::{DType, GroupSize};

use super::*;
use crate::model::linear::DenseView;

/// Bytes without a pattern.
fn noise(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 11) as u8
    };
    (0..count).map(next).collect()
}

/// Tensors of an AWQ linear.
struct Awq {
    n: usize,
    k: usize,
    group: usize,
    qweight: Vec<u8>,
    qzeros: Vec<u8>,
    scales: Vec<u8>,
}

impl Awq {
    fn new(n: usize, k: usize, group: usize, seed: u32) -> Awq {
        let scales = noise(k / group * n, seed + 2);
        let scales = scales.iter().map(|b| f16::from_f32((f32::from(*b) - 100.0) / 1024.0));
        Awq {
            n,
            k,
            group,
            qweight: noise(k * n / 2, seed),
            qzeros: noise(k / group * n / 2, seed + 1),
            scales: scales.flat_map(|scale| scale.to_le_bytes()).collect(),
        }
    }

    fn view(&self) -> AwqView<'_> {
        AwqView {
            n: self.n,
            k: self.k,
            group: self.group,
            qweight: &self.qweight,
            qzeros: Some(&self.qzeros),
            scales: &self.scales,
        }
    }
}

fn source<'a>(parts: Vec<LinearPart<'a>>, row_map: Option<Vec<u32>>) -> LinearSource<'a> {
    LinearSource { parts, row_map, bias: None }
}

fn word(bytes: &[u8], idx: usize) -> u32 {
    let b = &bytes[idx * 4..idx * 4 + 4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// The two halves of a register as the kernel's instructions make them: the word is shifted,
/// masked, put under an exponent, and brought to `q − zero` by one add or multiply-add.
fn integers(rows: RowType, q: u32, register: usize, zero: u16) -> [f32; 2] {
    let widen = |bits: u16| match rows {
        RowType::F16 => f16::from_bits(bits).to_f32(),
        RowType::BF16 => bf16::from_bits(bits).to_f32(),
    };
    let (shift, mask, exponent, factor) = match (rows, register) {
        (RowType::F16, 0) => (0, 0x000f_000f, 0x6400_6400, 1.0),
        (RowType::F16, 1) => (0, 0x00f0_00f0, 0x6400_6400, 1.0 / 16.0),
        (RowType::F16, 2) => (8, 0x000f_000f, 0x6400_6400, 1.0),
        (RowType::F16, _) => (8, 0x00f0_00f0, 0x6400_6400, 1.0 / 16.0),
        (RowType::BF16, register) => (4 * register, 0x000f_000f, 0x4300_4300, 1.0),
    };
    let pair: u32 = ((q >> shift) & mask) | exponent;
    [pair as u16, (pair >> 16) as u16].map(|bits| widen(bits) * factor + widen(zero))
}

/// Reads the weight of output `n` and packed input `place` as its lane does.
fn read_awq(tiles: &AwqTiles, layout: &AwqLayout, rows: RowType, n: usize, place: usize) -> f32 {
    let (group, tile, row) = (place / layout.scale_group, n % 64 / 16, n % 16);
    let (g, is_second) = (row % 8, row / 8);
    let record = (n / 64 * layout.num_scale_groups() + group) * 4 + tile;
    let record = word(&tiles.scales, record * 16 + g * 2 + is_second);
    let (scale, zero) = (f16::from_bits(record as u16).to_f32(), (record >> 16) as u16);
    // The mma's lane and register of the element, by the tables of the PTX manual.
    let (t, half, is_late) = (place % 8 / 2, place % 2, place % 16 / 8);
    let block = n / 64 * (layout.padded_k() / 64) + place / 64;
    let lane = ((block * 4 + tile) * 32 + g * 4 + t) * 4 + place % 64 / 16;
    let q = word(&tiles.weight, lane);
    integers(rows, q, is_second + 2 * is_late, zero)[half] * scale
}

fn check_awq(n: usize, k: usize, group: GroupSize) {
    for rows in RowType::ALL {
        let layout = AwqLayout::new(n, k, group);
        let tensors = Awq::new(n, k, group.of(k), (n * k) as u32);
        let source = source(vec![LinearPart::Awq(tensors.view())], None);
        let tiles = awq(&source, &layout, rows, 3).unwrap();
        let mut expected = vec![0.0; k];
        for row in 0..n {
            source.row(row, &mut expected);
            for (k, expected) in expected.iter().enumerate() {
                let got = read_awq(&tiles, &layout, rows, row, layout.place(k));
                assert_eq!(got, *expected, "{rows:?} {n}x{k} {group}, weight [{row}, {k}]");
            }
        }
    }
}

#[test]
fn awq_weights_are_read_back_at_every_place() {
    check_awq(64, 128, GroupSize::Of(128));
    check_awq(72, 96, GroupSize::Of(32));
    check_awq(128, 256, GroupSize::Of(64));
    check_awq(8, 1040, GroupSize::Channel);
    check_awq(136, 384, GroupSize::Of(384));
    for group in [8, 16, 24, 40, 48, 80, 96, 192] {
        check_awq(24, group * 5, GroupSize::Of(group));
    }
}

#[test]
fn nibbles_become_exact_differences() {
    for rows in RowType::ALL {
        for q in 0..16u32 {
            for zero in 0..16u8 {
                for register in 0..4 {
                    let bits = added_zero(rows, zero, register % 2 == 0);
                    let word = q << (4 * register) | q << (4 * register + 16);
                    let expected = q as f32 - f32::from(zero);
                    assert_eq!(integers(rows, word, register, bits), [expected; 2]);
                }
            }
        }
    }
}

#[test]
fn parts_and_row_maps_are_followed() {
    let (first, second) = (Awq::new(40, 64, 32, 7), Awq::new(24, 64, 32, 8));
    let parts = vec![LinearPart::Awq(first.view()), LinearPart::Awq(second.view())];
    let map = (0..64).map(|n| (n * 37 + 5) % 64).collect();
    let source = source(parts, Some(map));
    let layout = AwqLayout::new(64, 64, GroupSize::Of(32));
    let tiles = awq(&source, &layout, RowType::F16, 2).unwrap();
    let mut expected = vec![0.0; 64];
    for n in 0..64 {
        source.row(n, &mut expected);
        for (k, expected) in expected.iter().enumerate() {
            assert_eq!(read_awq(&tiles, &layout, RowType::F16, n, k), *expected);
        }
    }
}

#[test]
fn dense_weights_are_read_back_at_every_place() {
    for (n, k) in [(64, 64), (72, 96), (5, 1040), (130, 34)] {
        let bytes: Vec<u8> = noise(n * k, 3)
            .iter()
            .flat_map(|b| bf16::from_f32(f32::from(*b) - 128.0).to_le_bytes())
            .collect();
        let view = DenseView { n, k, dtype: DType::BF16, bytes: &bytes };
        let weight = dense(&source(vec![LinearPart::Dense(view)], None), RowType::BF16, 2).unwrap();
        let layout = DenseLayout { n, k };
        assert_eq!(weight.len(), layout.weight_bytes());
        for row in 0..n {
            for column in 0..k {
                let block = row / 64 * (layout.padded_k() / 64) + column / 64;
                let fragment = (block * 4 + row % 64 / 16) * 4 + column % 64 / 16;
                let lane = fragment * 32 + row % 8 * 4 + column % 8 / 2;
                let register = row % 16 / 8 + column % 16 / 8 * 2;
                let pair = word(&weight, lane * 4 + register);
                let got = (pair >> (column % 2 * 16)) as u16;
                let at = (row * k + column) * 2;
                assert_eq!(got.to_le_bytes(), bytes[at..at + 2], "{n}x{k} [{row}, {column}]");
            }
        }
    }
}

#[test]
fn weights_that_overflow_are_refused() {
    let bytes = f32::to_le_bytes(1e6).repeat(64);
    let view = DenseView { n: 8, k: 8, dtype: DType::F32, bytes: &bytes };
    let source = source(vec![LinearPart::Dense(view)], None);
    let message = dense(&source, RowType::F16, 1).unwrap_err().to_string();
    assert!(message.contains("weight [0, 0] = 1000000 does not fit f16"), "{message}");
    assert!(dense(&source, RowType::BF16, 1).is_ok());
}

#[test]
fn mixed_linears_are_refused() {
    let awq_part = Awq::new(8, 64, 64, 1);
    let bytes = vec![0; 8 * 64 * 4];
    let dense_part = DenseView { n: 8, k: 64, dtype: DType::F32, bytes: &bytes };
    let parts = vec![LinearPart::Awq(awq_part.view()), LinearPart::Dense(dense_part)];
    let layout = AwqLayout::new(16, 64, GroupSize::Of(64));
    let message = awq(&source(parts, None), &layout, RowType::F16, 1).unwrap_err().to_string();
    assert!(message.contains("mixes quantized and dense"), "{message}");
}
