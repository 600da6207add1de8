//! The process that verifies kernels, each of which may crash it.

use std::cell::RefCell;
use std::io;

use anyhow::Context as _;

use super::{Args, Console};
use crate::error::Error;
use crate::tune::isolation::Line;
use crate::tune::{Begin, TakeVerdict};

/// Prints what `verify` begins and what comes out, a line each, for whoever started the process.
pub(super) fn run(
    args: &Args,
    console: &mut Console<'_>,
    verify: impl FnOnce(&mut Begin<'_>, &mut TakeVerdict<'_>) -> Result<(), Error>,
) -> anyhow::Result<()> {
    if args.end_with_input {
        end_with_input()?;
    }
    let out = RefCell::new(console);
    let print = |line: &Line| {
        let printed = out.borrow_mut().print_json(line);
        printed.map_err(|error| Error::Resources(error.to_string()))
    };
    verify(&mut |symbol| print(&Line::Begin(symbol.to_owned())), &mut |symbol, verdict| {
        let symbol = symbol.to_owned();
        print(&match verdict {
            Ok(levels) => Line::Passed(symbol, levels),
            Err(failure) => Line::Failed(symbol, failure),
        })
    })?;
    Ok(())
}

/// Ends the process at the end of its standard input, which whoever waits for it holds open.
fn end_with_input() -> anyhow::Result<()> {
    let wait = || {
        // NOTE: nobody waits any more, whatever this says.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        std::process::exit(1);
    };
    std::thread::Builder::new().name("input".to_owned()).spawn(wait).context("cannot wait")?;
    Ok(())
}
