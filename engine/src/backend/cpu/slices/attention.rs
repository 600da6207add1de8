//! Attention over a KV cache in pages, and the rotation that fills it.

use std::collections::BTreeSet;
use std::marker::PhantomData;

use bespoke_kernel_gen::spec::{KvDType, ModelShape};

use super::{Needs, Runner, check_rows};
use crate::backend::cpu::float_memory;
use crate::backend::cpu::kernels::{self, Entry};
use crate::backend::cpu::memory::Memory;
use crate::binding::{Binding, Computes, PagedAttention};
use crate::error::Error;
use crate::kernels::abi::{PagedAttentionArgs, RopeArgs, SequenceSpan};
use crate::kernels::pages;

/// Attention of one model's layers.
///
/// Rows of `QKV` elements hold the query heads, then the heads of keys, then those of values; rows
/// of `OUT` elements the output of each query head; `ROTARY` elements of each head are rotated.
pub struct Attention<B, const QKV: usize, const OUT: usize, const ROTARY: usize> {
    shape: ModelShape,
    kv_dtype: KvDType,
    /// Weights of QK-norm.
    qk_norm: Option<(Memory, Memory)>,
    eps: f32,
    rope: Entry<RopeArgs>,
    decode: Entry<PagedAttentionArgs>,
    prefill: Entry<PagedAttentionArgs>,
    needs: Needs,
    binding: PhantomData<fn() -> B>,
}

/// How attention runs.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOptions<'a> {
    pub kv_dtype: KvDType,
    /// `[head_dim]` weights for queries and for keys, in models with QK-norm; `None` in others.
    pub qk_norm: Option<(&'a [f32], &'a [f32])>,
    /// Of QK-norm.
    pub eps: f32,
}

/// Pages of keys and values of one layer.
pub struct KvCache<B> {
    data: Memory,
    num_pages: usize,
    page_size: usize,
    page_bytes: usize,
    kv_dtype: KvDType,
    binding: PhantomData<fn() -> B>,
}

/// Rows of one sequence, the last of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span<'a> {
    /// The pages that hold the sequence, in order; there may be more than it needs.
    pub pages: &'a [u32],
    /// Tokens of the sequence, these rows included.
    pub context_len: usize,
    pub num_rows: usize,
}

impl Default for AttentionOptions<'_> {
    /// A float16 cache, no QK-norm.
    fn default() -> Self {
        AttentionOptions { kv_dtype: KvDType::F16, qk_norm: None, eps: 1e-5 }
    }
}

