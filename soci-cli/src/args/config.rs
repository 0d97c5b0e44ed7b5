//! What the environment says: homes, variables, terminals. The only file that reads it.

use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::Context;

use soci_fs::layer::private::{ensure_private_root, set_umask};

use crate::args::Global;
use crate::report::exit::{Exit, fail};

/// Where things are kept.
#[derive(Debug, Clone)]
pub struct Config {
    /// The root of everything below.
    pub root: PathBuf,
    /// Whether it was named, by `--root` or `SOCI_ROOT`.
    pub root_is_named: bool,
}

/// What a root has in it, one at least.
const OURS: [&str; 5] = ["content", "layers", "profiles", "snapshotter", "webhook"];

impl Config {
    /// Works out the directories.
    ///
    /// # Errors
    /// When an ordinary user has no home and named no root.
    pub fn new(global: &Global) -> anyhow::Result<Self> {
        let root = match &global.root {
            Some(root) => root.clone(),
            None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib/soci-snapshotter-grpc"),
            None => data_home()
                .context("no home directory is known: set HOME, or name a directory with --root")?
                .join("soci"),
        };
        Ok(Self { root, root_is_named: global.root.is_some() })
    }

    /// Refuses a root that holds something and nothing of ours, and mentions one that is not there: what is listed of
    /// either is empty, which looks like an answer. Where no root was named, nothing was kept yet.
    ///
    /// # Errors
    /// When it is a directory of something else, or no directory.
    pub fn check_listed(&self) -> anyhow::Result<()> {
        let shown = self.root.display();
        let mut entries = match std::fs::read_dir(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if self.root_is_named {
                    tracing::warn!("{shown} does not exist, so nothing is kept there: is --root right?");
                }
                return Ok(());
            }
            entries => entries.with_context(|| format!("reading {shown}"))?,
        };
        let is_ours = OURS.iter().any(|name| self.root.join(name).exists());
        if is_ours || entries.next().is_none() {
            return Ok(());
        }
        Err(fail(Exit::Usage, format!("{shown} is no root of soci's: it has none of {}", OURS.join(", "))))
    }

    /// Makes the root, and all that this process makes from now on, this user's alone. For every command that keeps
    /// something below the root; what it writes elsewhere for others has its mode set.
    ///
    /// # Errors
    /// When the root belongs to another user, or cannot be kept from others.
    pub fn keep_private(&self) -> anyhow::Result<()> {
        set_umask();
        ensure_private_root(&self.root)?;
        Ok(())
    }

    /// The index store, an OCI layout directory.
    #[must_use]
    pub fn index_store(&self) -> PathBuf {
        self.root.join("content")
    }

    /// What this machine remembers of start-ups.
    #[must_use]
    pub fn profiles(&self) -> PathBuf {
        self.root.join("profiles")
    }

    /// The layer stores of mounted images.
    #[must_use]
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }
}

fn data_home() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")))
}

/// What `SOCI_LOG` asks to see.
#[must_use]
pub fn log_filter() -> Option<String> {
    std::env::var("SOCI_LOG").ok()
}

/// When things are said to be made, in seconds since 1970, where builds are to be reproducible.
#[must_use]
pub fn source_date() -> Option<i64> {
    std::env::var("SOURCE_DATE_EPOCH").ok()?.parse().ok()
}

/// The file of this program, to start it again.
///
/// # Errors
/// If the system does not name it.
pub fn own_program() -> std::io::Result<PathBuf> {
    std::env::current_exe()
}

/// The directories in which programs are looked for.
#[must_use]
pub fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&path).collect()
}
