//! The CUDA driver as a device.
//!
//! The driver's library is looked for when it is first needed: a binary with this file runs on
//! machines without one. Nothing but [`probe`] may call the driver before `probe` has found it.

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use bespoke_kernel_gen::cuda::table::KernelSet;
use bespoke_kernel_gen::cuda::{CudaKernelTable, Launch, Serving, Spec, Variant};
use cudarc::driver::sys::{self, CUresult};

use super::device::{Address, Device, DeviceInfo, Use};
use crate::error::Error;

/// What this machine has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// No driver library.
    NoDriver,
    /// The driver is there and refuses: its own words.
    Refused(String),
    Devices {
        /// CUDA version that the driver knows: 13000 for 13.0.
        driver_version: usize,
        devices: Vec<Found>,
    },
}

/// A GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub name: String,
    pub capability: (u32, u32),
    pub num_sms: usize,
    pub memory_bytes: usize,
}

/// Looks for driver and devices; loads the driver's library.
pub fn probe() -> Probe {
    // SAFETY: opens a library and closes it.
    if !unsafe { sys::is_culib_present() } {
        return Probe::NoDriver;
    }
    // SAFETY: the library is there; 0 is the only value of the flags.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => {}
        CUresult::CUDA_ERROR_NO_DEVICE => {
            return Probe::Devices { driver_version: driver_version(), devices: Vec::new() };
        }
        result => return Probe::Refused(describe(result)),
    }
    match devices() {
        Ok(devices) => Probe::Devices { driver_version: driver_version(), devices },
        Err(result) => Probe::Refused(describe(result)),
    }
}

fn driver_version() -> usize {
    let mut version = 0;
    // SAFETY: writes one number.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    if result == CUresult::CUDA_SUCCESS { version as usize } else { 0 }
}

fn devices() -> Result<Vec<Found>, CUresult> {
    let mut count = 0;
    // SAFETY: writes one number.
    check(unsafe { sys::cuDeviceGetCount(&mut count) })?;
    (0..count).map(found).collect()
}

fn found(ordinal: c_int) -> Result<Found, CUresult> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
    };
    let (mut device, mut name, mut memory_bytes) = (0, [0; 256], 0);
    // SAFETY: writes one number, at most so many bytes with a zero at their end, and one number.
    unsafe {
        check(sys::cuDeviceGet(&mut device, ordinal))?;
        check(sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device))?;
        check(sys::cuDeviceTotalMem_v2(&mut memory_bytes, device))?;
    }
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: writes one number.
        check(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
        Ok::<u32, CUresult>(value as u32)
    };
    // SAFETY: the driver ended the name with a zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    Ok(Found {
        name,
        capability: (
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        num_sms: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        memory_bytes,
    })
}

fn check(result: CUresult) -> Result<(), CUresult> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(result) }
}

/// The driver's name and words for a result.
fn describe(result: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = ptr::null();
        // SAFETY: writes the address of a string that lives as long as the driver, or null.
        unsafe { get(result, &mut text) };
        match text.is_null() {
            true => format!("{}", result as u32),
            // SAFETY: as above.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        }
    };
    format!("{} ({})", text(sys::cuGetErrorName), text(sys::cuGetErrorString))
}

/// First driver of each major version of CUDA that runs its machine code.
pub fn driver_release(toolkit: &str) -> &'static str {
    if toolkit.starts_with("12") { "525" } else { "580" }
}

