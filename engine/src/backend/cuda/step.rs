//! What the kernels of a step read of its batch, at fixed places in device memory.
//!
//! A recorded step is replayed for every batch of up to so many rows, so where its inputs lie may
//! depend on that number alone. Rows that only fill up the batch compute token 0, are written to
//! slots that nothing reads, and no work item of attention names them.

use std::mem::offset_of;

use bespoke_kernel_gen::cuda::attention_plan::{DECODE_ROWS_MAX, Item, Plan, Shape, Span};
use bespoke_kernel_gen::cuda::paged_attention::CHUNK;

use super::device::{Address, Device, Use};
use super::params::{AttentionItem, AttentionSpan, Bytes};
use crate::batch::{Batch, BatchLimits};
use crate::error::Error;

/// The generator plans in structs of its own, which a kernel reads as those of its header: every
/// field lies where the header has it, and so nothing lies between them.
macro_rules! same_layout {
    ($ours:ident, $header:ident { $($field:ident),* }) => {
        const _: () = {
            assert!(size_of::<$ours>() == size_of::<$header>());
            $(assert!(offset_of!($ours, $field) == offset_of!($header, $field));)*
        };
        impl Bytes for $ours {}
    };
}
same_layout!(Span, AttentionSpan { first_row, num_rows, first_page, context_len });
same_layout!(
    Item,
    AttentionItem { span, first_row, num_rows, first_key, num_keys, part, num_parts, first_part }
);

/// Batch sizes that steps are recorded for: fewer than half of the rows only fill it up.
const BUCKETS: [usize; 18] =
    [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320];

/// The sizes that a batch of up to `rows_max` rows may be recorded for, ascending.
pub fn buckets(rows_max: usize) -> Vec<usize> {
    BUCKETS.into_iter().filter(|bucket| *bucket <= rows_max).collect()
}

/// Rows that fill up a batch at most.
pub fn padding_max(rows_max: usize) -> usize {
    let buckets = buckets(rows_max);
    buckets.windows(2).map(|pair| pair[1] - pair[0] - 1).max().unwrap_or(0)
}

/// One launch of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Items {
    pub(super) items: Address,
    /// Where their number is.
    pub(super) num_items: Address,
    /// How many there are, or may be when the launch is replayed.
    pub(super) num_max: usize,
}

/// Addresses of a step's inputs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) tokens: Address,
    pub(super) slots: Address,
    pub(super) cos_sin: Address,
    pub(super) spans: Address,
    pub(super) page_table: Address,
    pub(super) decode: Vec<Items>,
    pub(super) prefill: Option<Items>,
}

/// Sizes that the places of a step's inputs follow from.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    rows: usize,
    rotary_dim: usize,
    num_launches: usize,
    num_items: usize,
    num_pages: usize,
}

/// Offsets in bytes.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    tokens: usize,
    slots: usize,
    cos_sin: usize,
    spans: usize,
    items: usize,
    page_table: usize,
    end: usize,
}

impl Offsets {
    /// The numbers of items come first.
    fn of(sizes: Sizes) -> Offsets {
        // NOTE: kernels load up to 16 bytes at a time.
        let after = |offset: usize, len: usize| (offset + len).next_multiple_of(16);
        let tokens = after(0, 4 * sizes.num_launches);
        let slots = after(tokens, 4 * sizes.rows);
        let cos_sin = after(slots, 4 * sizes.rows);
        let spans = after(cos_sin, 4 * sizes.rows * sizes.rotary_dim);
        let items = after(spans, size_of::<Span>() * sizes.rows);
        let page_table = after(items, size_of::<Item>() * sizes.num_items);
        let end = after(page_table, 4 * sizes.num_pages);
        Offsets { tokens, slots, cos_sin, spans, items, page_table, end }
    }
}

/// Bounds of a step's inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InputLimits {
    pub(super) batch: BatchLimits,
    pub(super) page_size: usize,
    pub(super) rotary_dim: usize,
    /// How attention is cut into items.
    pub(super) attention: Shape,
}

impl InputLimits {
    /// Chunks that the keys of a row lie in at most; a window may begin and end inside of one.
    pub(super) fn chunks_max(&self) -> usize {
        match self.attention.window {
            0 => self.batch.context_max.div_ceil(CHUNK),
            window => window.min(self.batch.context_max).div_ceil(CHUNK) + 1,
        }
    }

    fn num_pages_max(&self) -> usize {
        self.batch.sequences_max * self.batch.context_max.div_ceil(self.page_size)
    }

