//! The command line.

use std::io::{self, IsTerminal, Write as _};
use std::panic;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bespoke::Error;
use bespoke::bundle::Bundle;
use bespoke::cli::{self, Console, Exit};
use bespoke::kernels::generated;
use bespoke::tokenizer;

/// Set for a program that `bespoke build` appends a model to, which then has to be there.
const IS_BUNDLE: bool = option_env!("BESPOKE_BUNDLE").is_some();

fn main() -> ExitCode {
    let (start, before_main) = (Instant::now(), process_time());
    // A contained panic is reported as an error by whoever contains it.
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !tokenizer::is_contained() {
            report(info);
        }
    }));
    let program = program();
    let bundle = match bundle(program.as_deref()) {
        Ok(bundle) => bundle.map(Arc::new),
        Err(error) => {
            // Nobody could be told that it cannot be written.
            let _ = writeln!(io::stderr(), "error: {error}");
            return Exit::Failed.into();
        }
    };
    let mut console = Console {
        out: &mut io::stdout(),
        err: &mut io::stderr(),
        is_terminal: io::stderr().is_terminal(),
        kernels: generated::table(),
        home: None,
        program,
        bundle,
        start,
        before_main,
    };
    cli::run(std::env::args_os(), &mut console).into()
}

/// This program's file. Where the system does not tell, as without /proc, it is where the program
/// was called from.
fn program() -> Option<PathBuf> {
    if let Ok(path) = std::env::current_exe() {
        return Some(path);
    }
    let called = PathBuf::from(std::env::args_os().next()?);
    if called.components().count() > 1 {
        return Some(called);
    }
    let folders = std::env::var_os("PATH")?;
    std::env::split_paths(&folders).map(|folder| folder.join(&called)).find(|path| path.is_file())
}

/// The model that this program brings.
fn bundle(program: Option<&Path>) -> Result<Option<Bundle>, Error> {
    let Some(program) = program.filter(|_| IS_BUNDLE) else { return Ok(None) };
    let bundle = Bundle::open(program)?;
    // The build packs the weights with the program before it has a model.
    let is_being_built = std::env::args_os()
        .nth(1)
        .is_some_and(|name| BUILDING.iter().any(|building| name == *building));
    match bundle {
        None if !is_being_built => Err(Error::model(
            program,
            "the model that this program should bring is missing: the file is truncated; get or \
             build it anew",
        )),
        bundle => Ok(bundle),
    }
}

/// Commands that `bespoke build` runs.
const BUILDING: [&str; 2] = ["kernels", "pack-weights"];

/// Processor time of this process up to now.
fn process_time() -> Option<Duration> {
    #[cfg(unix)]
    {
        use rustix::time::{ClockId, clock_gettime};
        let time = clock_gettime(ClockId::ProcessCPUTime);
        let (seconds, nanoseconds) = (time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?);
        Some(Duration::new(seconds, nanoseconds))
    }
    #[cfg(not(unix))]
    None
}
