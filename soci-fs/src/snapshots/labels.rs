//! Labels of snapshots: what is accepted, and how an update changes them. No file, no database.

use std::collections::BTreeMap;

use super::SnapshotError;

/// Longest key and value together, in bytes: containerd's own limit, so that what it accepts is accepted here.
pub const LABEL_BYTES_MAX: usize = 4096;

/// Names the snapshot that containerd would like to find in place of the one it prepares.
pub(super) const TARGET: &str = "containerd.io/snapshot.ref";
/// Marks a snapshot whose files a provider shows.
pub(super) const REMOTE: &str = "containerd.io/snapshot/remote";
/// Value of [`REMOTE`].
pub(super) const REMOTE_VALUE: &str = "remote snapshot";

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
    fn the_longest_label() {
        assert_eq!(checked(labels(&[("key", &"v".repeat(LABEL_BYTES_MAX - 3))])).unwrap().len(), 1);
        let error = checked(labels(&[("key", &"v".repeat(LABEL_BYTES_MAX - 2))])).unwrap_err();
        assert!(matches!(error, SnapshotError::LabelTooLong { bytes: 4097, .. }), "{error}");
    }
}
