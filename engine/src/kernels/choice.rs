//! Which servings of a table count on a machine, and kernels that are asked for by name.

use bespoke_kernel_gen::name::spec_name;
use bespoke_kernel_gen::plan::Provenance;
use bespoke_kernel_gen::spec::{KernelSpec, RowRegime};
use bespoke_kernel_gen::target::Target;
use bespoke_kernel_gen::tuning::distance::{Distance, distance};

use super::{Interval, Kernel, KernelTable, Serving};
use crate::error::Error;

/// The device class whose servings count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The one that this machine is in.
    #[default]
    This,
    /// The one with this key, wherever it runs.
    Class(&'static str),
    /// None: what serves where nothing was measured.
    Any,
}

/// A table seen from a device.
#[derive(Clone, Copy)]
pub struct Choice<'a> {
    pub table: &'a KernelTable,
    pub target: Target,
    /// Key of the device class; `None`: none is known.
    pub device: Option<&'a str>,
}

/// A serving, and how near its device is to the one it was chosen for.
#[derive(Clone, Copy, Debug)]
pub struct Chosen {
    pub serving: &'static Serving,
    /// Whether it was chosen for another device of the same family.
    pub is_transferred: bool,
}

impl Choice<'_> {
    /// What serves `spec`: the device's own serving, else that of the nearest device of the same
    /// instruction set and CPU family, else the one for any.
    pub fn serving(&self, spec: &KernelSpec) -> Option<Chosen> {
        let of_spec =
            |serving: &&'static Serving| serving.spec == *spec && serving.target == self.target;
        let servings = self.table.servings.iter().filter(of_spec);
        let rank = |serving: &'static Serving| match (serving.device, self.device) {
            (None, _) => Some((Distance::Any, serving)),
            (Some(found), Some(device)) => Some((distance(device, found)?, serving)),
            (Some(_), None) => None,
        };
        // NOTE: of equally near ones the first counts; the order of the table is that of the lock.
        let (distance, serving) =
            servings.filter_map(rank).min_by_key(|(distance, _)| *distance)?;
        let is_transferred = matches!(distance, Distance::Family { .. });
        Some(Chosen { serving, is_transferred })
    }

    /// The kernel that serves `num_rows` rows; for `paged_attention`, one row means decoding.
    pub fn kernel(&self, spec: &KernelSpec, num_rows: usize) -> Option<&'static Kernel> {
        self.table.kernel(self.serving(spec)?.serving.interval(num_rows).symbol)
    }

    /// Where the choice of `kernel` comes from; `None` where it serves nothing here.
    pub fn provenance(&self, kernel: &Kernel) -> Option<Provenance> {
        let chosen = self.serving(&kernel.spec)?;
        let mut intervals = chosen.serving.intervals.iter();
        let interval = intervals.find(|interval| interval.symbol == kernel.symbol)?;
        Some(chosen.provenance(interval))
    }
}

impl Chosen {
    /// Where the choice of one of its intervals comes from, on this device.
    pub fn provenance(&self, interval: &Interval) -> Provenance {
        match self.is_transferred {
            true => interval.provenance.transferred(),
            false => interval.provenance,
        }
    }
}

/// A kernel that shall serve a spec, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// As symbols begin: `awq_gemm_n960_k576_g64_int8`.
    pub spec: String,
    pub symbol: String,
}

impl Pin {
    /// Reads `SPEC=SYMBOL[,SPEC=SYMBOL…]`.
    ///
    /// # Errors
    /// A part is no such pair.
    pub fn parse_list(text: &str) -> Result<Vec<Pin>, Error> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let pin = |part: &str| match part.split_once('=') {
            Some((spec, symbol)) => Ok(Pin { spec: spec.to_owned(), symbol: symbol.to_owned() }),
            None => Err(Error::Request(format!("the pin {part:?} is not SPEC=SYMBOL"))),
        };
        parts.map(pin).collect()
    }
}

