//! `paged_attention`: decoding (one query row per sequence) and prefill over the paged KV cache.

use super::op::{Instance, Launch, Op, Workspace, config, size, type_of};
use super::pages::Layout;
use super::spec::{check_positive, check_regime};
use super::{Arch, KvType, Regime, RowType};
use crate::name::Words;
use crate::spec::PAGE_SIZES;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PagedAttention {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// 0 for full attention.
    pub window: usize,
    pub rows: RowType,
    pub kv: KvType,
    pub page_size: usize,
}

/// Keys that one decode item takes at most; part of the reduction order.
pub const CHUNK: usize = 256;
/// Keys of a block of the softmax.
const BLOCK: usize = 64;
/// The largest head whose sums fit the registers.
const HEAD_DIM_MAX: usize = 256;

config! {
    pub struct Config {
        /// Of a block. Decode has one for each block of keys of a chunk.
        warps: "w",
        /// Of the ring that keys and values come through: fragments of a warp in decode, blocks
        /// of keys or values in prefill.
        stages: "s",
        /// Blocks on a multiprocessor.
        blocks: "b",
    }
}

/// What a kernel's columns are.
struct Columns {
    /// Tiles of 8 of a warp.
    tiles: usize,
    /// Query heads of a KV head that a block takes.
    heads: usize,
    /// Blocks for all query heads of a KV head.
    head_tiles: usize,
}

impl PagedAttention {
    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    pub fn pages(&self) -> Layout {
        let PagedAttention { num_kv_heads, head_dim, page_size, kv, .. } = *self;
        Layout { num_kv_heads, head_dim, page_size, kv }
    }

    fn columns(&self, config: &Config, regime: Regime) -> Columns {
        let large = self.pages().dims() > 128;
        let (tiles, columns) = match regime {
            Regime::Decode if self.group() <= 8 || large => (1, 8),
            Regime::Decode => (2, 16),
            _ if large => (1, 8 * config.warps),
            _ => (2, 16 * config.warps),
        };
        let head_tiles = self.group().div_ceil(columns);
        Columns { tiles, heads: self.group().div_ceil(head_tiles), head_tiles }
    }

    /// Rows of a prefill item.
    pub fn rows_max(&self, config: &Config) -> usize {
        let columns = self.columns(config, Regime::Prefill);
        columns.tiles * 8 * config.warps / columns.heads
    }

    /// Bytes of 32 keys × 32 dimensions.
    fn fragment_bytes(&self) -> usize {
        32 * 32 * self.kv.bits() / 8
    }

    /// Fragments of a block of keys, or of values.
    fn fragments(&self) -> usize {
        2 * self.pages().dims() / 32
    }

    fn shared_bytes(&self, config: &Config, regime: Regime) -> usize {
        let Config { warps, stages, .. } = *config;
        let tiles = self.columns(config, regime).tiles;
        let quantized = self.kv != KvType::Rows;
        if regime == Regime::Decode {
            let ring = warps * stages * self.fragment_bytes();
            let sums = warps * tiles * 8 * (self.pages().dims() + 4) * 4;
            return ring.max(sums) + 16;
        }
        let params = if quantized { 8 * BLOCK } else { 0 };
        let slot = self.fragments() * self.fragment_bytes() + params;
        let vectors = tiles * (self.fragments() + if quantized { 2 } else { 1 });
        stages * slot + vectors * warps * 32 * 16
    }

    fn fits(&self, config: &Config, regime: Regime, arch: Arch) -> bool {
        let bytes = config.blocks * (self.shared_bytes(config, regime) + 1024);
        bytes <= arch.shared_bytes_per_sm()
    }

    fn default_decode(&self, arch: Arch) -> Config {
        // NOTE: 12 KiB a warp: two blocks of four warps fit where memory is smallest.
        let stages = (12288 / self.fragment_bytes()).min(2 * self.fragments());
        // NOTE: more blocks would leave too few registers for larger heads.
        let blocks_max = match (self.pages().dims(), self.columns_of_decode()) {
            (..=64, 8) => 4,
            (..=128, 8) => 3,
            _ => 2,
        };
        let config = |blocks| Config { warps: CHUNK / BLOCK, stages, blocks };
        let all = (1..=blocks_max).rev().map(config);
        let mut fitting = all.filter(|config| self.fits(config, Regime::Decode, arch));
        fitting.next().unwrap_or(config(1))
    }

    fn columns_of_decode(&self) -> usize {
        8 * self.columns(&Config { warps: 4, stages: 2, blocks: 1 }, Regime::Decode).tiles
    }

    fn default_prefill(&self, arch: Arch) -> Config {
        let configs = [(8, 4), (8, 3), (4, 4), (4, 3), (8, 2), (4, 2)];
        let all = configs.map(|(warps, stages)| Config { warps, stages, blocks: 1 });
        // NOTE: addresses of more stages spill there.
        let stages_max = if arch == Arch::Sm120 { 2 } else { usize::MAX };
        let few = all.into_iter().filter(|config| config.stages <= stages_max);
        let mut fitting = few.filter(|config| self.fits(config, Regime::Prefill, arch));
        fitting.next().unwrap_or(all[all.len() - 1])
    }
}

impl Op for PagedAttention {
    const NAME: &'static str = "paged_attention";
    const REGIMES: &'static [Regime] = &[Regime::Decode, Regime::Prefill];
    type Config = Config;

