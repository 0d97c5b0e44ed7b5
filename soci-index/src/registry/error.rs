//! What can go wrong between us and a registry, as facts.
//!
//! One enum for the subsystem. Every message is one line that names the registry and the thing and, where there is
//! something to do, says it. Invariant: no variant holds a token, a password, the query of a URL or the output of a
//! credential program, so errors may be logged anywhere. Nothing here is an absent manifest or blob that the protocol
//! allows to be absent: those are values.

use std::ops::Range;
use std::time::Duration;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::registry::redirect::{ShownUrl, TargetError};

/// How a connection failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportKind {
    /// No connection: refused, unreachable, or the name does not resolve.
    Connect,
    /// The server's certificate or the handshake is not acceptable.
    Tls,
    /// Nothing came for too long.
    Timeout,
    /// The connection ended in the middle.
    Interrupted,
    /// The proxy on the way wants a login that it was not given, or another one.
    Proxy,
    /// The request could not be made.
    Request,
}

impl TransportKind {
    /// Whether another attempt may go better.
    #[must_use]
    pub(crate) fn is_transient(self) -> bool {
        match self {
            Self::Connect | Self::Timeout | Self::Interrupted => true,
            Self::Tls | Self::Proxy | Self::Request => false,
        }
    }
}

/// A failed exchange with one server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{url}: {detail}")]
pub struct TransportError {
    /// In which way.
    pub kind: TransportKind,
    /// What was asked, without its query.
    pub url: ShownUrl,
    /// The cause in words.
    pub detail: String,
}

/// Why a fallback tag may not be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForeignTag {
    /// The tag holds something else than a list.
    #[error("it holds {media_type}, not an image index")]
    NotAnIndex { media_type: String },
    /// The registry takes the tag for the digest and answers with the image itself.
    #[error("the registry answers with the image itself")]
    Subject,
    /// The list is not well formed.
    #[error("its content is no image index: {reason}")]
    Malformed { reason: String },
}

/// What a registry thinks of a login that it refused for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginVerdict {
    /// None was shown.
    None,
    /// It is good, and lacks a right.
    Good,
    Wrong,
    /// The registry did not say.
    Unknown,
}

impl LoginVerdict {
    const fn text(self) -> &'static str {
        match self {
            Self::None | Self::Unknown => "",
            Self::Good => ": the login is good, and has no right to this",
            Self::Wrong => ": the registry does not know this login, or its password is another",
        }
    }
}

