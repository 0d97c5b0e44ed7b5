//! What a host of a registry is asked for, and the capability that it takes.

use crate::format::reference::ManifestName;
use crate::registry::hosts::Capabilities;

/// What a host is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Need {
    /// A blob, or a manifest by its digest.
    Content,
    /// A part of a blob.
    Part,
    /// A manifest by its tag.
    Tag,
    /// What refers to a manifest.
    Referrers,
    /// To take something.
    Push,
}

impl Need {
    pub(crate) fn of(name: &ManifestName) -> Self {
        match name {
            ManifestName::Tag(_) => Self::Tag,
            ManifestName::Digest(_) => Self::Content,
        }
    }

    /// What is refused with it: a repository's content is readable, or it is not.
    pub(crate) const fn refused(self) -> Self {
        match self {
            Self::Part => Self::Content,
            other => other,
        }
    }

    pub(crate) fn is_met(self, by: Capabilities) -> bool {
        match self {
            Self::Content | Self::Part => by.pull,
            // One request does both.
            Self::Tag => by.pull && by.resolve,
            Self::Referrers => by.referrers,
            Self::Push => by.push,
        }
    }

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Content | Self::Part => "pull",
            Self::Tag => "pull and resolve",
            Self::Referrers => "referrers",
            Self::Push => "push",
        }
    }
}
