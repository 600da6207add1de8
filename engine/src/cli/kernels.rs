//! `bespoke kernels`: what was generated into this binary.

use std::collections::HashMap;
use std::fs::File;

use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::target::Target;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;
use serde_json::{Map, Value};

use super::console::Console;
use super::elf;
use crate::backend::cpu::{available_threads, device_key};
use crate::kernels::choice::{Choice, DeviceChoice};
use crate::kernels::{Kernel, KernelTable, Served};

/// List every kernel in this binary
///
/// The JSON is an array with an object per kernel; `bytes` is the size of its machine code, null
/// where the binary has no symbol table.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    symbol: &'static str,
    op: &'static str,
    sizes: Map<String, Value>,
    dtype: &'static str,
    group_size: Option<usize>,
    target: &'static str,
    config: Config,
    reduction_class: &'static str,
    /// Where the choice comes from on this machine, null for a kernel that serves nothing here.
    provenance: Option<&'static str>,
    serves: Vec<Rows>,
    bytes: Option<u64>,
}

/// Row counts that a kernel serves; for attention, one row means decoding.
#[derive(Serialize)]
struct Rows {
    rows_min: usize,
    /// Null: no limit.
    rows_max: Option<usize>,
    /// Key of the device class, null for any.
    device: Option<&'static str>,
    /// Where the choice comes from on that device.
    provenance: &'static str,
}

#[derive(Serialize)]
struct Config {
    /// Row counts the kernel is for: any, one, few or many.
    regime: &'static str,
    rows: usize,
    cols: usize,
    scratch_bytes: usize,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let kernels = &console.kernels;
    let code_bytes = code_bytes(kernels.kernels);
    let keys = Target::ALL.map(|target| {
        let key = device_key(DeviceChoice::This, target, available_threads());
        (target, key.unwrap_or_default())
    });
    let row = |kernel: &Kernel| {
        let choice = keys
            .iter()
            .find(|(target, _)| *target == kernel.target)
            .map(|(_, key)| Choice { table: kernels, target: kernel.target, device: Some(key) });
        let provenance = choice.and_then(|choice| choice.provenance(kernel));
        row(kernels, kernel, provenance, code_bytes.get(kernel.symbol).copied())
    };
    let rows: Vec<Row> = kernels.kernels.iter().map(row).collect();
    match args.json {
        true => console.print_json(&rows),
        false => console.print(&table(&rows)),
    }
}

fn row(
    table: &KernelTable,
    kernel: &Kernel,
    provenance: Option<Provenance>,
    bytes: Option<u64>,
) -> Row {
    let sizes = kernel.spec.sizes().into_iter();
    Row {
        symbol: kernel.symbol,
        op: kernel.spec.op(),
        sizes: sizes.map(|(name, size)| (name.to_owned(), size.into())).collect(),
        dtype: kernel.spec.dtype(),
        group_size: kernel.spec.group_size(),
        target: kernel.target.name(),
        config: Config {
            regime: kernel.regime.name(),
            rows: kernel.rows,
            cols: kernel.cols,
            scratch_bytes: kernel.scratch_bytes,
        },
        reduction_class: kernel.reduction_class,
        provenance: provenance.map(Provenance::name),
        serves: table.serves(kernel).into_iter().map(rows_of).collect(),
        bytes,
    }
}

fn rows_of(served: Served) -> Rows {
    Rows {
        rows_min: served.rows_min,
        rows_max: (served.rows_max != usize::MAX).then_some(served.rows_max),
        device: served.device,
        provenance: served.provenance.name(),
    }
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "op", "sizes", "dtype", "group", "rows", "target", "config", "class", "from", "code",
    ]);
    for row in rows {
        let sizes: Vec<String> =
            row.sizes.iter().map(|(name, size)| format!("{name}={size}")).collect();
        let config = match row.config.cols {
            0 => String::new(),
            cols => format!("{}x{cols}", row.config.rows),
        };
        table.add_row([
            row.op.to_owned(),
            sizes.join(" "),
            row.dtype.to_owned(),
            row.group_size.map_or(String::new(), |group| group.to_string()),
            row.config.regime.to_owned(),
            row.target.to_owned(),
            config,
            row.reduction_class.to_owned(),
            row.provenance.unwrap_or("-").to_owned(),
            row.bytes.map_or(String::new(), |bytes| format!("{bytes} B")),
        ]);
    }
    format!("{}\n{} kernels\n", table.trim_fmt(), rows.len())
}

/// Bytes of machine code by kernel, as far as the running executable tells.
pub(super) fn code_bytes(kernels: &[Kernel]) -> HashMap<&'static str, u64> {
    let executable = std::env::current_exe().ok().and_then(|path| File::open(path).ok());
    let functions = executable.and_then(|mut file| elf::functions(&mut file).ok());
    let mut bytes: HashMap<&'static str, u64> = HashMap::new();
    let names: HashMap<&str, &'static str> =
        kernels.iter().map(|kernel| (kernel.symbol, kernel.symbol)).collect();
    for (name, size) in functions.unwrap_or_default() {
        for part in elf::name_parts(&name) {
            if let Some(symbol) = names.get(part) {
                *bytes.entry(symbol).or_default() += size;
                break;
            }
        }
    }
    bytes
}
