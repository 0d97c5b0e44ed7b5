//! Where an entry of the local index store was fetched. Pure.
//!
//! index.json is the store's only catalogue, so it is noted there: the annotation [`ORIGIN`] of an entry lists
//! `HOST/REPOSITORY` of every place that the index was fetched from, with commas between them (no name of a host or
//! repository has one). An entry without it was made on this machine. Earlier releases noted no origin; their fetched
//! entries have the image's name and, other than those that were made here, no time.

use crate::format::model::{Descriptor, annotation};
use crate::format::reference::Reference;

/// Annotation in the local store's index.json: what the user called the image.
pub const IMAGE_NAME: &str = "io.containerd.image.name";
/// Annotation in the local store's index.json: the repositories that the index was fetched from.
pub const ORIGIN: &str = "dev.soci.origin";
/// Annotation in the local store's index.json: the place that has the index's parts, if that is another one.
pub const KEPT_IN: &str = "dev.soci.kept-in";
/// Annotation in the local store's index.json: the manifest of the image that a fetched index is of.
pub const IMAGE: &str = "dev.soci.image";

/// The places that an entry was fetched from; `None` for one that was made on this machine.
#[must_use]
pub fn origins(entry: &Descriptor) -> Option<Vec<String>> {
    if let Some(noted) = entry.annotations.get(ORIGIN) {
        return Some(noted.split(',').map(str::to_owned).collect());
    }
    if entry.annotations.contains_key(annotation::CREATED) {
        return None;
    }
    match entry.annotations.get(IMAGE_NAME)?.parse() {
        Ok(Reference::Registry(image)) => Some(vec![format!("{}/{}", image.registry(), image.repository())]),
        Ok(_) | Err(_) => None,
    }
}

/// Notes on `entry` that it was fetched from `origin`, beside what `before`, the entry that it replaces, says. One that
/// was made here stays that.
pub(crate) fn annotate(entry: &mut Descriptor, origin: &str, before: Option<&Descriptor>) {
    let known = match before.map(origins) {
        Some(None) => return,
        Some(Some(known)) => known,
        None => Vec::new(),
    };
    let mut all: Vec<&str> = known.iter().map(String::as_str).filter(|known| *known != origin).collect();
    all.push(origin);
    entry.annotations.insert(ORIGIN.to_owned(), all.join(","));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(notes: &[(&str, &str)]) -> Descriptor {
        let mut entry = Descriptor::of("", b"index");
        entry.annotations.extend(notes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        entry
    }

    #[test]
    fn what_entries_say() {
        for (notes, expected) in [
            (&[][..], None),
            (&[(ORIGIN, "h/a")], Some(vec!["h/a"])),
            (&[(ORIGIN, "h/a,i:5/b/c"), (annotation::CREATED, "2026-01-01T00:00:00Z")], Some(vec!["h/a", "i:5/b/c"])),
            (&[(IMAGE_NAME, "h:5/a/b:v1"), (annotation::CREATED, "2026-01-01T00:00:00Z")], None),
            (&[(IMAGE_NAME, "h.example:5/a/b:v1")], Some(vec!["h.example:5/a/b"])),
            (&[(IMAGE_NAME, "oci:/layout")], None),
        ] {
            let expected = expected.map(|list| list.into_iter().map(str::to_owned).collect());
            assert_eq!(origins(&entry(notes)), expected, "{notes:?}");
        }
    }

    #[test]
    fn origins_add_up() {
        let noted = |before: Option<&Descriptor>, origin: &str| {
            let mut new = entry(&[(IMAGE_NAME, "h.example/a:v1")]);
            annotate(&mut new, origin, before);
            new
        };
        let first = noted(None, "h/a");
        let second = noted(Some(&first), "h/b");
        assert_eq!(origins(&second).unwrap(), ["h/a", "h/b"]);
        assert_eq!(origins(&noted(Some(&second), "h/a")).unwrap(), ["h/b", "h/a"]);
        let made = entry(&[(annotation::CREATED, "2026-01-01T00:00:00Z")]);
        assert!(!noted(Some(&made), "h/a").annotations.contains_key(ORIGIN));
    }
}
