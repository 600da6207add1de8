//! `bespoke tune` on emulated CUDA: everything but the times is as on a device.

use std::path::PathBuf;
use std::time::Duration;

use bespoke::tune::{Case, Cases, Measured, TuneOptions, measure};
use bespoke_kernel_gen::model::ModelConfig;
use bespoke_kernel_gen::spec::{KvDType, LinearRole, ModelShape};

use crate::engine::device::Emulated;

fn shape(case: &str) -> ModelShape {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden/tiny").join(case);
    ModelConfig::from_file(&folder.join("config.json")).unwrap().shape(case).unwrap()
}

fn cases() -> Cases {
    Cases {
        linear_rows: vec![1, 9, 65],
        decode: vec![(1, 40), (3, 300)],
        prefill: vec![33],
        small_rows: vec![1, 5],
        logit_rows: 4,
    }
}

fn options() -> TuneOptions {
    TuneOptions {
        cold_bytes: 1 << 14,
        num_launches: 3,
        num_samples: 2,
        time_max: Duration::from_secs(60),
        num_layers: 2,
    }
}

/// All cases are launched as often as was asked for, none without a kernel but the copy.
#[test]
fn every_case_is_measured() {
    for (case, kv) in [("llama-awq-g32", KvDType::F16), ("qwen3-qknorm", KvDType::I4)] {
        let shape = shape(case);
        let device = Emulated::new(21);
        let counters = device.counters();
        let mut found: Vec<Measured> = Vec::new();
        measure(device, &shape, kv, &cases(), &options(), &mut |_, _| true, &mut |measured| {
            found.push(measured);
            true
        })
        .unwrap();
        let is_copy = |measured: &&Measured| matches!(measured.case, Case::Copy { .. });
        let num_copies = found.iter().filter(is_copy).count();
        assert_eq!(num_copies, usize::from(kv == KvDType::F16));
        for measured in &found {
            assert!(measured.cost.bytes > 0 && measured.times.num_samples == 2, "{measured:?}");
            assert_eq!(measured.symbol.is_none(), is_copy(&measured), "{measured:?}");
        }
        // One replay that does not count, and two that do.
        let num_replays = 3 * (found.len() - num_copies);
        assert_eq!(counters.num_replays(), num_replays as u64);
        if kv == KvDType::F16 {
            for role in [LinearRole::Qkv, LinearRole::Down, LinearRole::Head] {
                let is_of =
                    |m: &&Measured| matches!(m.case, Case::Linear { role: r, .. } if r == role);
                let rows = if role == LinearRole::Head { 1 } else { 3 };
                assert_eq!(found.iter().filter(is_of).count(), rows, "{role:?}");
            }
        }
    }
}

/// What is not wanted is not measured, and a full budget ends the run.
#[test]
fn known_cases_are_left_out() {
    let shape = shape("llama-gqa2");
    let is_decode = |case: &Case| matches!(case, Case::Decode { .. });
    let mut num_found = 0;
    let mut wanted = |case: &Case, symbol: Option<&str>| {
        assert!(symbol.is_some() || matches!(case, Case::Copy { .. }));
        is_decode(case)
    };
    let mut take = |measured: Measured| {
        assert!(is_decode(&measured.case));
        num_found += 1;
        false
    };
    let device = Emulated::new(22);
    measure(device, &shape, KvDType::F16, &cases(), &options(), &mut wanted, &mut take).unwrap();
    assert_eq!(num_found, 1);
}
