//! Exit codes, and which error leads to which: the one table between failures and scripts.
//!
//! The codes are part of the interface (see `soci --help`); a new kind of error does not compile until it has one.

use std::process::ExitCode;

use soci_fs::foresight::profile::pack::PackError;
use soci_fs::layer::private::PrivateError;
use soci_fs::layer::proof::ProofError;
use soci_fs::layer::reader::{Cause, ReadError};
use soci_fs::layer::source::SourceError;
use soci_fs::layer::store::StoreError as LayerStoreError;
use soci_fs::layer::unpack::UnpackError;
use soci_fs::open::OpenError;
use soci_fs::open::trust::PolicyError;
use soci_index::format::decode::DecodeError;
use soci_index::format::manifest::ManifestError;
use soci_index::format::profile::ProfileError;
use soci_index::format::ztoc::ZtocError;
use soci_index::image::foreign::ForeignError;
use soci_index::image::sink::SinkError;
use soci_index::image::store::StoreError;
use soci_index::image::urls::UrlError;
use soci_index::image::{ImageError, SavedError};
use soci_index::indexing::IndexError;
use soci_index::indexing::pipeline::PipelineError;
use soci_index::publish::PublishError;
use soci_index::publish::build::BuildError;
use soci_index::publish::prefetched::PrefetchedError;
use soci_index::publish::profiles::ProfilesError;
use soci_index::registry::RegistryError;

#[cfg(feature = "node")]
mod node;

/// What a command ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done, or there was nothing to do.
    Success = 0,
    /// Something that has no code of its own.
    Failure = 1,
    /// Wrong arguments. clap uses the same code.
    Usage = 2,
    /// Credentials are missing or were refused.
    Credentials = 3,
    /// The registry or the network.
    Registry = 4,
    /// The image or an index is damaged, unusable or not what its digest says.
    BadContent = 5,
    /// No layer of the image can be indexed, or all are too small.
    NothingToIndex = 6,
    /// This machine: its disk (full, missing, not permitted), a mount, containerd.
    Local = 7,
    /// The registry understood and does not take it: quota, policy, immutable tag, media type, size.
    Refused = 8,
    /// The index was pushed, and the command that was to sign it failed.
    Signing = 9,
    /// Everything was in place already; only where that was asked for.
    UpToDate = 10,
    /// An interrupt (Ctrl-C), as shells have it: 128 and the number of the signal.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A failure whose code is known where it happens.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Coded {
    /// The code.
    pub exit: Exit,
    /// One line that names the thing and says what to do.
    pub message: String,
}

/// A failure that another process of ours has reported already, on the same standard error.
#[derive(Debug, thiserror::Error)]
#[error("the serving process ended with exit code {code}")]
pub struct Reported {
    /// What it ended with.
    pub code: u8,
}

/// Makes a [`Coded`] failure.
pub fn fail(exit: Exit, message: impl Into<String>) -> anyhow::Error {
    Coded { exit, message: message.into() }.into()
}

/// The code of a failure: that of the first error in its chain that has one.
#[must_use]
pub fn code(error: &anyhow::Error) -> Exit {
    error.chain().find_map(known).unwrap_or(Exit::Failure)
}

/// A failure in words: what happened and its causes, each once. Errors that say their cause themselves, and pass it on as
/// their source, too, would be said twice.
#[must_use]
pub fn words(error: &anyhow::Error) -> String {
    let mut words = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if words.is_empty() {
            words = cause;
        } else if !words.contains(&cause) {
            words = format!("{words}: {cause}");
        }
    }
    words
}

