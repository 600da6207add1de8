//! How long each kernel takes on this machine's GPU.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use bespoke_kernel_gen::spec::{KvDType, ModelShape};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use super::{Args, Console};
use crate::backend::cuda::device::{Device as _, DeviceInfo};
use crate::backend::cuda::driver::Driver;
use crate::cli::verify::shapes;
use crate::kernels::generated;
use crate::tune::{self, Cases, Key, Measured, Record, RecordedVariant, TuneOptions, key};

/// The JSON of a run.
#[derive(Serialize)]
struct Report {
    gpu: String,
    toolkit: &'static str,
    /// Cases that the file of records had already.
    num_known: usize,
    /// Whether the budget ended before the cases did.
    is_partial: bool,
    records: Vec<Record>,
}

pub(super) fn run(args: &Args, console: &mut Console<'_>) -> anyhow::Result<()> {
    let table = generated::cuda_table();
    let info = Driver::open(&table)?.info().clone();
    let mut session = Session::open(args, info)?;
    for shape in shapes(args.model.as_deref())? {
        for kv_dtype in [KvDType::F16, KvDType::I8, KvDType::I4] {
            console.report(&format!("{}, {} KV cache\n", shape.name, kv_dtype.name()));
            session.measure(Driver::open(&table)?, &shape, kv_dtype)?;
        }
    }
    let report = session.finish(table.toolkit)?;
    match args.json {
        true => console.print_json(&report),
        false => console.print(&text(&report)),
    }
}

/// A run and its file.
struct Session {
    info: DeviceInfo,
    hashes: BTreeMap<&'static str, &'static str>,
    toolkit: &'static str,
    known: BTreeSet<Key>,
    file: Option<File>,
    end: Option<Instant>,
    num_known: usize,
    is_partial: bool,
    records: Vec<Record>,
    failed: Option<anyhow::Error>,
}

impl Session {
    fn open(args: &Args, info: DeviceInfo) -> anyhow::Result<Session> {
        let table = generated::cuda_table();
        let target = table.targets.iter().find(|target| target.arch == info.arch);
        let kernels = target.map_or(&[][..], |target| target.kernels);
        let hashes = kernels.iter().map(|kernel| (kernel.symbol, kernel.source_hash)).collect();
        let path = args.records_file(Path::new("cuda.jsonl"));
        let at = || path.display().to_string();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(at)?;
        }
        let known = match std::fs::read_to_string(&path) {
            Ok(text) => Record::keys(&text),
            Err(error) if error.kind() == ErrorKind::NotFound => BTreeSet::new(),
            Err(error) => return Err(error).with_context(at),
        };
        let file = OpenOptions::new().create(true).append(true).open(&path).with_context(at)?;
        Ok(Session {
            info,
            hashes,
            toolkit: table.toolkit,
            known,
            file: Some(file),
            end: Some(Instant::now() + args.budget),
            num_known: 0,
            is_partial: false,
            records: Vec::new(),
            failed: None,
        })
    }

    fn hash_of(&self, symbol: Option<&str>) -> Option<String> {
        symbol.and_then(|symbol| self.hashes.get(symbol)).map(|hash| (*hash).to_owned())
    }

    fn measure(
        &mut self,
        device: Driver,
        shape: &ModelShape,
        kv_dtype: KvDType,
    ) -> anyhow::Result<()> {
        // NOTE: one of the two closures at a time has the session.
        let session = std::cell::RefCell::new(self);
        tune::measure(
            device,
            shape,
            kv_dtype,
            &Cases::default(),
            &TuneOptions::default(),
            &mut |case, symbol| {
                let mut session = session.borrow_mut();
                let hash = session.hash_of(symbol);
                let (name, arch) = (&session.info.name, session.info.arch.name());
                let symbol = symbol.map(str::to_owned);
                let key = key(&case.to_string(), name, arch, &symbol, &hash);
                let is_known = session.known.contains(&key);
                session.num_known += usize::from(is_known);
                !is_known
            },
            &mut |measured| {
                let mut session = session.borrow_mut();
                if let Err(error) = session.take(&measured, shape, kv_dtype) {
                    session.failed.get_or_insert(error);
                }
                let is_over = session.end.is_some_and(|end| Instant::now() > end);
                session.is_partial |= is_over;
                !is_over && session.failed.is_none()
            },
        )?;
        let session = session.into_inner();
        session.failed.take().map_or(Ok(()), Err)
    }

    fn take(
        &mut self,
        measured: &Measured,
        shape: &ModelShape,
        kv_dtype: KvDType,
    ) -> anyhow::Result<()> {
        let variant = RecordedVariant {
            symbol: measured.symbol.clone(),
            source_hash: self.hash_of(measured.symbol.as_deref()),
            toolkit: self.toolkit.to_owned(),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let record = Record::new(measured, shape, kv_dtype, &self.info, variant, now);
        if let Some(file) = &mut self.file {
            let line = format!("{}\n", serde_json::to_string(&record)?);
            file.write_all(line.as_bytes()).context("cannot write the file of records")?;
        }
        self.known.insert(record.key());
        self.records.push(record);
        Ok(())
    }

    fn finish(self, toolkit: &'static str) -> anyhow::Result<Report> {
        if let Some(file) = &self.file {
            file.sync_all().context("cannot write the file of records")?;
        }
        let Session { info, num_known, is_partial, records, .. } = self;
        Ok(Report { gpu: info.name, toolkit, num_known, is_partial, records })
    }
}

fn text(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["kernel", "case", "µs", "GB/s", "TFLOP/s"]);
    for record in &report.records {
        let symbol = record.variant.symbol.as_deref().unwrap_or("copy by the driver");
        table.add_row([
            symbol.to_owned(),
            record.problem.case.clone(),
            format!("{:.1}", record.time.us[1]),
            format!("{:.0}", record.time.gb_per_s),
            format!("{:.1}", record.time.tflop_per_s),
        ]);
    }
    let rest = if report.is_partial { "; the budget is spent, run again to go on" } else { "" };
    format!(
        "{}\n{} cases measured on {}, {} known before{rest}\n",
        table.trim_fmt(),
        report.records.len(),
        report.gpu,
        report.num_known
    )
}
