//! The block formats of GGML and their values.
//!
//! Each block holds 32 or 256 consecutive weights of a row. Arithmetic is float32, one rounding
//! an operation, in the order of the published format description, so that values are the same
//! bit for bit as those of other readers.

use half::{bf16, f16};

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFormat {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Format, name, GGML type id, elements and bytes of a block.
const FORMATS: [(BlockFormat, &str, u32, usize, usize); 11] = [
    (BlockFormat::F32, "F32", 0, 1, 4),
    (BlockFormat::F16, "F16", 1, 1, 2),
    (BlockFormat::BF16, "BF16", 30, 1, 2),
    (BlockFormat::Q4_0, "Q4_0", 2, 32, 18),
    (BlockFormat::Q4_1, "Q4_1", 3, 32, 20),
    (BlockFormat::Q5_0, "Q5_0", 6, 32, 22),
    (BlockFormat::Q5_1, "Q5_1", 7, 32, 24),
    (BlockFormat::Q8_0, "Q8_0", 8, 32, 34),
    (BlockFormat::Q4K, "Q4_K", 12, 256, 144),
    (BlockFormat::Q5K, "Q5_K", 13, 256, 176),
    (BlockFormat::Q6K, "Q6_K", 14, 256, 210),
];

/// Names of the types that are known but cannot be read.
const OTHER_NAMES: [(u32, &str); 18] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (39, "MXFP4"),
];

impl BlockFormat {
    /// The format of a GGML type id, or the reason why it cannot be read.
    pub fn from_id(id: u32) -> Result<BlockFormat, String> {
        if let Some(row) = FORMATS.iter().find(|row| row.2 == id) {
            return Ok(row.0);
        }
        let other = OTHER_NAMES.iter().find(|row| row.0 == id);
        let name = other.map_or("unknown", |row| row.1);
        let known: Vec<_> = FORMATS.iter().map(|row| row.1).collect();
        Err(format!("type {id} ({name}) cannot be read; use a file in {}", known.join(", ")))
    }

    fn row(self) -> &'static (BlockFormat, &'static str, u32, usize, usize) {
        // Every variant has its row, in the order of declaration.
        &FORMATS[self as usize]
    }

    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The GGML type id.
    pub fn id(self) -> u32 {
        self.row().2
    }

    /// Weights a block holds.
    pub fn elements(self) -> usize {
        self.row().3
    }

    /// Bytes a block takes.
    pub fn bytes(self) -> usize {
        self.row().4
    }
}

/// Computes the values of whole blocks; `values` holds `elements()` for every `bytes()` of
/// `blocks`.
pub fn dequantize(format: BlockFormat, blocks: &[u8], values: &mut [f32]) {
    assert_eq!(blocks.len() / format.bytes() * format.elements(), values.len());
    let one_block = match format {
        BlockFormat::F32 => f32_value,
        BlockFormat::F16 => f16_value,
        BlockFormat::BF16 => bf16_value,
        BlockFormat::Q4_0 => q4_0,
        BlockFormat::Q4_1 => q4_1,
        BlockFormat::Q5_0 => q5_0,
        BlockFormat::Q5_1 => q5_1,
        BlockFormat::Q8_0 => q8_0,
        BlockFormat::Q4K => q4_k,
        BlockFormat::Q5K => q5_k,
        BlockFormat::Q6K => q6_k,
    };
    let blocks = blocks.chunks_exact(format.bytes());
    for (block, out) in blocks.zip(values.chunks_exact_mut(format.elements())) {
        one_block(block, out);
    }
}

/// The float16 at the start of `bytes`.
fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn f32_value(block: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
}

fn f16_value(block: &[u8], out: &mut [f32]) {
    out[0] = half(block);
}

fn bf16_value(block: &[u8], out: &mut [f32]) {
    out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32();
}

/// Scale; 16 bytes whose low nibbles are the first half.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half(block);
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block[2..18].iter().enumerate() {
        low[i] = d * (i32::from(byte & 15) - 8) as f32;
        high[i] = d * (i32::from(byte >> 4) - 8) as f32;
    }
}

/// Scale, minimum; nibbles as in [`q4_0`].
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block), half(&block[2..]));
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block[4..20].iter().enumerate() {
        low[i] = d * f32::from(byte & 15) + m;
        high[i] = d * f32::from(byte >> 4) + m;
    }
}

