//! Content digests: `algorithm:hex`, as the OCI image specification writes them.
//!
//! A [`Digest`] that exists is well formed: parsing is the only way in from text, so nothing later has to check again.
//! Invariant: the text form is canonical (lower-case hex of exactly the algorithm's length), so equal digests are equal
//! strings and a digest may be used as a file name after replacing its colon.

use crate::format::class::{Class, Classified};
use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256, Sha512};

/// The hash functions the OCI image specification registers for digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// SHA-256, the one every registry uses.
    Sha256,
    /// SHA-512, allowed by the specification and rarely seen.
    Sha512,
}

impl Algorithm {
    /// Length of the digest in bytes.
    #[must_use]
    pub(crate) const fn length(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// The name before the colon.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

/// A digest of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    bytes: [u8; 64],
}

/// Why a text is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// There is no `algorithm:` in front, or it is one we do not know.
    #[error("{text:?} is not a digest: expected sha256: or sha512: and lower-case hex digits")]
    Algorithm {
        /// The text as given, cut at 100 characters.
        text: String,
    },
    /// The hex part has the wrong length or other characters than `0-9a-f`.
    #[error("{text:?} is not a digest: expected {expected} lower-case hex digits after the colon")]
    Hex {
        /// The text as given, cut at 100 characters.
        text: String,
        expected: usize,
    },
}

impl Classified for DigestError {
    fn class(&self) -> Class {
        Class::Content
    }
}

impl Digest {
    /// The SHA-256 digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_sha256(Sha256::digest(bytes).into())
    }

    /// Wraps a finished SHA-256.
    #[must_use]
    pub fn from_sha256(sha256: [u8; 32]) -> Self {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&sha256);
        Self { algorithm: Algorithm::Sha256, bytes }
    }

    /// Which hash function made it.
    #[must_use]
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The raw digest bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.length()]
    }

    /// The hex part alone.
    #[must_use]
    pub fn hex(&self) -> String {
        hex(self.bytes())
    }

    /// Whether `content` has this digest.
    #[must_use]
    pub fn matches(&self, content: &[u8]) -> bool {
        let mut hasher = Hasher::new(self.algorithm);
        hasher.update(content);
        hasher.finish() == *self
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let shown = || text.chars().take(100).collect();
        let (algorithm, digits) = match text.split_once(':') {
            Some(("sha256", digits)) => (Algorithm::Sha256, digits),
            Some(("sha512", digits)) => (Algorithm::Sha512, digits),
            _ => return Err(DigestError::Algorithm { text: shown() }),
        };
        let expected = 2 * algorithm.length();
        let bad = || DigestError::Hex { text: shown(), expected };
        if digits.len() != expected {
            return Err(bad());
        }
        let mut bytes = [0; 64];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            *byte = (nibble(pair[0]).ok_or_else(bad)? << 4) | nibble(pair[1]).ok_or_else(bad)?;
        }
        Ok(Self { algorithm, bytes })
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Computes a [`Digest`] of bytes that come in pieces.
#[derive(Debug, Clone)]
pub struct Hasher(HasherState);

#[derive(Debug, Clone)]
enum HasherState {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    /// Starts a hash by the given algorithm.
    #[must_use]
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha256 => HasherState::Sha256(Sha256::new()),
            Algorithm::Sha512 => HasherState::Sha512(Sha512::new()),
        })
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            HasherState::Sha256(state) => state.update(bytes),
            HasherState::Sha512(state) => state.update(bytes),
        }
    }

    /// The digest of all bytes added.
    #[must_use]
    pub fn finish(self) -> Digest {
        match self.0 {
            HasherState::Sha256(state) => Digest::from_sha256(state.finalize().into()),
            HasherState::Sha512(state) => Digest { algorithm: Algorithm::Sha512, bytes: state.finalize().into() },
        }
    }
}

/// Lower-case hex digits of `bytes`.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

const fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let empty512 = "sha512:cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e";
        for text in [empty, empty512] {
            let digest: Digest = text.parse().unwrap();
            assert_eq!(digest.to_string(), text);
            assert!(digest.matches(b""));
            assert!(!digest.matches(b"x"));
        }
        assert_eq!(Digest::of(b"").to_string(), empty);
        let upper = empty.to_uppercase().replace("SHA256", "sha256");
        for bad in ["", "sha256", "md5:00", "sha256:00", &empty[..70], &upper, &format!("{empty}0"), "sha512:e3b0"] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
