//! What a call of a kernel must move and compute at least, and how long that takes at best.

use bespoke_kernel_gen::spec::{ActivationType, DType, KernelSpec, RowFormat, activation_group};

use super::limits::Limits;
use super::pack::Panels;
use crate::kernels::Kernel;
use crate::kernels::abi::SequenceSpan;
use crate::kernels::pages::page_bytes;

/// What a call must move and compute, whatever the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes that come from memory: weights, KV pages.
    pub memory_bytes: usize,
    /// Bytes read and written that a cache holds: activations.
    pub cache_bytes: usize,
    /// Operations on bytes, 2 per multiply-add.
    pub dot_ops: usize,
    /// Operations on bfloat16, 2 per multiply-add.
    pub bf16_ops: usize,
    /// Operations on float32, 2 per multiply-add.
    pub fma_ops: usize,
}

/// What holds a call back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    Memory,
    Cache,
    Dot,
    Bf16,
    Fma,
}

impl Bound {
    pub fn name(self) -> &'static str {
        match self {
            Bound::Memory => "memory",
            Bound::Cache => "cache",
            Bound::Dot => "int8 dot",
            Bound::Bf16 => "bf16 dot",
            Bound::Fma => "f32 fma",
        }
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        self.memory_bytes += other.memory_bytes;
        self.cache_bytes += other.cache_bytes;
        self.dot_ops += other.dot_ops;
        self.bf16_ops += other.bf16_ops;
        self.fma_ops += other.fma_ops;
    }
}

impl std::ops::Mul<usize> for Work {
    type Output = Work;

    fn mul(self, times: usize) -> Work {
        Work {
            memory_bytes: self.memory_bytes * times,
            cache_bytes: self.cache_bytes * times,
            dot_ops: self.dot_ops * times,
            bf16_ops: self.bf16_ops * times,
            fma_ops: self.fma_ops * times,
        }
    }
}

impl Work {
    pub fn bytes(&self) -> usize {
        self.memory_bytes + self.cache_bytes
    }

    pub fn ops(&self) -> usize {
        self.dot_ops + self.bf16_ops + self.fma_ops
    }

    /// The shortest time that the machine's limits allow, in nanoseconds, and which limit sets it:
    /// moving and computing overlap perfectly. (A GB/s is a byte per nanosecond.)
    pub fn bound(&self, limits: &Limits) -> (f64, Bound) {
        let times = [
            (self.memory_bytes as f64 / limits.memory_gb_per_s, Bound::Memory),
            (self.cache_bytes as f64 / limits.cache_gb_per_s, Bound::Cache),
            (self.dot_ops as f64 / limits.dot_gop_per_s, Bound::Dot),
            (self.bf16_ops as f64 / limits.bf16_gop_per_s, Bound::Bf16),
            (self.fma_ops as f64 / limits.fma_gop_per_s, Bound::Fma),
        ];
        times.into_iter().fold((0.0, Bound::Memory), |a, b| if b.0 > a.0 { b } else { a })
    }

    /// Of one call of any kernel but attention's over `rows` rows. Biases and the vectors of norms
    /// are not counted.
    ///
    /// Panics for paged attention, whose work depends on contexts.
    pub fn of(kernel: &Kernel, rows: usize) -> Work {
        let cached = |bytes: usize| Work { cache_bytes: rows * bytes, ..Work::default() };
        match kernel.spec {
            KernelSpec::AwqGemm { .. } | KernelSpec::Gemm { .. } | KernelSpec::GemmBf16 { .. } => {
                linear(kernel, rows)
            }
            KernelSpec::Embed { hidden, dtype } => {
                Work { memory_bytes: rows * hidden * dtype.size(), ..cached(hidden * 4) }
            }
            // Residual in and out, what is added to it, and the rows that come out.
            KernelSpec::RmsNorm { hidden, out } => cached(3 * hidden * 4 + row_bytes(hidden, out)),
            KernelSpec::Rope {
                num_heads,
                num_kv_heads,
                head_dim,
                rotary_dim,
                kv,
                page_size,
                ..
            } => {
                let width = (num_heads + 2 * num_kv_heads) * head_dim;
                let page = page_bytes(kv.bits(), num_kv_heads, head_dim, page_size);
                // All of a row is read, its q and its share of the pages are written.
                cached((width + num_heads * head_dim + rotary_dim) * 4 + page / page_size)
            }
            KernelSpec::SiluAndMul { intermediate, out } => {
                cached(2 * intermediate * 4 + row_bytes(intermediate, out))
            }
            KernelSpec::Quantize { k, out } => cached(k * 4 + row_bytes(k, out)),
            KernelSpec::Sample { vocab } => cached(vocab * 4),
            KernelSpec::PagedAttention { .. } => wrong_spec(kernel),
        }
    }

    /// Of one call of paged attention over `spans`: each sequence's pages are read once, as far as
    /// its window reaches.
    ///
    /// Panics for other ops.
    pub fn of_attention(kernel: &Kernel, spans: &[SequenceSpan]) -> Work {
        #[rustfmt::skip]
        let KernelSpec::PagedAttention {
            num_heads, num_kv_heads, head_dim, window, kv, page_size,
        } = kernel.spec else { wrong_spec(kernel) };
        let page = page_bytes(kv.bits(), num_kv_heads, head_dim, page_size);
        let mut work = Work::default();
        for span in spans {
            let (rows, context) = (span.num_rows as usize, span.context_len as usize);
            let reach = if window > 0 { window.min(context) } else { context };
            // What the first row sees, then one more a row until the window is full.
            let first = (context - rows + 1).min(reach);
            let growing = (reach - first).min(rows - 1);
            let pairs = rows * first + growing * (growing + 1) / 2 + (rows - 1 - growing) * growing;
            let seen = (reach + rows - 1).min(context);
            work += Work {
                memory_bytes: seen.div_ceil(page_size) * page,
                cache_bytes: 2 * rows * num_heads * head_dim * 4,
                // A product with K and one with V for each query head and token seen.
                fma_ops: 4 * pairs * num_heads * head_dim,
                ..Work::default()
            };
        }
        work
    }
}