    fn sizes_max(&self) -> Sizes {
        let BatchLimits { rows_max, sequences_max, .. } = self.batch;
        let decode_items = (sequences_max * DECODE_ROWS_MAX).min(rows_max) * self.chunks_max();
        Sizes {
            rows: rows_max,
            rotary_dim: self.rotary_dim,
            // NOTE: a launch takes one item at least.
            num_launches: decode_items + 1,
            num_items: decode_items + rows_max,
            num_pages: self.num_pages_max(),
        }
    }

    /// Sizes of recorded steps of `bucket` rows.
    fn sizes_of_bucket(&self, bucket: usize) -> Sizes {
        Sizes {
            rows: bucket,
            num_launches: 1,
            num_items: bucket * self.chunks_max(),
            ..self.sizes_max()
        }
    }

    /// Rows of the largest step that may be recorded.
    pub(super) fn recorded_rows_max(&self) -> usize {
        let BatchLimits { rows_max, sequences_max, logit_rows_max, .. } = self.batch;
        sequences_max.min(rows_max).min(logit_rows_max)
    }
}

/// The inputs of the step at hand, on the host and on the device.
pub(super) struct StepInputs<H> {
    host: H,
    device: Address,
    limits: InputLimits,
    spans: Vec<Span>,
    plan: Plan,
    /// Whether a copy may still be reading `host`.
    is_uploading: bool,
    pub(super) places: Places,
    /// The first slot that nothing reads.
    pub(super) spare_slot: u32,
}

impl<H: AsRef<[u8]> + AsMut<[u8]>> StepInputs<H> {
    pub(super) fn new<D: Device<Host = H>>(
        device: &mut D,
        limits: InputLimits,
    ) -> Result<StepInputs<H>, Error> {
        let recorded = limits.sizes_of_bucket(limits.recorded_rows_max());
        let len = Offsets::of(limits.sizes_max()).end.max(Offsets::of(recorded).end);
        Ok(StepInputs {
            host: device.alloc_host(len)?,
            device: device.alloc(len, Use::Working, "the inputs of a step")?,
            limits,
            spans: Vec::with_capacity(limits.batch.sequences_max),
            plan: Plan::default(),
            is_uploading: false,
            places: Places::default(),
            spare_slot: 0,
        })
    }

    pub(super) fn recorded_rows_max(&self) -> usize {
        self.limits.recorded_rows_max()
    }

    /// The device has done everything that was asked of it.
    pub(super) fn finished(&mut self) {
        self.is_uploading = false;
    }

    /// Plans attention over a batch.
    pub(super) fn plan(&mut self, batch: &Batch) {
        self.spans.clear();
        self.spans.extend(batch.spans.iter().map(|span| Span {
            first_row: span.first_row,
            num_rows: span.num_rows,
            first_page: span.first_page,
            context_len: span.context_len,
        }));
        // The workspace holds a row of the longest context.
        self.plan.fill(&self.limits.attention, &self.spans).expect("a batch within its limits");
    }

    /// The bucket of the batch planned, where its ops may be recorded or replayed: each sequence
    /// has one row and wants its logits.
    pub(super) fn bucket(&self, batch: &Batch) -> Option<usize> {
        let rows = batch.num_rows();
        let is_decode = batch.spans.len() == rows && batch.logit_rows.len() == rows;
        if !is_decode || self.plan.decode_launches.len() > 1 {
            return None;
        }
        buckets(self.limits.recorded_rows_max()).into_iter().find(|bucket| rows <= *bucket)
    }

    /// Uploads the batch planned. With a bucket its inputs lie where all batches of this bucket
    /// have them.
    pub(super) fn upload<D: Device<Host = H>>(
        &mut self,
        device: &mut D,
        batch: &Batch,
        bucket: Option<usize>,
    ) {
        let num_pages = batch.page_table.len();
        assert!(num_pages <= self.limits.num_pages_max(), "{num_pages} pages in the table");
        let sizes = match bucket {
            Some(bucket) => Sizes { num_pages, ..self.limits.sizes_of_bucket(bucket) },
            None => Sizes {
                rows: batch.num_rows(),
                rotary_dim: self.limits.rotary_dim,
                num_launches: self.plan.decode_launches.len() + 1,
                num_items: self.plan.decode.len() + self.plan.prefill.len(),
                num_pages,
            },
        };
        let offsets = Offsets::of(sizes);
        self.places = self.places_at(&offsets, bucket.map(|_| sizes.num_items));
        if std::mem::replace(&mut self.is_uploading, true) {
            // NOTE: a step without logits reads nothing back, so nobody has waited for its copies.
            device.synchronize();
        }
        let items_end = self.write(batch, sizes.rows, &offsets);
        let bytes = self.host.as_ref();
        device.upload(self.device, &bytes[..items_end]);
        device.upload(self.places.page_table, &bytes[offsets.page_table..offsets.end]);
    }

