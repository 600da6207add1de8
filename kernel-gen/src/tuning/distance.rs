//! Distances: how near a choice that was made on one device is to another device.

use super::device::CpuDevice;

/// From near to far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// The same class of devices.
    Exact,
    /// The same instruction set and CPU family.
    Family {
        is_other_model: bool,
        /// Difference of the thread counts.
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
}
