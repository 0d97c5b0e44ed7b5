//! What others will see of a referrer that was pushed, and why some may not.
//!
//! A registry can list an entry and still keep clients from it: by a content type that strict ones do not take for the
//! API, or by facts that are not those of the manifest. What is compared here is what clients check.

use std::fmt;

use crate::format::model::Descriptor;

/// What shows that a registry has no referrers API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoApi {
    /// It says so.
    #[error("HTTP {0}")]
    Status(u16),
    /// The answer is of another kind: a login page, or a list that says that it is something else.
    #[error("the answer is {0:?}, not an image index")]
    ContentType(String),
    /// The answer says that it is a list, and is none.
    #[error("the answer is no image index: {0}")]
    Malformed(String),
    /// Another host answers.
    #[error("the registry redirects to another site")]
    OtherSite,
    /// It redirects to a forbidden target.
    #[error("{0}")]
    Redirect(String),
    /// No host has the capability.
    #[error("no host was asked")]
    NotAsked,
}

/// Which clients can discover a referrer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Visibility {
    /// Every client that knows referrers.
    Full,
    /// Not all of them.
    Partial(Vec<Blemish>),
}

/// Why some clients will not find a referrer, or not accept it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blemish {
    /// The list has another content type.
    ContentType { found: String },
    /// The entry has another size than the manifest.
    Size {
        listed: u64,
        /// Of the manifest.
        pushed: u64,
    },
    /// The entry has another type than the manifest, or none.
    ArtifactType {
        listed: String,
        /// Of the manifest.
        pushed: String,
    },
    /// The registry lists it and refuses to show it.
    Refused { reason: String },
    /// Clients that filter by this type do not get it.
    Filter { artifact_type: String },
}

impl fmt::Display for Blemish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ContentType { found } => write!(
                f,
                "the registry lists referrers as {found} (Harbor 2.8 and 2.9 do): strict clients read the fallback tag, \
                 which was written, others may see wrong sizes; update to Harbor 2.11 or later"
            ),
            Self::Size { listed, pushed } => write!(
                f,
                "the registry lists a wrong size, {listed} instead of {pushed} (Harbor before 2.11 does): clients that \
                 check it will not load the index; update it, or publish with --v2"
            ),
            Self::ArtifactType { listed, pushed } => write!(
                f,
                "the registry lists the type {listed:?} instead of {pushed:?}: clients that look for the type will not \
                 find the index; publish with --v2"
            ),
            Self::Refused { reason } => write!(
                f,
                "no client can read it: {reason}; have it signed as the registry demands (--sign-with COMMAND), or have \
                 unsigned content admitted"
            ),
            Self::Filter { artifact_type } => write!(
                f,
                "the registry does not list it for requests that filter by {artifact_type}: clients that do will not find \
                 the index; publish with --v2"
            ),
        }
    }
}

impl Visibility {
    /// Full, if there is nothing to say.
    #[must_use]
    pub fn of(blemishes: Vec<Blemish>) -> Self {
        if blemishes.is_empty() { Self::Full } else { Self::Partial(blemishes) }
    }

    /// Notes another thing to say.
    pub fn add(&mut self, blemish: Blemish) {
        match self {
            Self::Full => *self = Self::Partial(vec![blemish]),
            Self::Partial(blemishes) => blemishes.push(blemish),
        }
    }

    /// Whether the registry refuses to show it.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.blemishes().iter().any(|blemish| matches!(blemish, Blemish::Refused { .. }))
    }

    /// What there is to say.
    #[must_use]
    pub(crate) fn blemishes(&self) -> &[Blemish] {
        match self {
            Self::Full => &[],
            Self::Partial(blemishes) => blemishes,
        }
    }

    /// The same in words.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.blemishes().iter().map(Blemish::to_string).collect()
    }
}

/// What is wrong with a list that is not quite the API.
pub(super) fn of_no_api(no_api: &NoApi) -> Vec<Blemish> {
    match no_api {
        // Some clients look at nothing but the body.
        NoApi::ContentType(found) if found == "application/json" => vec![Blemish::ContentType { found: found.clone() }],
        // Everybody sees that this is no list.
        NoApi::ContentType(_)
        | NoApi::Status(_)
        | NoApi::Malformed(_)
        | NoApi::OtherSite
        | NoApi::Redirect(_)
        | NoApi::NotAsked => Vec::new(),
    }
}

/// What is wrong with an entry.
pub(super) fn of_entry(pushed: &Descriptor, listed: &Descriptor) -> Vec<Blemish> {
    let mut blemishes = Vec::new();
    if pushed.size != listed.size {
        blemishes.push(Blemish::Size { listed: listed.size, pushed: pushed.size });
    }
    if pushed.kind() != listed.kind() {
        let (listed, pushed) = (listed.kind().to_owned(), pushed.kind().to_owned());
        blemishes.push(Blemish::ArtifactType { listed, pushed });
    }
    blemishes
}
