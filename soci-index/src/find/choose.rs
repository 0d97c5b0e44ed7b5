//! The choice itself: from candidates to the one that is meant, and why not the others. Pure.

use std::cmp::Reverse;
use std::fmt;

use bytes::Bytes;

use crate::format::digest::Digest;
use crate::format::index_manifest::IndexManifest;

/// When an index was made: seconds and nanoseconds since 1970, so that texts of other zones or with fractions compare
/// right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Created(i64, u32);

/// Where an index is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum IndexPlace {
    /// In a repository that the operator named for the image; the first that was named has position 0.
    Named {
        /// Its position among those that were named.
        position: usize,
        /// `HOST/REPOSITORY`.
        repository: String,
    },
    /// In the image's own place, and named by the image's manifest.
    Image,
    /// In the image's own place, and referring to the image.
    Beside,
    /// In the local index store, and made on this machine.
    Local,
}

/// An index that fits the image.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Digest of its manifest.
    pub digest: Digest,
    /// The manifest, byte for byte.
    pub raw: Bytes,
    /// The same, parsed.
    pub index: IndexManifest,
    /// When it was made; `None`, the oldest of all, when that is not said or cannot be read.
    pub created: Option<Created>,
    pub place: IndexPlace,
    /// Whether this is a copy in the local index store that stands for `place`, which was not asked or did not answer.
    pub cached: bool,
}

/// Why an index, or all that a place may have, was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Another one was named by its digest.
    NotNamed,
    /// A repository that was named for the image goes before.
    Place,
    /// Another form goes before.
    Form {
        /// The form of the one that was taken.
        taken: &'static str,
    },
    /// The one that was taken has tables of more layers.
    Fewer,
    /// The one that was taken is newer.
    Older,
    /// Both are of the same time, and the other digest is smaller.
    Digest,
    /// It is the one that was taken, in another place.
    Same,
    /// It is not trusted, and the one that was taken is.
    Doubt(String),
    /// It is no index of this image, or cannot be read.
    Unfit(String),
    /// It is there, and the registry refuses to show it.
    Refused(String),
    /// It was kept from a place that does not have it any more.
    Gone,
    /// It was kept from another repository, so it says nothing of this image's.
    Foreign {
        /// Where it was fetched.
        origin: String,
    },
    /// The place could not be asked.
    Unasked(String),
    /// The place was not asked: an earlier one decides.
    NotNeeded,
}

/// An index that was not taken, or a place that gave none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// The index; `None` when it is the place as a whole.
    pub digest: Option<Digest>,
    pub place: IndexPlace,
    pub reason: Reason,
}

/// Candidates in the order in which they are taken, and what was left out.
#[derive(Debug, Clone, Default)]
pub struct Ordered {
    /// The best first; every digest once.
    pub candidates: Vec<Candidate>,
    /// What cannot be taken.
    pub others: Vec<PassedOver>,
}

/// What was taken, and what was not.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// The index; `None` when there is none.
    pub chosen: Option<Candidate>,
    /// The others, each with the reason.
    pub passed_over: Vec<PassedOver>,
}

impl Candidate {
    /// What candidates are sorted by; the smallest is the best. The order of the rules of [`crate::find`].
    fn key(&self) -> impl Ord + use<> {
        let named = self.place.position().unwrap_or(usize::MAX);
        (
            named,
            form_rank(&self.index),
            better_first(&self.index, self.created, &self.digest),
            self.place.clone(),
            self.cached,
        )
    }

    /// Whether its form goes before version 1.
    pub(crate) fn is_before_version_1(&self) -> bool {
        form_rank(&self.index) < 2
    }

    /// Its place, for display.
    #[must_use]
    pub fn whereabouts(&self) -> String {
        match self.cached {
            true => format!("{}, kept locally", self.place),
            false => self.place.to_string(),
        }
    }
}

/// The span index goes first, then the one that the image names, then AWS's version 1.
fn form_rank(index: &IndexManifest) -> u8 {
    match index {
        IndexManifest::Spans(_) => 0,
        IndexManifest::Soci(index) if index.version() == 2 => 1,
        IndexManifest::Soci(_) => 2,
    }
}

/// What two indexes of one form and one kind of place are ordered by: the one of more layers, then as they are listed.
pub(crate) fn better_first(index: &IndexManifest, created: Option<Created>, digest: &Digest) -> impl Ord + use<> {
    (Reverse(index.coverage()), newest_first(created, digest))
}

/// What indexes are listed by before they are read: the newest, then the smallest digest.
pub(crate) fn newest_first(created: Option<Created>, digest: &Digest) -> (Reverse<Option<Created>>, Digest) {
    (Reverse(created), *digest)
}

/// Puts candidates in order. `named` is the digest that was asked for, if one was; then no other is left.
#[must_use]
pub(crate) fn order(mut candidates: Vec<Candidate>, named: Option<&Digest>) -> Ordered {
    candidates.sort_by_cached_key(Candidate::key);
    let mut ordered = Ordered::default();
    for candidate in candidates {
        let reason = match named {
            Some(named) if *named != candidate.digest => Some(Reason::NotNamed),
            _ if ordered.candidates.iter().any(|better| better.digest == candidate.digest) => Some(Reason::Same),
            _ => None,
        };
        match reason {
            Some(reason) => ordered.others.push(PassedOver::of(&candidate, reason)),
            None => ordered.candidates.push(candidate),
        }
    }
    ordered
}

