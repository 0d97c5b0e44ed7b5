//! What a search has found so far, and what it passed over. Pure.

use crate::find::choose::{self, Candidate, IndexPlace, Ordered, PassedOver, Reason};
use crate::find::discover::{Fitting, Listed, Refused, Rejected};
use crate::find::{Kept, PATIENCE};
use crate::format::digest::Digest;
use crate::registry::RegistryError;

/// What a search has found.
#[derive(Debug, Default)]
pub struct Gathered {
    /// All that may be taken.
    pub candidates: Vec<Candidate>,
    /// What may not.
    pub passed_over: Vec<PassedOver>,
    pub(super) failures: Vec<RegistryError>,
    pub(super) refused: Vec<Refused>,
}

/// Why a place gave no answer.
pub(super) enum Unasked {
    Failed(RegistryError),
    Slow,
}

impl Gathered {
    /// Puts what was found in order. `named` is the digest that was asked for.
    #[must_use]
    pub fn order(self, named: Option<&Digest>) -> Ordered {
        let mut ordered = choose::order(self.candidates, named);
        ordered.others.extend(self.passed_over);
        ordered
    }

    /// The first error of a registry that could not be asked. It is one of the caller where there is no index and the
    /// caller has to say for certain that there is none.
    #[must_use]
    pub fn failure(&self) -> Option<&RegistryError> {
        self.failures.first()
    }

    /// Indexes that are there, as listed, and that their registry refuses to show.
    #[must_use]
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }

    pub(super) fn add(&mut self, answer: Result<Listed, Unasked>, place: &IndexPlace, name: &str, fetched: &[Kept]) {
        match answer {
            Ok(listed) => {
                self.reject(&listed, place);
                self.candidates.extend(listed.found.into_iter().map(|found| candidate(found, place.clone())));
            }
            Err(why) => {
                let copies = fetched.iter().filter(|kept| kept.is_of(name)).map(|kept| kept.as_copy_of(place.clone()));
                self.candidates.extend(copies);
                self.fail(place.clone(), why);
            }
        }
    }

    pub(super) fn fail(&mut self, place: IndexPlace, why: Unasked) {
        let text = match why {
            Unasked::Failed(error) => {
                let text = error.to_string();
                self.failures.push(error);
                text
            }
            Unasked::Slow => format!("it did not answer within {PATIENCE:?}"),
        };
        self.passed_over.push(PassedOver::place(place, Reason::Unasked(text)));
    }

    pub(super) fn unfit(&mut self, digest: Digest, place: IndexPlace, reason: String) {
        self.passed_over.push(PassedOver { digest: Some(digest), place, reason: Reason::Unfit(reason) });
    }

    pub(super) fn reject(&mut self, listed: &Listed, place: &IndexPlace) {
        let over = |digest: Digest, reason| PassedOver { digest: Some(digest), place: place.clone(), reason };
        let is_refused = |digest: &Digest| listed.refused.iter().any(|refused| refused.digest == *digest);
        let reason = |no: &Rejected| match is_refused(&no.digest) {
            true => Reason::Refused(no.reason.clone()),
            false => Reason::Unfit(no.reason.clone()),
        };
        self.passed_over.extend(listed.rejected.iter().map(|no| over(no.digest, reason(no))));
        self.refused.extend(listed.refused.iter().cloned());
        let taken = listed.found.first().map_or("", |found| found.index.form());
        self.passed_over.extend(listed.unread.iter().map(|entry| over(entry.digest, Reason::Form { taken })));
    }
}

pub(super) fn candidate(found: Fitting, place: IndexPlace) -> Candidate {
    let Fitting { raw, index, created, .. } = found;
    Candidate { digest: raw.digest, raw: raw.bytes, index, created, place, cached: false }
}
