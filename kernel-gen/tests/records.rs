//! Files of records: what is appended by many, killed half-way, or damaged.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command};

use bespoke_kernel_gen::tuning::record::{
    Appender, Case, Failure, LINE_BYTES_MAX, Outcome, Problem, Record, Records, Time, VERSION,
    Variant,
};
use bespoke_kernel_gen::tuning::{CudaDevice, Device};

const NUM_WRITERS: usize = 8;
const NUM_RECORDS: usize = 200;

fn record(writer: usize, rows: usize) -> Record {
    let device = CudaDevice {
        arch: "sm_90a".to_string(),
        num_sms: 132,
        memory_gib: 80,
        name: "a GPU".to_string(),
    };
    Record {
        v: VERSION,
        problem: Problem {
            spec: format!("awq_gemm_n{writer}_k576_g64_int8"),
            target: "sm_90a".to_string(),
            case: Case::Rows(rows),
        },
        device: Device::Cuda(device),
        variant: Variant {
            symbol: "x".repeat(writer * 100),
            source_hash: "12".to_string(),
            compiler: "rustc 1.89.0".to_string(),
            code_bytes: 4096,
        },
        outcome: Outcome::Time(Time {
            mode: "graph".to_string(),
            cache: "cold".to_string(),
            us: [1.0, 1.1, 1.0 + 0.1 / 3.0 + 0.1],
            num_samples: 20,
            default: "d".to_string(),
            vs_default: 0.1 + 0.2,
            noise: 0.01,
            limit_us: None,
        }),
        measured_at: 1,
    }
}

fn append(path: &Path, writer: usize) {
    let mut appender = Appender::open(path).unwrap();
    for rows in 1..=NUM_RECORDS {
        appender.append(&record(writer, rows)).unwrap();
    }
}

/// Runs as a process of its own where a test asks it to; else there is nothing to do.
#[test]
fn writer_process() {
    if let (Ok(path), Ok(writer)) = (std::env::var("RECORDS_PATH"), std::env::var("RECORDS_WRITER"))
    {
        append(Path::new(&path), writer.parse().unwrap());
    }
}

fn spawn(path: &Path, writer: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "writer_process"]).env("RECORDS_PATH", path);
    command.env("RECORDS_WRITER", writer.to_string()).stdout(std::process::Stdio::null());
    command.spawn().unwrap()
}

fn keys(records: &Records) -> Vec<(String, Case)> {
    let key = |record: &Record| (record.problem.spec.clone(), record.problem.case);
    let mut keys: Vec<(String, Case)> = records.all.iter().map(key).collect();
    keys.sort();
    keys
}

#[test]
fn eight_processes_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/folder/all.jsonl");
    let writers: Vec<Child> = (0..NUM_WRITERS).map(|writer| spawn(&path, writer)).collect();
    for mut writer in writers {
        assert!(writer.wait().unwrap().success());
    }
    let (records, warnings) = Records::open(folder.path());
    assert_eq!(warnings, []);
    let written = (0..NUM_WRITERS).flat_map(|w| (1..=NUM_RECORDS).map(move |rows| record(w, rows)));
    let written = Records { all: written.collect() };
    assert_eq!(keys(&records), keys(&written));
    let sorted = |mut all: Vec<Record>| {
        all.sort_by_key(|record| (record.problem.clone(), record.variant.clone()));
        all
    };
    assert_eq!(sorted(records.all), sorted(written.all));
}

#[test]
fn a_killed_process_loses_no_whole_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.jsonl");
    for _ in 0..5 {
        let mut writers: Vec<Child> = (0..3).map(|writer| spawn(&path, writer)).collect();
        // Killed as soon as something is written: most of them in the middle of it.
        while !fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0) {
            std::thread::yield_now();
        }
        writers[0].kill().unwrap();
        for writer in &mut writers {
            writer.wait().unwrap();
        }
        append(&path, 7);
        let (records, _) = Records::open(folder.path());
        let of = |writer: usize| {
            let spec = format!("awq_gemm_n{writer}_k576_g64_int8");
            records.all.iter().filter(|record| record.problem.spec == spec).count()
        };
        assert_eq!([of(1), of(2), of(7)], [NUM_RECORDS; 3]);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_truncated_line_is_mended_and_costs_itself_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.jsonl");
    let line = record(1, 1).line().unwrap();
    for cut in [1, line.len() / 2, line.len() - 1] {
        fs::write(&path, format!("{line}\n{}", &line[..cut])).unwrap();
        Appender::open(&path).unwrap().append(&record(2, 2)).unwrap();
        let (records, warnings) = Records::open(folder.path());
        assert_eq!(records.all, [record(1, 1), record(2, 2)]);
        assert_eq!(warnings.len(), 1);
        assert_eq!(warnings[0].line, Some(2));
    }
    // A whole line without its end is a record.
    fs::write(&path, &line).unwrap();
    Appender::open(&path).unwrap().append(&record(2, 2)).unwrap();
    assert_eq!(
        Records::open(folder.path()),
        (Records { all: vec![record(1, 1), record(2, 2)] }, Vec::new(),)
    );
}

