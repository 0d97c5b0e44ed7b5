//! What kind of failure an error is: the one property of an error that callers outside its module decide by.
//!
//! Each error enum implements [`Classified`] beside its variants, exhaustively, so that a new variant does not compile
//! until it has a class. An exit (the exit code of a command, whether a webhook's job is tried again) maps classes and
//! knows no variant.

/// A kind of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The request cannot be carried out as it was made: a wrong name, option or configuration.
    Usage,
    /// Credentials are missing or were refused.
    Credentials,
    /// The registry or the network failed, and may not the next time.
    Registry,
    /// The registry understood and refused: quota, policy, immutable tag, media type, size.
    Refused,
    /// The image or an index is damaged, unusable or not what its digest says.
    Content,
    /// No layer of the image can be indexed.
    NothingToIndex,
    /// This machine: its disk, a mount, containerd.
    Local,
    /// None of these.
    Other,
}

/// An error that has a class.
pub trait Classified {
    /// The class of this error.
    fn class(&self) -> Class;
}