/// Why a registry operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The client could not be set up.
    #[error("cannot set up access to {registry}: {reason}")]
    Setup { registry: String, reason: String },
    /// The exchange failed, for good or too often.
    #[error("{registry}: {error}{}", tries(*attempts))]
    Transport { registry: String, attempts: u32, error: TransportError },
    /// Time is up.
    #[error("{registry}/{repository}: {what} did not end within {allowed:?}{}", because(last))]
    Deadline {
        registry: String,
        repository: String,
        what: String,
        /// How long it was allowed to take without progress.
        allowed: Duration,
        /// The last failure before, if there was one.
        last: Option<String>,
    },
    /// An answer that we cannot use.
    #[error("{registry}/{repository}: {what}: HTTP {status}{}{}", server_says(code, message), hint(*status, message))]
    Status { registry: String, repository: String, what: String, status: u16, code: Option<Box<str>>, message: String },
    /// No access, also after asking for a new token.
    #[error("{registry}/{repository}: access denied to {scope} ({credentials}{}){}{}", login.text(), server_says(&None, message), unasked(*challenged, *login))]
    Unauthorized {
        registry: String,
        repository: String,
        scope: String,
        /// Which credentials were used, in words that hold no secret.
        credentials: &'static str,
        message: String,
        challenged: bool,
        login: LoginVerdict,
    },
    /// No credentials where there should be some.
    #[error("{registry}: cannot read credentials: {reason}")]
    Credentials { registry: String, reason: String },
    /// The registry sends us to a token service that must not get a secret.
    #[error("{registry}: its token service {realm:?} is refused: {reason}")]
    Realm {
        registry: String,
        /// What it named, cut at its query.
        realm: String,
        reason: TargetError,
    },
    /// The token service did not give a token.
    #[error("{registry}: no token from {realm}: {reason}")]
    Token { registry: String, realm: ShownUrl, status: Option<u16>, reason: String },
    /// A redirect that must not be followed.
    #[error("{registry}/{repository}: a redirect from {from} is refused: {reason}")]
    Redirect { registry: String, repository: String, from: ShownUrl, reason: String },
    /// Content that must be there is not.
    #[error("{registry}/{repository} has no {what}")]
    Missing { registry: String, repository: String, what: String },
    /// The content is not what its digest says.
    #[error("{registry}/{repository}: {what} has digest {found}, expected {expected}")]
    Digest { registry: String, repository: String, what: String, expected: Box<Digest>, found: String },
    /// The content is not as long as it should be.
    #[error("{registry}/{repository}: {what} has {found} bytes, expected {expected}")]
    Size { registry: String, repository: String, what: String, expected: u64, found: u64 },
    /// More than we are willing to hold.
    #[error("{registry}/{repository}: {what} is larger than the limit of {limit} bytes")]
    TooLarge { registry: String, repository: String, what: String, limit: u64 },
    /// The registry answered a range request with other bytes than asked for.
    #[error("{registry}/{repository}: bytes {}..{} of {digest} were asked for, the answer is {found}", range.start, range.end)]
    WrongRange {
        registry: String,
        repository: String,
        digest: Box<Digest>,
        /// What was asked for, end exclusive.
        range: Range<u64>,
        found: String,
    },
    /// The blob is shorter than the range asked for.
    #[error("{registry}/{repository}: {digest} has no bytes {}..{}{}", range.start, range.end, size_is(*size))]
    RangeNotSatisfiable {
        registry: String,
        repository: String,
        digest: Box<Digest>,
        /// What was asked for, end exclusive.
        range: Range<u64>,
        size: Option<u64>,
    },
    /// A document that cannot be read.
    #[error("{registry}/{repository}: {what} cannot be read: {reason}")]
    Malformed { registry: String, repository: String, what: String, reason: String },
    /// The source of an upload failed.
    #[error("{registry}/{repository}: cannot read what should be uploaded as {digest}: {reason}")]
    Source { registry: String, repository: String, digest: Box<Digest>, reason: String },
    /// The fallback tag is not a referrers list.
    #[error(
        "{registry}/{repository}: the tag {tag} cannot list referrers: {reason}; nothing was changed; publish to another repository with --to, or into the image itself with --v2"
    )]
    ForeignTag { registry: String, repository: String, tag: String, reason: ForeignTag },
    /// Others kept overwriting the fallback tag.
    #[error("{registry}/{repository}: {digest} was lost from the tag {tag} {writes} times to other writers; run again")]
    FallbackLost { registry: String, repository: String, tag: String, digest: Box<Digest>, writes: u32 },
    /// The registry has no referrers API, and does not take the fallback tag either.
    #[error(
        "{registry}/{repository}: {digest} is stored, but this registry has no place where an image's indexes are listed: it has no referrers API ({api}) and refuses the tag instead ({tag}); publish to another repository with --to, or into the image itself with --v2"
    )]
    NoListing {
        registry: String,
        repository: String,
        digest: Box<Digest>,
        /// What shows that there is no API.
        api: String,
        tag: String,
    },
    /// The registry does not list the referrers of an image, though it may well serve the image.
    #[error(
        "{registry}/{repository}: the question what refers to {subject} is not answered ({answer}); an index can be published into the image itself with --v2, or to another repository with --to"
    )]
    NoReferrers {
        registry: String,
        repository: String,
        subject: Box<Digest>,
        answer: String,
        /// Whether it refused, which other credentials may change.
        is_refusal: bool,
    },
    /// The registry took the manifest and does not list it.
    #[error(
        "{registry}/{repository}: {digest} is stored, but the referrers of {subject} do not list it, so no client will find it"
    )]
    NotListed { registry: String, repository: String, digest: Box<Digest>, subject: Box<Digest> },
}

impl Classified for RegistryError {
    fn class(&self) -> Class {
        match self {
            Self::Unauthorized { .. }
            | Self::Credentials { .. }
            | Self::Realm { .. }
            | Self::Token { .. }
            | Self::NoReferrers { is_refusal: true, .. } => Class::Credentials,
            Self::Digest { .. } | Self::Size { .. } => Class::Content,
            Self::Setup { .. } => Class::Usage,
            error @ Self::Status { status: 403, .. } if error.lacks_rights() => Class::Credentials,
            Self::Status { status: 400 | 403 | 405 | 409 | 412 | 413 | 415 | 422, .. } => Class::Refused,
            Self::Transport { .. }
            | Self::Deadline { .. }
            | Self::Status { .. }
            | Self::Redirect { .. }
            | Self::Missing { .. }
            | Self::TooLarge { .. }
            | Self::WrongRange { .. }
            | Self::RangeNotSatisfiable { .. }
            | Self::Malformed { .. }
            | Self::Source { .. }
            | Self::ForeignTag { .. }
            | Self::FallbackLost { .. }
            | Self::NoListing { .. }
            | Self::NoReferrers { is_refusal: false, .. }
            | Self::NotListed { .. } => Class::Registry,
        }
    }
}

