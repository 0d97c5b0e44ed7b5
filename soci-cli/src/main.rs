//! The `soci` binary: parse, run, exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use soci_cli::args::Arguments;
use soci_cli::args::config::log_filter;
use soci_cli::report::exit;
use soci_cli::report::logging;
use soci_cli::report::output;
use soci_cli::run;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    logging::start(arguments.global.debug || arguments.command.shows_requests(), log_filter());
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(reported) = error.downcast_ref::<exit::Reported>() {
                return reported.code.into();
            }
            // With standard error closed the message has no destination.
            let _ = writeln!(std::io::stderr(), "soci: {}", output::clean(&exit::message(&error)));
            exit::code(&error).into()
        }
    }
}
