//! Kernels with planted faults, verified in processes of their own as `bespoke tune` does it, and
//! what a selection makes of the records.

use std::collections::{BTreeMap, HashMap};
use std::process::{Command, Stdio};
use std::time::Duration;

use bespoke::error::Error;
use bespoke::kernels::{Kernel, KernelTable};
use bespoke::tune::TuneSummary;
use bespoke::tune::cpu::{CpuProblem, CpuSetting, CpuTuning};
use bespoke::tune::isolation::Isolation;
use bespoke::tune::race::RaceOptions;
use bespoke_kernel_gen::name::spec_name;
use bespoke_kernel_gen::plan::{self, PlanOptions};
use bespoke_kernel_gen::presets;
use bespoke_kernel_gen::tuning::device::{CpuDevice, Device, this_cpu};
use bespoke_kernel_gen::tuning::lock::Lock;
use bespoke_kernel_gen::tuning::record::{Appender, Case, Outcome, Record, Records, Time};
use bespoke_kernel_gen::tuning::select::{Options, Selection, select, source_hashes};
use bespoke_tuning_tests::planted::{self, Fault};

use crate::process;

const NUM_THREADS: usize = 2;
/// A sound kernel is verified in a fraction of a second, however busy the machine.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Row counts of the planted times.
const ROWS: [usize; 3] = [2, 4, 8];

fn device() -> Device {
    Device::Cpu(CpuDevice { target: planted::default_kernel().target, ..this_cpu(NUM_THREADS) })
}

/// Verifies what `known` does not speak of, and races what passes; `append` gets the new records.
fn tune(
    table: &KernelTable,
    known: Vec<Record>,
    command: &dyn Fn(&[String]) -> Command,
    append: &mut dyn FnMut(&Record) -> Result<(), Error>,
) -> TuneSummary {
    let setting = CpuSetting {
        table,
        target: planted::default_kernel().target,
        device: device(),
        num_threads: NUM_THREADS,
        compiler: "rustc of a test",
        code_bytes: &HashMap::new(),
        isolation: Isolation { command, silence_max: SILENCE_MAX },
    };
    let problem = CpuProblem { spec: planted::spec(), share: 1.0, rows_max: 16 };
    let options =
        RaceOptions { first_rows: vec![2], other_rows: Vec::new(), ..RaceOptions::default() };
    let budget = Duration::from_secs(1);
    CpuTuning::new(setting, known, append).run(&[problem], &options, budget, &mut |_| {}).unwrap()
}

/// The process of `bespoke tune` that verifies kernels.
fn verifier(symbols: &[String]) -> Command {
    let mut command = process("planted");
    command.args(["tune", "--end-with-input", "--threads", &NUM_THREADS.to_string()]);
    command.arg("--verify-candidates").arg(symbols.join(",")).stderr(Stdio::null());
    command
}

/// Reason, and a part of the message, of the failure that each fault becomes.
fn failure(fault: Fault) -> Option<(&'static str, &'static str)> {
    match fault {
        Fault::None => None,
        Fault::Wrong => Some(("mismatch", "V4: row 0, output 0 of 17 rows")),
        Fault::Rounding => Some(("mismatch", "row 0, output 0 of")),
        Fault::Threads => Some(("mismatch", "V2: row 0, output 0 of 13 rows by 3 threads")),
        Fault::Scratch => Some(("mismatch", "row 0, output 0 of")),
        Fault::OutOfOutputs => Some(("mismatch", "V1: wrote outside of the outputs of 129 rows")),
        Fault::OutOfScratch => Some(("mismatch", "V1: wrote outside of its")),
        Fault::NullWrite => Some(("crash", "signal: 11")),
        Fault::Panic => Some(("crash", "exit status: 101")),
        Fault::Abort => Some(("crash", "signal: 6")),
        Fault::Hang => Some(("hang", "no end after 20 s")),
    }
}

