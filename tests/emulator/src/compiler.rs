//! Kernel sources → loaded libraries, with a cache of what was compiled before.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::{env, fs, io, process, thread};

use bespoke_kernel_gen::cuda::Variant;
use bespoke_kernel_gen::cuda::render::render_with;
use bespoke_kernel_gen::cuda::templates::Template;
use libloading::os::unix::{self, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

/// One kernel: its entry's name and the text that defines it with `KERNEL`.
///
/// Quoted includes are looked for in the emulator, in `templates/common` and in `templates`, in
/// this order; nothing of the real `ptx.cuh` is left. Sources with the same text are compiled
/// once, so a text may define several kernels.
#[derive(Clone, Debug)]
pub struct Source {
    pub symbol: String,
    pub text: String,
}

impl Source {
    #[must_use]
    pub fn new(symbol: impl Into<String>, text: impl Into<String>) -> Source {
        Source { symbol: symbol.into(), text: text.into() }
    }

    /// The kernel that the generator makes of `variant`, with the emulator's `ptx.cuh`.
    ///
    /// # Errors
    /// What `render` says; the emulator's files cannot be read.
    pub fn of(variant: &Variant) -> Result<Source, CompileError> {
        let text = flatten("ptx", "#include \"ptx.cuh\"\n").map_err(CompileError)?;
        let ptx = Template { path: "emulator/ptx.cuh", text: &text };
        let source = render_with(variant, Some(ptx)).map_err(|e| CompileError(e.to_string()))?;
        Ok(Source { symbol: source.symbol, text: source.text })
    }
}

/// Why there is no library, with the compiler's words.
#[derive(Debug)]
pub struct CompileError(String);

impl fmt::Display for CompileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CompileError {}

/// Compiled kernels by name. Libraries stay loaded until the process ends.
#[derive(Debug, Default)]
pub struct Library {
    kernels: BTreeMap<String, Kernel>,
}

/// What an emulated library says of its kernel (`emulator::Kernel` in C++).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct KernelEntry {
    run: unsafe extern "C" fn(*const u8),
    pub(crate) num_param_bytes: u32,
    pub(crate) num_threads: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) symbol: CString,
    pub(crate) entry: &'static KernelEntry,
}

impl Library {
    pub(crate) fn kernel(&self, symbol: &str) -> Option<&Kernel> {
        self.kernels.get(symbol)
    }

    /// The names of its kernels, sorted.
    pub fn symbols(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }
}

/// Compiles what the cache does not hold, a few at a time, and loads all.
///
/// # Errors
/// No C++ compiler, a missing include, the compiler's messages, or a source that does not define
/// its symbol.
pub fn compile(sources: &[Source]) -> Result<Library, CompileError> {
    runtime()?;
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<Kernel>, CompileError> {
        let mut kernels = Vec::new();
        while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            kernels.push(load_kernel(source)?);
        }
        Ok(kernels)
    };
    let num_threads = thread::available_parallelism().map_or(1, |n| n.get()).min(sources.len());
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|t| t.join().expect("compiling does not panic")).collect()
    });
    let mut library = Library::default();
    for kernels in results {
        for kernel in kernels? {
            let symbol = kernel.symbol.to_string_lossy().into_owned();
            library.kernels.insert(symbol, kernel);
        }
    }
    Ok(library)
}

fn load_kernel(source: &Source) -> Result<Kernel, CompileError> {
    let failed = |why: String| CompileError(format!("kernel {}: {why}", source.symbol));
    let text = flatten("source", &source.text).map_err(failed)?;
    let path = build_once(&text, "-O2").map_err(failed)?;
    let symbol = CString::new(source.symbol.as_str())
        .map_err(|_| failed("a name with a zero byte".to_string()))?;
    // SAFETY: our own library, which runs nothing when it is loaded.
    let loaded = unsafe { unix::Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
    let library = loaded.map_err(|e| failed(format!("{} does not load: {e}", path.display())))?;
    // SAFETY: `KERNEL` defines a function of this type.
    let entry = unsafe {
        library
            .get::<unsafe extern "C" fn() -> *const KernelEntry>(symbol.as_bytes_with_nul())
            .map_err(|e| failed(format!("not defined by its source: {e}")))
            .map(|function| &*function())?
    };
    // NOTE: places in the source are strings inside it.
    std::mem::forget(library);
    Ok(Kernel { symbol, entry })
}

/// The emulator itself, compiled once. Its symbols are there for all kernels.
pub(crate) fn runtime() -> Result<&'static unix::Library, CompileError> {
    static RUNTIME: OnceLock<Result<unix::Library, String>> = OnceLock::new();
    let load = || {
        let text = flatten("emulator", "#include \"emulator.cpp\"\n")?;
        let path = build_once(&text, "-O3")?;
        // SAFETY: our own library, which runs nothing when it is loaded.
        unsafe { unix::Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }
            .map_err(|e| format!("{} does not load: {e}", path.display()))
    };
    RUNTIME.get_or_init(load).as_ref().map_err(|e| CompileError(format!("the emulator: {e}")))
}

// --- one text from many files ---

fn include_folders() -> [PathBuf; 3] {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let templates = package.join("../../templates");
    [package.join("cuda"), templates.join("common"), templates]
}