fn known(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(coded) = error.downcast_ref::<Coded>() {
        return Some(coded.exit);
    }
    match error.downcast_ref::<PipelineError<std::io::Error>>() {
        Some(PipelineError::Read(_)) => return Some(Exit::Local),
        Some(PipelineError::Index(_)) => return Some(Exit::BadContent),
        None => {}
    }
    if let Some(error) = error.downcast_ref::<OpenError>() {
        return Some(of_open(error));
    }
    if let Some(error) = error.downcast_ref::<ReadError>() {
        return Some(of_read(&error.cause));
    }
    if let Some(error) = error.downcast_ref::<ProofError>() {
        return Some(of_proof(error));
    }
    if let Some(error) = error.downcast_ref::<PolicyError>() {
        return Some(of_policy(error));
    }
    if error.is::<LayerStoreError>() || error.is::<PrivateError>() {
        return Some(Exit::Local);
    }
    #[cfg(feature = "mount")]
    if error.is::<soci_fs::fuse::mount::MountError>() {
        return Some(Exit::Local);
    }
    #[cfg(feature = "node")]
    if let Some(exit) = node::known(error) {
        return Some(exit);
    }
    if let Some(error) = error.downcast_ref::<PublishError>() {
        return Some(of_publish(error));
    }
    if let Some(error) = error.downcast_ref::<ProfilesError>() {
        return Some(of_profiles(error));
    }
    if let Some(error) = error.downcast_ref::<PrefetchedError>() {
        return Some(of_prefetched(error));
    }
    if let Some(error) = error.downcast_ref::<PackError>() {
        return Some(of_pack(error));
    }
    if error.is::<ProfileError>() {
        return Some(Exit::BadContent);
    }
    if let Some(error) = error.downcast_ref::<ImageError>() {
        return Some(of_image(error));
    }
    if let Some(error) = error.downcast_ref::<RegistryError>() {
        return Some(of_registry(error));
    }
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return Some(of_store(error));
    }
    if error.is::<IndexError>() || error.is::<ZtocError>() || error.is::<DecodeError>() || error.is::<ManifestError>() {
        return Some(Exit::BadContent);
    }
    error.is::<std::io::Error>().then_some(Exit::Local)
}

fn of_read(cause: &Cause) -> Exit {
    match cause {
        Cause::Source(error) => of_source(error),
        Cause::Short { .. } | Cause::Deadline { .. } => Exit::Registry,
        Cause::Store(_) => Exit::Local,
        Cause::Decode(_)
        | Cause::WindowBlob(_)
        | Cause::NoWindow { .. }
        | Cause::Suspended { .. }
        | Cause::Header(_)
        | Cause::Window { .. }
        | Cause::Condemned { .. }
        | Cause::OutOfRange { .. } => Exit::BadContent,
        Cause::Windows(cause) => of_read(cause),
        Cause::Abandoned => Exit::Failure,
    }
}

fn of_proof(error: &ProofError) -> Exit {
    match error {
        ProofError::Source { cause, .. } => of_source(cause),
        ProofError::Store { .. } => Exit::Local,
        ProofError::Index { .. }
        | ProofError::WrongBlob { .. }
        | ProofError::WrongTar { .. }
        | ProofError::Content { .. }
        | ProofError::Table { .. } => Exit::BadContent,
        ProofError::Incomplete { .. } | ProofError::Abandoned { .. } => Exit::Failure,
    }
}

fn of_prefetched(error: &PrefetchedError) -> Exit {
    match error {
        PrefetchedError::Registry(error) => of_registry(error),
        PrefetchedError::Image(error) => of_image(error),
        PrefetchedError::NoIndex { .. } | PrefetchedError::NothingNamed { .. } => Exit::Failure,
        PrefetchedError::Manifest { .. } | PrefetchedError::Ztoc { .. } => Exit::BadContent,
    }
}

