//! What `gemm` and `awq_gemm` share: packed layouts, the slices of K, tilings and their choice.
//!
//! The words are those of `templates/common/matmul.cuh`.

use super::op::{Constant, Launch, Workspace, config, size};
use super::{Arch, Regime};
use crate::spec::{GroupSize, check_group};

/// Inputs of a stage, and outputs of the tiles that lie together; both sizes are padded to it.
const BLOCK: usize = 64;
/// Outputs of a tile.
const TILE: usize = 16;
/// Warps that a multiprocessor should have, enough to hide the latency of memory.
const NUM_WARPS: usize = 16;

config! {
    /// How the work of a matmul is cut.
    pub struct Config {
        /// 16-output tiles of a warp.
        out_tiles: "o",
        /// 8-row tiles of a warp.
        row_tiles: "r",
        /// Warps of a team, side by side along the outputs.
        out_warps: "ow",
        /// Warps of a team, side by side along the rows.
        row_warps: "rw",
        /// Teams of a block, each with its slice of K.
        k_warps: "kw",
        /// Blocks that share outputs, each with its slices of K.
        splits: "sp",
        /// Stages of a team's ring.
        stages: "s",
    }
}

/// Sizes of packed int4 weights; the layout is described in `templates/awq_gemm/awq_gemm.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AwqLayout {
    pub n: usize,
    pub k: usize,
    /// Inputs of a group.
    pub group: usize,
    /// Inputs of a group as packed: up to the next multiple of 16.
    pub packed_group: usize,
    /// Inputs of a record of scales.
    pub scale_group: usize,
}

impl AwqLayout {
    pub fn new(n: usize, k: usize, group: GroupSize) -> AwqLayout {
        let (group, packed_group, scale_group) = match group {
            GroupSize::Channel => (k, k, k.next_multiple_of(BLOCK)),
            GroupSize::Of(group) if group == k => (k, k, k.next_multiple_of(BLOCK)),
            GroupSize::Of(group) => {
                let packed = group.next_multiple_of(TILE);
                let whole = packed.is_multiple_of(BLOCK);
                let part = 1 << packed.trailing_zeros().min(BLOCK.trailing_zeros());
                (group, packed, if whole { packed } else { part })
            }
        };
        AwqLayout { n, k, group, packed_group, scale_group }
    }

    /// Inputs as packed, before they are padded to whole blocks.
    pub fn packed_k(&self) -> usize {
        self.k / self.group * self.packed_group
    }

    /// Where input `k` is packed.
    pub fn place(&self, k: usize) -> usize {
        k / self.group * self.packed_group + k % self.group
    }

    pub fn padded_n(&self) -> usize {
        self.n.next_multiple_of(BLOCK)
    }

    pub fn padded_k(&self) -> usize {
        self.packed_k().next_multiple_of(BLOCK)
    }

    pub fn num_scale_groups(&self) -> usize {
        self.padded_k() / self.scale_group
    }

    pub fn weight_bytes(&self) -> usize {
        self.padded_n() * self.padded_k() / 2
    }

    pub fn scale_bytes(&self) -> usize {
        self.padded_n() * self.num_scale_groups() * 4
    }
}

/// Sizes of packed 16-bit weights; the layout is described in `templates/gemm/gemm.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseLayout {
    pub n: usize,
    pub k: usize,
}

impl DenseLayout {
    pub fn padded_n(&self) -> usize {
        self.n.next_multiple_of(BLOCK)
    }

    pub fn padded_k(&self) -> usize {
        self.k.next_multiple_of(BLOCK)
    }

    pub fn weight_bytes(&self) -> usize {
        self.padded_n() * self.padded_k() * 2
    }
}

/// A matmul as its tiling sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) packed_k: usize,
    pub(super) group: usize,
    pub(super) packed_group: usize,
    /// Weights and scales of 16 outputs × 64 inputs.
    pub(super) tile_bytes: usize,
}

impl Shape {
    pub(super) fn dense(n: usize, k: usize) -> Shape {
        Shape { n, k, packed_k: k, group: k, packed_group: k, tile_bytes: TILE * BLOCK * 2 }
    }

    pub(super) fn awq(layout: &AwqLayout) -> Shape {
        let chains = BLOCK / layout.scale_group.min(BLOCK);
        Shape {
            n: layout.n,
            k: layout.k,
            packed_k: layout.packed_k(),
            group: layout.group,
            packed_group: layout.packed_group,
            tile_bytes: TILE * BLOCK / 2 + chains * TILE * 4,
        }
    }

