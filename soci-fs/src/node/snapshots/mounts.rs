//! Which mounts show a snapshot. Paths in, options out: nothing is looked at.

use std::path::{Path, PathBuf};

use crate::node::snapshots::SnapshotOptions;
use crate::node::snapshots::record::Kind;

/// One mount, for the client to carry out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub kind: &'static str,
    /// Directory to bind, or a name for the overlay.
    pub source: String,
    /// Options in their order.
    pub options: Vec<String>,
}

/// Directories of a snapshot that is to be mounted.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) kind: Kind,
    /// Its own directory for files.
    pub(super) own: PathBuf,
    /// Its work directory.
    pub(super) work: PathBuf,
    /// What lies below, the top first.
    pub(super) lower: Vec<PathBuf>,
    pub(super) options: SnapshotOptions,
}

/// The mounts of a snapshot.
pub(super) fn mounts(parts: &Parts) -> Vec<Mount> {
    let writable = parts.kind == Kind::Active;
    let mount = match parts.lower.as_slice() {
        [] => bind(&parts.own, writable),
        // Overlay wants two directories at least, and reading needs no more than the one.
        [only] if !writable => bind(only, false),
        lower => overlay(parts, lower, writable),
    };
    vec![mount]
}

fn bind(source: &Path, writable: bool) -> Mount {
    let access = if writable { "rw" } else { "ro" };
    Mount { kind: "bind", source: text(source), options: vec![access.to_owned(), "rbind".to_owned()] }
}

fn overlay(parts: &Parts, lower: &[PathBuf], writable: bool) -> Mount {
    let mut options = Vec::new();
    if parts.options.index_off {
        options.push("index=off".to_owned());
    }
    if parts.options.user_xattr {
        options.push("userxattr".to_owned());
    }
    if writable {
        options.push(format!("workdir={}", text(&parts.work)));
        options.push(format!("upperdir={}", text(&parts.own)));
    }
    let lower: Vec<String> = lower.iter().map(|path| text(path)).collect();
    options.push(format!("lowerdir={}", lower.join(":")));
    Mount { kind: "overlay", source: "overlay".to_owned(), options }
}

/// A path as text: the root was checked to be text when the store was opened, and what follows it is numbers.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case() {
        use Kind::{Active, View};
        for (kind, lower, (user_xattr, index_off), expected) in [
            (Active, &[][..], (false, false), "bind /s/9/fs rw,rbind"),
            (View, &[], (true, true), "bind /s/9/fs ro,rbind"),
            (
                Active,
                &["/s/1/fs"],
                (false, false),
                "overlay overlay workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/1/fs",
            ),
            (View, &["/layers/4"], (true, true), "bind /layers/4 ro,rbind"),
            (View, &["/layers/4", "/s/1/fs"], (false, true), "overlay overlay index=off,lowerdir=/layers/4:/s/1/fs"),
            (
                Active,
                &["/layers/4", "/s/1/fs"],
                (true, true),
                "overlay overlay index=off,userxattr,workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/layers/4:/s/1/fs",
            ),
        ] {
            let lower = lower.iter().map(PathBuf::from).collect();
            let options = SnapshotOptions { user_xattr, index_off };
            let found = mounts(&Parts { kind, own: "/s/9/fs".into(), work: "/s/9/work".into(), lower, options });
            let [mount] = found.as_slice() else { panic!("{found:?}") };
            assert_eq!(format!("{} {} {}", mount.kind, mount.source, mount.options.join(",")), expected);
        }
    }
}