fn of_publish(error: &PublishError) -> Exit {
    match error {
        PublishError::Build(BuildError::Image(error)) | PublishError::Image(error) => of_image(error),
        PublishError::Build(BuildError::Layer { .. } | BuildError::LayerDigest { .. } | BuildError::DiffId { .. })
        | PublishError::Manifest { .. }
        | PublishError::SpanIndex { .. } => Exit::BadContent,
        PublishError::Build(BuildError::Stopped) => Exit::Failure,
        PublishError::Registry(error) | PublishError::Beside { source: error } => of_registry(error),
        PublishError::Store(error) => of_store(error),
        PublishError::Sink(SinkError::Registry(error)) => of_registry(error),
        PublishError::Sink(SinkError::Image(error)) => of_image(error),
        PublishError::Sink(SinkError::Store(error)) => of_store(error),
        PublishError::Sink(SinkError::Stopped) => Exit::Failure,
        PublishError::NothingToIndex { .. } => Exit::NothingToIndex,
        PublishError::Moved { .. } => Exit::Failure,
        PublishError::NoReferrers { .. } | PublishError::Signed { .. } => Exit::Usage,
        PublishError::Ztoc { .. } | PublishError::Enable { .. } | PublishError::Sparse { .. } => Exit::BadContent,
    }
}

fn of_profiles(error: &ProfilesError) -> Exit {
    match error {
        ProfilesError::Image(error) => of_image(error),
        ProfilesError::Registry(error) => of_registry(error),
        ProfilesError::Profile { .. } => Exit::BadContent,
        ProfilesError::Encode(_) => Exit::Failure,
        ProfilesError::Pack { .. } => Exit::Local,
    }
}

const fn of_pack(error: &PackError) -> Exit {
    match error {
        PackError::Read(_) | PackError::Abandoned => Exit::Failure,
        PackError::Write(_) | PackError::Store(_) => Exit::Local,
        PackError::Stream { .. } => Exit::Registry,
        PackError::Range { .. } => Exit::BadContent,
    }
}

const fn of_policy(error: &PolicyError) -> Exit {
    match error {
        PolicyError::File { .. } => Exit::Local,
        PolicyError::Content { .. }
        | PolicyError::NoSigner { .. }
        | PolicyError::NoPattern
        | PolicyError::NobodyTrusted
        | PolicyError::NothingChecked => Exit::Usage,
    }
}

fn of_open(error: &OpenError) -> Exit {
    match error {
        OpenError::Image(error) => of_image(error),
        OpenError::Registry(error) => of_registry(error),
        OpenError::IndexStore(error) => of_store(error),
        OpenError::NoSuchIndex { .. } | OpenError::NotLazy { .. } | OpenError::Abandoned => Exit::Failure,
        OpenError::NoPart { .. } => Exit::Failure,
        OpenError::Condemned { .. } | OpenError::NotALayer { .. } | OpenError::Foreign { .. } => Exit::BadContent,
        OpenError::Profile(error) => of_profiles(error),
        OpenError::Unpack(error) => of_unpack(error),
        OpenError::Store(_) => Exit::Local,
    }
}

fn of_unpack(error: &UnpackError) -> Exit {
    match error {
        UnpackError::Source { cause, .. } => of_source(cause),
        UnpackError::Index { .. }
        | UnpackError::Zstd { .. }
        | UnpackError::WrongBlob { .. }
        | UnpackError::WrongTar { .. }
        | UnpackError::Algorithm { .. } => Exit::BadContent,
        UnpackError::Store { .. } => Exit::Local,
        UnpackError::Abandoned { .. } => Exit::Failure,
    }
}

fn of_source(error: &SourceError) -> Exit {
    match error {
        SourceError::Local { .. } => Exit::Local,
        SourceError::Registry(error) => of_registry(error),
        SourceError::Stored(error) => of_store(error),
        SourceError::OutOfRange { .. } => Exit::BadContent,
        SourceError::Denied { .. } => Exit::Credentials,
        // The image's own place is asked first.
        SourceError::Everywhere { causes } => causes.first().map_or(Exit::Registry, of_source),
        SourceError::Unavailable { .. }
        | SourceError::Missing { .. }
        | SourceError::Empty
        | SourceError::NoParts
        | SourceError::Protocol { .. } => Exit::Registry,
    }
}