#[test]
fn no_planted_kernel_is_ever_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let table = planted::kernels();
    let mut appender = Appender::open(&folder.path().join("planted.jsonl")).unwrap();
    let mut append = |record: &Record| appender.append(record).map_err(Error::from);
    tune(&table, Vec::new(), &verifier, &mut append);
    let records = records(folder.path());
    check_verdicts(&records);
    check_that_nothing_is_tried_twice(&table, records.clone());

    let verdicts: Vec<Record> =
        records.into_iter().filter(|record| record.time().is_none()).collect();
    let times = times(&table, &verdicts);
    check_selection(&[verdicts.clone(), times.clone()].concat());
    check_without_certificate(&verdicts, &times);
}

fn records(folder: &std::path::Path) -> Vec<Record> {
    let (records, warnings) = Records::open(folder);
    assert!(warnings.is_empty(), "{warnings:?}");
    records.all
}

/// Every fault is recorded for what it is, and the sound kernels beside them are certified, those
/// behind a crash and a hang among them.
fn check_verdicts(records: &[Record]) {
    let of = |symbol: &str| -> Vec<&Record> {
        let of_symbol = records.iter().filter(|record| record.variant.symbol == symbol);
        of_symbol.filter(|record| record.time().is_none()).collect()
    };
    for fault in Fault::ALL {
        let [record] = of(planted::symbol(fault))[..] else { panic!("one verdict of {fault:?}") };
        match (failure(fault), record.failure(), record.certificate()) {
            (None, None, Some(certificate)) => assert_eq!(certificate.check(), Ok(())),
            (Some((reason, part)), Some(found), None) => {
                assert_eq!(found.reason, reason, "{fault:?}: {}", found.message);
                assert!(found.message.contains(part), "{fault:?}: {}", found.message);
            }
            _ => panic!("{fault:?}: {record:?}"),
        }
    }
    for kernel in defaults(&planted::kernels()) {
        let [record] = of(kernel.symbol)[..] else { panic!("one verdict of {}", kernel.symbol) };
        assert!(record.certificate().is_some_and(|found| found.check().is_ok()), "{record:?}");
    }
    let timed = records.iter().filter(|record| record.time().is_some());
    for record in timed {
        let symbol = &*record.variant.symbol;
        let fault = Fault::ALL.into_iter().find(|fault| planted::symbol(*fault) == symbol);
        assert!(fault.is_none_or(|fault| fault == Fault::None), "{fault:?} was raced");
    }
}

/// The kernels of the matmul that serve without a lock.
fn defaults(table: &KernelTable) -> Vec<&'static Kernel> {
    let of_spec = table.kernels.iter().filter(|kernel| kernel.spec == planted::spec());
    of_spec.filter(|kernel| !table.serves(kernel).is_empty()).collect()
}

fn check_that_nothing_is_tried_twice(table: &KernelTable, records: Vec<Record>) {
    let never = |symbols: &[String]| panic!("{symbols:?} are verified once more");
    let summary = tune(table, records, &never, &mut |_| Ok(()));
    assert_eq!((summary.num_verified, summary.num_failed), (0, 0));
}

/// Times as if every planted kernel took half of the default's, the sound one a little more.
fn times(table: &KernelTable, verdicts: &[Record]) -> Vec<Record> {
    let mut all = Vec::new();
    for rows in ROWS {
        let default =
            table.serving_kernel(&planted::spec(), rows, planted::default_kernel().target);
        let default = default.unwrap().symbol;
        let mut add = |symbol: &str, ratio: f64| {
            let verdict = verdicts.iter().find(|record| record.variant.symbol == symbol).unwrap();
            let mut record = verdict.clone();
            record.problem.case = Case::Rows(rows);
            record.outcome = Outcome::Time(Time {
                mode: "backend".to_owned(),
                cache: "cold".to_owned(),
                us: [99.0 * ratio, 100.0 * ratio, 101.0 * ratio],
                num_samples: 20,
                default: default.to_owned(),
                vs_default: ratio,
                noise: 0.01,
                limit_us: None,
            });
            all.push(record);
        };
        add(default, 1.0);
        for fault in Fault::ALL {
            add(planted::symbol(fault), if fault == Fault::None { 0.6 } else { 0.5 });
        }
    }
    all
}

