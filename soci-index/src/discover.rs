//! Finding the SOCI index of an image.
//!
//! A version 1 index is a manifest whose `subject` is the image's manifest. Registries list such manifests in no
//! defined order, and anybody who may push can add one; so the choice is made here and made the same everywhere: the
//! newest by its `created` annotation, then the smallest digest. Invariants: a manifest is chosen by what it says
//! itself, never by what a list says of it; its `subject` is the image; its raw bytes are returned.

use bytes::Bytes;

use crate::digest::Digest;
use crate::image::ImageError;
use crate::image::layout::Layout;
use crate::image::model::{Descriptor, ImageManifest, RawManifest, annotation, media_type};
use crate::image::store::{Store, StoreError};
use crate::registry::referrers::{FoundBy, Listing, Lists};
use crate::registry::{RegistryError, Repository};

/// The configuration media type of a version 1 index, which is also its artifact type.
pub use crate::manifest::INDEX_V1 as SOCI_INDEX_V1;

/// Manifests that are fetched at most. Stops a repository full of referrers from holding up a mount.
const CANDIDATES_MAX: usize = 32;

/// An index that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundIndex {
    /// The manifest's digest.
    pub digest: Digest,
    /// The manifest, byte for byte.
    pub raw: Bytes,
    /// The same, parsed.
    pub manifest: ImageManifest,
    /// How many others were passed over.
    pub others: usize,
    /// Which of the kinds that were asked for it is: its artifact type.
    pub kind: &'static str,
}

/// Why a listed manifest was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The manifest.
    pub digest: Digest,
    /// Why not.
    pub reason: String,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discovery {
    /// An index.
    Found(Box<FoundIndex>),
    /// None, and why.
    None {
        /// One line for a log.
        reason: String,
        /// What was listed and not taken.
        rejected: Vec<Rejected>,
    },
}

/// Which of an image's indexes is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which<'a> {
    /// The newest.
    Newest,
    /// This one and no other.
    Named(&'a Digest),
}

impl Which<'_> {
    fn is(self, digest: &Digest) -> bool {
        match self {
            Self::Newest => true,
            Self::Named(wanted) => wanted == digest,
        }
    }
}

/// Searches a repository for AWS's index of `image` (an image manifest, not an index).
///
/// # Errors
/// As [`preferred_on_registry`].
pub async fn on_registry(
    repository: &Repository,
    image: &Digest,
    which: Which<'_>,
) -> Result<Discovery, RegistryError> {
    preferred_on_registry(repository, image, which, &[SOCI_INDEX_V1]).await
}

