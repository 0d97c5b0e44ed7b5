//! The containerds that tests run against: the one that is installed, and version 2.2.
//!
//! They differ in their configuration and in the shim that they start: a containerd looks for it in its search path, so
//! the programs of one version come first there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::go;

/// A version of containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Containerd {
    /// What the distribution has; 1.6 on Debian 12.
    Installed,
    /// 2.2, built from its module.
    V2,
    /// The same with the services that the kubelet uses.
    Kubelets,
}

impl Containerd {
    /// Where its programs are: `None`, with a message on standard error, when they cannot be obtained or not be used.
    #[must_use]
    pub fn programs(self) -> Option<Programs> {
        let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
        if !rustix::process::geteuid().is_root() || !has("runc") {
            eprintln!("SKIPPED: containers need root and runc");
            return None;
        }
        match self {
            Self::Installed if has("containerd") && has("ctr") => Some(Programs { directory: None }),
            Self::Installed => {
                eprintln!("SKIPPED: containers need containerd and ctr");
                None
            }
            Self::V2 | Self::Kubelets => Some(Programs { directory: Some(go::programs()?) }),
        }
    }

    /// What answers for names in tests that do not care: both ways are in all that run with both versions.
    #[must_use]
    pub const fn tree(self) -> &'static str {
        match self {
            Self::Installed => "fuse",
            Self::V2 | Self::Kubelets => "auto",
        }
    }

    /// The configuration for a machine that keeps everything in `directory`.
    #[must_use]
    pub fn configuration(self, directory: &Path) -> String {
        let at = |name: &str| directory.join(name);
        let common = format!(
            "root = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n\
             [proxy_plugins.soci]\ntype = \"snapshot\"\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("containerd.sock"),
            at("opt"),
            at("soci.sock")
        );
        match self {
            Self::Installed => {
                format!("version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n{common}")
            }
            Self::V2 | Self::Kubelets => format!(
                "version = 3\n{}{common}capabilities = [\"remap-ids\"]\n\
                 [proxy_plugins.soci.exports]\nroot = {:?}\nenable_remote_snapshot_annotations = \"true\"\n\
                 [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatform = \"linux\"\nsnapshotter = \"soci\"\n\
                 [plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"soci\"\n",
                self.services(),
                at("soci")
            ),
        }
    }
}

impl Containerd {
    /// What 2.2 serves beside its own clients: nothing, unless it is for the kubelet.
    const fn services(self) -> &'static str {
        match self {
            Self::Installed | Self::V2 => {
                "disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\", \"io.containerd.nri.v1.nri\"]\n"
            }
            Self::Kubelets => "disabled_plugins = [\"io.containerd.nri.v1.nri\"]\n",
        }
    }
}

/// Programs of one version.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Where they are, if not in the search path.
    directory: Option<PathBuf>,
}

impl Programs {
    /// A command line of one of them, which finds the others before any of another version.
    ///
    /// # Panics
    /// When the search path cannot be written down.
    #[must_use]
    pub fn command(&self, name: &str) -> Command {
        let Some(directory) = &self.directory else { return Command::new(name) };
        let mut command = Command::new(directory.join(name));
        command.env("PATH", search_path(directory));
        command
    }
}

fn search_path(first: &Path) -> OsString {
    let rest = std::env::var_os("PATH").unwrap_or_default();
    let all = [first.to_owned()].into_iter().chain(std::env::split_paths(&rest));
    std::env::join_paths(all).expect("a path without colons")
}

/// Makes a test with a runtime of each named `async fn(Containerd)`, for each containerd.
#[macro_export]
macro_rules! on_each_containerd {
    ($($test:ident),+ $(,)?) => {
        mod installed {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                super::$test($crate::containerd::Containerd::Installed).await;
            })+
        }
        mod v2 {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                super::$test($crate::containerd::Containerd::V2).await;
            })+
        }
    };
}
