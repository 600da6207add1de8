//! `bespoke` with the kernels that `BESPOKE_TEST_KERNELS` names: `planted`, `hanging`, `sound`; or
//! a build script, where there are none.

use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::time::Instant;

use bespoke::cli::{self, Console};
use bespoke_tuning_tests::planted::{self, Fault};

fn main() -> ExitCode {
    let kernels = match std::env::var("BESPOKE_TEST_KERNELS").as_deref() {
        Ok("planted") => planted::kernels(),
        Ok("hanging") => planted::hanging(),
        Ok("sound") => planted::table(&[Fault::None]),
        _ => {
            bespoke_kernel_gen::cargo::build();
            return ExitCode::SUCCESS;
        }
    };
    let mut console = Console {
        out: &mut io::stdout(),
        err: &mut io::stderr(),
        is_terminal: io::stderr().is_terminal(),
        kernels,
        home: None,
        program: std::env::current_exe().ok(),
        bundle: None,
        start: Instant::now(),
        before_main: None,
    };
    cli::run(std::env::args_os(), &mut console).into()
}
