//! Repositories that hold the indexes of other repositories' images.
//!
//! Not every image can have its index beside it: its registry may be read-only for its user, or refuse artifacts. So a
//! node can be configured where else to look, by rules that name images by pattern. What a rule names was chosen by the
//! node's operator, while every client with push access can add an index to an image: repositories of rules are asked
//! first.

use soci_index::format::class::{Class, Classified};
use soci_index::format::reference::RegistryReference;

use crate::layer::glob::is_like;

/// Where to look for the indexes of some images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexRule {
    /// Which images, as `HOST/REPOSITORY`, where `*` is any text and `?` any one letter.
    pub images: String,
    /// The registry to look in.
    pub registry: String,
    /// The repository to look in.
    pub repository: String,
}

/// Why a rule makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// The pattern is empty.
    #[error("a pattern of images is needed, as in docker.io/library/*")]
    Pattern,
    /// The repository is none.
    #[error("{text:?} is no repository: expected HOST/NAME without tag and digest")]
    Repository { text: String },
}

impl Classified for RuleError {
    fn class(&self) -> Class {
        Class::Usage
    }
}

impl IndexRule {
    /// A rule for the images that `images` describes, with their indexes in `repository`.
    ///
    /// # Errors
    /// [`RuleError`].
    pub fn new(images: &str, repository: &str) -> Result<Self, RuleError> {
        if images.is_empty() {
            return Err(RuleError::Pattern);
        }
        let parsed: Option<RegistryReference> = repository.parse().ok();
        // Spelt out, that is: with a host, without tag and digest.
        let parsed = parsed.filter(|parsed| format!("{}/{}", parsed.registry(), parsed.repository()) == repository);
        let parsed = parsed.ok_or_else(|| RuleError::Repository { text: repository.to_owned() })?;
        let (registry, repository) = (parsed.registry().to_owned(), parsed.repository().to_owned());
        Ok(Self { images: images.to_owned(), registry, repository })
    }

    /// Whether it is for images of this repository.
    #[must_use]
    pub fn is_for(&self, registry: &str, repository: &str) -> bool {
        is_like(self.images.as_bytes(), format!("{registry}/{repository}").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let rule = IndexRule::new("docker.io/*", "harbor.example/soci/index").unwrap();
        assert_eq!((rule.registry.as_str(), rule.repository.as_str()), ("harbor.example", "soci/index"));
        assert!(rule.is_for("docker.io", "library/busybox") && !rule.is_for("quay.io", "library/busybox"));
        assert!(IndexRule::new("*/team/?pp", "localhost:5000/i").unwrap().is_for("h.example", "team/app"));
        assert_eq!(IndexRule::new("", "harbor.example/soci"), Err(RuleError::Pattern));
        for bad in
            ["", "harbor.example", "busybox", "library/busybox", "harbor.example/a:tag", "oci:/tmp/x", "h.example/A"]
        {
            assert!(matches!(IndexRule::new("*", bad), Err(RuleError::Repository { .. })), "{bad}");
        }
    }
}
