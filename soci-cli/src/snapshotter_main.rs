//! The `soci-snapshotter-grpc` binary: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser as _;
use soci_cli::daemon::{self, args::Arguments, log};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match daemon::run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::fatal(&error);
            ExitCode::FAILURE
        }
    }
}
