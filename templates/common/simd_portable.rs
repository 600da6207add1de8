//! [`Simd`] in plain Rust: eight lanes as arrays, any machine.

use super::simd::Simd;

#[derive(Clone, Copy)]
pub struct Portable;

const L: usize = 8;

macro_rules! lanes {
    ($i:ident => $e:expr) => {{
        let mut out = [Default::default(); L];
        let mut $i = 0;
        while $i < L {
            out[$i] = $e;
            $i += 1;
        }
        out
    }};
}

#[allow(clippy::undocumented_unsafe_blocks, reason = "pointer reads the trait's contract covers")]
impl Simd for Portable {
    const LANES: usize = L;
    const DOT_I8_BIAS: i32 = 0;
    const BLOCK_TILES: usize = 1;
    type F32 = [f32; L];
    type I32 = [i32; L];

    #[inline(always)]
    unsafe fn zero() -> [f32; L] {
        [0.0; L]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; L] {
        [x; L]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; L] {
        unsafe { p.cast::<[f32; L]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: [f32; L]) {
        unsafe { p.cast::<[f32; L]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> [f32; L] {
        lanes!(i => if i < n { unsafe { p.add(i).read_unaligned() } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_first(p: *mut f32, x: [f32; L], n: usize) {
        for (i, value) in x.into_iter().enumerate().take(n) {
            unsafe { p.add(i).write_unaligned(value) }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> [f32; L] {
        lanes!(i => half::f16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> [f32; L] {
        lanes!(i => f32::from_bits(u32::from(unsafe { p.add(i).read_unaligned() }) << 16))
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> [f32; L] {
        lanes!(i => f32::from(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_u4(p: *const u8, first: usize) -> [f32; L] {
        let shift = if first == 0 { 0 } else { 4 };
        lanes!(i => f32::from(unsafe { *p.add(i) } >> shift & 0x0f))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: [f32; L]) {
        for (i, value) in x.into_iter().enumerate() {
            unsafe { p.add(i).write_unaligned(half::f16::from_f32(value).to_bits()) }
        }
    }

    #[inline(always)]
    unsafe fn add(a: [f32; L], b: [f32; L]) -> [f32; L] {
        lanes!(i => a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; L], b: [f32; L]) -> [f32; L] {
        lanes!(i => a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; L], b: [f32; L]) -> [f32; L] {
        lanes!(i => a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: [f32; L], b: [f32; L]) -> [f32; L] {
        lanes!(i => a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; L], b: [f32; L]) -> [f32; L] {
        lanes!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: [f32; L], b: [f32; L]) -> [f32; L] {
        lanes!(i => if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn abs(a: [f32; L]) -> [f32; L] {
        lanes!(i => a[i].abs())
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; L], b: [f32; L], c: [f32; L]) -> [f32; L] {
        // NOTE: not mul_add, which is a library call on machines without FMA.
        lanes!(i => a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(a: [f32; L]) -> [f32; L] {
        // NOTE: adding and subtracting 1.5 · 2^23 rounds to even below 2^22 in plain SSE2.
        const MAGIC: f32 = 12_582_912.0;
        lanes!(i => (a[i] + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn mul_pow2(a: [f32; L], n: [f32; L]) -> [f32; L] {
        lanes!(i => a[i] * f32::from_bits((((n[i].max(-127.0) as i32) + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn reduce_add(a: [f32; L]) -> f32 {
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    unsafe fn reduce_max(a: [f32; L]) -> f32 {
        let mut max = a[0];
        for value in a {
            if value > max {
                max = value;
            }
        }
        max
    }

    #[inline(always)]
    unsafe fn zero_i32() -> [i32; L] {
        [0; L]
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> [i32; L] {
        [x; L]
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u8) -> [i32; L] {
        unsafe { p.cast::<[i32; L]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u8, x: [i32; L]) {
        unsafe { p.cast::<[i32; L]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_u8_i32(p: *const u8) -> [i32; L] {
        lanes!(i => i32::from(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn add_i32(a: [i32; L], b: [i32; L]) -> [i32; L] {
        lanes!(i => a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn sub_i32(a: [i32; L], b: [i32; L]) -> [i32; L] {
        lanes!(i => a[i].wrapping_sub(b[i]))
    }
    #[inline(always)]
    unsafe fn mul_i32(a: [i32; L], b: [i32; L]) -> [i32; L] {
        lanes!(i => a[i].wrapping_mul(b[i]))
    }
    #[inline(always)]
    unsafe fn to_f32(a: [i32; L]) -> [f32; L] {
        lanes!(i => a[i] as f32)
    }
    #[inline(always)]
    unsafe fn low_nibbles(a: [i32; L]) -> [i32; L] {
        lanes!(i => a[i] & 0x0f0f_0f0f)
    }
    #[inline(always)]
    unsafe fn high_nibbles(a: [i32; L]) -> [i32; L] {
        lanes!(i => (a[i] >> 4) & 0x0f0f_0f0f)
    }
    #[inline(always)]
    unsafe fn byte<const BYTE: u32>(a: [i32; L]) -> [i32; L] {
        lanes!(i => (a[i] >> (8 * BYTE)) & 0xff)
    }
    #[inline(always)]
    unsafe fn dot_u4(acc: [i32; L], u: [i32; L], s: [i32; L]) -> [i32; L] {
        lanes!(i => {
            let (u, s) = (u[i].to_le_bytes(), s[i].to_le_bytes());
            acc[i]
                + i32::from(u[0]) * i32::from(s[0] as i8)
                + i32::from(u[1]) * i32::from(s[1] as i8)
                + i32::from(u[2]) * i32::from(s[2] as i8)
                + i32::from(u[3]) * i32::from(s[3] as i8)
        })
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: [i32; L], w: [i32; L], a: [i32; L]) -> [i32; L] {
        lanes!(i => {
            let (w, a) = (w[i].to_le_bytes(), a[i].to_le_bytes());
            acc[i]
                + (i32::from(w[0]) - 128) * i32::from(a[0] as i8)
                + (i32::from(w[1]) - 128) * i32::from(a[1] as i8)
                + (i32::from(w[2]) - 128) * i32::from(a[2] as i8)
                + (i32::from(w[3]) - 128) * i32::from(a[3] as i8)
        })
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: [f32; L]) -> [i32; L] {
        let rounded = unsafe { Self::round(x) };
        lanes!(i => {
            let q = rounded[i] as i32;
            unsafe { *p.add(i) = q as i8 };
            q
        })
    }
    #[inline(always)]
    unsafe fn reduce_add_i32(a: [i32; L]) -> i32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
}
