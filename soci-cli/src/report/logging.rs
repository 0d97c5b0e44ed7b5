//! Messages for interactive use: plain lines on standard error, never on standard output.

use std::io::IsTerminal;

use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Begins logging: our own notes and others' warnings, or what `--debug` or `asked` (of `SOCI_LOG`) asks for.
///
/// Filters are by level and target only: those that also look at fields need regular expressions, and to compile these
/// took a sixth of the time that a mount takes.
pub fn start(debug: bool, asked: Option<String>) {
    let ours = if debug { "debug" } else { "info" };
    // The FUSE library warns of every unmount that was done before it.
    let default = format!("warn,fuser=error,soci_index={ours},soci_fs={ours},soci_cli={ours}");
    let asked = asked.and_then(|text| text.parse::<Targets>().ok());
    let filter = asked.or_else(|| default.parse().ok()).unwrap_or_default();
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(colours);
    let lines = if debug { lines.boxed() } else { lines.without_time().boxed() };
    // A second start in one process (tests) changes nothing.
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
}
