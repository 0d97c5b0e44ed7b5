//! What is known of a snapshot, and how one state follows from another. No file, no database, no clock.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::node::snapshots::{SnapshotError, Usage};

/// What may be done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Can be read, never committed.
    View,
    /// Can be written and committed.
    Active,
    /// Unchangeable, and may have children.
    Committed,
}

impl Kind {
    /// The word that filters use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// What a client learns of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Key of an active snapshot or a view, name of a committed one.
    pub name: String,
    /// Name of the snapshot below.
    pub parent: Option<String>,
    /// What may be done with it.
    pub kind: Kind,
    /// When it came to be, in nanoseconds since 1970; a commit counts as that.
    pub created: u64,
    /// When it was last changed, in nanoseconds since 1970.
    pub updated: u64,
    /// Its labels; none is empty.
    pub labels: BTreeMap<String, String>,
}

/// Where the files of a snapshot are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lower {
    /// In its own directory.
    Local,
    /// In a layer that the provider shows.
    Layer {
        /// The provider's number for the layer.
        slot: u16,
    },
}

/// What is stored of a snapshot, beside its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Number of its directory; never given twice.
    pub(super) id: u64,
    pub(super) kind: Kind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<String>,
    pub(super) content: Lower,
    /// Number of the mapping by which it shows the owners of what is below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) id_map: Option<u8>,
    pub(super) created: u64,
    pub(super) updated: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) labels: BTreeMap<String, String>,
    /// Measured at the commit; zero before it, and for what the provider shows.
    #[serde(default)]
    pub(super) usage: Usage,
}

impl Record {
    pub(super) fn new(
        id: u64,
        kind: Kind,
        parent: Option<&str>,
        content: Lower,
        labels: BTreeMap<String, String>,
        now: u64,
    ) -> Self {
        let (parent, usage) = (parent.map(str::to_owned), Usage::default());
        Self { id, kind, parent, content, id_map: None, created: now, updated: now, labels, usage }
    }

    /// The committed snapshot that an active one becomes. Labels are replaced, not inherited.
    ///
    /// # Errors
    /// [`SnapshotError::NotActive`], or [`SnapshotError::ParentChanged`] if it is to leave the parent that it has.
    pub(super) fn committed(self, key: &str, commit: Commit<'_>) -> Result<Self, SnapshotError> {
        if self.kind != Kind::Active {
            return Err(SnapshotError::NotActive { key: key.to_owned(), kind: self.kind });
        }
        let parent = match (self.parent, commit.parent) {
            (Some(parent), Some(given)) if parent != given => {
                return Err(SnapshotError::ParentChanged { key: key.to_owned(), parent, given: given.to_owned() });
            }
            (Some(parent), _) => Some(parent),
            (None, given) => given.map(str::to_owned),
        };
        let (labels, now) = (commit.labels, commit.now);
        let (kind, id_map) = (Kind::Committed, None);
        Ok(Self { kind, parent, id_map, labels, usage: commit.usage, created: now, updated: now, ..self })
    }

    /// The layer that it stands on.
    pub(super) const fn slot(&self) -> Option<u16> {
        match self.content {
            Lower::Local => None,
            Lower::Layer { slot } => Some(slot),
        }
    }

    pub(super) fn info(self, name: &str) -> Info {
        let Self { kind, parent, created, updated, labels, .. } = self;
        Info { name: name.to_owned(), parent, kind, created, updated, labels }
    }
}

/// What a commit adds to the active snapshot.
pub(super) struct Commit<'a> {
    pub(super) parent: Option<&'a str>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) usage: Usage,
    pub(super) now: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: Kind, parent: Option<&str>) -> Record {
        let labels = BTreeMap::from([("old".to_owned(), "1".to_owned())]);
        Record::new(7, kind, parent, Lower::Local, labels, 10)
    }

    fn commit(parent: Option<&str>) -> Commit<'_> {
        let labels = BTreeMap::from([("new".to_owned(), "2".to_owned())]);
        Commit { parent, labels, usage: Usage { bytes: 5, inodes: 1 }, now: 20 }
    }

    #[test]
    fn a_commit_may_give_a_parent_but_not_change_it() {
        for (has, given, becomes) in [
            (None, None, Some(None)),
            (None, Some("base"), Some(Some("base"))),
            (Some("base"), None, Some(Some("base"))),
            (Some("base"), Some("base"), Some(Some("base"))),
            (Some("base"), Some("other"), None),
        ] {
            let committed = record(Kind::Active, has).committed("key", commit(given));
            match (committed, becomes) {
                (Ok(committed), Some(parent)) => assert_eq!(committed.parent.as_deref(), parent, "{has:?} {given:?}"),
                (Err(SnapshotError::ParentChanged { .. }), None) => {}
                (result, _) => panic!("{has:?} {given:?}: {result:?}"),
            }
        }
    }

    #[test]
    fn a_commit_replaces_labels_and_times() {
        let committed = record(Kind::Active, None).committed("key", commit(None)).unwrap();
        assert_eq!(committed.labels.keys().collect::<Vec<_>>(), ["new"]);
        assert_eq!((committed.created, committed.updated, committed.id), (20, 20, 7));
        assert_eq!(committed.usage, Usage { bytes: 5, inodes: 1 });
        for kind in [Kind::View, Kind::Committed] {
            let error = record(kind, None).committed("key", commit(None)).unwrap_err();
            assert!(matches!(error, SnapshotError::NotActive { kind: found, .. } if found == kind), "{error}");
        }
    }

    /// Records outlive the program that wrote them.
    #[test]
    fn records_keep_their_form() {
        let layer = Record { content: Lower::Layer { slot: 9 }, ..record(Kind::Committed, Some("base")) };
        let text = serde_json::to_string(&layer).unwrap();
        let expected = r#"{"id":7,"kind":"committed","parent":"base","content":{"layer":{"slot":9}},"created":10,"updated":10,"labels":{"old":"1"},"usage":{"bytes":0,"inodes":0}}"#;
        assert_eq!(text, expected);
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), layer);
        let mapped = serde_json::to_string(&Record { id_map: Some(3), ..layer.clone() }).unwrap();
        assert!(mapped.contains(r#""id_map":3,"#), "{mapped}");
        let shortest = r#"{"id":1,"kind":"view","content":"local","created":0,"updated":0}"#;
        assert_eq!(serde_json::from_str::<Record>(shortest).unwrap().kind, Kind::View);
    }
}