/// The fifth bits of 32 weights are the bits of a little-endian word.
fn fifth_bits(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn fifth(word: u32, i: usize) -> u8 {
    ((word >> i) as u8 & 1) << 4
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, bits) = (half(block), fifth_bits(&block[2..]));
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block[6..22].iter().enumerate() {
        low[i] = d * (i32::from(byte & 15 | fifth(bits, i)) - 16) as f32;
        high[i] = d * (i32::from(byte >> 4 | fifth(bits, i + 16)) - 16) as f32;
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, bits) = (half(block), half(&block[2..]), fifth_bits(&block[4..]));
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block[8..24].iter().enumerate() {
        low[i] = d * f32::from(byte & 15 | fifth(bits, i)) + m;
        high[i] = d * f32::from(byte >> 4 | fifth(bits, i + 16)) + m;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half(block);
    for (value, &byte) in out.iter_mut().zip(&block[2..34]) {
        *value = d * f32::from(byte as i8);
    }
}

/// Scale and minimum (6 bits each) of sub-block `j` of 8, packed into 12 bytes.
fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let scale = packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4;
        let min = packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
        (scale, min)
    }
}

/// Factor and offset of sub-block `j`, from a block that starts with d, dmin and 12 scale bytes.
fn sub_block(block: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = scale_and_min(&block[4..16], j);
    (half(block) * f32::from(scale), half(&block[2..]) * f32::from(min))
}

/// 8 sub-blocks of 32; each 32 bytes of nibbles hold a pair of them.
fn q4_k(block: &[u8], out: &mut [f32]) {
    for (pair, values) in out.chunks_exact_mut(64).enumerate() {
        let nibbles = &block[16 + 32 * pair..][..32];
        let (d0, m0) = sub_block(block, 2 * pair);
        let (d1, m1) = sub_block(block, 2 * pair + 1);
        for (i, &byte) in nibbles.iter().enumerate() {
            values[i] = d0 * f32::from(byte & 15) - m0;
            values[i + 32] = d1 * f32::from(byte >> 4) - m1;
        }
    }
}

/// As [`q4_k`], with 32 bytes of fifth bits before the nibbles: bit `j` belongs to sub-block `j`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let bits = &block[16..48];
    for (pair, values) in out.chunks_exact_mut(64).enumerate() {
        let nibbles = &block[48 + 32 * pair..][..32];
        let (d0, m0) = sub_block(block, 2 * pair);
        let (d1, m1) = sub_block(block, 2 * pair + 1);
        for (i, &byte) in nibbles.iter().enumerate() {
            let fifths = bits[i] >> (2 * pair);
            values[i] = d0 * f32::from(byte & 15 | (fifths & 1) << 4) - m0;
            values[i + 32] = d1 * f32::from(byte >> 4 | (fifths >> 1 & 1) << 4) - m1;
        }
    }
}

/// Two halves of 128 weights: 64 bytes of nibbles, 32 bytes of upper bit pairs and 8 signed
/// scales (one for 16 weights) each; the block's scale comes last.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half(&block[208..]);
    for (h, values) in out.chunks_exact_mut(128).enumerate() {
        let nibbles = &block[64 * h..][..64];
        let upper = &block[128 + 32 * h..][..32];
        let scales = &block[192 + 8 * h..][..8];
        for i in 0..32 {
            for quarter in 0..4 {
                let byte = nibbles[i + 32 * (quarter % 2)];
                let nibble = if quarter < 2 { byte & 15 } else { byte >> 4 };
                let q = i32::from(nibble | (upper[i] >> (2 * quarter) & 3) << 4) - 32;
                let scale = d * f32::from(scales[2 * quarter + i / 16] as i8);
                values[i + 32 * quarter] = scale * q as f32;
            }
        }
    }
}

/// Appends `values` as float16, rounded to nearest even. A value that is not finite or does not
/// fit is returned with its index.
pub fn append_f16(values: &[f32], out: &mut Vec<u8>) -> Result<(), (usize, f32)> {
    out.reserve(values.len() * 2);
    for (i, &value) in values.iter().enumerate() {
        let rounded = f16::from_f32(value);
        if !rounded.is_finite() {
            return Err((i, value));
        }
        out.extend_from_slice(&rounded.to_le_bytes());
    }
    Ok(())
}
