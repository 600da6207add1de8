//! Device memory and launches.

use std::ffi::{CStr, c_char};

use libloading::os::unix::Symbol;

use crate::compiler::{CompileError, KernelEntry, Library, runtime};
use crate::report::{Fault, FaultKind, Report, SharedAccesses};

/// What kernels may do with an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Access {
    /// Read it at any time: weights, and tables that no kernel writes.
    Constant,
    /// Read it after `grid_wait`: what an earlier kernel or copy wrote.
    ReadOnly,
    /// Read and write it after `grid_wait`.
    ReadWrite,
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub grid: [u32; 2],
    /// Threads of a block.
    pub block: u32,
    pub shared_bytes: u32,
}

/// A device: memory, and the seed of all orders.
pub struct Emulator {
    functions: Functions,
    state: *mut State,
}

// SAFETY: the state belongs to its `Emulator` alone; fibers live inside one call of `launch`.
unsafe impl Send for Emulator {}

/// The C++ side's; never looked into.
enum State {}

#[repr(C)]
struct Request {
    symbol: *const c_char,
    kernel: *const KernelEntry,
    params: *const u8,
    grid_x: u32,
    grid_y: u32,
    num_threads: u32,
    shared_bytes: u32,
}

#[repr(C)]
struct RawAccesses {
    file: *const c_char,
    line: u32,
    num_passes: u64,
    num_passes_min: u64,
}

#[repr(C)]
struct RawReport {
    fault: u32,
    grid_waited: u32,
    message: *const c_char,
    accesses: *const RawAccesses,
    num_accesses: u64,
    num_mma: u64,
}

struct Functions {
    new: Symbol<unsafe extern "C" fn(u64) -> *mut State>,
    delete: Symbol<unsafe extern "C" fn(*mut State)>,
    alloc: Symbol<unsafe extern "C" fn(*mut State, u64, u32) -> u64>,
    write: Symbol<unsafe extern "C" fn(*mut State, u64, *const u8, u64) -> bool>,
    read: Symbol<unsafe extern "C" fn(*mut State, u64, *mut u8, u64) -> u64>,
    poison: Symbol<unsafe extern "C" fn(*mut State, u64, u64) -> bool>,
    free: Symbol<unsafe extern "C" fn(*mut State, u64) -> bool>,
    launch: Symbol<unsafe extern "C" fn(*mut State, *const Request, *mut RawReport)>,
}

impl Functions {
    fn load() -> Result<Functions, CompileError> {
        let library = runtime()?;
        // SAFETY: emulator.cpp defines each with this type.
        let functions = unsafe {
            let missing = "emulator.cpp defines its functions";
            Functions {
                new: library.get(b"emulator_new\0").expect(missing),
                delete: library.get(b"emulator_delete\0").expect(missing),
                alloc: library.get(b"emulator_alloc\0").expect(missing),
                write: library.get(b"emulator_write\0").expect(missing),
                read: library.get(b"emulator_read\0").expect(missing),
                poison: library.get(b"emulator_poison\0").expect(missing),
                free: library.get(b"emulator_free\0").expect(missing),
                launch: library.get(b"emulator_launch\0").expect(missing),
            }
        };
        Ok(functions)
    }
}

impl Emulator {
    /// A device without memory in use.
    ///
    /// # Errors
    /// The emulator could not be compiled: there is no C++ compiler.
    pub fn new(seed: u64) -> Result<Emulator, CompileError> {
        let functions = Functions::load()?;
        // SAFETY: no condition.
        let state = unsafe { (functions.new)(seed) };
        Ok(Emulator { functions, state })
    }

    /// The address of `num_bytes` uninitialized bytes, aligned to 2³⁹.
    pub fn alloc(&mut self, num_bytes: usize, access: Access) -> u64 {
        // SAFETY: `state` lives.
        unsafe { (self.functions.alloc)(self.state, num_bytes as u64, access as u32) }
    }

    /// An allocation that holds `bytes`.
    pub fn upload(&mut self, bytes: &[u8], access: Access) -> u64 {
        let address = self.alloc(bytes.len(), access);
        self.write(address, bytes);
        address
    }

