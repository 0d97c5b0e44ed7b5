//! Exit codes, and which error leads to which: the one table between failures and scripts.
//!
//! The codes are part of the interface (see `soci --help`); a new kind of error does not compile until it has one.

use std::process::ExitCode;

use soci_fs::foresight::profile::pack::PackError;
use soci_fs::layer::private::PrivateError;
use soci_fs::layer::proof::ProofError;
use soci_fs::layer::reader::ReadError;
use soci_fs::layer::store::StoreError as LayerStoreError;
use soci_fs::open::OpenError;
use soci_fs::open::trust::PolicyError;
use soci_index::format::class::{Class, Classified};
use soci_index::format::decode::DecodeError;
use soci_index::format::manifest::ManifestError;
use soci_index::format::profile::ProfileError;
use soci_index::format::ztoc::ZtocError;
use soci_index::image::ImageError;
use soci_index::image::store::StoreError;
use soci_index::indexing::IndexError;
use soci_index::indexing::pipeline::PipelineError;
use soci_index::publish::PublishError;
use soci_index::publish::prefetched::PrefetchedError;
use soci_index::publish::profiles::ProfilesError;
use soci_index::registry::RegistryError;

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

/// A failure in words: what happened and its causes, each once. Errors that say their cause themselves, and pass it on
/// as their source, too, would be said twice.
#[must_use]
pub fn message(error: &anyhow::Error) -> String {
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

/// The class of an error, if it is one of those listed.
macro_rules! class_of {
    ($error:expr; $($known:ty),* $(,)?) => {
        None$(.or_else(|| $error.downcast_ref::<$known>().map(Classified::class)))*
    };
}

fn known(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(coded) = error.downcast_ref::<Coded>() {
        return Some(coded.exit);
    }
    if error.is::<std::io::Error>() {
        return Some(Exit::Local);
    }
    let class = class_of!(error;
        PipelineError<std::io::Error>,
        OpenError,
        ReadError,
        ProofError,
        PolicyError,
        LayerStoreError,
        PrivateError,
        PublishError,
        ProfilesError,
        PrefetchedError,
        PackError,
        ProfileError,
        ImageError,
        RegistryError,
        StoreError,
        IndexError,
        ZtocError,
        DecodeError,
        ManifestError,
    );
    class.or_else(|| of_features(error)).map(Exit::from)
}

/// The class of an error of the rooms that are built by a feature.
fn of_features(error: &(dyn std::error::Error + 'static)) -> Option<Class> {
    #[cfg(feature = "mount")]
    if let Some(error) = error.downcast_ref::<soci_fs::fuse::mount::MountError>() {
        return Some(error.class());
    }
    #[cfg(feature = "node")]
    if let Some(class) = class_of!(error;
        soci_fs::node::rpull::PullError,
        soci_fs::node::grpc::containerd::ContainerdError,
    ) {
        return Some(class);
    }
    let _ = error;
    None
}

impl From<Class> for Exit {
    fn from(class: Class) -> Self {
        match class {
            Class::Usage => Self::Usage,
            Class::Credentials => Self::Credentials,
            Class::Registry => Self::Registry,
            Class::Refused => Self::Refused,
            Class::Content => Self::BadContent,
            Class::NothingToIndex => Self::NothingToIndex,
            Class::Local => Self::Local,
            Class::Other => Self::Failure,
        }
    }
}
