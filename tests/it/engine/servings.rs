//! Kernels that a lock chooses serve exactly the rows it says, with the bits of the default ones.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::PathBuf;

use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kernels::choice::{DeviceChoice, Pin};
use bespoke::kernels::{KernelTable, Served};
use bespoke::request::Request;
use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::{ActivationType, RowRegime};
use bespoke_kernel_gen::tuning::lock::Lock;

fn load(kernels: KernelTable, device: DeviceChoice, num_threads: usize) -> Engine {
    load_with(kernels, device, num_threads, ActivationType::Int8)
}

fn load_with(
    kernels: KernelTable,
    device: DeviceChoice,
    num_threads: usize,
    activation: ActivationType,
) -> Engine {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/tiny/llama-awq-g32");
    let options = EngineOptions {
        backend: BackendChoice::Cpu,
        num_threads: Some(num_threads),
        max_context: Some(128),
        activation,
        device,
        ..EngineOptions::new(kernels)
    };
    Engine::load(&dir, &options, &mut |_| {}).unwrap()
}

fn tokens(num: usize) -> Vec<u32> {
    (0..num as u32).map(|i| (i * 37 + 11) % 160).collect()
}

/// The matmul kernels that a step of so many rows runs, the head's aside, whose row is one.
fn used_kernels(engine: &mut Engine, num_rows: usize) -> BTreeSet<&'static str> {
    let request = Request { prompt_ids: tokens(num_rows), max_tokens: 1, ..Request::default() };
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
    let usage = engine.kernel_usage().unwrap();
    usage.iter().filter(|usage| usage.op == "awq_gemm").map(|usage| usage.symbol).collect()
}

fn logits_bits(engine: &mut Engine, num_rows: usize) -> Vec<u32> {
    let mut bits = Vec::new();
    let mut sink = |_: usize, logits: &[f32]| bits.extend(logits.iter().map(|x| x.to_bits()));
    engine.logits(&tokens(num_rows), &mut sink).unwrap();
    bits
}

/// Whether a kernel serves `num_rows` rows as one of `served`.
fn serves(served: &[Served], device: Option<&str>, num_rows: usize) -> bool {
    served
        .iter()
        .any(|rows| rows.device == device && (rows.rows_min..=rows.rows_max).contains(&num_rows))
}

#[test]
fn locked_kernels_serve_their_rows() {
    let table = bespoke_tests::locked_kernels();
    let lock = Lock::parse(table.lock).unwrap();
    let device = lock.problems[0].device.clone();
    let mut seen = BTreeSet::new();
    for num_rows in [1, 2, 3, 4, 8, 12, 13, 40] {
        for (choice, device) in
            [(DeviceChoice::This, Some(device.as_str())), (DeviceChoice::Any, None)]
        {
            let used = used_kernels(&mut load(table, choice, 2), num_rows);
            assert!(!used.is_empty());
            for symbol in used {
                let kernel = table.kernel(symbol).unwrap();
                let served = table.serves(kernel);
                assert!(serves(&served, device, num_rows), "{symbol} at {num_rows} rows");
                if device.is_some() {
                    seen.insert((num_rows, kernel.regime));
                }
            }
        }
    }
    // NOTE: these are rows that the regimes do not serve by default.
    assert!(seen.contains(&(4, RowRegime::Many)) && seen.contains(&(40, RowRegime::Few)));
}

#[test]
fn locked_kernels_give_the_bits_of_the_default_ones() {
    let table = bespoke_tests::locked_kernels();
    for activation in [ActivationType::Int8, ActivationType::Float] {
        let mut default = load_with(table, DeviceChoice::Any, 2, activation);
        let mut locked = load_with(table, DeviceChoice::This, 2, activation);
        let mut alone = load_with(table, DeviceChoice::This, 1, activation);
        for num_rows in [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 17, 33, 50] {
            let expected = logits_bits(&mut default, num_rows);
            assert_eq!(logits_bits(&mut locked, num_rows), expected, "{num_rows} rows");
            assert_eq!(logits_bits(&mut alone, num_rows), expected, "{num_rows} rows, 1 thread");
        }
    }
}

#[test]
fn provenance_says_how_near_the_device_is() {
    let table = bespoke_tests::locked_kernels();
    let of = |engine: &Engine, provenance| engine.provenances().get(&provenance).copied();
    let own = load(table, DeviceChoice::This, 2);
    assert!(
        of(&own, Provenance::Measured) > Some(4 * 4) && of(&own, Provenance::Default).is_some()
    );
    assert_eq!(of(&own, Provenance::Transferred), None);
    let family = load(table, DeviceChoice::This, 3);
    assert_eq!(of(&family, Provenance::Transferred), of(&own, Provenance::Measured));
    for engine in [
        load(table, DeviceChoice::Any, 2),
        load(table, DeviceChoice::Class("avx512-other-1-1-l2-1-l3-1-t2"), 2),
    ] {
        let provenances: Vec<Provenance> = engine.provenances().into_keys().collect();
        assert_eq!(provenances, [Provenance::Default]);
    }
}

#[test]
fn a_pinned_kernel_serves_what_it_is_pinned_to() {
    let table = bespoke_tests::locked_kernels();
    let problem = &Lock::parse(table.lock).unwrap().problems[0];
    let [_, few, ..] = &problem.intervals[..] else { panic!("{problem:?}") };
    let pin = Pin { spec: problem.spec.clone(), symbol: few.symbol.clone() };
    let pinned = table.pinned(&[pin]).unwrap();
    for serving in pinned.servings {
        let interval = serving.interval(40);
        let is_pinned = interval.symbol == few.symbol;
        assert_eq!(is_pinned, interval.provenance == Provenance::Pinned, "{serving:?}");
    }
    let num_pinned = pinned.servings.iter().filter(|serving| {
        serving.intervals.iter().any(|interval| interval.provenance == Provenance::Pinned)
    });
    assert_eq!(num_pinned.count(), 2, "for any device and for the lock's");
    let expected = logits_bits(&mut load(table, DeviceChoice::Any, 2), 20);
    assert_eq!(logits_bits(&mut load(pinned, DeviceChoice::This, 2), 20), expected);
}

#[test]
fn steps_are_counted_by_their_rows() {
    let mut engine = load(bespoke_tests::locked_kernels(), DeviceChoice::This, 1);
    let request =
        Request { prompt_ids: tokens(40), max_tokens: 5, ignore_eos: true, ..Request::default() };
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
    let counts = engine.row_histogram().counts();
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), [(1, 4), (40, 1)]);
}
