//! A model's weights in a file, as the CPU's kernels read them: mapped, not loaded.
//!
//! [`PackedFile`] is an opened file, [`write`] makes one of a loaded model, and [`PackedCache`]
//! keeps those of the models that were loaded lately.

mod cache;
mod checksum;
mod format;
mod parts;
mod write;

pub use cache::{BYTES_MAX, PackedCache};
pub use format::{PackedFile, VERSION};
pub use parts::PackedParts;
pub use write::{packed_bytes, write};

#[cfg(test)]
mod tests {
    use bespoke_kernel_gen::spec::{DType, LinearRole};

    use super::VERSION;
    use crate::backend::cpu::pack::{self, Panels};
    use crate::model::linear::{AwqView, DenseView, LinearPart, LinearSource};

    /// Files of packed weights live longer than programs: what is packed differently needs another
    /// `packed::VERSION`, and then another hash here.
    #[test]
    fn the_layout_is_that_of_its_version() {
        let (n, k, group) = (40, 64, 32);
        let bytes = |len: usize, step: usize| -> Vec<u8> {
            (0..len).map(|i| ((i * step % 251) & 0x3b) as u8).collect()
        };
        let panels = Panels { n, k, lanes: 16, cols: 2 };
        let linear = |part| LinearSource { parts: vec![part], row_map: None, bias: None };
        let dense = bytes(n * k * 2, 7);
        let view = DenseView { n, k, dtype: DType::F16, bytes: &dense };
        let of_dense = linear(LinearPart::Dense(view));
        let (qweight, qzeros) = (bytes(n * k / 2, 11), bytes(k / group * n / 2, 13));
        let scales = bytes(k / group * n * 2, 17);
        let view =
            AwqView { n, k, group, qweight: &qweight, qzeros: Some(&qzeros), scales: &scales };
        let of_awq = linear(LinearPart::Awq(view));
        let dense = pack::dense(&of_dense, DType::F16, panels, 2).unwrap();
        let (int8, int8_scales) = pack::int8(&of_dense, panels, 2).unwrap();
        let awq = pack::awq(&of_awq, LinearRole::O, group, panels, 2).unwrap();
        let mut hasher = blake3::Hasher::new();
        for memory in [dense, int8, int8_scales, awq.weight, awq.scales, awq.zeros] {
            hasher.update(memory.bytes());
        }
        let found = (VERSION, hasher.finalize().to_hex()[..16].to_owned());
        assert_eq!(found, (1, "34b6304b96985595".to_owned()));
    }
}