    fn num_k_blocks(&self) -> usize {
        self.packed_k.div_ceil(BLOCK)
    }

    fn num_tiles(&self) -> usize {
        self.n.next_multiple_of(BLOCK) / TILE
    }

    /// How many slices K has, for all kernels of the linear: as many as it takes to keep a GPU's
    /// multiprocessors busy with one row, of two blocks of inputs at least.
    fn slices(&self) -> usize {
        let most = match self.n {
            0..8192 => 16,
            8192..16384 => 8,
            _ => 4,
        };
        let fit = (self.num_k_blocks() / 2).max(1);
        most.min(1 << fit.ilog2())
    }

    pub(super) fn constants(&self, config: &Config) -> Vec<Constant> {
        vec![
            size("N", self.n),
            size("K", self.k),
            size("PACKED_K", self.packed_k),
            size("GROUP", self.group),
            size("PACKED_GROUP", self.packed_group),
            size("OUT_TILES", config.out_tiles),
            size("ROW_TILES", config.row_tiles),
            size("OUT_WARPS", config.out_warps),
            size("ROW_WARPS", config.row_warps),
            size("K_WARPS", config.k_warps),
            size("SPLITS", config.splits),
            size("SLICES", self.slices()),
            size("STAGES", config.stages),
            size("SHARED_BYTES", config.shared_bytes(self)),
        ]
    }

    pub(super) fn default_config(&self, regime: Regime, arch: Arch) -> Config {
        let team = match regime {
            Regime::UpTo(8) => Config { out_tiles: self.out_tiles(arch), ..TEAM },
            Regime::UpTo(16) => Config { out_tiles: 2, row_tiles: 2, out_warps: 2, ..TEAM },
            Regime::UpTo(32) => Config { out_tiles: 2, row_tiles: 4, out_warps: 4, ..TEAM },
            Regime::UpTo(_) => {
                Config { out_tiles: 2, row_tiles: 4, out_warps: 4, row_warps: 2, ..TEAM }
            }
            _ => {
                let out_tiles = self.out_tiles_many(arch);
                Config { out_tiles, row_tiles: 4, out_warps: 2, row_warps: 4, ..TEAM }
            }
        };
        let (k_warps, splits) = self.parts(&team, regime, arch);
        self.with_stages(Config { k_warps, splits, ..team }, arch)
    }

    /// Tiles of a warp for few rows: as many as fill the multiprocessors within a tenth of the
    /// best, because each reads the rows once more.
    fn out_tiles(&self, arch: Arch) -> usize {
        let rounds = |tiles: &usize| {
            self.num_tiles().div_ceil(*tiles).div_ceil(num_multiprocessors(arch)) * tiles
        };
        let choices = 1..=if self.tile_bytes > 1024 { 2 } else { 4 };
        let best = choices.clone().map(|tiles| rounds(&tiles)).min().unwrap_or(1);
        choices.rev().find(|tiles| rounds(tiles) * 10 <= best * 11).unwrap_or(1)
    }

    /// Tiles of a warp for many rows: as many as its registers hold, which differs with what the
    /// compiler makes of an architecture.
    fn out_tiles_many(&self, arch: Arch) -> usize {
        let is_quantized = self.tile_bytes < TILE * BLOCK * 2;
        if is_quantized && arch != Arch::Sm90a { 3 } else { 4 }
    }

    /// Teams of a block and blocks of an output tile: all slices for one team where there are
    /// enough output tiles (or rows) to fill the GPU, else one for each.
    fn parts(&self, team: &Config, regime: Regime, arch: Arch) -> (usize, usize) {
        let slices = self.slices();
        if regime == Regime::UpTo(8) {
            return (slices, 1);
        }
        let enough = self.n.div_ceil(team.block_outs()) * 5 >= num_multiprocessors(arch) * 4;
        if regime == Regime::Many || enough {
            return (1, 1);
        }
        let k_warps = slices.min(8 / team.team_warps()).max(1);
        (k_warps, slices / k_warps)
    }