/// Searches a repository for an index of `image` that is of the first of `kinds`, artifact types, of which there is one.
/// The registry's list is asked for once.
///
/// # Errors
/// [`RegistryError`] when the registry cannot be asked. A candidate that cannot be read is passed over.
pub async fn preferred_on_registry(
    repository: &Repository,
    image: &Digest,
    which: Which<'_>,
    kinds: &[&'static str],
) -> Result<Discovery, RegistryError> {
    preferred(Lists::Repository(repository), image, which, kinds).await
}

/// The same for the newest index, by a list that was asked for early.
///
/// # Errors
/// As [`preferred_on_registry`].
pub async fn preferred_listed(listing: &Listing, kinds: &[&'static str]) -> Result<Discovery, RegistryError> {
    preferred(Lists::Early(listing), listing.subject(), Which::Newest, kinds).await
}

async fn preferred(
    lists: Lists<'_>,
    image: &Digest,
    which: Which<'_>,
    kinds: &[&'static str],
) -> Result<Discovery, RegistryError> {
    let (listed, nothing) = match which {
        // One that is named need not be listed: it says itself whose it is.
        Which::Named(digest) => (vec![Descriptor::new("", *digest, 0)], format!("the registry has no index {digest}")),
        Which::Newest => {
            let one_kind = if let [kind] = kinds { Some(*kind) } else { None };
            let referrers = lists.referrers(image, one_kind).await?;
            let nothing = match &referrers.found_by {
                FoundBy::Api => "the registry lists no such referrer".to_owned(),
                FoundBy::FallbackTag => "the fallback tag lists no such referrer".to_owned(),
                FoundBy::Nothing(reason) => format!("no referrers API ({reason}) and no fallback tag"),
            };
            (ordered(referrers.entries), nothing)
        }
    };
    let mut none = Vec::new();
    for kind in kinds {
        // What was listed as another kind need not be fetched, unless the list was to be of one kind anyway.
        let may_be = |entry: &&Descriptor| kinds.len() == 1 || may_be(entry, kind);
        let candidates = listed.iter().filter(may_be).map(|entry| entry.digest);
        match of_kind(lists, image, candidates, kind, &nothing).await? {
            Discovery::None { rejected, .. } => none.extend(rejected),
            found @ Discovery::Found(_) => return Ok(found),
        }
    }
    Ok(Discovery::None { reason: none.first().map_or(nothing, why), rejected: none })
}

/// Looks at the manifests of a list that may be of one kind.
async fn of_kind(
    lists: Lists<'_>,
    image: &Digest,
    listed: impl Iterator<Item = Digest>,
    kind: &'static str,
    nothing: &str,
) -> Result<Discovery, RegistryError> {
    let mut search = Search::new(image, kind);
    for digest in listed.take(CANDIDATES_MAX) {
        match lists.manifest(digest).await {
            Ok(Some(raw)) => search.consider(raw),
            Ok(None) => search.reject(digest, "it is not there"),
            Err(error @ (RegistryError::Deadline { .. } | RegistryError::Unauthorized { .. })) => return Err(error),
            Err(error) => search.reject(digest, &error.to_string()),
        }
    }
    Ok(search.finish(nothing))
}

/// Searches an OCI layout for the index of `image`: every manifest that index.json names is looked at.
///
/// # Errors
/// [`ImageError`] when index.json cannot be read. A candidate that cannot be read is passed over.
pub fn in_layout(layout: &Layout, image: &Digest, which: Which<'_>) -> Result<Discovery, ImageError> {
    in_layout_of(layout, image, which, SOCI_INDEX_V1)
}

/// Searches an OCI layout for an index of `image` that is of the first of `kinds`, artifact types, of which there is
/// one.
///
/// # Errors
/// As [`in_layout`].
pub fn preferred_in_layout(
    layout: &Layout,
    image: &Digest,
    which: Which<'_>,
    kinds: &[&'static str],
) -> Result<Discovery, ImageError> {
    let mut last = Discovery::None { reason: "nothing was asked for".to_owned(), rejected: Vec::new() };
    for kind in kinds {
        last = in_layout_of(layout, image, which, kind)?;
        if matches!(last, Discovery::Found(_)) {
            break;
        }
    }
    Ok(last)
}

fn in_layout_of(
    layout: &Layout,
    image: &Digest,
    which: Which<'_>,
    kind: &'static str,
) -> Result<Discovery, ImageError> {
    let store = Store::Layout(layout.clone());
    let mut search = Search::new(image, kind);
    // A local layout may hold the indexes of thousands of images; reading them all is still cheap.
    for entry in ordered(store.entries()?) {
        if entry.media_type != media_type::MANIFEST || !which.is(&entry.digest) || !may_be(&entry, kind) {
            continue;
        }
        match store.manifest(&entry) {
            Ok(Some(raw)) => search.consider_quietly(raw),
            Ok(None) => {}
            Err(error @ StoreError::Io { .. }) => return Err(error.into()),
            Err(error) => search.reject(entry.digest, &error.to_string()),
        }
    }
    Ok(search.finish("the layout holds no such index of this image"))
}

fn may_be(entry: &Descriptor, artifact_type: &str) -> bool {
    entry.kind().is_empty() || entry.kind() == artifact_type
}

/// The most promising first: registries copy annotations into their lists, so the newest is usually known beforehand.
fn ordered(mut entries: Vec<Descriptor>) -> Vec<Descriptor> {
    entries.sort_by_key(|entry| (std::cmp::Reverse(created(&entry.annotations)), entry.digest));
    entries.dedup_by_key(|entry| entry.digest);
    entries
}

struct Search<'a> {
    image: &'a Digest,
    artifact_type: &'static str,
    found: Vec<(RawManifest, ImageManifest)>,
    rejected: Vec<Rejected>,
}

impl<'a> Search<'a> {
    fn new(image: &'a Digest, artifact_type: &'static str) -> Self {
        Self { image, artifact_type, found: Vec::new(), rejected: Vec::new() }
    }

    fn reject(&mut self, digest: Digest, reason: &str) {
        self.rejected.push(Rejected { digest, reason: reason.to_owned() });
    }

    fn consider(&mut self, raw: RawManifest) {
        let digest = raw.digest;
        if let Err(reason) = self.judge(raw) {
            self.reject(digest, &reason);
        }
    }

    /// For lists that hold much that was never meant for this image.
    fn consider_quietly(&mut self, raw: RawManifest) {
        let _ = self.judge(raw);
    }

    fn judge(&mut self, raw: RawManifest) -> Result<(), String> {
        let manifest: ImageManifest = serde_json::from_slice(&raw.bytes).map_err(|error| error.to_string())?;
        // The AWS tools say it by the configuration's type alone; others may use the field that is made for it.
        if manifest.config.media_type != self.artifact_type && manifest.kind() != self.artifact_type {
            return Err(format!("it is {:?}", manifest.kind()));
        }
        match &manifest.subject {
            Some(subject) if subject.digest == *self.image => {}
            Some(subject) => return Err(format!("it belongs to {}", subject.digest)),
            None => return Err("it names no subject".to_owned()),
        }
        self.found.push((raw, manifest));
        Ok(())
    }

    fn finish(mut self, nothing: &str) -> Discovery {
        self.found.sort_by_key(|(raw, manifest)| (std::cmp::Reverse(created(&manifest.annotations)), raw.digest));
        let others = self.found.len().saturating_sub(1);
        let Some((raw, manifest)) = self.found.into_iter().next() else {
            let reason = match self.rejected.first() {
                None => nothing.to_owned(),
                Some(first) => why(first),
            };
            return Discovery::None { reason, rejected: self.rejected };
        };
        if others > 0 {
            tracing::info!(image = %self.image, chosen = %raw.digest, others, "several indexes: taking the newest");
        }
        let kind = self.artifact_type;
        Discovery::Found(Box::new(FoundIndex { digest: raw.digest, raw: raw.bytes, manifest, others, kind }))
    }
}

fn why(first: &Rejected) -> String {
    format!("none of the listed manifests fits; {}: {}", first.digest, first.reason)
}

/// The `created` annotation as seconds and nanoseconds since 1970; `None`, the oldest of all, when there is none.
fn created(annotations: &std::collections::BTreeMap<String, String>) -> Option<(i64, u32)> {
    timestamp(annotations.get(annotation::CREATED)?)
}

/// Reads an RFC 3339 time. Texts would not compare right: offsets and fractions differ.
fn timestamp(text: &str) -> Option<(i64, u32)> {
    let number = |range: std::ops::Range<usize>| {
        let digits = text.get(range)?;
        if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse::<i64>().ok() } else { None }
    };
    let separators = [(4, b'-'), (7, b'-'), (13, b':'), (16, b':')];
    let bytes = text.as_bytes();
    if !separators.iter().all(|(place, separator)| bytes.get(*place) == Some(separator)) {
        return None;
    }
    if !matches!(bytes.get(10), Some(b'T' | b't' | b' ')) {
        return None;
    }
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let rest = text.get(19..)?;
    let digits = rest.strip_prefix('.').map_or("", |fraction| {
        &fraction[..fraction.bytes().position(|byte| !byte.is_ascii_digit()).unwrap_or(fraction.len())]
    });
    let zone = if digits.is_empty() { rest } else { rest.get(1 + digits.len()..)? };
    let nanoseconds = format!("{digits:0<9}").get(..9)?.parse().ok()?;
    let offset = match zone.as_bytes() {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] if [h1, h2, m1, m2].iter().all(|digit| digit.is_ascii_digit()) => {
            let two = |tens: &u8, ones: &u8| i64::from(tens - b'0') * 10 + i64::from(ones - b'0');
            let seconds = two(h1, h2) * 3600 + two(m1, m2) * 60;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    // Days since 1970 by counting years from March, so that the leap day is the last of its year.
    let (shifted_year, shifted_month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    let leap_days = shifted_year.div_euclid(4) - shifted_year.div_euclid(100) + shifted_year.div_euclid(400);
    let days = 365 * shifted_year + leap_days + day_of_year - 719_468;
    Some((days * 86_400 + hour * 3600 + minute * 60 + second - offset, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", Some((0, 0))),
            ("2000-02-29T12:34:56Z", Some((951_827_696, 0))),
            ("2026-08-01T00:00:00.5Z", Some((1_785_542_400, 500_000_000))),
            ("2026-08-01T02:00:00.123456789+02:00", Some((1_785_542_400, 123_456_789))),
            ("2026-07-31T19:00:00-05:00", Some((1_785_542_400, 0))),
            ("2026-08-01", None),
            ("2026-13-01T00:00:00Z", None),
            ("2026-08-01T00:00:00", None),
            ("2026-08-01T00:00:00+2", None),
            ("2026-08-01T00:00:0éZ", None),
            ("", None),
        ] {
            assert_eq!(timestamp(text), expected, "{text}");
        }
    }
}