impl KernelTable {
    /// The table with `pins` in place of what serves their specs, on any device. A kernel for one
    /// row serves one row, and one for several all row counts above.
    ///
    /// What is put in place lives as long as the program.
    ///
    /// # Errors
    /// A kernel is not in the table, or cannot serve the spec: it computes something else, adds up
    /// in another order, or wants other panels than the kernels beside it.
    pub fn pinned(&self, pins: &[Pin]) -> Result<KernelTable, Error> {
        if pins.is_empty() {
            return Ok(*self);
        }
        let mut servings = self.servings.to_vec();
        for pin in pins {
            let refuse = |reason: String| {
                Error::Request(format!("cannot pin {} to {}: {reason}", pin.spec, pin.symbol))
            };
            let kernel = self.kernel(&pin.symbol).ok_or_else(|| {
                refuse("this binary has no such kernel; see bespoke kernels".to_owned())
            })?;
            let name = spec_name(&kernel.spec);
            if name != pin.spec {
                return Err(refuse(format!("that is a kernel of {name}")));
            }
            let mut num_pinned = 0;
            for serving in &mut servings {
                if serving.spec == kernel.spec && serving.target == kernel.target {
                    serving.intervals = Vec::leak(with_pin(serving.intervals, kernel));
                    num_pinned += 1;
                }
            }
            if num_pinned == 0 {
                return Err(refuse("nothing of this spec is served in this binary".to_owned()));
            }
        }
        for pin in pins {
            let is_of_pin = |serving: &&Serving| spec_name(&serving.spec) == pin.spec;
            for serving in servings.iter().filter(is_of_pin) {
                self.check_together(serving).map_err(|reason| {
                    Error::Request(format!("cannot pin {} to {}: {reason}", pin.spec, pin.symbol))
                })?;
            }
        }
        Ok(KernelTable { servings: Vec::leak(servings), ..*self })
    }

    /// All kernels of a serving read one layout and add up in one order.
    fn check_together(&self, serving: &Serving) -> Result<(), String> {
        let kernels = serving.intervals.iter().filter_map(|interval| self.kernel(interval.symbol));
        let kernels: Vec<&Kernel> = kernels.collect();
        let Some((first, others)) = kernels.split_first() else { return Ok(()) };
        for other in others {
            if first.cols != other.cols {
                return Err(format!(
                    "panels of {} tiles ({}) and of {} ({}) would serve one weight; pin kernels \
                     of one layout",
                    first.cols, first.symbol, other.cols, other.symbol
                ));
            }
            if first.reduction_class != other.reduction_class {
                return Err(format!(
                    "{} and {} add up in different orders",
                    first.symbol, other.symbol
                ));
            }
        }
        Ok(())
    }
}

