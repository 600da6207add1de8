//! `bespoke bench` on a tiny model: what is counted, not how fast it is.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{check_error, json as run_json, keys, run, tiny};
use bespoke::cli::Exit;

const LATENCY: [&str; 4] = ["--mode", "latency", "--backend", "reference"];
const THROUGHPUT: [&str; 4] = ["--mode", "throughput", "--backend", "reference"];

fn args<'a>(mode: &[&'a str], model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["bench", "--model", model], mode, more].concat()
}

/// The JSON of a measurement on the tiny model, whose context has 256 tokens.
#[track_caller]
fn bench(mode: &[&str], more: &[&str]) -> Value {
    let model = tiny("llama-gqa2");
    let model = model.to_str().unwrap();
    run_json(&[&args(mode, model, more)[..], &["--json"]].concat())
}

#[track_caller]
fn count(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("{key} in {report}"))
}

const POINT_KEYS: [&str; 20] = [
    "mode",
    "prompt_tokens",
    "max_tokens",
    "concurrency",
    "requests",
    "prompt_tokens_per_s",
    "decode_tokens_per_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "requests_per_s",
    "requests_per_min",
    "ttft_ms",
    "tpot_ms",
    "elapsed_s",
    "total_prompt_tokens",
    "total_output_tokens",
    "cached_tokens",
    "preemptions",
    "memory",
    "points",
];

#[test]
fn measures_static_batches() {
    let lengths = ["--prompt-tokens", "7,40", "--max-tokens", "5", "--rounds", "2"];
    let report = bench(&LATENCY, &[&lengths[..], &["--concurrency", "1,3"]].concat());
    assert_eq!(keys(&report), [&["model", "backend", "seed"], &POINT_KEYS[..]].concat());
    assert_eq!(report["backend"], "reference");
    let points = report["points"].as_array().unwrap();
    let of = |point: &Value| {
        ["prompt_tokens", "max_tokens", "concurrency", "requests"].map(|key| count(point, key))
    };
    let expected = [[7, 5, 1, 2], [7, 5, 3, 6], [40, 5, 1, 2], [40, 5, 3, 6]];
    assert_eq!(points.iter().map(of).collect::<Vec<_>>(), expected);
    for point in points {
        let requests = count(point, "requests");
        assert_eq!(keys(point), POINT_KEYS[..19]);
        assert_eq!(point["mode"], "latency");
        assert_eq!(count(point, "total_prompt_tokens"), requests * count(point, "prompt_tokens"));
        assert_eq!(count(point, "total_output_tokens"), requests * 5);
        assert_eq!((count(point, "cached_tokens"), count(point, "preemptions")), (0, 0));
        for key in ["ttft_ms", "tpot_ms"] {
            assert_eq!(keys(&point[key]), ["mean", "min", "max", "p50", "p75", "p95", "p99"]);
            let values = ["min", "p50", "p75", "p95", "p99", "max"]
                .map(|name| point[key][name].as_f64().unwrap());
            assert!(values[0] > 0.0 && values.is_sorted(), "{key}: {values:?}");
        }
        assert!(POINT_KEYS[5..11].iter().all(|key| point[key].as_f64().unwrap() > 0.0));
        assert_eq!(keys(&point["memory"]), ["weights_bytes", "kv_cache_bytes", "peak_rss_bytes"]);
    }
    assert!(POINT_KEYS[..19].iter().all(|key| report[key] == points[3][key]));
}

#[test]
fn leaves_out_what_does_not_fit() {
    let model = tiny("llama-gqa2");
    let model = model.to_str().unwrap();
    let more = ["--concurrency", "2", "--rounds", "1"];
    let run = run(&args(&LATENCY, model, &more));
    assert_eq!(run.exit, Exit::Done, "{}", run.err);
    assert!(run.err.contains("left out: 128 prompt tokens and 2048 generated"), "{}", run.err);
    assert_eq!(run.err.matches("left out").count(), 3, "{}", run.err);
    for heading in ["\n1 → 128 tokens, 2 at once, 2 requests", "\n128 → 128 tokens, 2 at once"]
    {
        assert!(run.out.contains(heading), "{}", run.out);
    }
    assert_eq!(run.out.matches("first token").count(), 2, "{}", run.out);
    assert!(run.out.contains("decode/s"), "{}", run.out);
}

