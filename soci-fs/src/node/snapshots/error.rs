//! Why a question about snapshots has no answer.

use soci_index::format::class::{Class, Classified};
use std::io;
use std::path::PathBuf;

use crate::layer::store::StoreError;
use crate::node::snapshots::filter::FilterError;
use crate::node::snapshots::labels::LABEL_BYTES_MAX;
use crate::node::snapshots::record::Kind;

/// Why a question about snapshots has no answer.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The key or name is taken.
    #[error("snapshot {key:?} exists already")]
    Exists { key: String },
    /// There is no such snapshot.
    #[error("no snapshot {key:?}")]
    NotFound { key: String },
    /// Only committed snapshots can be parents.
    #[error("{parent:?} cannot be the parent of {key:?}: it is not committed")]
    ParentNotCommitted { key: String, parent: String },
    /// A commit names another parent than the snapshot has.
    #[error("snapshot {key:?} stands on {parent:?}, which a commit cannot change to {given:?}")]
    ParentChanged { key: String, parent: String, given: String },
    /// Only active snapshots can be committed.
    #[error("snapshot {key:?} cannot be committed: it is {}", kind.name())]
    NotActive { key: String, kind: Kind },
    /// Committed snapshots are mounted through active ones and views.
    #[error("snapshot {key:?} is committed: prepare a snapshot or a view on top of it")]
    NotMountable { key: String },
    /// Others stand on it.
    #[error("snapshot {key:?} cannot be removed: {child:?} stands on it")]
    HasChildren { key: String, child: String },
    /// A request without a key or name.
    #[error("the request names no snapshot")]
    NoKey,
    /// A label above the limit.
    #[error("label {key:?} takes {bytes} bytes with its value, {LABEL_BYTES_MAX} are allowed")]
    LabelTooLong { key: String, bytes: usize },
    /// An update of something that is not a label.
    #[error("{path:?} cannot be updated: only labels can")]
    Unchangeable { path: String },
    /// A label says how owners are to be mapped, and makes no sense.
    #[error("the label {label}: {reason}")]
    Mapping { label: &'static str, reason: String },
    /// Owners cannot be mapped.
    #[error("snapshot {key:?} cannot be shown with the owners of a user namespace: {reason}")]
    Unmappable { key: String, reason: String },
    /// A listing with a filter that makes no sense.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// Files of a snapshot, or of one below it, are not there.
    #[error("the files of snapshot {key:?} are not at {}: {cause}; remove the image and pull it again", path.display())]
    Unavailable { key: String, path: PathBuf, cause: io::Error },
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io { operation: &'static str, path: PathBuf, cause: io::Error },
    /// The database failed.
    #[error("cannot {operation} the database of snapshots: {cause}")]
    Database { operation: &'static str, cause: Box<redb::Error> },
    /// A record that this program did not write.
    #[error("the record of snapshot {key:?} is damaged: {cause}")]
    Record { key: String, cause: serde_json::Error },
    /// The database was written by a later program.
    #[error("{} has form {found}, this program knows {expected}: use the later program again", path.display())]
    Format { path: PathBuf, found: u64, expected: u64 },
    /// The root is in use, or cannot be locked.
    #[error(transparent)]
    Lock(StoreError),
    /// The path of the root would not survive in mount options.
    #[error("{} cannot be the root: mount options need a path of text without , : and \\", path.display())]
    Root { path: PathBuf },
    /// Overlay, on which all snapshots depend, cannot be mounted.
    #[error("overlay cannot be mounted below {}: {cause}; use a root on ext4, or on xfs with ftype=1", path.display())]
    NoOverlay { path: PathBuf, cause: io::Error },
    /// The program ends, or a part of it failed, before the answer was there.
    #[error("the answer about snapshot {key:?} was given up")]
    Abandoned { key: String },
}

impl Classified for SnapshotError {
    fn class(&self) -> Class {
        Class::Local
    }
}