#[test]
fn damage_is_skipped_with_a_warning() {
    let good = record(1, 1).line().unwrap();
    let check = |bad: &[u8], message: &str| {
        let mut text = format!("{good}\n").into_bytes();
        text.extend_from_slice(bad);
        text.extend_from_slice(format!("\n\n{good}\n").as_bytes());
        let (records, warnings) = Records::parse(&text, Path::new("a.jsonl"));
        assert_eq!(records.all.len(), 2, "{message}");
        assert_eq!(warnings.len(), 1, "{message}: {warnings:?}");
        let warning = warnings[0].to_string();
        assert!(warning.starts_with("a.jsonl:2: skipped: "), "{warning}");
        assert!(warning.contains(message), "{message}: {warning}");
    };
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replacen(from, to, 1).into_bytes()
    };
    check(b"\0\0\0\0", "expected");
    check(&[0xff, 0xfe], "utf-8");
    check(b"[1, 2]", "");
    check(&vec![b'['; 2 * LINE_BYTES_MAX], "more than 65536 bytes");
    let nested = format!("{{\"x\":{}", "[".repeat(LINE_BYTES_MAX - 8));
    check(nested.as_bytes(), "EOF");
    check(&with("\"v\":2", "\"v\":1"), "version 1");
    check(&with("\"v\":2", "\"v\":3"), "version 3");
    check(&with("\"us\":[1.0", "\"us\":[-1.0"), "a time of -1");
    check(&with("\"us\":[1.0", "\"us\":[0.0"), "a time of 0");
    check(&with("\"us\":[1.0", "\"us\":[NaN"), "");
    check(&with("\"us\":[1.0", "\"us\":[null"), "null");
    check(&with("\"us\":[1.0", "\"us\":[1e999"), "");
    check(&with("\"us\":[1.0", "\"us\":[7.0"), "not in order");
    check(&with("\"noise\":0.01", "\"noise\":-0.01"), "noise");
    check(&with("\"num_samples\":20", "\"num_samples\":0"), "no samples");
    check(&with("\"rows 1\"", "\"rows 0\""), "no case");
    check(&with("\"kind\":\"time\"", "\"kind\":\"guess\""), "guess");
}

#[test]
fn fields_of_later_programs_are_ignored() {
    let line = record(1, 1).line().unwrap().replacen("{\"v\":2", "{\"new\":[1],\"v\":2", 1);
    assert_eq!(Record::parse(&line).unwrap(), record(1, 1));
}

#[test]
fn many_warnings_are_counted() {
    let text = "x\n".repeat(100);
    let (_, warnings) = Records::parse(text.as_bytes(), Path::new("a.jsonl"));
    assert_eq!(warnings.len(), 9);
    assert!(warnings[8].to_string().contains("92 more lines"), "{}", warnings[8]);
}

#[test]
fn folders_are_read_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(Records::open(&folder.path().join("none")), (Records::default(), Vec::new()));
    fs::create_dir_all(folder.path().join("a/b.jsonl")).unwrap();
    fs::write(folder.path().join("a/notes.txt"), "no records").unwrap();
    let mut file = fs::File::create(folder.path().join("a/b.jsonl/c.jsonl")).unwrap();
    file.write_all(record(1, 1).line().unwrap().as_bytes()).unwrap();
    let deep = folder.path().join("1/2/3/4/5/6/7/8/9");
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("d.jsonl"), record(1, 1).line().unwrap()).unwrap();
    let (records, warnings) = Records::open(folder.path());
    assert_eq!(records.all, [record(1, 1)]);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].message.contains("deeper than 8"));
}

#[test]
fn what_could_not_be_read_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.jsonl");
    let mut appender = Appender::open(&path).unwrap();
    let mut bad = record(1, 1);
    bad.variant.symbol = "x".repeat(LINE_BYTES_MAX);
    assert!(appender.append(&bad).unwrap_err().to_string().contains("bytes"));
    if let Outcome::Time(time) = &mut bad.outcome {
        time.us[1] = f64::NAN;
    }
    assert!(appender.append(&bad).unwrap_err().to_string().contains("NaN"));
    let failure = Failure { reason: "crash".to_string(), message: "signal\n11".to_string() };
    let failed = Record { outcome: Outcome::Failure(failure), ..record(1, 1) };
    appender.append(&failed).unwrap();
    assert_eq!(Records::open(folder.path()), (Records { all: vec![failed] }, Vec::new()));
}