#[test]
fn tells_the_time_of_kernels() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel-gen/models");
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("config.json");
    fs::copy(config.join("smollm2-135m-awq.json"), to).unwrap();
    let folder = folder.path().to_str().unwrap();
    let model = ["bench", "--model", folder, "--load-format", "dummy"];
    let lengths = ["--prompt-tokens", "1", "--max-tokens", "2", "--rounds", "1"];
    let report =
        run_json(&[&model[..], &lengths, &["--concurrency", "1", "--kernels", "--json"]].concat());
    let kernels = report["points"][0]["kernels"].as_array().unwrap();
    let calls = |op: &str| {
        let of_op = kernels.iter().filter(|kernel| kernel["op"] == op);
        of_op.map(|kernel| count(kernel, "calls")).sum::<u64>()
    };
    // The first of the steps, four in all, is timed: thirty layers of four linears.
    assert_eq!(["embed", "paged_attention", "awq_gemm", "gemm"].map(calls), [1, 30, 120, 1]);
    for kernel in kernels {
        let [seconds, limit] =
            ["seconds", "limit_seconds"].map(|key| kernel[key].as_f64().unwrap());
        assert!(seconds > 0.0 && limit > 0.0, "{kernel}");
        let bounds = ["memory", "cache", "int8 dot", "f32 fma"];
        assert!(bounds.contains(&kernel["bound"].as_str().unwrap()), "{kernel}");
    }
}

#[test]
fn one_token_has_no_gap() {
    let report = bench(&LATENCY, &["--concurrency", "2", "--max-tokens", "1", "--rounds", "1"]);
    assert_eq!(count(&report, "total_output_tokens"), 2);
    assert_eq!(count(&report, "prompt_tokens"), 128);
    assert!(report["ttft_ms"]["p50"].is_f64());
    assert_eq!(
        (&report["tpot_ms"]["p50"], &report["decode_tokens_per_s"]),
        (&json!(null), &json!(null))
    );
}

#[test]
fn measures_a_stream_of_requests() {
    let fixed = ["--prompt-tokens", "33", "--max-tokens", "6", "--requests", "9"];
    let report = bench(&THROUGHPUT, &[&fixed[..], &["--concurrency", "4"]].concat());
    assert_eq!((count(&report, "requests"), count(&report, "concurrency")), (9, 4));
    assert_eq!(count(&report, "total_prompt_tokens"), 9 * 33);
    assert_eq!(count(&report, "total_output_tokens"), 9 * 6);
    assert_eq!(count(&report, "cached_tokens"), 0);

    // Two pages of 32 tokens are the same for all, and all but the first find them.
    let shared = ["--prompt-tokens", "70", "--max-tokens", "2", "--requests", "9"];
    let shared = [&shared[..], &["--concurrency", "1", "--shared-prefix-tokens", "65"]].concat();
    assert_eq!(count(&bench(&THROUGHPUT, &shared), "cached_tokens"), 8 * 64);
    let without = [&shared[..], &["--no-prefix-cache"]].concat();
    assert_eq!(count(&bench(&THROUGHPUT, &without), "cached_tokens"), 0);

    // Too few pages for four: some give theirs back, and all end nevertheless.
    let tight = ["--prompt-tokens", "30", "--max-tokens", "40", "--requests", "6"];
    let tight = [&tight[..], &["--concurrency", "4", "--num-pages", "8"]].concat();
    let report = bench(&THROUGHPUT, &tight);
    assert!(count(&report, "preemptions") > 0, "{report}");
    assert_eq!(count(&report, "total_output_tokens"), 6 * 40);
}

