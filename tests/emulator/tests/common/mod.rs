//! What the tests share: bytes of values, random numbers, 16-bit types.

pub(crate) mod kv_cache;
pub(crate) mod models;

use bespoke_emulator::{Access, Emulator, Fault, Launch, Library, Report, Source, compile};
use bespoke_kernel_gen::cuda::{RowType, Variant};
use half::{bf16, f16};

pub(crate) const SEEDS: [u64; 5] = [1, 2, 3, 4, 5];

/// `value` as an element of 16-bit rows.
pub(crate) fn round(rows: RowType, value: f32) -> u16 {
    match rows {
        RowType::F16 => f16::from_f32(value).to_bits(),
        RowType::BF16 => bf16::from_f32(value).to_bits(),
    }
}

pub(crate) fn widen(rows: RowType, bits: u16) -> f32 {
    match rows {
        RowType::F16 => f16::from_bits(bits).to_f32(),
        RowType::BF16 => bf16::from_bits(bits).to_f32(),
    }
}

/// What rounding `value`, which has an error of float32 itself, may change.
pub(crate) fn tolerance(rows: RowType, value: f32) -> f32 {
    let half_step = match rows {
        RowType::F16 => 1.0 / 2048.0,
        RowType::BF16 => 1.0 / 256.0,
    };
    value.abs() * half_step * 1.01 + 1e-6
}

/// splitmix64
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In −1..1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.float() * scale).collect()
    }
}

/// Plain values as bytes.
pub(crate) trait Bytes {
    fn bytes(&self) -> Vec<u8>;
}

macro_rules! bytes {
    ($($t:ty),*) => {$(
        impl Bytes for [$t] {
            fn bytes(&self) -> Vec<u8> {
                self.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
        }
    )*};
}
bytes!(u8, u16, u32, u64, i32, f32);

pub(crate) fn to_u16(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

pub(crate) fn to_u32(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub(crate) fn to_f32(bytes: &[u8]) -> Vec<f32> {
    to_u32(bytes).into_iter().map(f32::from_bits).collect()
}

/// Launch parameters, field after field.
#[derive(Default)]
pub(crate) struct Params(pub(crate) Vec<u8>);

impl Params {
    pub(crate) fn u64(mut self, value: u64) -> Params {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Params {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn f32(mut self, value: f32) -> Params {
        self.0.extend(value.to_le_bytes());
        self
    }
}

pub(crate) fn emulator(seed: u64) -> Emulator {
    Emulator::new(seed).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn upload<T>(emulator: &mut Emulator, values: &[T], access: Access) -> u64
where
    [T]: Bytes,
{
    emulator.upload(&values.bytes(), access)
}

/// The kernel that the generator makes of `variant`, compiled.
pub(crate) fn generated(variant: &Variant) -> Library {
    let source = Source::of(variant).unwrap_or_else(|e| panic!("{e}"));
    compile(&[source]).unwrap_or_else(|e| panic!("{e}"))
}

/// Launches a generated kernel; `rows` as in `Variant::launch`.
pub(crate) fn launch(
    device: &mut Emulator,
    library: &Library,
    variant: &Variant,
    rows: usize,
    params: &Params,
) -> Result<Report, Fault> {
    const NUM_SMS: usize = 4;
    let instance = variant.instance();
    let grid = variant.launch(rows, NUM_SMS);
    let launch = Launch {
        grid: [grid.grid_x as u32, grid.grid_y as u32],
        block: instance.threads as u32,
        shared_bytes: instance.shared_bytes as u32,
    };
    device.launch(library, &variant.symbol(), launch, &params.0)
}