fn of_image(error: &ImageError) -> Exit {
    match error {
        ImageError::Registry(error) => of_registry(error),
        ImageError::Store(error) => of_store(error),
        ImageError::Malformed { .. } | ImageError::NotAnImage { .. } => Exit::BadContent,
        ImageError::NotFound { .. } | ImageError::Ambiguous { .. } | ImageError::NoPlatform { .. } => Exit::Failure,
        ImageError::NoImage { .. } => Exit::NothingToIndex,
        ImageError::Urls { source, .. } => of_url(source),
        ImageError::Stopped => Exit::Failure,
        ImageError::Elsewhere { .. } => Exit::Usage,
        ImageError::Foreign(error) => of_foreign(error),
    }
}

const fn of_url(error: &UrlError) -> Exit {
    match error {
        UrlError::Setup { .. } => Exit::Failure,
        UrlError::Transport(_) | UrlError::Status { .. } => Exit::Registry,
        UrlError::None | UrlError::Target { .. } | UrlError::Size { .. } | UrlError::Digest { .. } => Exit::BadContent,
    }
}

const fn of_foreign(error: &ForeignError) -> Exit {
    match error {
        ForeignError::Missing { .. } => Exit::Failure,
        ForeignError::Failed { .. } | ForeignError::Store { .. } => Exit::Local,
        ForeignError::Size { .. }
        | ForeignError::Digest { .. }
        | ForeignError::TooLarge { .. }
        | ForeignError::Range { .. }
        | ForeignError::Malformed { .. } => Exit::BadContent,
    }
}

fn of_registry(error: &RegistryError) -> Exit {
    match error {
        RegistryError::Unauthorized { .. }
        | RegistryError::Credentials { .. }
        | RegistryError::Realm { .. }
        | RegistryError::Token { .. }
        | RegistryError::NoReferrers { is_refusal: true, .. } => Exit::Credentials,
        RegistryError::Digest { .. } | RegistryError::Size { .. } => Exit::BadContent,
        RegistryError::Setup { .. } => Exit::Usage,
        error @ RegistryError::Status { status: 403, .. } if error.lacks_rights() => Exit::Credentials,
        RegistryError::Status { status: 400 | 403 | 405 | 409 | 412 | 413 | 415 | 422, .. } => Exit::Refused,
        RegistryError::Transport { .. }
        | RegistryError::Deadline { .. }
        | RegistryError::Status { .. }
        | RegistryError::Redirect { .. }
        | RegistryError::Missing { .. }
        | RegistryError::TooLarge { .. }
        | RegistryError::WrongRange { .. }
        | RegistryError::RangeNotSatisfiable { .. }
        | RegistryError::Malformed { .. }
        | RegistryError::Source { .. }
        | RegistryError::ForeignTag { .. }
        | RegistryError::FallbackLost { .. }
        | RegistryError::NoListing { .. }
        | RegistryError::NoReferrers { is_refusal: false, .. }
        | RegistryError::NotListed { .. } => Exit::Registry,
    }
}

const fn of_store(error: &StoreError) -> Exit {
    match error {
        StoreError::Io { .. } | StoreError::NotALayout { .. } => Exit::Local,
        StoreError::Malformed { .. }
        | StoreError::Digest { .. }
        | StoreError::Size { .. }
        | StoreError::TooLarge { .. }
        | StoreError::Range { .. }
        | StoreError::Missing { .. } => Exit::BadContent,
        StoreError::Saved { reason, .. } => of_saved(reason),
    }
}

const fn of_saved(error: &SavedError) -> Exit {
    match error {
        SavedError::Ambiguous { .. } | SavedError::NoSuchTag { .. } => Exit::Failure,
        SavedError::NoManifest => Exit::Local,
        SavedError::Json { .. }
        | SavedError::Missing { .. }
        | SavedError::Outside { .. }
        | SavedError::Links { .. }
        | SavedError::TooMany { .. } => Exit::BadContent,
    }
}