/// The one that is meant.
#[must_use]
pub(crate) fn choose(candidates: Vec<Candidate>, named: Option<&Digest>) -> Choice {
    order(candidates, named).first()
}

impl Ordered {
    /// Takes the first.
    #[must_use]
    pub fn first(self) -> Choice {
        self.take(0, &[])
    }

    /// Takes the candidate at `position`; those before it were passed over for `doubts`, in the same order.
    #[must_use]
    pub fn take(self, position: usize, doubts: &[String]) -> Choice {
        let Self { candidates, others } = self;
        let Some(chosen) = candidates.get(position).cloned() else {
            return Choice { chosen: None, passed_over: others };
        };
        let mut passed_over = Vec::new();
        for (place, other) in candidates.iter().enumerate().filter(|(place, _)| *place != position) {
            let doubt = doubts.get(place).filter(|_| place < position);
            let reason = doubt.map_or_else(|| beaten(other, &chosen), |doubt| Reason::Doubt(doubt.clone()));
            passed_over.push(PassedOver::of(other, reason));
        }
        passed_over.extend(others);
        Choice { chosen: Some(chosen), passed_over }
    }
}

/// By which rule `taken` goes before `other`.
fn beaten(other: &Candidate, taken: &Candidate) -> Reason {
    if other.place.position() != taken.place.position() {
        return Reason::Place;
    }
    if form_rank(&other.index) != form_rank(&taken.index) {
        return Reason::Form { taken: taken.index.form() };
    }
    if other.index.coverage() != taken.index.coverage() {
        return Reason::Fewer;
    }
    if other.created == taken.created { Reason::Digest } else { Reason::Older }
}

impl Reason {
    /// Whether a place or an index is faulty, which an operator should look into.
    #[must_use]
    pub const fn is_trouble(&self) -> bool {
        matches!(self, Self::Unasked(_) | Self::Unfit(_) | Self::Refused(_))
    }

    /// Whether this is nothing to look into: an image that was published by default has two forms of one index.
    #[must_use]
    pub const fn is_usual(&self) -> bool {
        match self {
            Self::Form { .. } | Self::Same | Self::NotNeeded | Self::NotNamed => true,
            Self::Place
            | Self::Fewer
            | Self::Older
            | Self::Digest
            | Self::Doubt(_)
            | Self::Unfit(_)
            | Self::Refused(_)
            | Self::Gone
            | Self::Foreign { .. }
            | Self::Unasked(_) => false,
        }
    }
}

impl PassedOver {
    fn of(candidate: &Candidate, reason: Reason) -> Self {
        Self { digest: Some(candidate.digest), place: candidate.place.clone(), reason }
    }

    /// A place that gave nothing.
    #[must_use]
    pub(crate) const fn place(place: IndexPlace, reason: Reason) -> Self {
        Self { digest: None, place, reason }
    }
}

impl IndexPlace {
    const fn position(&self) -> Option<usize> {
        match self {
            Self::Named { position, .. } => Some(*position),
            Self::Image | Self::Beside | Self::Local => None,
        }
    }
}

impl Created {
    /// Reads an RFC 3339 time.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        timestamp(text).map(|(seconds, nanoseconds)| Self(seconds, nanoseconds))
    }
}

impl fmt::Display for IndexPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named { repository, .. } => f.write_str(repository),
            Self::Image => f.write_str("the image itself"),
            Self::Beside => f.write_str("beside the image"),
            Self::Local => f.write_str("the local index store"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotNamed => f.write_str("another one was named"),
            Self::Place => f.write_str("a repository that was named for the image goes first"),
            Self::Form { taken } => write!(f, "the form {taken} goes first"),
            Self::Fewer => f.write_str("it covers fewer layers"),
            Self::Older => f.write_str("it is older"),
            Self::Digest => f.write_str("it is of the same time, and its digest is larger"),
            Self::Same => f.write_str("it is the same index in another place"),
            Self::Doubt(doubt) => f.write_str(doubt),
            Self::Unfit(why) => f.write_str(why),
            Self::Refused(why) => write!(f, "it is there, and the registry refuses to show it: {why}"),
            Self::Gone => f.write_str("it was kept locally, and its place does not have it any more"),
            Self::Foreign { origin } => write!(f, "it was fetched for another repository: {origin}"),
            Self::Unasked(why) => write!(f, "it could not be asked: {why}"),
            Self::NotNeeded => f.write_str("it was not asked: a repository that was named for the image has an index"),
        }
    }
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.digest {
            Some(digest) => write!(f, "index {digest} ({}) passed over: {}", self.place, self.reason),
            None => write!(f, "{}: {}", self.place, self.reason),
        }
    }
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
mod tests;
