//! Names of images: a registry reference, an OCI layout directory, an archive file, a name that containerd knows.
//!
//! The registry form rests on the grammar of the distribution project (`grammar`). Invariants: a [`RegistryReference`]
//! has a tag, a digest or both; its digest is one that we can check; `docker.io` names are spelt out
//! (`docker.io/library/debian:latest`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;

mod grammar;

/// A registry's answer to "which manifest": by tag or by digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ManifestName {
    /// A tag, which may move.
    Tag(String),
    /// A digest, which cannot.
    Digest(Digest),
}

impl ManifestName {
    /// The tag, if it is one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        match self {
            Self::Tag(tag) => Some(tag),
            Self::Digest(_) => None,
        }
    }
}

impl fmt::Display for ManifestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// An image on a registry: `host[:port]/repository[:tag][@digest]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegistryReference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// It does not follow the grammar.
    #[error(
        "{text:?} is not an image reference ({reason}): expected host/repository:tag, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:TAG] or containerd:NAME"
    )]
    Malformed {
        /// The text as given, cut at 300 characters.
        text: String,
        reason: String,
    },
    /// The path of a layout or archive is empty, or the name in containerd.
    #[error("{text:?} names nothing: expected {expected}")]
    NoPath {
        /// The text as given, cut at 300 characters.
        text: String,
        expected: &'static str,
    },
}

impl Classified for ReferenceError {
    fn class(&self) -> Class {
        Class::Usage
    }
}

impl RegistryReference {
    /// The registry as written, for example `docker.io` or `localhost:5000`.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository, for example `library/debian`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was given (or implied: `latest`).
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What to ask the registry for. A digest wins over a tag: the tag is then a comment.
    #[must_use]
    pub(crate) fn manifest_name(&self) -> ManifestName {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => ManifestName::Digest(*digest),
            (None, Some(tag)) => ManifestName::Tag(tag.clone()),
            (None, None) => ManifestName::Tag("latest".to_owned()),
        }
    }
}

impl FromStr for RegistryReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let bad = |reason: String| ReferenceError::Malformed { text: shown(text), reason };
        let parts = grammar::parse(text).map_err(|error| bad(error.to_string()))?;
        let digest = parts.digest.map(str::parse).transpose().map_err(|error| bad(format!("{error}")))?;
        let tag = parts.tag.map(str::to_owned);
        Ok(Self { registry: parts.registry, repository: parts.repository, tag, digest })
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// An image, wherever it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    Registry(RegistryReference),
    /// In an OCI layout directory: `oci:DIR[:TAG]`.
    Layout {
        /// The directory that holds `oci-layout` and `index.json`.
        directory: PathBuf,
        /// The tag, as index.json names it.
        tag: Option<String>,
    },
    /// In a tar file that holds an OCI layout: `oci-archive:FILE[:TAG]`.
    Archive {
        /// The tar file.
        file: PathBuf,
        /// The tag, as index.json names it.
        tag: Option<String>,
    },
    /// In a tar file that `docker save` has written: `docker-archive:FILE[:TAG]`.
    Saved {
        /// The tar file.
        file: PathBuf,
        /// The tag, as manifest.json or index.json names it.
        tag: Option<String>,
    },
    /// In containerd's content store: `containerd:NAME`.
    Containerd {
        /// The name, as containerd has it.
        name: String,
    },
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let path = |rest: &str, expected| {
            let (path, tag) = split_tag(rest);
            if path.is_empty() {
                return Err(ReferenceError::NoPath { text: shown(text), expected });
            }
            Ok((PathBuf::from(path), tag.map(str::to_owned)))
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (directory, tag) = path(rest, "oci:DIR[:TAG]")?;
            return Ok(Self::Layout { directory, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) = path(rest, "oci-archive:FILE[:TAG]")?;
            return Ok(Self::Archive { file, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, tag) = path(rest, "docker-archive:FILE[:TAG]")?;
            return Ok(Self::Saved { file, tag });
        }
        if let Some(name) = text.strip_prefix("containerd:").filter(|name| !is_port(name)) {
            if name.is_empty() {
                return Err(ReferenceError::NoPath { text: shown(text), expected: "containerd:NAME" });
            }
            return Ok(Self::Containerd { name: name.to_owned() });
        }
        text.strip_prefix(REGISTRY_SCHEME).unwrap_or(text).parse().map(Self::Registry)
    }
}