    /// Copies `bytes` to `address`.
    ///
    /// # Panics
    /// The bytes do not lie in one allocation.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        let (from, size) = (bytes.as_ptr(), bytes.len() as u64);
        // SAFETY: `state` lives, `bytes` holds `size` bytes.
        let written = unsafe { (self.functions.write)(self.state, address, from, size) };
        assert!(written, "{size} bytes at {address:#x} do not lie in one allocation");
    }

    /// Copies `size` bytes from `address`.
    ///
    /// # Errors
    /// A byte that is in no allocation, or that nothing wrote.
    pub fn read(&self, address: u64, size: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; size];
        let to = bytes.as_mut_ptr();
        // SAFETY: `state` lives, `bytes` holds `size` bytes.
        let read = unsafe { (self.functions.read)(self.state, address, to, size as u64) };
        if read == size as u64 {
            return Ok(bytes);
        }
        let message = format!("byte {read} of {size} at {address:#x} was never written");
        Err(Fault { kind: FaultKind::Uninitialized, message })
    }

    /// Makes bytes uninitialized again.
    ///
    /// # Panics
    /// The bytes do not lie in one allocation.
    pub fn poison(&mut self, address: u64, size: usize) {
        // SAFETY: `state` lives.
        let poisoned = unsafe { (self.functions.poison)(self.state, address, size as u64) };
        assert!(poisoned, "{size} bytes at {address:#x} do not lie in one allocation");
    }

    /// Gives an allocation back; using its address is a fault from now on.
    ///
    /// # Panics
    /// There is no such allocation.
    pub fn free(&mut self, address: u64) {
        // SAFETY: `state` lives.
        let freed = unsafe { (self.functions.free)(self.state, address) };
        assert!(freed, "{address:#x} is no allocation");
    }

    /// Runs a kernel to its end, or to the first rule it breaks.
    ///
    /// # Errors
    /// That rule, or what is wrong with the launch.
    pub fn launch(
        &mut self,
        library: &Library,
        symbol: &str,
        launch: Launch,
        params: &[u8],
    ) -> Result<Report, Fault> {
        let kernel = library.kernel(symbol).ok_or_else(|| refused(symbol, "is not compiled"))?;
        check(symbol, kernel.entry, launch, params)?;
        // NOTE: the struct of parameters wants its alignment.
        let mut aligned = vec![0_u64; params.len().div_ceil(8)];
        for (word, bytes) in aligned.iter_mut().zip(params.chunks(8)) {
            let mut eight = [0; 8];
            eight[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(eight);
        }
        let request = Request {
            symbol: kernel.symbol.as_ptr(),
            kernel: kernel.entry,
            params: aligned.as_ptr().cast(),
            grid_x: launch.grid[0],
            grid_y: launch.grid[1],
            num_threads: launch.block,
            shared_bytes: launch.shared_bytes,
        };
        let mut raw = std::mem::MaybeUninit::<RawReport>::uninit();
        // SAFETY: `state` lives; the request is checked, and the report is written.
        let raw = unsafe {
            (self.functions.launch)(self.state, &request, raw.as_mut_ptr());
            raw.assume_init()
        };
        report(&raw)
    }
}

fn refused(symbol: &str, why: &str) -> Fault {
    Fault { kind: FaultKind::Launch, message: format!("kernel {symbol} {why}") }
}

/// As the driver does.
fn check(symbol: &str, kernel: &KernelEntry, launch: Launch, params: &[u8]) -> Result<(), Fault> {
    const SHARED_BYTES_MAX: u32 = 227 * 1024;
    let Launch { grid, block, shared_bytes } = launch;
    let why = if params.len() != kernel.num_param_bytes as usize {
        format!("takes {} bytes of parameters, not {}", kernel.num_param_bytes, params.len())
    } else if block == 0 || block % 32 != 0 || block > 1024 || block > kernel.num_threads {
        format!("cannot run with {block} threads; it is made for {}", kernel.num_threads)
    } else if grid.contains(&0) || grid[1] > 65535 {
        format!("cannot run in a grid of {} by {} blocks", grid[0], grid[1])
    } else if shared_bytes > SHARED_BYTES_MAX {
        format!("asks for {shared_bytes} bytes of shared memory of {SHARED_BYTES_MAX}")
    } else {
        return Ok(());
    };
    Err(refused(symbol, &why))
}

fn report(raw: &RawReport) -> Result<Report, Fault> {
    if let Some(kind) = FaultKind::from_number(raw.fault) {
        // SAFETY: a string of the C++ side until the next launch.
        let message = unsafe { CStr::from_ptr(raw.message) }.to_string_lossy().into_owned();
        return Err(Fault { kind, message });
    }
    let accesses = if raw.num_accesses == 0 {
        &[]
    } else {
        // SAFETY: an array of the C++ side until the next launch.
        unsafe { std::slice::from_raw_parts(raw.accesses, raw.num_accesses as usize) }
    };
    let shared = accesses.iter().map(|a| SharedAccesses {
        // SAFETY: a string inside the kernel's library, which stays loaded.
        file: unsafe { CStr::from_ptr(a.file) }.to_string_lossy().into_owned(),
        line: a.line,
        num_passes: a.num_passes,
        num_passes_min: a.num_passes_min,
    });
    let shared = shared.collect();
    Ok(Report { shared, num_mma: raw.num_mma, grid_waited: raw.grid_waited != 0 })
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // SAFETY: the last use of `state`.
        unsafe { (self.functions.delete)(self.state) };
    }
}
