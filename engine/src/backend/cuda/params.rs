//! Launch parameters of the CUDA kernels: `templates/common/params.h` in Rust. Device pointers are
//! plain numbers.

macro_rules! params {
    ($($(#[$attribute:meta])* $name:ident [$size:literal] { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$attribute])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, PartialEq)]
            pub struct $name {
                $(pub $field: $type,)*
            }

            // The padding is spelled out: a struct is as long as its fields together.
            const _: () = {
                assert!(size_of::<$name>() == $size);
                assert!(0 $(+ size_of::<$type>())* == $size);
            };

            impl Bytes for $name {}
        )*
    };
}

/// Structs of numbers without gaps.
pub trait Bytes: Copy {
    /// The struct as a kernel reads it.
    fn bytes(&self) -> &[u8] {
        // SAFETY: `params!` proves that the struct has no padding, and its fields are numbers.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

params! {
    EmbedParams [32] {
        table: u64,
        tokens: u64,
        out: u64,
        num_rows: u32,
        pad: u32,
    }
    RmsNormParams [48] {
        residual: u64,
        delta: u64,
        weight: u64,
        select: u64,
        out: u64,
        num_rows: u32,
        epsilon: f32,
    }
    LinearParams [64] {
        weight: u64,
        scales: u64,
        bias: u64,
        x: u64,
        out: u64,
        workspace: u64,
        counters: u64,
        num_rows: u32,
        pad: u32,
    }
    RopeParams [56] {
        qkv: u64,
        cos_sin: u64,
        slots: u64,
        q_norm: u64,
        k_norm: u64,
        kv_cache: u64,
        num_rows: u32,
        epsilon: f32,
    }
    PagedAttentionParams [80] {
        qkv: u64,
        kv_cache: u64,
        spans: u64,
        items: u64,
        num_items: u64,
        page_table: u64,
        out: u64,
        workspace: u64,
        counters: u64,
        scale: f32,
        pad: u32,
    }
    SiluAndMulParams [24] {
        gate_up: u64,
        out: u64,
        num_rows: u32,
        pad: u32,
    }
    LogitStatsOut [12] {
        max: f32,
        argmax: u32,
        log_sum_exp: f32,
    }
    SampleParams [24] {
        logits: u64,
        out: u64,
        num_rows: u32,
        pad: u32,
    }
}
