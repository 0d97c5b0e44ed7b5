//! Labels of snapshots: what is accepted, and how an update changes them. No file, no database.

use std::collections::BTreeMap;

use crate::node::snapshots::SnapshotError;
use crate::tree::id_map::{self, IdMap};

/// Longest key and value together, in bytes: containerd's own limit, so that what it accepts is accepted here.
pub const LABEL_BYTES_MAX: usize = 4096;

/// Names the snapshot that containerd would like to find in place of the one it prepares.
pub(super) const TARGET: &str = "containerd.io/snapshot.ref";
/// Marks a snapshot whose files a provider shows.
pub(super) const REMOTE: &str = "containerd.io/snapshot/remote";
/// Value of [`REMOTE`].
pub(super) const REMOTE_VALUE: &str = "remote snapshot";

/// How the users and groups of a container in a user namespace are mapped.
const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// The mapping of owners that labels ask for.
///
/// # Errors
/// [`SnapshotError::Mapping`] when it makes no sense, or is there for users or groups only.
pub(super) fn id_map(labels: &BTreeMap<String, String>) -> Result<Option<IdMap>, SnapshotError> {
    let ranges = |label: &'static str, other: &str| {
        let text = labels.get(label).filter(|text| !text.is_empty());
        let parsed = match (text, labels.get(other).filter(|text| !text.is_empty())) {
            (None, None) => return Ok(None),
            (None, Some(_)) => Err(format!("it must be there where {other} is")),
            (Some(text), _) => id_map::parse(text),
        };
        parsed.map(Some).map_err(|reason| SnapshotError::Mapping { label, reason })
    };
    let uids = ranges(UID_MAPPING, GID_MAPPING)?;
    let gids = ranges(GID_MAPPING, UID_MAPPING)?;
    Ok(uids.zip(gids).map(|(uids, gids)| IdMap { uids, gids }))
}

/// Checks labels, and drops those without a value, as containerd's own stores do.
///
/// # Errors
/// [`SnapshotError::LabelTooLong`].
pub(super) fn checked(labels: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, SnapshotError> {
    for (key, value) in &labels {
        let bytes = key.len() + value.len();
        if bytes > LABEL_BYTES_MAX {
            let key = key.chars().take(64).collect();
            return Err(SnapshotError::LabelTooLong { key, bytes });
        }
    }
    Ok(labels.into_iter().filter(|(_, value)| !value.is_empty()).collect())
}

/// The labels after an update: `mask` says which of the `given` ones count. No mask means all.
///
/// # Errors
/// [`SnapshotError::Unchangeable`] for anything that is not a label, [`SnapshotError::LabelTooLong`].
pub(super) fn updated(
    mut present: BTreeMap<String, String>,
    given: BTreeMap<String, String>,
    mask: &[String],
) -> Result<BTreeMap<String, String>, SnapshotError> {
    if mask.is_empty() {
        return checked(given);
    }
    for path in mask {
        match path.strip_prefix("labels.") {
            Some(key) => {
                present.insert(key.to_owned(), given.get(key).cloned().unwrap_or_default());
            }
            None if path == "labels" => present.clone_from(&given),
            None => return Err(SnapshotError::Unchangeable { path: path.clone() }),
        }
    }
    checked(present)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn masks() {
        let present = labels(&[("a", "1"), ("b.c/d", "2")]);
        let given = labels(&[("a", "9"), ("e", "5"), ("empty", "")]);
        for (mask, after) in [
            (&[][..], Some(&[("a", "9"), ("e", "5")][..])),
            (&["labels"], Some(&[("a", "9"), ("e", "5")])),
            (&["labels.a"], Some(&[("a", "9"), ("b.c/d", "2")])),
            (&["labels.b.c/d"], Some(&[("a", "1")])),
            (&["labels.empty", "labels.e"], Some(&[("a", "1"), ("b.c/d", "2"), ("e", "5")])),
            (&["labels.absent"], Some(&[("a", "1"), ("b.c/d", "2")])),
            (&["parent"], None),
            (&["labels.a", "name"], None),
            (&["label"], None),
            (&["labels.a", "labels"], Some(&[("a", "9"), ("e", "5")])),
            (&["labels", "parent"], None),
        ] {
            let mask: Vec<String> = mask.iter().map(|path| (*path).to_owned()).collect();
            match (updated(present.clone(), given.clone(), &mask), after) {
                (Ok(result), Some(after)) => assert_eq!(result, labels(after), "{mask:?}"),
                (Err(SnapshotError::Unchangeable { .. }), None) => {}
                (result, _) => panic!("{mask:?}: {result:?}"),
            }
        }
    }

    #[test]
    fn mappings_of_owners() {
        let map = |uids: &str, gids: &str| id_map(&labels(&[(UID_MAPPING, uids), (GID_MAPPING, gids)]));
        assert_eq!(id_map(&labels(&[])).unwrap(), None);
        assert_eq!(map("", "").unwrap(), None);
        let both = map("0:1000:1", "0:2000:2").unwrap().unwrap();
        assert_eq!((both.uid(0), both.gid(1)), (1000, 2001));
        for (uids, gids, label) in
            [("0:1000:1", "", GID_MAPPING), ("", "0:1:1", UID_MAPPING), ("x", "0:1:1", UID_MAPPING)]
        {
            let error = map(uids, gids).unwrap_err();
            assert!(matches!(error, SnapshotError::Mapping { label: found, .. } if found == label), "{error}");
        }
    }

    #[test]
    fn the_longest_label() {
        assert_eq!(checked(labels(&[("key", &"v".repeat(LABEL_BYTES_MAX - 3))])).unwrap().len(), 1);
        let error = checked(labels(&[("key", &"v".repeat(LABEL_BYTES_MAX - 2))])).unwrap_err();
        assert!(matches!(error, SnapshotError::LabelTooLong { bytes: 4097, .. }), "{error}");
    }
}