/// `text` with each quoted include replaced by its file, once, and `#line` around it.
fn flatten(name: &str, text: &str) -> Result<String, String> {
    let mut flat = String::new();
    append(&mut flat, name, text, &mut BTreeSet::new())?;
    Ok(flat)
}

fn append(
    flat: &mut String,
    name: &str,
    text: &str,
    seen: &mut BTreeSet<String>,
) -> Result<(), String> {
    let _ = writeln!(flat, "#line 1 \"{name}\"");
    for (i, line) in text.lines().enumerate() {
        let included = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match included {
            Some(file) => {
                if seen.insert(file.to_string()) {
                    append(flat, file, &read_include(file, name)?, seen)?;
                    let _ = writeln!(flat, "#line {} \"{name}\"", i + 2);
                } else {
                    flat.push('\n');
                }
            }
            None if line == "#pragma once" => flat.push('\n'),
            None => {
                flat.push_str(line);
                flat.push('\n');
            }
        }
    }
    Ok(())
}

fn read_include(file: &str, from: &str) -> Result<String, String> {
    let mut found = include_folders().into_iter().map(|folder| folder.join(file));
    let path = found
        .find(|path| path.is_file())
        .ok_or_else(|| format!("{from} includes \"{file}\", which is in no include folder"))?;
    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
}

// --- the compiler ---

struct Compiler {
    path: PathBuf,
    version: Vec<u8>,
}

/// What the cc crate finds: `CXX`, or the system's.
fn compiler() -> Result<&'static Compiler, String> {
    static COMPILER: OnceLock<Result<Compiler, String>> = OnceLock::new();
    let find = || {
        let host = format!("{}-unknown-linux-gnu", env::consts::ARCH);
        let tool = cc::Build::new()
            .cpp(true)
            .cargo_metadata(false)
            .opt_level(2)
            .host(&host)
            .target(&host)
            .try_get_compiler()
            .map_err(|e| format!("no C++ compiler: {e}; install g++ or set CXX"))?;
        let path = tool.path().to_path_buf();
        let version = Command::new(&path).arg("--version").output();
        let version =
            version.map_err(|e| format!("{}: {e}; install g++ or set CXX", path.display()))?.stdout;
        Ok(Compiler { path, version })
    };
    COMPILER.get_or_init(find).as_ref().map_err(Clone::clone)
}

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fno-strict-aliasing",
    // The results depend on no instruction set.
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unused",
    "-Wno-unknown-pragmas",
];

fn machine_flags() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        return &["-mavx2", "-mfma", "-mf16c"];
    }
    &[]
}

/// As `build`; threads of this process that want the same wait for one compiler.
fn build_once(text: &str, optimization: &str) -> Result<PathBuf, String> {
    type Built = Arc<OnceLock<Result<PathBuf, String>>>;
    static BUILT: Mutex<BTreeMap<[u8; 32], Built>> = Mutex::new(BTreeMap::new());
    let hash = *blake3::hash(text.as_bytes()).as_bytes();
    let built =
        BUILT.lock().expect("nothing panics with the lock").entry(hash).or_default().clone();
    built.get_or_init(|| build(text, optimization)).clone()
}

/// The library of `text`, from the cache or compiled.
fn build(text: &str, optimization: &str) -> Result<PathBuf, String> {
    let compiler = compiler()?;
    let mut flags = vec![optimization];
    flags.extend_from_slice(FLAGS);
    flags.extend_from_slice(machine_flags());
    let mut hasher = blake3::Hasher::new();
    for part in [flags.join(" ").as_bytes(), &compiler.version, text.as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let hash = hasher.finalize().to_hex();
    let folder = cache_folder().map_err(|e| format!("the cache folder: {e}"))?;
    let library = folder.join(format!("{}.so", &hash[..32]));
    if library.is_file() {
        return Ok(library);
    }
    // NOTE: others may compile the same; each works on its own files, and the last rename wins.
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let unique = format!("{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let source = folder.join(format!("{}.{unique}.cpp", &hash[..32]));
    let output = folder.join(format!("{}.{unique}.so", &hash[..32]));
    fs::write(&source, text).map_err(|e| format!("{}: {e}", source.display()))?;
    let mut command = Command::new(&compiler.path);
    command.args(&flags).arg("-o").arg(&output).arg(&source);
    let result = command.output();
    let _ = fs::remove_file(&source);
    let result = result.map_err(|e| format!("{}: {e}", compiler.path.display()))?;
    if !result.status.success() {
        let _ = fs::remove_file(&output);
        return Err(String::from_utf8_lossy(&result.stderr).into_owned());
    }
    fs::rename(&output, &library).map_err(|e| format!("{}: {e}", library.display()))?;
    Ok(library)
}

/// `emulator` in the target folder that the running program lies in, else a temporary folder.
fn cache_folder() -> io::Result<PathBuf> {
    let program = env::current_exe()?;
    // target/<profile>/deps/<test>, or target/<profile>/<program>
    let mut folder = program.parent();
    if folder.is_some_and(|f| f.ends_with("deps")) {
        folder = folder.and_then(Path::parent);
    }
    let base = folder.and_then(Path::parent).map_or_else(env::temp_dir, Path::to_path_buf);
    let cache = base.join("emulator");
    fs::create_dir_all(&cache)?;
    Ok(cache)
}