impl RegistryError {
    /// Whether the connection failed in a way that another attempt may not.
    #[must_use]
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::Transport { error, .. } if error.kind.is_transient())
    }
}

impl RegistryError {
    /// Whether a right is missing or a login is wrong. A status of 403 is also how registries say that a quota is full,
    /// that they are read-only, or that a project accepts no pushes at all: no login changes these.
    #[must_use]
    pub fn lacks_rights(&self) -> bool {
        match self {
            Self::Status { status: 403, code, message, .. } => {
                let is_denial = |code: &str| matches!(code, "DENIED" | "UNAUTHORIZED" | "FORBIDDEN");
                let is_denial = code.as_deref().is_none_or(is_denial);
                is_denial && hint(403, message).is_empty() && !is_read_only(message)
            }
            other => other.is_refusal() || matches!(other, Self::Realm { .. } | Self::Token { .. }),
        }
    }

    /// Whether the registry or its token service denied access, or no source could provide credentials.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Unauthorized { .. } | Self::Credentials { .. } => true,
            Self::Status { status, .. } => matches!(status, 401 | 403),
            Self::Token { status, .. } => matches!(status, Some(401 | 403)),
            Self::NoReferrers { is_refusal, .. } => *is_refusal,
            _ => false,
        }
    }
}

impl RegistryError {
    /// The error of a question for referrers: what the registry said, without what it is about.
    pub(crate) fn about_referrers(self, repository: String, subject: Digest) -> Self {
        let is_refusal = self.is_refusal();
        let (registry, answer) = match &self {
            Self::Unauthorized { registry, credentials, message, .. } => {
                // What it advises is of no use here: the image could be read.
                let credentials = credentials.split(':').next().unwrap_or_default();
                (registry, format!("HTTP 401 with {credentials}{}", server_says(&None, message)))
            }
            Self::Status { registry, status, code, message, .. } => {
                (registry, format!("HTTP {status}{}", server_says(code, message)))
            }
            Self::Transport { registry, attempts, error, .. } => (registry, format!("{error}{}", tries(*attempts))),
            Self::Deadline { registry, allowed, last, .. } => {
                (registry, format!("no answer within {allowed:?}{}", because(last)))
            }
            _ => return self,
        };
        let (registry, subject) = (registry.clone(), Box::new(subject));
        Self::NoReferrers { registry, repository, subject, answer, is_refusal }
    }
}

fn tries(attempts: u32) -> String {
    if attempts > 1 { format!(" (tried {attempts} times)") } else { String::new() }
}

fn because(last: &Option<String>) -> String {
    last.as_ref().map(|last| format!("; last failure: {last}")).unwrap_or_default()
}

fn size_is(size: Option<u64>) -> String {
    size.map(|size| format!(", it has {size} in all")).unwrap_or_default()
}

fn server_says(code: &Option<Box<str>>, message: &str) -> String {
    match (code, message) {
        (None, "") => String::new(),
        (Some(code), "") => format!(" {code}"),
        (None, message) => format!(": {message}"),
        (Some(code), message) => format!(" {code}: {message}"),
    }
}

fn is_read_only(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    message.contains("read only") || message.contains("read-only") || message.contains("readonly")
}

/// What to do. What a status means beyond its number stands in the message, in words that registries have kept for
/// years.
fn hint(status: u16, message: &str) -> &'static str {
    match status {
        403 if message.contains("proxy project") => {
            " (a proxy-cache project takes nothing: publish to another repository with --to)"
        }
        403 if message.contains("quota") || message.contains("exceed the configured upper limit") => {
            " (free space in the project, or raise its quota)"
        }
        404 | 400 if message.contains("roject") && message.contains("not found") => " (create the project first)",
        412 => " (an immutable tag, or a policy of the project, forbids this)",
        413 => " (larger than the registry accepts)",
        415 => " (the registry does not accept this media type)",
        429 => " (too many requests: wait, or log in if you have not)",
        _ => "",
    }
}

/// A registry that refuses without a challenge will not accept a login either.
fn unasked(challenged: bool, login: LoginVerdict) -> &'static str {
    if challenged || login != LoginVerdict::None {
        ""
    } else {
        " (it asks for no login here: the project or repository does not exist, or these credentials may not see it; \
         check the name, or create it)"
    }
}
