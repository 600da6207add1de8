//! Distances: how near a choice that was made on one device is to another device.

use super::device::{CpuDevice, CudaDevice};

/// From near to far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// The same class of devices.
    Exact,
    /// The same instruction set and CPU family, or GPU architecture.
    Family {
        /// Of a CPU.
        is_other_model: bool,
        /// Difference of the thread counts, of GPUs of the numbers of multiprocessors.
        threads: usize,
    },
    /// A choice for any device.
    Any,
}

/// How far the device class `other` is from `device`, by their keys; `None`: its measurements say
/// nothing here.
pub fn distance(device: &str, other: &str) -> Option<Distance> {
    if device == other {
        return Some(Distance::Exact);
    }
    if let Some(device) = CudaDevice::parse_key(device) {
        let other = CudaDevice::parse_key(other).filter(|other| other.arch == device.arch)?;
        let threads = device.num_sms.abs_diff(other.num_sms);
        return Some(Distance::Family { is_other_model: false, threads });
    }
    let device = CpuDevice::parse_key(device)?;
    device.matches(other)?;
    let other = CpuDevice::parse_key(other)?;
    Some(Distance::Family {
        is_other_model: device.model != other.model,
        threads: device.num_threads.abs_diff(other.num_threads),
    })
}

/// The nearest of some device classes to `device`, the first of equally near ones.
pub fn nearest<'a>(
    device: &str,
    keys: impl IntoIterator<Item = &'a str>,
) -> Option<(&'a str, Distance)> {
    let ranked = keys.into_iter().filter_map(|key| Some((key, distance(device, key)?)));
    ranked.min_by_key(|(_, distance)| *distance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_device_is_of_the_same_model_and_as_many_threads() {
        let here = "avx512-amd-25-17-l2-1024-l3-32768-t2";
        let model = "avx512-amd-25-97-l2-1024-l3-32768-t2";
        let four = "avx512-amd-25-17-l2-1024-l3-32768-t4";
        let eight = "avx512-amd-25-17-l2-1024-l3-32768-t8";
        let stranger = "avx512-intel-6-143-l2-2048-l3-32768-t2";
        let check = |keys: &[&str], expected: Option<&str>| {
            let found = nearest(here, keys.iter().copied());
            assert_eq!(found.map(|(key, _)| key), expected, "{keys:?}");
        };
        check(&[model, eight, four, here], Some(here));
        check(&[model, eight, four], Some(four));
        check(&[stranger, model], Some(model));
        check(&[stranger, "sm_90a-sms-132-mem-80"], None);
        assert_eq!(distance(stranger, stranger), Some(Distance::Exact));
    }
    #[test]
    fn the_nearest_gpu_is_of_the_same_architecture_and_as_many_multiprocessors() {
        let [sxm, pcie] = ["sm_90a-sms-132-mem-80", "sm_90a-sms-114-mem-80"];
        let keys = ["sm_80-sms-108-mem-80", pcie, sxm, "avx512-amd-25-17-l2-1024-l3-32768-t2"];
        for (device, expected) in [
            (sxm, Some(sxm)),
            ("sm_90a-sms-132-mem-140", Some(sxm)),
            ("sm_90a-sms-120-mem-80", Some(pcie)),
            ("sm_120-sms-170-mem-32", None),
        ] {
            assert_eq!(nearest(device, keys).map(|(key, _)| key), expected, "{device}");
        }
    }
}