fn selection(records: &[Record]) -> Selection {
    let hashes = source_hashes(records.iter().map(|record| &*record.variant.symbol)).unwrap();
    let selection = select(records, &hashes, &Options::default()).unwrap();
    let text = selection.lock.print();
    for fault in Fault::ALL.into_iter().filter(|fault| *fault != Fault::None) {
        let symbol = planted::symbol(fault);
        let problems = selection.lock.problems.iter();
        let mut chosen = problems.flat_map(|problem| &problem.intervals);
        assert!(chosen.all(|interval| interval.symbol != symbol), "{fault:?}: {text}");
        assert!(selection.lock.variant(symbol).is_none(), "{fault:?}: {text}");
    }
    selection
}

/// The sound kernel serves, whatever is said of the others, and it is said why they do not.
fn check_selection(records: &[Record]) {
    let selection = selection(records);
    let [problem] = &selection.lock.problems[..] else { panic!("{:?}", selection.lock) };
    let sound = planted::symbol(Fault::None);
    let chosen = problem.intervals.iter().find(|interval| interval.symbol == sound);
    let chosen = chosen.unwrap_or_else(|| panic!("{problem:?}"));
    assert_eq!(chosen.provenance, "measured");
    assert!(selection.lock.variant(sound).is_some_and(|variant| !variant.certificate.is_empty()));
    let rejected: &BTreeMap<String, String> = &selection.decisions[0].rejected;
    for fault in Fault::ALL {
        let found = rejected.get(planted::symbol(fault)).map(String::as_str);
        let expected = failure(fault).map(|(reason, _)| format!("failed: {reason}"));
        assert_eq!(found, expected.as_deref(), "{fault:?}");
    }
    check_plan(&selection.lock);
}

/// A time alone, without the verdicts, lets nothing serve.
fn check_without_certificate(verdicts: &[Record], times: &[Record]) {
    let defaults: Vec<&str> =
        defaults(&planted::kernels()).iter().map(|kernel| kernel.symbol).collect();
    let of_defaults = verdicts.iter().filter(|record| defaults.contains(&&*record.variant.symbol));
    let records: Vec<Record> = of_defaults.chain(times).cloned().collect();
    let selection = selection(&records);
    for fault in Fault::ALL {
        let symbol = planted::symbol(fault);
        assert_eq!(selection.decisions[0].rejected[symbol], "uncertified", "{fault:?}");
    }
    let mut intervals = selection.lock.problems.iter().flat_map(|problem| &problem.intervals);
    assert!(intervals.all(|interval| defaults.contains(&&*interval.symbol)));
}

/// A build takes the lock, and not if somebody writes another kernel's name into it.
fn check_plan(lock: &Lock) {
    let config = bespoke_tuning_tests::model().join("config.json");
    let shape = presets::shape(&config.to_string_lossy(), &[std::path::PathBuf::new()]).unwrap();
    let plan = |lock: &Lock| {
        let options = PlanOptions { lock: Some(lock), tuner: None };
        plan::plan(std::slice::from_ref(&shape), &[planted::default_kernel().target], &options)
    };
    let sound = planted::symbol(Fault::None);
    let planned = plan(lock).unwrap();
    assert!(planned.warnings.is_empty(), "{:?}", planned.warnings);
    assert!(planned.variants.iter().any(|variant| variant.symbol() == sound));
    let spec = spec_name(&planted::spec());
    assert!(lock.problems.iter().all(|problem| problem.spec == spec));
    let mut forged = lock.clone();
    for interval in &mut forged.problems[0].intervals {
        if interval.symbol == sound {
            interval.symbol = planted::symbol(Fault::Wrong).to_owned();
        }
    }
    let error = plan(&forged).unwrap_err().to_string();
    assert!(error.contains("no certificate"), "{error}");
}