/// `intervals` with `kernel` for one row, or for all above what a kernel for one row serves.
fn with_pin(intervals: &[Interval], kernel: &Kernel) -> Vec<Interval> {
    let pinned =
        |rows_max| Interval { rows_max, symbol: kernel.symbol, provenance: Provenance::Pinned };
    let mut all = Vec::new();
    match kernel.regime {
        RowRegime::One => {
            all.push(pinned(1));
            all.extend(intervals.iter().filter(|interval| interval.rows_max > 1));
        }
        RowRegime::Few | RowRegime::Many => {
            let of_one_row = |interval: &&Interval| interval.rows_max == 1;
            all.extend(intervals.first().filter(of_one_row));
            all.push(pinned(usize::MAX));
        }
        RowRegime::Any => all.push(pinned(usize::MAX)),
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::KernelFn;
    use crate::kernels::abi::{GemmArgs, Share};
    use bespoke_kernel_gen::spec::DType;

    const SPEC: KernelSpec = KernelSpec::Gemm { n: 64, k: 64, weight: DType::F32 };
    const HERE: &str = "avx512-amd-25-17-l2-1024-l3-32768-t2";

    unsafe fn nothing(_: &GemmArgs, _: Share) {}

    const fn kernel(symbol: &'static str, regime: RowRegime, cols: usize) -> Kernel {
        Kernel {
            symbol,
            spec: SPEC,
            regime,
            target: Target::Avx512,
            rows: 1,
            cols,
            scratch_bytes: 0,
            reduction_class: "gemm_float.avx512",
            source_hash: "",
            run: KernelFn::Gemm(nothing),
        }
    }

    static KERNELS: &[Kernel] = &[
        kernel("one", RowRegime::One, 4),
        kernel("few", RowRegime::Few, 4),
        kernel("many", RowRegime::Many, 4),
        kernel("few_c2", RowRegime::Few, 2),
        kernel("one_c2", RowRegime::One, 2),
        Kernel { reduction_class: "gemm_other.avx512", ..kernel("few_other", RowRegime::Few, 4) },
    ];

    const fn interval(rows_max: usize, symbol: &'static str, provenance: Provenance) -> Interval {
        Interval { rows_max, symbol, provenance }
    }

    static DEFAULTS: &[Interval] = &[
        interval(1, "one", Provenance::Default),
        interval(8, "few", Provenance::Default),
        interval(usize::MAX, "many", Provenance::Default),
    ];
    static MEASURED: &[Interval] = &[
        interval(1, "one", Provenance::Default),
        interval(usize::MAX, "few", Provenance::Measured),
    ];

    const fn serving(device: Option<&'static str>, intervals: &'static [Interval]) -> Serving {
        Serving { spec: SPEC, target: Target::Avx512, device, intervals }
    }

    fn table(servings: &'static [Serving]) -> KernelTable {
        KernelTable { kernels: KERNELS, servings, ..KernelTable::EMPTY }
    }

    /// The device that `device` takes its kernels from, and what the last is said to come from.
    fn chosen(table: &KernelTable, device: &str) -> (Option<&'static str>, Provenance) {
        let choice = Choice { table, target: Target::Avx512, device: Some(device) };
        let chosen = choice.serving(&SPEC).unwrap();
        (chosen.serving.device, chosen.provenance(chosen.serving.interval(100)))
    }

    #[test]
    fn the_nearest_device_of_the_family_counts() {
        const EIGHT: &str = "avx512-amd-25-17-l2-1024-l3-32768-t8";
        const OTHER_MODEL: &str = "avx512-amd-25-97-l2-1024-l3-32768-t2";
        static SERVINGS: &[Serving] = &[
            serving(None, DEFAULTS),
            serving(Some(OTHER_MODEL), MEASURED),
            serving(Some(EIGHT), MEASURED),
            serving(Some(HERE), MEASURED),
        ];
        let all = table(SERVINGS);
        assert_eq!(chosen(&all, HERE), (Some(HERE), Provenance::Measured));
        let of = |key: &str| chosen(&all, key);
        let near_two = "avx512-amd-25-17-l2-512-l3-32768-t3";
        assert_eq!(of(near_two), (Some(HERE), Provenance::Transferred));
        let near_eight = "avx512-amd-25-17-l2-1024-l3-32768-t7";
        assert_eq!(of(near_eight), (Some(EIGHT), Provenance::Transferred));
        let without_it = table(&SERVINGS[..3]);
        assert_eq!(chosen(&without_it, HERE), (Some(EIGHT), Provenance::Transferred));
        let other_model = table(&SERVINGS[..2]);
        assert_eq!(chosen(&other_model, HERE), (Some(OTHER_MODEL), Provenance::Transferred));
        for stranger in [
            "avx512-intel-6-143-l2-2048-l3-99-t2",
            "avx512-amd-26-17-l2-1024-l3-32768-t2",
            "",
            "avx512",
        ] {
            assert_eq!(of(stranger), (None, Provenance::Default), "{stranger}");
        }
        let any = Choice { table: &all, target: Target::Avx512, device: None };
        assert_eq!(any.kernel(&SPEC, 100).unwrap().symbol, "many");
        let here = Choice { device: Some(HERE), ..any };
        assert_eq!(here.kernel(&SPEC, 1).unwrap().symbol, "one");
        assert_eq!(here.kernel(&SPEC, 100).unwrap().symbol, "few");
        assert!(Choice { target: Target::Portable, ..here }.serving(&SPEC).is_none());
    }

    fn pinned(text: &str) -> Result<Vec<Vec<Interval>>, String> {
        static SERVINGS: &[Serving] = &[serving(None, DEFAULTS), serving(Some(HERE), MEASURED)];
        let pins = Pin::parse_list(text).map_err(|error| error.to_string())?;
        let table = table(SERVINGS).pinned(&pins).map_err(|error| error.to_string())?;
        Ok(table.servings.iter().map(|serving| serving.intervals.to_vec()).collect())
    }

    #[test]
    fn a_pin_serves_on_every_device() {
        let last = |symbol| interval(usize::MAX, symbol, Provenance::Pinned);
        let one = interval(1, "one", Provenance::Default);
        assert_eq!(pinned("gemm_n64_k64_f32=many"), Ok(vec![vec![one, last("many")]; 2]));
        let pinned_one = interval(1, "one", Provenance::Pinned);
        let mut by_one = vec![DEFAULTS.to_vec(), MEASURED.to_vec()];
        by_one[0][0] = pinned_one;
        by_one[1][0] = pinned_one;
        assert_eq!(pinned("gemm_n64_k64_f32=one"), Ok(by_one));
        let both = vec![interval(1, "one_c2", Provenance::Pinned), last("few_c2")];
        let text = "gemm_n64_k64_f32=few_c2, gemm_n64_k64_f32=one_c2";
        assert_eq!(pinned(text), Ok(vec![both; 2]));
        assert_eq!(pinned(""), Ok(vec![DEFAULTS.to_vec(), MEASURED.to_vec()]));
    }

    #[test]
    fn pins_that_cannot_serve_are_refused() {
        let cases = [
            ("few", "not SPEC=SYMBOL"),
            ("gemm_n64_k64_f32=none", "no such kernel"),
            ("gemm_n65_k64_f32=few", "a kernel of gemm_n64_k64_f32"),
            ("gemm_n64_k64_f32=few_c2", "one layout"),
            ("gemm_n64_k64_f32=one_c2", "one layout"),
            ("gemm_n64_k64_f32=few_other", "different orders"),
        ];
        for (text, reason) in cases {
            let error = pinned(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