/// Packed weights of a linear with its scales and zeros, its rows in and out, and its operations.
fn linear(kernel: &Kernel, rows: usize) -> Work {
    let lanes = kernel.target.lanes();
    match kernel.spec {
        KernelSpec::AwqGemm { n, k, group, activation } => {
            let group = activation_group(k, group).expect("a plan has no group it cannot pack");
            let panels = Panels { n, k, lanes, cols: kernel.cols };
            // Half a byte a weight, a float16 scale and a byte for the zero of a group.
            let memory_bytes = panels.padded_n() * (k / 2 + k / group * 3);
            let ops = 2 * rows * n * k;
            let (format, dot_ops, fma_ops) = match activation {
                ActivationType::Int8 => (RowFormat::I8 { group }, ops, 0),
                _ => (RowFormat::F32, 0, ops),
            };
            let cache_bytes = rows * (row_bytes(k, format) + n * 4);
            Work { memory_bytes, cache_bytes, dot_ops, fma_ops, ..Work::default() }
        }
        KernelSpec::Gemm { n, k, weight } => {
            let panels = Panels { n, k, lanes, cols: kernel.cols };
            let memory_bytes = panels.padded_n() * k * weight.size();
            let ops = 2 * rows * n * k;
            // Rows of int8 are a byte an element, and a scale that does not count.
            let (row_bytes, dot_ops, fma_ops) = match weight {
                DType::I8 => (k, ops, 0),
                _ => (k * 4, 0, ops),
            };
            let cache_bytes = rows * (row_bytes + n * 4);
            Work { memory_bytes, cache_bytes, dot_ops, fma_ops, ..Work::default() }
        }
        KernelSpec::GemmBf16 { n, k } => {
            let panels = Panels { n, k, lanes, cols: kernel.cols };
            let memory_bytes = panels.padded_n() * k.next_multiple_of(2) * 2;
            let cache_bytes = rows * (row_bytes(k, RowFormat::Bf16) + n * 4);
            Work { memory_bytes, cache_bytes, bf16_ops: 2 * rows * n * k, ..Work::default() }
        }
        _ => wrong_spec(kernel),
    }
}

/// Bytes of a row of `k` elements, with the scales and sums of an int8 row.
fn row_bytes(k: usize, format: RowFormat) -> usize {
    match format {
        RowFormat::F32 => k * 4,
        RowFormat::Bf16 => k * 2,
        RowFormat::I8 { group } => k + k / group * 8,
    }
}

fn wrong_spec(kernel: &Kernel) -> ! {
    panic!("{}: asked for the work of another op than {:?}", kernel.symbol, kernel.spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::KernelFn;
    use crate::kernels::abi::{PagedAttentionArgs, Share};
    use bespoke_kernel_gen::spec::{KvDType, RowRegime};
    use bespoke_kernel_gen::target::Target;

    #[test]
    fn the_slowest_limit_binds() {
        let limits = Limits {
            target: Target::Portable,
            num_threads: 2,
            memory_gb_per_s: 20.0,
            cache_gb_per_s: 100.0,
            dot_gop_per_s: 1000.0,
            bf16_gop_per_s: 400.0,
            fma_gop_per_s: 200.0,
        };
        let some = Work { memory_bytes: 2000, cache_bytes: 9000, ..Work::default() };
        let work = Work { dot_ops: 50_000, ..some };
        assert_eq!(work.bound(&limits), (100.0, Bound::Memory));
        let work = Work { dot_ops: 500_000, ..work };
        assert_eq!(work.bound(&limits), (500.0, Bound::Dot));
        let work = Work { bf16_ops: 100_000, ..some };
        assert_eq!(work.bound(&limits), (250.0, Bound::Bf16));
    }

    /// A kernel that does nothing.
    fn attention(num_heads: usize, head_dim: usize, window: usize) -> Kernel {
        unsafe fn nothing(_: &PagedAttentionArgs, _: Share) {}
        Kernel {
            symbol: "nothing",
            spec: KernelSpec::PagedAttention {
                num_heads,
                num_kv_heads: 1,
                head_dim,
                window,
                kv: KvDType::F16,
                page_size: 16,
            },
            regime: RowRegime::Any,
            target: Target::Portable,
            rows: 1,
            cols: 0,
            scratch_bytes: 0,
            reduction_class: "nothing",
            source_hash: "",
            run: KernelFn::PagedAttention(nothing),
        }
    }

    #[test]
    fn attention_counts_what_each_row_sees() {
        let (num_heads, head_dim) = (3, 8);
        for window in [0, 1, 2, 5, 40] {
            let kernel = attention(num_heads, head_dim, window);
            for (rows, context) in [(1, 1), (1, 33), (7, 7), (7, 20), (33, 40)] {
                let span = SequenceSpan {
                    num_rows: rows as u32,
                    context_len: context as u32,
                    ..SequenceSpan::default()
                };
                let seen = |row: usize| {
                    let visible = context - rows + row + 1;
                    if window > 0 { visible.min(window) } else { visible }
                };
                let pairs: usize = (0..rows).map(seen).sum();
                let work = Work::of_attention(&kernel, &[span, span]);
                assert_eq!(work.fma_ops, 2 * 4 * pairs * num_heads * head_dim, "{rows} {context}");
            }
        }
    }
}