    /// The configuration with as many stages, up to 4, as let the multiprocessor have its warps;
    /// with fewer teams a block where not even 2 fit.
    fn with_stages(&self, config: Config, arch: Arch) -> Config {
        let blocks = config.blocks_wanted(arch);
        let fits = |config: &Config, blocks: usize| {
            blocks * (config.shared_bytes(self) + 1024) <= arch.shared_bytes_per_sm()
        };
        for blocks in (1..=blocks).rev() {
            let fewest = if blocks > 1 { 3 } else { 2 };
            let choices = (fewest..=4).rev().map(|stages| Config { stages, ..config });
            if let Some(config) = choices.into_iter().find(|config| fits(config, blocks)) {
                return config;
            }
        }
        match config.k_warps {
            1 => Config { stages: 2, ..config },
            k_warps => {
                let halved = Config { k_warps: k_warps / 2, splits: config.splits * 2, ..config };
                self.with_stages(halved, arch)
            }
        }
    }

    /// Configurations near the default, feasible or not: those that differ in at most two of the
    /// outputs of a warp, of a team, and how K is shared out; those of other rows of a warp or a
    /// team; each with as many stages as fit; and those of other stages.
    pub(super) fn candidates(&self, regime: Regime, arch: Arch) -> Vec<Config> {
        let default = self.default_config(regime, arch);
        let slices = self.slices();
        let mut parts: Vec<(usize, usize)> = vec![(1, 1)];
        parts.extend((0..=slices.ilog2()).map(|i| (1 << i, slices >> i)));
        let mut near = Vec::new();
        for out_tiles in 1..=4 {
            for out_warps in [1, 2, 4] {
                for (row_tiles, row_warps) in default.row_shapes(regime) {
                    near.extend(parts.iter().map(|&(k_warps, splits)| {
                        let team = Config { out_tiles, row_tiles, out_warps, row_warps, ..default };
                        Config { k_warps, splits, ..team }
                    }));
                }
            }
        }
        let mut all = [2, 3, 4, 6].map(|stages| Config { stages, ..default }).to_vec();
        all.push(default);
        for config in near {
            if config.distance(&default) <= 2 {
                all.push(self.with_stages(config, arch));
            }
        }
        all.sort();
        all.dedup();
        all
    }

