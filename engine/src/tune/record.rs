//! A measurement as a line of JSON that says all it depends on.

use std::collections::BTreeSet;

use bespoke_kernel_gen::spec::{KvDType, ModelShape};
use serde::{Deserialize, Serialize};

use super::Measured;
use crate::backend::cuda::device::DeviceInfo;

/// Version of the form.
const VERSION: u32 = 1;

/// One line of a file of records. Lines of several files may be put into one; order means nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub v: u32,
    pub problem: Problem,
    pub device: RecordedDevice,
    pub variant: RecordedVariant,
    pub time: Time,
    /// Seconds since 1970.
    pub measured_at: u64,
}

/// What was computed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// The kernel's op, `copy` for a copy by the driver.
    pub op: String,
    /// Rows, or sequences and their lengths.
    pub case: String,
    /// The first model of the binary that has it.
    pub model: String,
    pub kv_dtype: String,
    /// Bytes read and written, each once.
    pub bytes: usize,
    pub flops: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RecordedDevice {
    pub name: String,
    pub arch: String,
    pub num_sms: usize,
    pub memory_bytes: usize,
}

/// The kernel: a changed body has another hash.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RecordedVariant {
    /// Null for a copy.
    pub symbol: Option<String>,
    pub source_hash: Option<String>,
    pub toolkit: String,
}

/// How it was measured, and what came out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Time {
    /// `graph`: launches replayed from a recording.
    pub mode: String,
    /// `cold`: operands come from memory.
    pub cache: String,
    /// Microseconds of one launch: 10th, 50th and 90th percentile.
    pub us: [f64; 3],
    pub num_samples: usize,
    /// Of the median.
    pub gb_per_s: f64,
    pub tflop_per_s: f64,
}

/// What a record is found by.
pub type Key = (String, String, String, Option<String>, Option<String>);

impl Record {
    pub fn new(
        measured: &Measured,
        shape: &ModelShape,
        kv_dtype: KvDType,
        device: &DeviceInfo,
        variant: RecordedVariant,
        measured_at: u64,
    ) -> Record {
        let Measured { case, times, cost, symbol } = measured;
        let op = symbol.as_deref().and_then(bespoke_kernel_gen::cuda::Variant::parse);
        Record {
            v: VERSION,
            problem: Problem {
                op: op.map_or("copy".to_owned(), |variant| variant.spec().op().to_owned()),
                case: case.to_string(),
                model: shape.name.clone(),
                kv_dtype: kv_dtype.name().to_owned(),
                bytes: cost.bytes,
                flops: cost.flops,
            },
            device: RecordedDevice {
                name: device.name.clone(),
                arch: device.arch.name().to_owned(),
                num_sms: device.num_sms,
                memory_bytes: device.memory_bytes,
            },
            variant,
            time: Time {
                mode: "graph".to_owned(),
                cache: "cold".to_owned(),
                us: [times.p10, times.p50, times.p90],
                num_samples: times.num_samples,
                gb_per_s: cost.bytes as f64 / times.p50 / 1e3,
                tflop_per_s: cost.flops as f64 / times.p50 / 1e6,
            },
            measured_at,
        }
    }

    pub fn key(&self) -> Key {
        let (device, variant) = (&self.device, &self.variant);
        let case = self.problem.case.clone();
        key(&case, &device.name, &device.arch, &variant.symbol, &variant.source_hash)
    }

    /// The keys of a file's lines; a damaged line is none.
    pub fn keys(text: &str) -> BTreeSet<Key> {
        let records = text.lines().filter_map(|line| serde_json::from_str::<Record>(line).ok());
        records.filter(|record| record.v == VERSION).map(|record| record.key()).collect()
    }
}

/// As [`Record::key`].
pub fn key(
    case: &str,
    device: &str,
    arch: &str,
    symbol: &Option<String>,
    source_hash: &Option<String>,
) -> Key {
    (case.to_owned(), device.to_owned(), arch.to_owned(), symbol.clone(), source_hash.clone())
}

#[cfg(test)]
mod tests {
    use super::super::{Case, Cost, Times};
    use super::*;
    use bespoke_kernel_gen::cuda::Arch;
    use bespoke_kernel_gen::presets;

    #[test]
    fn records_are_found_again() {
        let shape = presets::shape("smollm2-135m", &[]).unwrap();
        let device =
            DeviceInfo { name: "one".into(), arch: Arch::Sm90a, num_sms: 3, memory_bytes: 5 };
        let measured = Measured {
            case: Case::Embed { rows: 4 },
            symbol: Some("embed_h576_bf16__sm_90a".into()),
            times: Times { p10: 1.0, p50: 2.0, p90: 3.0, num_samples: 4 },
            cost: Cost { bytes: 4000, flops: 0 },
        };
        let variant = RecordedVariant {
            symbol: measured.symbol.clone(),
            source_hash: Some("abc".into()),
            toolkit: "13.0.88".into(),
        };
        let record = Record::new(&measured, &shape, KvDType::F16, &device, variant, 7);
        assert_eq!(record.problem.op, "embed");
        assert_eq!(record.time.gb_per_s, 2.0);
        let line = serde_json::to_string(&record).unwrap();
        let keys = Record::keys(&format!("{line}\n{{\"v\":1\n\n"));
        assert_eq!(keys, BTreeSet::from([record.key()]));
        let changed = Record {
            variant: RecordedVariant { source_hash: None, ..record.variant.clone() },
            ..record
        };
        assert!(!keys.contains(&changed.key()), "another body was not measured");
    }
}