#[test]
fn draws_the_same_lengths_again() {
    let totals = |seed| {
        let more = ["--requests", "5", "--concurrency", "5", "--seed", seed];
        let report = bench(&THROUGHPUT, &more);
        ["total_prompt_tokens", "total_output_tokens"].map(|key| count(&report, key))
    };
    assert_eq!(totals("1"), totals("1"));
    assert_ne!(totals("1"), totals("2"));
}

#[test]
fn follows_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace.jsonl");
    let file_name = file.to_str().unwrap();
    let line = |prompt, max| format!("{{\"prompt_tokens\": {prompt}, \"max_tokens\": {max}}}\n");
    fs::write(&file, [line(10, 3), "\n".to_owned(), line(20, 4)].concat()).unwrap();
    let trace = ["--trace", file_name, "--concurrency", "2"];
    let report = bench(&THROUGHPUT, &trace);
    assert_eq!((count(&report, "requests"), count(&report, "total_prompt_tokens")), (2, 30));
    assert_eq!(count(&report, "total_output_tokens"), 7);
    // The mean of 3 and 4, rounded.
    assert_eq!((count(&report, "prompt_tokens"), count(&report, "max_tokens")), (15, 4));
    let report = bench(&THROUGHPUT, &[&trace[..], &["--requests", "3"]].concat());
    assert_eq!((count(&report, "requests"), count(&report, "total_prompt_tokens")), (3, 40));

    let model = tiny("llama-gqa2");
    let model = model.to_str().unwrap();
    let check = |text: &str, expect| {
        fs::write(&file, text).unwrap();
        check_error(&args(&THROUGHPUT, model, &trace), Exit::Failed, expect);
    };
    check("", "trace.jsonl: no requests");
    check("\n{\"prompt_tokens\": 1}\n", "trace.jsonl, line 2: missing field `max_tokens`");
    check("{\"prompt_tokens\": -1, \"max_tokens\": 2}", "`-1`");
    check(&line(0, 3), "line 1: 0 prompt tokens and 3 generated ones; both must be at least 1");
    check(&line(200, 57), "do not fit the model's context of 256");
    let huge = u64::MAX;
    check(&line(huge, huge), "do not fit the model's context of 256");
}

#[test]
fn refuses_what_makes_no_sense() {
    let model = tiny("llama-gqa2");
    let model = model.to_str().unwrap();
    let usage = |more: &[&str], expect| {
        check_error(&args(&[], model, more), Exit::WrongUsage, expect);
    };
    usage(&["--mode", "guess"], "'guess'");
    usage(&["--concurrency", "1,0"], "0 is not in 1..=4096");
    usage(&["--concurrency", "1,x"], "'x'");
    usage(&["--prompt-tokens", "0"], "0 is not in");
    usage(&["--trace", "f", "--max-tokens", "3"], "cannot be used");
    let check = |mode: &[&str], more: &[&str], expect| {
        check_error(&args(mode, model, more), Exit::Failed, expect);
    };
    let expected = "--requests has a meaning with --mode throughput or serving only";
    check(&LATENCY, &["--requests", "3"], expected);
    check(&LATENCY, &["--url", "http://[::1]:1"], "--url has a meaning with --mode serving only");
    check(&["--mode", "serving"], &[], "--mode serving needs --url");
    check(&LATENCY, &["--trace", "f"], "--trace has");
    check(&THROUGHPUT, &["--rounds", "3"], "--rounds has a meaning with --mode latency only");
    let uneven = ["--prompt-tokens", "1,2,3", "--max-tokens", "4,5"];
    check(&LATENCY, &uneven, "--prompt-tokens has 3 values and --max-tokens 2");
    check(&LATENCY, &["--prompt-tokens", "200"], "200 prompt tokens and 128 generated ones do not");
    check(&THROUGHPUT, &["--trace", "/no/such.jsonl"], "/no/such.jsonl");
    let few = ["--concurrency", "8", "--max-batch-tokens", "4"];
    check(&LATENCY, &few, "max_batch_tokens is 4");
    check(&LATENCY, &["--num-pages", "1"], "the KV cache has 1");
    check(&LATENCY, &["--chunk-tokens", "0"], "max_chunk_tokens is 0");
}
