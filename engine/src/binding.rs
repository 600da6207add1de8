//! What [`bind!`](crate::bind) makes of a model: a type that stands for its kernels, and claims
//! about its sizes that the compiler checks.

use std::marker::PhantomData;

use bespoke_kernel_gen::cuda::CudaKernelTable;
use bespoke_kernel_gen::spec::{DType, ModelShape};
use half::{bf16, f16};

use crate::config::EngineOptions;
use crate::kernels::KernelTable;

/// A model and its kernels, known while the program is compiled.
pub trait Binding: 'static {
    fn shape() -> ModelShape;

    fn kernels() -> KernelTable;

    /// Its kernels for GPUs; empty where the build made none.
    fn cuda_kernels() -> CudaKernelTable;

    /// The default options of an engine over these kernels.
    fn options() -> EngineOptions {
        EngineOptions { cuda_kernels: Self::cuda_kernels(), ..EngineOptions::new(Self::kernels()) }
    }
}

/// That the kernels compute `Op`: [`Gemm`], [`AwqGemm`] or [`PagedAttention`] at fixed sizes.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no kernel for `{Op}`",
    label = "the model has no such op",
    note = "sizes are part of an op: N and K are a linear's outputs and inputs, GROUP the inputs \
            that share a scale; the module of `bind!` has a type for each op of the model"
)]
pub trait Computes<Op>: Binding {}

/// A matmul with `N` outputs and `K` inputs over dense weights of type `E`.
pub struct Gemm<E, const N: usize, const K: usize>(PhantomData<E>);

/// A matmul over 4-bit weights, `GROUP` inputs to a scale and a zero.
pub struct AwqGemm<const N: usize, const K: usize, const GROUP: usize>;

/// Attention over rows of `QKV` elements, with rows of `OUT` elements as its output, and the
/// rotation of `ROTARY` elements of each head.
pub struct PagedAttention<const QKV: usize, const OUT: usize, const ROTARY: usize>;

/// An element type of dense weights: [`F32`], [`F16`] or [`BF16`].
pub trait Element: sealed::Element {
    const DTYPE: DType;
    /// Plain numbers without padding.
    type Value: Copy;
}

/// float32 weights.
#[derive(Clone, Copy, Debug)]
pub enum F32 {}

/// float16 weights.
#[derive(Clone, Copy, Debug)]
pub enum F16 {}

/// bfloat16 weights.
#[derive(Clone, Copy, Debug)]
pub enum BF16 {}

impl Element for F32 {
    const DTYPE: DType = DType::F32;
    type Value = f32;
}

impl Element for F16 {
    const DTYPE: DType = DType::F16;
    type Value = f16;
}

impl Element for BF16 {
    const DTYPE: DType = DType::BF16;
    type Value = bf16;
}

/// NOTE: weights are read as bytes, which other types than these may not have.
mod sealed {
    pub trait Element {}

    impl Element for super::F32 {}
    impl Element for super::F16 {}
    impl Element for super::BF16 {}
}

/// Panics where a program claims another size than its model has, `usize::MAX` being all inputs of
/// an output. Called by the compiler: its message is an error of the build.
#[track_caller]
pub const fn check_size(name: &str, of_model: usize, claimed: usize) {
    if of_model != claimed {
        let message = Message::new()
            .with(name)
            .with(" is ")
            .with_size(of_model)
            .with(" in the model that the build script names, not ")
            .with_size(claimed);
        panic!("{}", message.text());
    }
}

/// As [`check_size`] for the element type of dense weights.
#[track_caller]
pub const fn check_dtype(of_model: DType, claimed: DType) {
    if of_model as usize != claimed as usize {
        let message = Message::new()
            .with("dtype is ")
            .with(of_model.name())
            .with(" in the model that the build script names, not ")
            .with(claimed.name());
        panic!("{}", message.text());
    }
}

/// A text that the compiler can put together.
struct Message {
    bytes: [u8; Message::LEN_MAX],
    len: usize,
}

impl Message {
    /// Names, two numbers of 20 digits, and what stands between them; more is cut off.
    const LEN_MAX: usize = 160;

    const fn new() -> Message {
        Message { bytes: [0; Message::LEN_MAX], len: 0 }
    }

    const fn with(mut self, text: &str) -> Message {
        let text = text.as_bytes();
        let mut idx = 0;
        while idx < text.len() && self.len < Message::LEN_MAX {
            self.bytes[self.len] = text[idx];
            self.len += 1;
            idx += 1;
        }
        self
    }

    const fn with_size(self, size: usize) -> Message {
        if size == usize::MAX {
            return self.with("Channel");
        }
        let mut digits = [b'0'; 20];
        let (mut first, mut rest) = (digits.len() - 1, size);
        digits[first] += (rest % 10) as u8;
        while rest >= 10 {
            rest /= 10;
            first -= 1;
            digits[first] += (rest % 10) as u8;
        }
        match str::from_utf8(digits.split_at(first).1) {
            Ok(digits) => self.with(digits),
            Err(_) => self,
        }
    }

    const fn text(&self) -> &str {
        match str::from_utf8(self.bytes.split_at(self.len).0) {
            Ok(text) => text,
            // Only a text that was cut within a character.
            Err(_) => "a size is not the model's",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_both_numbers() {
        for (size, text) in
            [(0, "0"), (9, "9"), (10, "10"), (49_152, "49152"), (usize::MAX, "Channel")]
        {
            assert_eq!(Message::new().with_size(size).text(), text);
        }
        assert_eq!(Message::new().with_size(usize::MAX - 1).text(), format!("{}", usize::MAX - 1));
        let long = "0123456789".repeat(20);
        assert_eq!(Message::new().with(&long).text(), &long[..Message::LEN_MAX]);
    }

    #[test]
    fn right_claims_pass() {
        const _: () = check_size("hidden_size", 576, 576);
        const _: () = check_dtype(DType::BF16, DType::BF16);
    }

    #[test]
    #[should_panic(
        expected = "hidden_size is 576 in the model that the build script names, not 577"
    )]
    fn a_wrong_size_is_told() {
        check_size("hidden_size", 576, 577);
    }

    #[test]
    #[should_panic(expected = "dtype is f16 in the model that the build script names, not bf16")]
    fn a_wrong_type_is_told() {
        check_dtype(DType::F16, DType::BF16);
    }
}