    pub(super) fn is_feasible(&self, config: &Config, regime: Regime) -> Result<(), String> {
        if !self.k.is_multiple_of(2) {
            return Err(format!(
                "{} inputs; rows of an odd number of them are not aligned",
                self.k
            ));
        }
        if config.fields_min() == 0 {
            return Err("every number of a tiling is at least 1".to_string());
        }
        let (parts, slices) = (config.k_warps * config.splits, self.slices());
        if parts != 1 && parts != slices {
            return Err(format!("{parts} teams for {slices} slices; 1 or {slices} are possible"));
        }
        if config.stages < 2 {
            return Err("a ring of 1 stage; 2 are the fewest".to_string());
        }
        // NOTE: barrier 0 is the block's, and there are 16.
        if config.team_warps() > 1 && config.k_warps > 15 {
            return Err(format!("{} teams of several warps; 15 have a barrier", config.k_warps));
        }
        // NOTE: accumulators, for some tilings twice, beside which a warp keeps fragments.
        if config.out_tiles * config.row_tiles > 16 {
            return Err(format!(
                "{} × {} tiles a warp; their sums take more registers than a thread has",
                config.out_tiles, config.row_tiles
            ));
        }
        // NOTE: as `ptxas` needs them for so many sums.
        let registers = Arch::REGISTERS / config.threads();
        if config.out_tiles * config.row_tiles > 12 && registers < 160 {
            return Err(format!(
                "{} × {} tiles a warp and {registers} registers a thread; their sums spill",
                config.out_tiles, config.row_tiles
            ));
        }
        match regime.rows_max() {
            Some(rows) if config.block_rows() >= 2 * rows.max(8) => {
                Err(format!("blocks of {} rows for {rows} at most", config.block_rows()))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn launch(&self, config: &Config, rows: usize) -> Launch {
        Launch {
            grid_x: rows.div_ceil(config.block_rows()),
            grid_y: self.n.div_ceil(config.block_outs()) * config.splits,
        }
    }

    pub(super) fn workspace(&self, config: &Config, rows: usize) -> Workspace {
        if config.splits == 1 {
            return Workspace::default();
        }
        let tiles = rows.div_ceil(config.block_rows()) * self.n.div_ceil(config.block_outs());
        let tile = config.block_rows() * config.block_outs();
        Workspace { floats: tiles * self.slices() * tile, counters: tiles }
    }
}

/// A warp of one row tile by itself.
const TEAM: Config = Config {
    out_tiles: 1,
    row_tiles: 1,
    out_warps: 1,
    row_warps: 1,
    k_warps: 1,
    splits: 1,
    stages: 2,
};

impl Config {
    fn team_warps(&self) -> usize {
        self.out_warps * self.row_warps
    }

    pub(super) fn threads(&self) -> usize {
        32 * self.team_warps() * self.k_warps
    }

    /// Row tiles of a warp and warps along the rows: of as many rows as here; where there are many
    /// rows, also of half and twice as many.
    fn row_shapes(&self, regime: Regime) -> Vec<(usize, usize)> {
        let sizes = [1, 2, 4, 8];
        let all = sizes.into_iter().flat_map(|tiles| sizes.map(|warps| (tiles, warps)));
        let fits = |&(row_tiles, row_warps): &(usize, usize)| {
            let is_next = row_tiles == self.row_tiles
                && (self.row_warps == 2 * row_warps || row_warps == 2 * self.row_warps);
            let is_same = row_tiles * row_warps == self.row_tiles * self.row_warps;
            is_same || (regime == Regime::Many && is_next)
        };
        all.filter(fits).collect()
    }

    /// How far two configurations are apart, but for stages.
    fn distance(&self, other: &Config) -> usize {
        let is_other_rows = (self.row_tiles, self.row_warps) != (other.row_tiles, other.row_warps);
        let differences = [
            self.out_tiles != other.out_tiles,
            self.out_warps != other.out_warps,
            (self.k_warps, self.splits) != (other.k_warps, other.splits),
            // NOTE: twice, so that other rows come with nothing else.
            is_other_rows,
            is_other_rows,
        ];
        differences.into_iter().filter(|differs| *differs).count()
    }

    fn block_outs(&self) -> usize {
        TILE * self.out_tiles * self.out_warps
    }

    pub(super) fn block_rows(&self) -> usize {
        8 * self.row_tiles * self.row_warps
    }

    /// Blocks that a multiprocessor shall hold, as far as shared memory allows.
    pub(super) fn min_blocks(&self, shape: &Shape, arch: Arch) -> usize {
        let fit = arch.shared_bytes_per_sm() / (self.shared_bytes(shape) + 1024);
        self.blocks_wanted(arch).min(fit).max(1)
    }

    /// Blocks that have the warps a multiprocessor should have, as far as registers allow.
    fn blocks_wanted(&self, arch: Arch) -> usize {
        // NOTE: as `ptxas` needs them, with sums of a slice and of all slices before.
        let registers = match self.out_tiles * self.row_tiles {
            0..8 => 128,
            8..16 if arch == Arch::Sm120 => 200,
            8..16 => 168,
            _ => 255,
        };
        (NUM_WARPS * 32 / self.threads()).min(Arch::REGISTERS / registers / self.threads()).max(1)
    }

    /// The rings, or the sums that take their place.
    pub(super) fn shared_bytes(&self, shape: &Shape) -> usize {
        let rows = self.block_rows() * BLOCK * 2;
        let tiles = self.block_outs() / TILE * shape.tile_bytes;
        let ring = self.k_warps * self.stages * (rows + tiles).next_multiple_of(128);
        let sums = self.k_warps * self.block_rows() * (self.block_outs() + 4) * 4;
        ring.max(sums)
    }

    fn fields_min(&self) -> usize {
        use super::op::OpConfig;
        self.fields().into_iter().map(|(_, value)| value).min().unwrap_or(0)
    }
}

/// Multiprocessors of a common GPU of the architecture.
fn num_multiprocessors(arch: Arch) -> usize {
    match arch {
        Arch::Sm80 => 108,
        Arch::Sm86 => 84,
        Arch::Sm89 => 128,
        Arch::Sm90a => 132,
        Arch::Sm100a => 148,
        Arch::Sm120 => 170,
    }
}

/// Groups that rows can be copied for, 8 inputs at a time.
pub(super) fn check_awq_group(k: usize, group: GroupSize) -> Result<(), String> {
    check_group(k, group).map_err(|error| error.to_string())?;
    let group = group.of(k);
    match group.is_multiple_of(8) {
        true => Ok(()),
        false => Err(format!("group size {group} is not a multiple of 8")),
    }
}