/// A device's primary context and our stream in it; what lives in it keeps it alive.
struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: contexts and streams may be used by any thread, and these fields are never changed.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    fn open(ordinal: c_int) -> Result<Context, CUresult> {
        let (mut device, mut context, mut stream) = (0, ptr::null_mut(), ptr::null_mut());
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: each call writes one handle, which the next ones use; what was retained is
        // released where a later call fails.
        unsafe {
            check(sys::cuDeviceGet(&mut device, ordinal))?;
            check(sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            let made = check(sys::cuCtxSetCurrent(context))
                .and_then(|()| check(sys::cuStreamCreate(&mut stream, flags)));
            if let Err(result) = made {
                sys::cuDevicePrimaryCtxRelease_v2(device);
                return Err(result);
            }
        }
        Ok(Context { device, context, stream })
    }

    /// Makes the context this thread's.
    fn enter(&self) -> CUresult {
        // SAFETY: the context lives.
        unsafe { sys::cuCtxSetCurrent(self.context) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.enter();
        // SAFETY: nothing else has the stream. A driver that is shutting down may refuse.
        unsafe {
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A GPU with the kernels that this binary has for it.
pub struct Driver {
    info: DeviceInfo,
    kernels: KernelSet,
    context: Arc<Context>,
    driver_version: usize,
    /// What was allocated, to be given back.
    allocations: Vec<sys::CUdeviceptr>,
    /// What was launched last, for messages.
    last: String,
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.context.enter();
        // SAFETY: the memory is ours, and no kernel that uses it runs any more. After a failure the
        // driver refuses, and the process is about to end.
        unsafe {
            sys::cuStreamSynchronize(self.context.stream);
            for address in &self.allocations {
                sys::cuMemFree_v2(*address);
            }
        }
    }
}

/// A kernel in the device's memory.
pub struct DriverKernel {
    context: Arc<Context>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    symbol: String,
    threads: u32,
    shared_bytes: u32,
}

// SAFETY: functions may be launched by any thread.
unsafe impl Send for DriverKernel {}

impl Drop for DriverKernel {
    fn drop(&mut self) {
        self.context.enter();
        // SAFETY: nothing else has the module. A driver that is shutting down may refuse.
        unsafe { sys::cuModuleUnload(self.module) };
    }
}

/// A recording, ready to run.
pub struct DriverGraph {
    context: Arc<Context>,
    exec: sys::CUgraphExec,
}

// SAFETY: graphs may be launched by any thread.
unsafe impl Send for DriverGraph {}

impl Drop for DriverGraph {
    fn drop(&mut self) {
        self.context.enter();
        // SAFETY: nothing else has the graph. A driver that is shutting down may refuse.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}

/// Page-locked memory of the host.
pub struct Pinned {
    context: Arc<Context>,
    data: *mut u8,
    len: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the driver gave `len` bytes, zeroed since.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl AsMut<[u8]> for Pinned {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_ref`.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.context.enter();
        // SAFETY: the driver's own memory. A driver that is shutting down may refuse.
        unsafe { sys::cuMemFreeHost(self.data.cast()) };
    }
}

impl Driver {
    /// The first device that `table` has kernels for.
    pub fn open(table: &CudaKernelTable) -> Result<Driver, Error> {
        let (driver_version, devices) = match probe() {
            Probe::Devices { driver_version, devices } => (driver_version, devices),
            Probe::NoDriver => {
                return Err(Error::Unsupported(
                    "no NVIDIA driver was found; install one, or run with `--backend cpu`".into(),
                ));
            }
            Probe::Refused(why) => {
                return Err(Error::Unsupported(format!(
                    "the NVIDIA driver refuses to start: {why}; see nvidia-smi, or run with \
                     `--backend cpu`"
                )));
            }
        };
        check_driver(table, driver_version)?;
        let usable = devices.iter().enumerate().find_map(|(ordinal, found)| {
            table.arch_for(found.capability).map(|arch| (ordinal, found, arch))
        });
        let Some((ordinal, found, arch)) = usable else {
            return Err(no_usable_device(table, &devices));
        };
        let info = DeviceInfo {
            name: found.name.clone(),
            arch,
            num_sms: found.num_sms,
            memory_bytes: found.memory_bytes,
        };
        let context = Context::open(ordinal as c_int).map_err(|result| {
            Error::Resources(format!(
                "{} cannot be used: {}; another process may hold it",
                info.name,
                describe(result)
            ))
        })?;
        Ok(Driver {
            kernels: table.load(arch)?,
            info,
            context: Arc::new(context),
            driver_version,
            allocations: Vec::new(),
            last: "nothing yet".to_owned(),
        })
    }

    /// Makes the device's context this thread's.
    fn enter(&self) {
        self.expect("enter its context", self.context.enter());
    }

    /// Whether kernels may start before those before them end.
    fn has_programmatic_launch(&self) -> bool {
        // NOTE: graphs have such edges from CUDA 12.3 on.
        self.info.arch.capability() >= (9, 0) && self.driver_version >= 12030
    }

    fn stream(&self) -> sys::CUstream {
        self.context.stream
    }

    /// Ends the process' use of the device where the driver reports a failure.
    fn expect(&self, what: &str, result: CUresult) {
        assert!(
            result == CUresult::CUDA_SUCCESS,
            "{} failed to {what}: {}; launched last: {}. What the device holds is lost: start the \
             process anew; if it happens again, run `bespoke doctor` and look for Xid messages in \
             the system's log",
            self.info.name,
            describe(result),
            self.last
        );
    }

    fn resources(&self, what: &str, result: CUresult) -> Error {
        Error::Resources(format!(
            "{} cannot {what}: {}; free memory of the device, or choose a smaller batch, context \
             or KV cache",
            self.info.name,
            describe(result)
        ))
    }

    fn load_one(&mut self, variant: &Variant) -> Result<DriverKernel, Error> {
        let loaded = self.kernels.kernel(variant)?;
        let instance = variant.instance();
        let symbol = loaded.symbol.to_owned();
        let name = CString::new(symbol.as_str()).expect("symbols have no zero bytes");
        let mut module = ptr::null_mut();
        // SAFETY: the image is an ELF file of the build, and longer than its headers say nothing;
        // the driver copies it.
        let result = unsafe { sys::cuModuleLoadData(&mut module, loaded.cubin.as_ptr().cast()) };
        check(result).map_err(|result| self.resources(&format!("load {symbol}"), result))?;
        let mut kernel = DriverKernel {
            context: self.context.clone(),
            module,
            function: ptr::null_mut(),
            symbol: symbol.clone(),
            threads: instance.threads as u32,
            shared_bytes: instance.shared_bytes as u32,
        };
        // SAFETY: the module lives as long as the kernel.
        let result =
            unsafe { sys::cuModuleGetFunction(&mut kernel.function, module, name.as_ptr()) };
        check(result).map_err(|result| self.resources(&format!("find {symbol}"), result))?;
        let function = kernel.function;
        let bytes = instance.shared_bytes as c_int;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function lives.
        let result = unsafe { sys::cuFuncSetAttribute(function, attribute, bytes) };
        check(result).map_err(|result| {
            self.resources(&format!("give {symbol} {bytes} bytes of shared memory"), result)
        })?;
        // NOTE: a driver that loads functions when they are first launched must not do so while a
        // stream records.
        if self.driver_version >= 12040 {
            // SAFETY: the function lives.
            let result = unsafe { sys::cuFuncLoad(function) };
            check(result).map_err(|result| self.resources(&format!("load {symbol}"), result))?;
        }
        Ok(kernel)
    }
}

fn check_driver(table: &CudaKernelTable, driver_version: usize) -> Result<(), Error> {
    let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut parts = table.toolkit.split('.');
    let major: usize = number(parts.next());
    // NOTE: machine code of one major version runs on all drivers of that version.
    if driver_version / 1000 >= major {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "the NVIDIA driver knows CUDA {}.{}, and this binary's kernels were made by CUDA {}; \
         install driver {} or later, build with an older toolkit, or run with `--backend cpu`",
        driver_version / 1000,
        driver_version % 1000 / 10,
        table.toolkit,
        driver_release(table.toolkit)
    )))
}

fn no_usable_device(table: &CudaKernelTable, devices: &[Found]) -> Error {
    let archs: Vec<&str> = table.archs().iter().map(|arch| arch.name()).collect();
    let found: Vec<String> = devices
        .iter()
        .map(|found| {
            let (major, minor) = found.capability;
            format!("{} (compute capability {major}.{minor})", found.name)
        })
        .collect();
    let (found, archs) = match (found.is_empty(), archs.is_empty()) {
        (true, _) => ("none is there".to_owned(), archs.join(", ")),
        (_, true) => (found.join(", "), "none".to_owned()),
        _ => (found.join(", "), archs.join(", ")),
    };
    Error::Unsupported(format!(
        "no GPU that this binary has kernels for: found {found}; it has kernels for {archs}; build \
         it with BESPOKE_CUDA_TARGETS naming the GPU's architecture, or run with `--backend cpu`"
    ))
}

impl Device for Driver {
    type Kernel = DriverKernel;
    type Graph = DriverGraph;
    type Host = Pinned;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn serving(&self, spec: &Spec) -> Option<Serving> {
        self.kernels.serving(spec, &self.info.class())
    }

    fn kernels(&self, spec: &Spec) -> Vec<Variant> {
        self.kernels.of_spec(spec)
    }

    fn load(&mut self, variants: &[Variant]) -> Result<Vec<DriverKernel>, Error> {
        self.enter();
        variants.iter().map(|variant| self.load_one(variant)).collect()
    }

    fn free_bytes(&self) -> Result<usize, Error> {
        self.enter();
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        let result = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        check(result).map_err(|result| self.resources("tell its free memory", result))?;
        Ok(free)
    }

    fn alloc(&mut self, len: usize, _: Use, what: &str) -> Result<Address, Error> {
        self.enter();
        let mut address = 0;
        let refuse = |result| self.resources(&format!("hold {len} bytes for {what}"), result);
        // SAFETY: writes one number; the memory is the device's until it is dropped.
        check(unsafe { sys::cuMemAlloc_v2(&mut address, len.max(256)) }).map_err(refuse)?;
        self.allocations.push(address);
        let refuse = |result| self.resources(&format!("hold {len} bytes for {what}"), result);
        // SAFETY: the memory was just given.
        let result = unsafe { sys::cuMemsetD8Async(address, 0, len.max(256), self.stream()) };
        check(result).map_err(refuse)?;
        Ok(Address(address))
    }

    fn alloc_host(&mut self, len: usize) -> Result<Pinned, Error> {
        self.enter();
        let mut data: *mut c_void = ptr::null_mut();
        // SAFETY: writes one address.
        let result = unsafe { sys::cuMemHostAlloc(&mut data, len.max(1), 0) };
        check(result).map_err(|result| {
            self.resources(&format!("lock {len} bytes of the host's memory"), result)
        })?;
        // SAFETY: the driver gave `len` bytes.
        unsafe { ptr::write_bytes(data.cast::<u8>(), 0, len) };
        Ok(Pinned { context: self.context.clone(), data: data.cast(), len })
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.enter();
        // SAFETY: the caller's addresses lie in memory of `alloc`; what is not page-locked is
        // staged before the call returns.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, bytes.as_ptr().cast(), bytes.len(), self.stream())
        };
        self.expect("copy from the host", result);
    }

    fn download(&mut self, from: Address, bytes: &mut [u8]) {
        if !bytes.is_empty() {
            self.enter();
            // SAFETY: as in `upload`; the copy ends before `bytes` is looked at.
            let result = unsafe {
                let to = bytes.as_mut_ptr().cast();
                sys::cuMemcpyDtoHAsync_v2(to, from.0, bytes.len(), self.stream())
            };
            self.expect("copy to the host", result);
        }
        self.synchronize();
    }

    fn copy(&mut self, from: Address, to: Address, len: usize) {
        self.enter();
        // SAFETY: the caller's addresses lie in memory of `alloc`.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, len, self.stream()) };
        self.expect("copy", result);
    }

    fn launch(&mut self, kernel: &DriverKernel, launch: Launch, params: &[u8]) {
        self.last.clear();
        self.last.push_str(&kernel.symbol);
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid_x as u32,
            gridDimY: launch.grid_y as u32,
            gridDimZ: 1,
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.shared_bytes,
            hStream: self.stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(self.has_programmatic_launch()),
        };
        let mut values = [params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the function takes one struct, whose bytes the driver copies.
        let result = unsafe {
            sys::cuLaunchKernelEx(&config, kernel.function, values.as_mut_ptr(), ptr::null_mut())
        };
        self.expect("launch", result);
    }

    fn begin_capture(&mut self) {
        self.enter();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        let result = unsafe { sys::cuStreamBeginCapture_v2(self.stream(), mode) };
        self.expect("record a step", result);
    }

    fn end_capture(&mut self) -> DriverGraph {
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: writes one handle.
        let result = unsafe { sys::cuStreamEndCapture(self.stream(), &mut graph) };
        self.expect("end a recording", result);
        // SAFETY: the graph was just given, and is not used after it was instantiated.
        let result = unsafe {
            let result = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            result
        };
        self.expect("prepare a recording", result);
        DriverGraph { context: self.context.clone(), exec }
    }

    fn replay(&mut self, graph: &DriverGraph) {
        self.enter();
        self.last.clear();
        self.last.push_str("a recorded step");
        // SAFETY: the graph lives.
        self.expect("replay a step", unsafe { sys::cuGraphLaunch(graph.exec, self.stream()) });
    }

    fn synchronize(&mut self) {
        // SAFETY: the stream lives.
        self.expect("finish its work", unsafe { sys::cuStreamSynchronize(self.stream()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the machine has, looking does not panic, and an empty table gives an error.
    #[test]
    fn looking_never_panics() {
        let probe = probe();
        let error = match Driver::open(&CudaKernelTable::default()) {
            Ok(_) => panic!("a device without kernels"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("--backend cpu"), "{probe:?}: {error}");
    }

    #[test]
    fn old_drivers_are_named() {
        let table = CudaKernelTable { toolkit: "13.0.88", ..CudaKernelTable::default() };
        let error = check_driver(&table, 12040).unwrap_err().to_string();
        for part in ["12.4", "13.0.88", "580"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(check_driver(&table, 13000).is_ok());
        let table = CudaKernelTable { toolkit: "12.8.93", ..CudaKernelTable::default() };
        assert!(check_driver(&table, 12040).is_ok());
    }
}