    fn words(&self) -> String {
        let PagedAttention { num_heads, num_kv_heads, head_dim, window, page_size, .. } = self;
        let (rows, kv) = (self.rows.name(), self.kv.name());
        format!("h{num_heads}_v{num_kv_heads}_d{head_dim}_w{window}_p{page_size}_{rows}_{kv}")
    }

    fn parse(words: &mut Words<'_>) -> Option<PagedAttention> {
        // NOTE: fields are evaluated in the order they are written, the order of the words.
        Some(PagedAttention {
            num_heads: words.size("h")?,
            num_kv_heads: words.size("v")?,
            head_dim: words.size("d")?,
            window: words.size("w")?,
            page_size: words.size("p")?,
            rows: words.row_type()?,
            kv: words.kv_type()?,
        })
    }

    fn default_config(&self, regime: Regime, arch: Arch) -> Config {
        match regime {
            Regime::Decode => self.default_decode(arch),
            _ => self.default_prefill(arch),
        }
    }

    /// Of the default's warps, which say how many rows of a prompt an item has.
    fn candidates(&self, regime: Regime, arch: Arch) -> Vec<Config> {
        let default = self.default_config(regime, arch);
        let stages = [2, 3, 4, 6, 8, 12, 16].into_iter();
        let mut all: Vec<Config> = stages
            .flat_map(|stages| (1..=4).map(move |blocks| Config { stages, blocks, ..default }))
            .chain([default])
            .collect();
        all.sort();
        all.dedup();
        all
    }

    fn is_feasible(&self, config: &Config, regime: Regime, _arch: Arch) -> Result<(), String> {
        check_regime::<PagedAttention>(regime)?;
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim, self.page_size)?;
        let Config { warps, stages, blocks } = *config;
        let decode = regime == Regime::Decode;
        if decode && warps * BLOCK != CHUNK {
            return Err(format!("{warps} warps; decode has one for each {BLOCK} of {CHUNK} keys"));
        }
        if warps == 0 || warps > 16 {
            return Err(format!("{warps} warps; 1 to 16 are possible"));
        }
        let stages_max = if decode { 2 * self.fragments() } else { 8 };
        if !(2..=stages_max).contains(&stages) {
            return Err(format!("{stages} stages; 2 to {stages_max} are possible"));
        }
        // NOTE: what sums and queries of a warp take, and what is needed beside them.
        let tiles = self.columns(config, regime).tiles;
        let registers = self.pages().dims() * tiles * 3 / 8 + 88;
        let limit = (65536 / (blocks.max(1) * warps * 32)).min(255);
        if registers > limit {
            return Err(format!("about {registers} registers a thread, {limit} are there"));
        }
        Ok(())
    }

    fn instance(&self, config: &Config, regime: Regime, _arch: Arch) -> Instance {
        let columns = self.columns(config, regime);
        Instance {
            kernel: if regime == Regime::Decode { "Decode" } else { "Prefill" },
            params: "PagedAttentionParams",
            constants: vec![
                type_of("Rows", self.rows.template()),
                type_of("Kv", self.kv.template(self.rows)),
                size("HEADS", self.num_heads),
                size("KV_HEADS", self.num_kv_heads),
                size("HEAD_DIM", self.head_dim),
                size("WINDOW", self.window),
                size("PAGE", self.page_size),
                size("CHUNK", CHUNK),
                size("HEADS_TILE", columns.heads),
                size("NT", columns.tiles),
                size("WARPS", config.warps),
                size("STAGES", config.stages),
            ],
            threads: config.warps * 32,
            min_blocks: config.blocks,
            shared_bytes: self.shared_bytes(config, regime),
        }
    }

    /// Decode: as many blocks as the device holds, which walk over the items, whose number is on
    /// the device. Prefill: a block for each item, KV head and tile of heads.
    fn launch(&self, config: &Config, regime: Regime, items: usize, num_sms: usize) -> Launch {
        let sets = self.num_kv_heads * self.columns(config, regime).head_tiles;
        let grid_x = match regime {
            Regime::Decode => num_sms * config.blocks,
            _ => items * sets,
        };
        Launch { grid_x: grid_x.max(1), grid_y: 1 }
    }

    /// Decode: room for `items` parts of rows, and a counter for each row, of which there are no
    /// more than items.
    fn workspace(&self, config: &Config, regime: Regime, items: usize) -> Workspace {
        if regime != Regime::Decode {
            return Workspace::default();
        }
        let columns = self.columns(config, regime);
        let sets = self.num_kv_heads * columns.head_tiles;
        let part = columns.heads * (self.pages().dims() + 4);
        Workspace { floats: items * sets * part, counters: items * sets }
    }
}

/// Sizes of heads and pages that the kernels of the KV cache can have.
pub(super) fn check_heads(
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    page_size: usize,
) -> Result<(), String> {
    let sizes = [
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("page_size", page_size),
    ];
    check_positive(&sizes)?;
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(format!("{num_heads} query heads are not a multiple of {num_kv_heads}"));
    }
    if !head_dim.is_multiple_of(8) || head_dim > HEAD_DIM_MAX {
        return Err(format!("head_dim {head_dim} is not a multiple of 8 up to {HEAD_DIM_MAX}"));
    }
    if !PAGE_SIZES.contains(&page_size) {
        return Err(format!("page size {page_size} is not one of 16, 32 and 64"));
    }
    Ok(())
}
