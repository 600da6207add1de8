//! The emulator as a device of the engine.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bespoke::Error;
use bespoke::backend::cuda::device::{Address, Device, DeviceInfo, Use};
use bespoke_emulator::{Access, Emulator, Launch, Library, Source, compile};
use bespoke_kernel_gen::cuda::{self, Arch, Serving, Spec, Variant};

/// What was asked of a device; a clone counts along.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counters(Arc<[AtomicU64; 3]>);

impl Counters {
    fn add(&self, which: usize, count: u64) {
        self.0[which].fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn bytes_down(&self) -> u64 {
        self.0[0].load(Ordering::Relaxed)
    }

    pub(crate) fn num_launches(&self) -> u64 {
        self.0[1].load(Ordering::Relaxed)
    }

    pub(crate) fn num_replays(&self) -> u64 {
        self.0[2].load(Ordering::Relaxed)
    }
}

pub(crate) struct Emulated {
    emulator: Emulator,
    info: DeviceInfo,
    recording: Option<Vec<Recorded>>,
    counters: Counters,
    /// Kernels of which names begin with this do nothing.
    broken: Option<String>,
    /// What a tuner may try beside the defaults.
    candidates: Vec<Variant>,
    /// Where memory of `alloc_host` lies.
    pinned: Vec<Range<usize>>,
    /// What a device may still be reading of it.
    in_flight: Vec<Range<usize>>,
}

#[derive(Clone)]
pub(crate) struct Kernel {
    symbol: String,
    compiled: Arc<Library>,
    threads: u32,
    shared_bytes: u32,
}

#[derive(Clone)]
pub(crate) struct Recorded {
    kernel: Kernel,
    launch: cuda::Launch,
    params: Vec<u8>,
}

fn addresses(bytes: &[u8]) -> Range<usize> {
    let range = bytes.as_ptr_range();
    range.start as usize..range.end as usize
}

impl Emulated {
    pub(crate) fn new(seed: u64) -> Emulated {
        Emulated {
            emulator: Emulator::new(seed).unwrap(),
            info: DeviceInfo {
                name: "the emulator".into(),
                arch: Arch::Sm90a,
                num_sms: 3,
                memory_bytes: 1 << 30,
            },
            recording: None,
            counters: Counters::default(),
            broken: None,
            candidates: Vec::new(),
            pinned: Vec::new(),
            in_flight: Vec::new(),
        }
    }

    /// A device on which the kernels of an op, or of another beginning of their names, do nothing.
    pub(crate) fn broken(seed: u64, op: &str) -> Emulated {
        Emulated { broken: Some(op.to_owned()), ..Emulated::new(seed) }
    }

    /// The device with these kernels beside the defaults.
    pub(crate) fn with_candidates(self, candidates: &[Variant]) -> Emulated {
        Emulated { candidates: candidates.to_vec(), ..self }
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters.clone()
    }

    fn run(&mut self, recorded: &Recorded) {
        let Recorded { kernel, launch, params } = recorded;
        let launch = Launch {
            grid: [launch.grid_x as u32, launch.grid_y as u32],
            block: kernel.threads,
            shared_bytes: kernel.shared_bytes,
        };
        self.counters.add(1, 1);
        if self.broken.as_ref().is_some_and(|op| kernel.symbol.starts_with(op)) {
            return;
        }
        let result = self.emulator.launch(&kernel.compiled, &kernel.symbol, launch, params);
        result.unwrap_or_else(|fault| panic!("{}: {fault}", kernel.symbol));
    }
}

impl Device for Emulated {
    type Kernel = Kernel;
    type Graph = Vec<Recorded>;
    type Host = Vec<u8>;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn serving(&self, spec: &Spec) -> Option<Serving> {
        let serving = Serving::default_for(spec, self.info.arch);
        let is_there = |one: &cuda::Interval| one.variant.is_feasible().is_ok();
        serving.intervals.iter().all(is_there).then_some(serving)
    }

    fn kernels(&self, spec: &Spec) -> Vec<Variant> {
        let own = self.serving(spec).map_or(Vec::new(), |serving| serving.intervals);
        let own = own.into_iter().map(|interval| interval.variant);
        let candidates = self.candidates.iter().filter(|one| one.spec() == *spec).copied();
        own.chain(candidates).collect::<BTreeSet<Variant>>().into_iter().collect()
    }

    fn load(&mut self, variants: &[Variant]) -> Result<Vec<Kernel>, Error> {
        let sources: Vec<Source> =
            variants.iter().map(|variant| Source::of(variant).unwrap()).collect();
        let compiled = Arc::new(compile(&sources).unwrap());
        let kernel = |variant: &Variant| {
            let instance = variant.instance();
            Kernel {
                symbol: variant.symbol(),
                compiled: compiled.clone(),
                threads: instance.threads as u32,
                shared_bytes: instance.shared_bytes as u32,
            }
        };
        Ok(variants.iter().map(kernel).collect())
    }

    fn free_bytes(&self) -> Result<usize, Error> {
        Ok(1 << 20)
    }

    fn alloc(&mut self, len: usize, usage: Use, _: &str) -> Result<Address, Error> {
        let access = match usage {
            Use::Weights => Access::Constant,
            Use::Working => Access::ReadWrite,
        };
        let len = len.max(16);
        let address = self.emulator.alloc(len, access);
        self.emulator.write(address, &vec![0; len]);
        Ok(Address(address))
    }

    fn alloc_host(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        let host = vec![0; len];
        self.pinned.push(addresses(&host));
        Ok(host)
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) {
        assert!(self.recording.is_none(), "a recording holds launches alone");
        if bytes.is_empty() {
            return;
        }
        let range = addresses(bytes);
        let overlaps = |other: &Range<usize>| other.start < range.end && range.start < other.end;
        if self.pinned.iter().any(overlaps) {
            // Who copies a place twice has written it in between, while the first copy was queued.
            assert!(!self.in_flight.iter().any(overlaps), "a copy is not waited for");
            self.in_flight.push(range);
        }
        self.emulator.write(to.0, bytes);
    }

    fn download(&mut self, from: Address, bytes: &mut [u8]) {
        assert!(self.recording.is_none(), "a recording holds launches alone");
        self.counters.add(0, bytes.len() as u64);
        self.in_flight.clear();
        bytes.copy_from_slice(&self.emulator.read(from.0, bytes.len()).unwrap());
    }

    fn copy(&mut self, from: Address, to: Address, len: usize) {
        assert!(self.recording.is_none(), "a recording holds launches alone");
        let bytes = self.emulator.read(from.0, len).unwrap();
        self.emulator.write(to.0, &bytes);
    }

    fn launch(&mut self, kernel: &Kernel, launch: cuda::Launch, params: &[u8]) {
        let recorded = Recorded { kernel: kernel.clone(), launch, params: params.to_vec() };
        match &mut self.recording {
            Some(recording) => recording.push(recorded),
            None => self.run(&recorded),
        }
    }

    fn begin_capture(&mut self) {
        assert!(self.recording.is_none());
        self.recording = Some(Vec::new());
    }

    fn end_capture(&mut self) -> Vec<Recorded> {
        self.recording.take().expect("a recording was begun")
    }

    fn replay(&mut self, graph: &Vec<Recorded>) {
        self.counters.add(2, 1);
        graph.iter().for_each(|recorded| self.run(recorded));
    }

    fn synchronize(&mut self) {
        self.in_flight.clear();
    }
}