impl<B: Binding, const QKV: usize, const OUT: usize, const ROTARY: usize>
    Attention<B, QKV, OUT, ROTARY>
{
    /// # Errors
    /// QK-norm weights for a model without, or none for one with it, or of another size; a kernel
    /// that is not in the table.
    pub fn new(runner: &Runner<B>, options: &AttentionOptions<'_>) -> Result<Self, Error>
    where
        B: Computes<PagedAttention<QKV, OUT, ROTARY>>,
    {
        let shape = ModelShape { page_size: runner.table.page_size, ..B::shape() };
        let ModelShape { num_heads, num_kv_heads, head_dim, rotary_dim, .. } = shape;
        let sizes = ((num_heads + 2 * num_kv_heads) * head_dim, num_heads * head_dim, rotary_dim);
        if sizes != (QKV, OUT, ROTARY) {
            let (qkv, out, rotary) = sizes;
            return Err(Error::Request(format!(
                "attention over rows of {QKV} with outputs of {OUT} and {ROTARY} rotated elements; \
                 the model has {qkv}, {out} and {rotary}"
            )));
        }
        let kv = options.kv_dtype;
        let qk_norm = qk_norm(&shape, options.qk_norm)?;
        let (found, needs) = runner.find(|lookup| {
            let rope = lookup.any(shape.rope_kernel(kv)).map(kernels::rope);
            let attention = lookup.served(shape.paged_attention_kernel(kv))?;
            let [decode, prefill] =
                [1, usize::MAX].map(|rows| kernels::paged_attention(attention.of(rows)));
            Some((rope?, decode, prefill))
        })?;
        let (rope, decode, prefill) = found;
        Ok(Attention {
            shape,
            kv_dtype: kv,
            qk_norm,
            eps: options.eps,
            rope,
            decode,
            prefill,
            needs,
            binding: PhantomData,
        })
    }

    /// Empty pages of one layer.
    ///
    /// # Errors
    /// No memory, or more token slots than 32 bits can number.
    pub fn kv_cache(&self, num_pages: usize) -> Result<KvCache<B>, Error> {
        let page_size = self.shape.page_size;
        let num_pages_max = u32::MAX as usize / page_size;
        if num_pages > num_pages_max {
            return Err(Error::Request(format!(
                "{num_pages} pages; at most {num_pages_max} can be addressed"
            )));
        }
        // NOTE: the last vector of the last head may reach beyond it.
        let len = num_pages.checked_mul(self.page_bytes()).and_then(|len| len.checked_add(64));
        let len = len.ok_or_else(|| {
            Error::Resources(format!("{num_pages} pages do not fit an address space"))
        })?;
        Ok(KvCache {
            data: Memory::new(len, "the KV cache")?,
            num_pages,
            page_size,
            page_bytes: self.page_bytes(),
            kv_dtype: self.kv_dtype,
            binding: PhantomData,
        })
    }

    /// Rotates the queries of `qkv` in place, and appends rotated keys and values to the pages of
    /// their sequences. `spans` name the rows of `qkv` in order; `cos_sin` has the cosines of each
    /// row's `ROTARY / 2` frequencies, then their sines.
    ///
    /// # Errors
    /// Rows and spans do not fit each other or the cache, or two sequences would write into one
    /// page.
    pub fn rotate(
        &self,
        runner: &mut Runner<B>,
        qkv: &mut [[f32; QKV]],
        cos_sin: &[[f32; ROTARY]],
        spans: &[Span<'_>],
        cache: &mut KvCache<B>,
    ) -> Result<(), Error> {
        if qkv.len() != cos_sin.len() {
            let (rows, rotations) = (qkv.len(), cos_sin.len());
            let message = format!("{rows} rows and {rotations} rotations; give one for each row");
            return Err(Error::Request(message));
        }
        self.check(qkv.len(), spans, cache)?;
        let slots = self.slots(spans)?;
        if slots.is_empty() {
            return Ok(());
        }
        let norm = |memory: Option<&Memory>| memory.map_or(std::ptr::null(), Memory::ptr);
        let args = RopeArgs {
            rows: slots.len(),
            qkv: qkv.as_mut_ptr().cast(),
            cos_sin: cos_sin.as_ptr().cast(),
            slots: slots.as_ptr(),
            kv: cache.data.ptr_mut(),
            q_norm: norm(self.qk_norm.as_ref().map(|(q_norm, _)| q_norm)),
            k_norm: norm(self.qk_norm.as_ref().map(|(_, k_norm)| k_norm)),
            eps: self.eps,
        };
        // SAFETY: `check` compared rows and pages with the cache; a page is written by one sequence
        // only, whose slots ascend.
        unsafe { runner.run(self.needs, self.rope.run, &args) }
        Ok(())
    }

    /// Attention of the rotated queries of `qkv`, each over the tokens of its sequence up to its
    /// own.
    ///
    /// # Errors
    /// Rows, outputs and spans do not fit each other or the cache.
    pub fn attend(
        &self,
        runner: &mut Runner<B>,
        qkv: &[[f32; QKV]],
        spans: &[Span<'_>],
        cache: &KvCache<B>,
        out: &mut [[f32; OUT]],
    ) -> Result<(), Error> {
        check_rows(qkv.len(), out.len())?;
        self.check(qkv.len(), spans, cache)?;
        if qkv.is_empty() {
            return Ok(());
        }
        let (mut of_kernel, mut page_table) = (Vec::with_capacity(spans.len()), Vec::new());
        let mut first_row = 0;
        for span in spans {
            of_kernel.push(SequenceSpan {
                first_row: number(first_row)?,
                num_rows: number(span.num_rows)?,
                context_len: number(span.context_len)?,
                first_page: number(page_table.len())?,
            });
            first_row += span.num_rows;
            page_table.extend_from_slice(span.needed(cache.page_size));
        }
        let args = PagedAttentionArgs {
            spans: of_kernel.as_ptr(),
            num_spans: of_kernel.len(),
            qkv: qkv.as_ptr().cast(),
            kv: cache.data.ptr(),
            page_table: page_table.as_ptr(),
            softmax_scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            out: out.as_mut_ptr().cast(),
        };
        let decodes = spans.iter().all(|span| span.num_rows == 1);
        let entry = if decodes { self.decode } else { self.prefill };
        // SAFETY: `check` compared rows and pages with the cache.
        unsafe { runner.run(self.needs, entry.run, &args) }
        Ok(())
    }

    fn page_bytes(&self) -> usize {
        let ModelShape { num_kv_heads, head_dim, page_size, .. } = self.shape;
        pages::page_bytes(self.kv_dtype.bits(), num_kv_heads, head_dim, page_size)
    }

    fn check(&self, num_rows: usize, spans: &[Span<'_>], cache: &KvCache<B>) -> Result<(), Error> {
        let refuse = |message: String| Err(Error::Request(message));
        let KvCache { page_size, page_bytes, kv_dtype, .. } = *cache;
        let own = (self.shape.page_size, self.page_bytes(), self.kv_dtype);
        if (page_size, page_bytes, kv_dtype) != own {
            let (of_cache, own) = (cache.kv_dtype.name(), self.kv_dtype.name());
            return refuse(format!("a cache of {of_cache} for attention over {own}"));
        }
        let mut num_of_spans = 0usize;
        for Span { pages, context_len, num_rows } in spans {
            if *num_rows == 0 || num_rows > context_len {
                return refuse(format!(
                    "{num_rows} rows of {context_len} tokens; a span has at least one row, and \
                     its rows are among its tokens"
                ));
            }
            let num_pages = context_len.div_ceil(cache.page_size);
            if pages.len() < num_pages {
                let given = pages.len();
                return refuse(format!(
                    "{given} pages for {context_len} tokens, which take {num_pages}"
                ));
            }
            if let Some(page) = pages.iter().find(|page| **page as usize >= cache.num_pages) {
                return refuse(format!("page {page} of a cache of {}", cache.num_pages));
            }
            num_of_spans = num_of_spans.saturating_add(*num_rows);
        }
        match num_of_spans == num_rows {
            true => Ok(()),
            false => refuse(format!("{num_rows} rows, and spans of {num_of_spans} rows")),
        }
    }

    /// Where the rows of `spans` are appended.
    fn slots(&self, spans: &[Span<'_>]) -> Result<Vec<u32>, Error> {
        let page_size = self.shape.page_size;
        let mut slots = Vec::new();
        let mut written = BTreeSet::new();
        for span in spans {
            let first = span.context_len - span.num_rows;
            for page_idx in first / page_size..span.context_len.div_ceil(page_size) {
                let page = span.pages[page_idx];
                if !written.insert(page) {
                    return Err(Error::Request(format!(
                        "page {page} would be written at two places; give each its own"
                    )));
                }
            }
            for position in first..span.context_len {
                let page = span.pages[position / page_size] as usize;
                slots.push(number(page * page_size + position % page_size)?);
            }
        }
        Ok(slots)
    }
}

impl Span<'_> {
    /// The pages that hold the sequence's tokens.
    fn needed(&self, page_size: usize) -> &[u32] {
        &self.pages[..self.context_len.div_ceil(page_size)]
    }
}

impl<B> KvCache<B> {
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Token slots of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }
}

/// The weights of QK-norm, where the model has it.
fn qk_norm(
    shape: &ModelShape,
    weights: Option<(&[f32], &[f32])>,
) -> Result<Option<(Memory, Memory)>, Error> {
    let head_dim = shape.head_dim;
    match weights {
        None if !shape.qk_norm => Ok(None),
        Some((q, k)) if shape.qk_norm && q.len() == head_dim && k.len() == head_dim => {
            Ok(Some((float_memory(q, "a norm")?, float_memory(k, "a norm")?)))
        }
        _ => {
            let wants = if shape.qk_norm { "two weights of QK-norm" } else { "no QK-norm" };
            Err(Error::Request(format!(
                "{} wants {wants}, of {head_dim} elements each",
                shape.name
            )))
        }
    }
}

/// Kernels count in 32 bits.
fn number(value: usize) -> Result<u32, Error> {
    u32::try_from(value).map_err(|_| {
        Error::Request(format!("{value} rows or tokens; kernels count to {}", u32::MAX))
    })
}
