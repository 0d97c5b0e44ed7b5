//! A machine for one start: containerd 2.2 and one snapshotter, with all they keep in a directory that goes with it.
//!
//! Their daemons get the configuration of their makers but for fetching in the background, which is off in all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use soci_tests::node::unmount_below;
use tempfile::TempDir;

use crate::process::soci_path;

/// How long a daemon may take to serve.
const PATIENCE: Duration = Duration::from_secs(20);

/// Programs that were built from Go.
#[derive(Debug)]
pub(crate) struct Programs {
    /// The directory with containerd's.
    pub(crate) containerd: PathBuf,
    /// AWS's daemon.
    pub(crate) aws: PathBuf,
    /// stargz's daemon and converter.
    pub(crate) stargz: PathBuf,
}

impl Programs {
    /// Where containerd and its client find each other before those that are installed.
    pub(crate) fn search_path(&self) -> anyhow::Result<OsString> {
        let rest = std::env::var_os("PATH").unwrap_or_default();
        Ok(std::env::join_paths([self.containerd.clone()].into_iter().chain(std::env::split_paths(&rest)))?)
    }
}

/// A snapshotter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// containerd's own.
    Overlayfs,
    /// AWS's.
    Aws,
    /// stargz-snapshotter.
    Stargz,
    /// Ours.
    Soci,
    /// Ours, with a published profile of the start.
    Profile,
    /// The same, with a pack.
    Pack,
    /// Ours, which then answers for all names itself.
    Fuse,
    /// The same, with a pack.
    FusePack,
}

impl Kind {
    /// Those that are compared with others', in the order of their turns.
    pub(crate) const ALL: [Self; 6] = [Self::Overlayfs, Self::Aws, Self::Stargz, Self::Soci, Self::Profile, Self::Pack];

    /// Its name in containerd.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Aws => "aws",
            Self::Stargz => "stargz",
            Self::Soci | Self::Profile | Self::Pack | Self::Fuse | Self::FusePack => "soci",
        }
    }

    /// Its name in tables and pictures.
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Overlayfs | Self::Aws | Self::Stargz | Self::Soci => self.name(),
            Self::Profile => "soci, profile",
            Self::Pack => "soci, pack",
            Self::Fuse => "soci, names by FUSE",
            Self::FusePack => "soci, pack, names by FUSE",
        }
    }

    /// The tag of the image that it reads.
    pub(crate) const fn tag(self) -> &'static str {
        match self {
            Self::Overlayfs | Self::Soci | Self::Profile | Self::Pack | Self::Fuse | Self::FusePack => "latest",
            Self::Aws => "v2",
            Self::Stargz => "esgz",
        }
    }
}

/// The processes. They end when it is dropped.
#[derive(Debug)]
pub(crate) struct Machine {
    children: Vec<Child>,
    directory: TempDir,
}

impl Machine {
    /// Starts one, and waits until containerd answers for the snapshotter.
    pub(crate) fn start(kind: Kind, programs: &Programs) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("soci-bench-cold-").tempdir()?;
        let mut machine = Self { children: Vec::new(), directory };
        fs::create_dir(machine.path("daemon"))?;
        fs::write(machine.path("config.toml"), machine.configuration(kind))?;
        let (root, socket, config) = (machine.path("daemon"), machine.path("daemon.sock"), machine.path("daemon.toml"));
        let background = match kind {
            Kind::Stargz => "no_background_fetch = true\n",
            Kind::Aws | Kind::Overlayfs => "[background_fetch]\ndisable = true\n",
            Kind::Soci => "[background_fetch]\ndisable = true\n[profile]\nreplay = false\n",
            Kind::Profile | Kind::Pack => "[background_fetch]\ndisable = true\n[profile]\nreplay = true\n",
            Kind::Fuse => "[background_fetch]\ndisable = true\n[profile]\nreplay = false\n[fuse]\ntree = 'fuse'\n",
            Kind::FusePack => "[background_fetch]\ndisable = true\n[profile]\nreplay = true\n[fuse]\ntree = 'fuse'\n",
        };
        fs::write(&config, background)?;
        let daemon = match kind {
            Kind::Overlayfs => None,
            Kind::Stargz => {
                let mut command = Command::new(&programs.stargz);
                command.arg("serve").args([&root, &socket, &config]);
                Some(command)
            }
            Kind::Aws | Kind::Soci | Kind::Profile | Kind::Pack | Kind::Fuse | Kind::FusePack => {
                let ours = soci_path()?.with_file_name("soci-snapshotter-grpc");
                let mut command = Command::new(if kind == Kind::Aws { &programs.aws } else { &ours });
                command.env_remove("SOCI_LOG").arg("--root").arg(&root).arg("--address").arg(&socket);
                command.arg("--config").arg(&config);
                Some(command)
            }
        };
        if let Some(command) = daemon {
            machine.spawn(command, "daemon.log")?;
            machine.wait("the snapshotter starts", || machine.log().contains("successfully started"))?;
        }
        let mut containerd = Command::new(programs.containerd.join("containerd"));
        containerd.env("PATH", programs.search_path()?).arg("--config").arg(machine.path("config.toml"));
        machine.spawn(containerd, "containerd.log")?;
        machine.wait("containerd answers", || {
            let mut ask = Command::new(programs.containerd.join("ctr"));
            ask.arg("--address").arg(machine.path("containerd.sock"));
            ask.args(["snapshots", "--snapshotter", kind.name(), "ls"]);
            ask.output().is_ok_and(|output| output.status.success())
        })?;
        Ok(machine)
    }

    fn configuration(&self, kind: Kind) -> String {
        let common = format!(
            "version = 3\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \
             \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\", \"io.containerd.nri.v1.nri\"]\n\
             [grpc]\naddress = {:?}\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            self.path("root"),
            self.path("state"),
            self.path("containerd.sock"),
            self.path("opt"),
        );
        if kind == Kind::Overlayfs {
            return common;
        }
        format!(
            "{common}[proxy_plugins.{}]\ntype = \"snapshot\"\naddress = {:?}\n",
            kind.name(),
            self.path("daemon.sock")
        )
    }

    fn spawn(&mut self, mut command: Command, log: &str) -> anyhow::Result<()> {
        let log = File::create(self.path(log))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        self.children.push(child);
        Ok(())
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) -> anyhow::Result<()> {
        let start = Instant::now();
        while !done() {
            anyhow::ensure!(start.elapsed() < PATIENCE, "{what}: not in time\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// A file of this machine.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What the snapshotter has said.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The last one first: containerd, then what it asks. On INT daemons take their mounts with them.
        for mut child in self.children.drain(..).rev() {
            let _ = kill_process(Pid::from_child(&child), Signal::INT);
            let start = Instant::now();
            while matches!(child.try_wait(), Ok(None)) {
                if start.elapsed() > PATIENCE {
                    let _ = child.kill();
                    let _ = child.wait();
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        unmount_below(self.directory.path());
    }
}
