//! The daemon's command line as typed: beside the one of `soci`, the only place that knows clap.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand, ValueEnum};

/// Where containerd's configuration looks for the daemon.
pub const ADDRESS: &str = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock";

/// The release, as it is shown.
pub const RELEASE: &str = concat!("v", env!("CARGO_PKG_VERSION"));
/// The revision of the sources, if `SOCI_REVISION` was set at build time.
pub const REVISION: &str = match option_env!("SOCI_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// containerd snapshotter that starts containers without downloading their images.
#[derive(Debug, Parser)]
#[command(name = "soci-snapshotter-grpc", version = version(), max_term_width = 110)]
pub struct Arguments {
    /// Where to listen: a path, unix://PATH, or fd:// for the socket that systemd passes
    #[arg(long, env = "SOCI_SNAPSHOTTER_ADDRESS", value_name = "ADDRESS", default_value = ADDRESS)]
    pub address: Address,
    /// Configuration file; may be missing unless it is named here
    #[arg(long, env = "SOCI_SNAPSHOTTER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to log: this level and the graver ones
    #[arg(long, env = "SOCI_SNAPSHOTTER_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub log_level: Level,
    /// Directory of everything that is kept
    #[arg(long, env = "SOCI_SNAPSHOTTER_ROOT", value_name = "DIR", default_value = "/var/lib/soci-snapshotter-grpc/")]
    pub root: PathBuf,
    /// Be a worker of the supervisor that started this process.
    #[arg(long, hide = true)]
    pub worker: bool,
    /// Something else than serving.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the program does besides serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the configuration
    Config {
        /// Which.
        #[command(subcommand)]
        what: ConfigCommand,
    },
}

/// Which configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum ConfigCommand {
    /// The one that holds where no file says otherwise
    Default,
    /// The one in effect: the default and what the file says
    Dump,
}

/// Where the daemon listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// On a socket of its own.
    Path(PathBuf),
    /// On the socket that it was started with.
    Inherited,
}

impl FromStr for Address {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        if text == "fd://" {
            return Ok(Self::Inherited);
        }
        Ok(Self::Path(text.strip_prefix("unix://").unwrap_or(text).into()))
    }
}

/// How grave a line of the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Everything.
    Trace,
    /// Steps of the work.
    Debug,
    /// What an operator may want to know.
    Info,
    /// What may be wrong.
    Warn,
    /// What is wrong.
    Error,
    /// What ends the program.
    Fatal,
    /// The same.
    Panic,
}

impl Level {
    /// As it is written on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
            Self::Fatal => "fatal",
            Self::Panic => "panic",
        }
    }

    /// At least the steps of the work.
    #[must_use]
    pub const fn or_debug(self) -> Self {
        match self {
            Self::Trace => Self::Trace,
            Self::Debug | Self::Info | Self::Warn | Self::Error | Self::Fatal | Self::Panic => Self::Debug,
        }
    }
}

fn version() -> &'static str {
    static TEXT: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| format!("version {RELEASE} {REVISION}"));
    &TEXT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, address) in [
            ("/run/s.sock", Address::Path("/run/s.sock".into())),
            ("unix:///run/s.sock", Address::Path("/run/s.sock".into())),
            ("fd://", Address::Inherited),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
    }

    #[test]
    fn defaults_are_those_of_the_daemon_that_is_replaced() {
        let arguments = Arguments::try_parse_from(["soci-snapshotter-grpc"]).unwrap();
        assert_eq!(arguments.address, Address::Path(ADDRESS.into()));
        assert_eq!(arguments.root, PathBuf::from("/var/lib/soci-snapshotter-grpc/"));
        assert_eq!((arguments.config, arguments.log_level), (None, Level::Info));
    }
}