    /// Addresses of the step's inputs; `recorded_items` is the room for items of a recorded step.
    fn places_at(&self, offsets: &Offsets, recorded_items: Option<usize>) -> Places {
        let at = |offset| self.device.offset(offset);
        let items = |idx: usize, first: usize, num_max: usize| Items {
            items: at(offsets.items + first * size_of::<Item>()),
            num_items: at(4 * idx),
            num_max,
        };
        let launches = self.plan.decode_launches.iter().enumerate();
        let decode = launches
            .map(|(idx, launch)| items(idx, launch.start, recorded_items.unwrap_or(launch.len())));
        let decode: Vec<Items> = decode.collect();
        let num_prefill = self.plan.prefill.len();
        let first_prefill = self.plan.decode.len();
        let prefill = items(decode.len(), first_prefill, num_prefill);
        Places {
            tokens: at(offsets.tokens),
            slots: at(offsets.slots),
            cos_sin: at(offsets.cos_sin),
            spans: at(offsets.spans),
            page_table: at(offsets.page_table),
            prefill: (num_prefill > 0).then_some(prefill),
            decode,
        }
    }

    /// Fills the host's copy; returns where the items end.
    fn write(&mut self, batch: &Batch, rows: usize, offsets: &Offsets) -> usize {
        let bytes = self.host.as_mut();
        let num_padding = rows - batch.num_rows();
        let launches = self.plan.decode_launches.iter().map(|launch| launch.len());
        let num_items = launches.chain([self.plan.prefill.len()]);
        put(bytes, 0, num_items.map(|num| (num as u32).to_le_bytes()));
        let tokens = batch.tokens.iter().copied().chain(std::iter::repeat_n(0, num_padding));
        put(bytes, offsets.tokens, tokens.map(u32::to_le_bytes));
        let spare = (0..num_padding).map(|idx| self.spare_slot + idx as u32);
        let slots = batch.slots.iter().copied().chain(spare);
        put(bytes, offsets.slots, slots.map(u32::to_le_bytes));
        let no_angles = std::iter::repeat_n(0.0, num_padding * self.limits.rotary_dim);
        let cos_sin = batch.cos_sin.iter().copied().chain(no_angles);
        put(bytes, offsets.cos_sin, cos_sin.map(f32::to_le_bytes));
        self.spans.iter().fold(offsets.spans, |at, span| put_bytes(bytes, at, span.bytes()));
        put(bytes, offsets.page_table, batch.page_table.iter().map(|page| page.to_le_bytes()));
        let items = self.plan.decode.iter().chain(&self.plan.prefill);
        items.fold(offsets.items, |at, item| put_bytes(bytes, at, item.bytes()))
    }
}

/// Writes values of 4 bytes one after the other.
fn put(bytes: &mut [u8], at: usize, values: impl Iterator<Item = [u8; 4]>) {
    for (place, value) in bytes[at..].chunks_exact_mut(4).zip(values) {
        place.copy_from_slice(&value);
    }
}

fn put_bytes(bytes: &mut [u8], at: usize, value: &[u8]) -> usize {
    bytes[at..at + value.len()].copy_from_slice(value);
    at + value.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_fill_up() {
        assert_eq!(buckets(33), [1, 2, 4, 8, 16, 24, 32]);
        assert_eq!(padding_max(64), 15);
        assert_eq!(padding_max(1), 0);
        for rows in 1..=320 {
            let bucket = buckets(320).into_iter().find(|bucket| rows <= *bucket).unwrap();
            assert!(bucket < 2 * rows, "{rows} in {bucket}");
        }
    }

    #[test]
    fn inputs_do_not_overlap() {
        let sizes = Sizes { rows: 3, rotary_dim: 10, num_launches: 5, num_items: 7, num_pages: 7 };
        let Offsets { tokens, slots, cos_sin, spans, items, page_table, end } = Offsets::of(sizes);
        let parts = [
            (0, 20),
            (tokens, 12),
            (slots, 12),
            (cos_sin, 120),
            (spans, 48),
            (items, 224),
            (page_table, 28),
            (end, 0),
        ];
        for pair in parts.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
            assert!(pair[1].0 % 16 == 0);
        }
    }
}
