//! On whose word something is reused.

use std::sync::Arc;

use crate::clock;
use crate::format::digest::Digest;
use crate::image::ImageSource;
use crate::trust::Trust;
use crate::trust::fetch::{Verdict, search};

/// Default number of tags that are searched. Each costs a manifest or two, and some registries count these as pulls, of
/// which they allow so many an hour.
pub const REUSE_TAGS: usize = 8;

/// What of existing indexes is relied on. By default all that fits, unverified.
#[derive(Debug, Clone, Default)]
pub struct Reuse {
    /// Only what an index lists that bears a good signature by one of these; if empty, only what was built in this run.
    /// For what is going to be signed, or becomes part of an image.
    pub signed_by: Option<Arc<Trust>>,
    /// Only what is built again and found to be the same.
    pub verified: bool,
}

/// Why what was reused is relied on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relied {
    /// It is not known to be right.
    Unverified,
    /// It was built again and is the same.
    Verified,
    /// It is listed by an index that is signed.
    Signed,
    /// It was built on this machine, in an earlier run.
    BuiltHere,
}

/// Where something was reused from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReusedFrom {
    /// The index that lists it.
    pub index: Digest,
    /// Where that is.
    pub place: String,
    /// Whether all that the index lists was built on this machine.
    pub built_here: bool,
}

impl Reuse {
    /// Why what is found is relied on.
    #[must_use]
    pub(crate) const fn relied(&self) -> Relied {
        match (self.verified, &self.signed_by) {
            (true, _) => Relied::Verified,
            (false, Some(_)) => Relied::Signed,
            (false, None) => Relied::Unverified,
        }
    }

    /// Whether what an index in `origin` lists may be reused. `signed` are its manifest and those that name it: one of
    /// them has to be signed.
    pub(crate) async fn allows(&self, origin: &ImageSource, signed: &[Digest]) -> bool {
        let Some(trust) = &self.signed_by else { return true };
        let Some(repository) = origin.repository() else { return false };
        if trust.is_empty() {
            return false;
        }
        let now = clock::seconds();
        for manifest in signed {
            match search(repository, manifest, trust, now).await {
                Verdict::Good(_) => return true,
                none @ Verdict::None(_) => tracing::debug!(%manifest, "not reused: {none}"),
            }
        }
        false
    }
}

impl std::fmt::Display for Relied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unverified => "not verified",
            Self::Verified => "verified",
            Self::Signed => "signed",
            Self::BuiltHere => "built here",
        })
    }
}