/// What the name of an image may begin with to say that it is in a registry, as skopeo has it. Most names need not say
/// so.
pub const REGISTRY_SCHEME: &str = "docker://";

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, path, tag) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::Layout { directory, tag } => ("oci", directory, tag),
            Self::Archive { file, tag } => ("oci-archive", file, tag),
            Self::Saved { file, tag } => ("docker-archive", file, tag),
            Self::Containerd { name } => return write!(f, "containerd:{name}"),
        };
        let path = path.display().to_string();
        match tag {
            Some(tag) => write!(f, "{scheme}:{path}:{tag}"),
            // The end of the path must not be taken for a tag.
            None if split_tag(&path) != (&path, None) => write!(f, "{scheme}:{path}:"),
            None => write!(f, "{scheme}:{path}"),
        }
    }
}

impl Reference {
    /// The same with the path of a layout or archive split off where the disk says: `image.tar:team/db:latest` is the
    /// image `team/db:latest` in `image.tar`, unless there is a file `image.tar:team/db`. Where nothing is there yet,
    /// the path ends in a directory that is there. `exists` looks.
    #[must_use]
    pub fn settled(self, exists: impl Fn(&Path) -> bool) -> Self {
        let settle = |path: PathBuf, tag: Option<String>| resplit(path, tag, &exists);
        match self {
            Self::Layout { directory, tag } => {
                let (directory, tag) = settle(directory, tag);
                Self::Layout { directory, tag }
            }
            Self::Archive { file, tag } => {
                let (file, tag) = settle(file, tag);
                Self::Archive { file, tag }
            }
            Self::Saved { file, tag } => {
                let (file, tag) = settle(file, tag);
                Self::Saved { file, tag }
            }
            other @ (Self::Registry(_) | Self::Containerd { .. }) => other,
        }
    }
}

fn resplit(path: PathBuf, tag: Option<String>, exists: &impl Fn(&Path) -> bool) -> (PathBuf, Option<String>) {
    let Some(spelled) = path.to_str().filter(|_| !exists(&path)).map(str::to_owned) else { return (path, tag) };
    let shorter = || {
        let colons = spelled.rmatch_indices(':').filter(|(at, _)| *at > 0 && at + 1 < spelled.len());
        colons.map(|(at, _)| (Path::new(&spelled[..at]), &spelled[at + 1..]))
    };
    let parent_exists = |path: &Path| match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => true,
        Some(parent) => exists(parent),
        None => false,
    };
    // `app:latest`, distinguished from a path only by its form.
    let is_name = |name: &str| {
        let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        tag.is_some() && name.starts_with(|first: char| first.is_ascii_lowercase()) && name.bytes().all(letter)
    };
    let in_odd_directory = path.parent().is_some_and(|parent| parent.to_string_lossy().contains(':') && exists(parent));
    let found = match shorter().find(|(path, _)| exists(path)) {
        _ if in_odd_directory => None,
        Some(found) => Some(found),
        None if parent_exists(&path) => shorter().next().filter(|(_, name)| is_name(name)),
        None => shorter().find(|(path, _)| parent_exists(path)),
    };
    match found {
        Some((path, name)) => {
            let tag = tag.map_or_else(|| name.to_owned(), |tag| format!("{name}:{tag}"));
            (path.to_owned(), Some(tag))
        }
        None => (path, tag),
    }
}

/// Splits `PATH[:TAG]`. What follows the last colon is a tag only if it could be one: it has no slash.
fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((path, tag)) if !tag.is_empty() && !tag.contains('/') => (path, Some(tag)),
        Some((path, "")) => (path, None),
        _ => (text, None),
    }
}

/// Whether `PORT/REPOSITORY` follows: a machine may be called containerd, too.
fn is_port(text: &str) -> bool {
    text.split_once('/').is_some_and(|(port, _)| port.parse::<u16>().is_ok())
}

