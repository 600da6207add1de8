//! The command line.

use std::io::{self, IsTerminal};
use std::panic;
use std::process::ExitCode;

use bespoke::cli::{self, Console};
use bespoke::kernels::generated;
use bespoke::tokenizer;

fn main() -> ExitCode {
    // A contained panic is reported as an error by whoever contains it.
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !tokenizer::is_contained() {
            report(info);
        }
    }));
    let mut console = Console {
        out: &mut io::stdout(),
        err: &mut io::stderr(),
        is_terminal: io::stderr().is_terminal(),
        kernels: generated::table(),
        home: None,
        program: std::env::current_exe().ok(),
    };
    cli::run(std::env::args_os(), &mut console).into()
}