fn shown(text: &str) -> String {
    text.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn registry_references() {
        let full = format!("localhost:5000/a/b:1@{HEX}");
        let by_digest = format!("h.example/a@{HEX}");
        for (text, expected) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:13", "docker.io/library/debian:13"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/library/debian:13", "docker.io/library/debian:13"),
            ("harbor.example/p/r:v1.2", "harbor.example/p/r:v1.2"),
            ("127.0.0.1:5000/x:y", "127.0.0.1:5000/x:y"),
            ("[::1]:5000/x:y", "[::1]:5000/x:y"),
            ("[::1]/x", "[::1]/x:latest"),
            (full.as_str(), full.as_str()),
            (by_digest.as_str(), by_digest.as_str()),
        ] {
            let parsed: Reference = text.parse().unwrap();
            assert!(matches!(parsed, Reference::Registry(_)));
            assert_eq!(parsed.to_string(), expected, "{text}");
            assert_eq!(expected.parse::<Reference>().unwrap(), parsed, "{text}");
        }
    }

    #[test]
    fn digest_wins_over_tag() {
        let parsed: RegistryReference = format!("h.example/a:1@{HEX}").parse().unwrap();
        assert_eq!(parsed.manifest_name(), ManifestName::Digest(HEX.parse().unwrap()));
        assert_eq!(parsed.tag(), Some("1"));
        let parsed: RegistryReference = "h.example/a:1".parse().unwrap();
        assert_eq!(parsed.manifest_name(), ManifestName::Tag("1".into()));
    }

    #[test]
    fn paths() {
        for (text, path, tag) in [
            ("oci:dir", "dir", None),
            ("oci:dir:", "dir", None),
            ("oci:/a/b:v1", "/a/b", Some("v1")),
            ("oci:/a:b/c", "/a:b/c", None),
            ("oci:/a:b/c:d", "/a:b/c", Some("d")),
            ("oci:/a:b:", "/a:b", None),
        ] {
            let expected = Reference::Layout { directory: path.into(), tag: tag.map(str::to_owned) };
            assert_eq!(text.parse::<Reference>().unwrap(), expected, "{text}");
            assert_eq!(expected.to_string().parse::<Reference>().unwrap(), expected, "{expected}");
            let saved = text.replace("oci:", "docker-archive:");
            let expected = Reference::Saved { file: path.into(), tag: tag.map(str::to_owned) };
            assert_eq!(saved.parse::<Reference>().unwrap(), expected, "{saved}");
            assert_eq!(expected.to_string().parse::<Reference>().unwrap(), expected, "{expected}");
            let archive = text.replace("oci:", "oci-archive:");
            let expected = Reference::Archive { file: path.into(), tag: tag.map(str::to_owned) };
            assert_eq!(archive.parse::<Reference>().unwrap(), expected, "{archive}");
        }
    }

    #[test]
    fn whole_names_after_paths() {
        let there = ["image.tar", "/a:b", "/a:b/c", "/a", "/"];
        for (text, path, tag) in [
            ("image.tar:team/db:latest", "image.tar", Some("team/db:latest")),
            ("image.tar:team/db", "image.tar", Some("team/db")),
            ("image.tar:h.example:5000/db:1", "image.tar", Some("h.example:5000/db:1")),
            ("image.tar:latest", "image.tar", Some("latest")),
            ("image.tar:@1", "image.tar", Some("@1")),
            ("image.tar", "image.tar", None),
            ("/a:b/c", "/a:b/c", None),
            ("/a:b/c:d", "/a:b/c", Some("d")),
            ("/a:b:x/y:d", "/a:b", Some("x/y:d")),
            // Nothing is there yet.
            ("new:v1", "new", Some("v1")),
            ("new:team/db:latest", "new", Some("team/db:latest")),
            ("new:app:latest", "new", Some("app:latest")),
            ("image.tar:app:latest", "image.tar", Some("app:latest")),
            ("at-10:00:00.tar:v1", "at-10:00:00.tar", Some("v1")),
            ("/a/new:team/db:v", "/a/new", Some("team/db:v")),
            ("/a:b/new:v", "/a:b/new", Some("v")),
            ("no/where:v", "no/where", Some("v")),
        ] {
            for (scheme, make) in [
                ("oci", (|directory, tag| Reference::Layout { directory, tag }) as fn(_, _) -> _),
                ("oci-archive", |file, tag| Reference::Archive { file, tag }),
                ("docker-archive", |file, tag| Reference::Saved { file, tag }),
            ] {
                let parsed: Reference = format!("{scheme}:{text}").parse().unwrap();
                let settled = parsed.settled(|path| there.iter().any(|there| Path::new(there) == path));
                assert_eq!(settled, make(PathBuf::from(path), tag.map(str::to_owned)), "{text}");
                assert_eq!(settled.to_string(), format!("{scheme}:{text}"));
            }
        }
    }

    #[test]
    fn names_in_containerd() {
        for name in ["docker.io/library/debian:13", "any name", "localhost:5000/a"] {
            let parsed: Reference = format!("containerd:{name}").parse().unwrap();
            assert_eq!(parsed, Reference::Containerd { name: name.to_owned() });
            assert_eq!(parsed.to_string(), format!("containerd:{name}"));
        }
        assert!(matches!("containerd:5000/a:b".parse(), Ok(Reference::Registry(_))));
    }

    #[test]
    fn refused() {
        let upper = format!("h.example/a@{}", HEX.to_uppercase());
        for text in [
            "",
            "UPPER/Case:1",
            "UPPER/case:1",
            "h.example/",
            "h.example/a:",
            "a b",
            "oci:",
            "oci::t",
            "oci-archive:",
            "docker-archive:",
            "containerd:",
            "[::1/x",
        ]
        .into_iter()
        .chain(["h.example/a@sha256:00", "[zz]:1/x", "https://h.example/a", &upper])
        {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }
}
