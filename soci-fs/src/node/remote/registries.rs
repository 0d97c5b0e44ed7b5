//! The registries that a node speaks to, and where else it looks for indexes.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use soci_index::format::digest::Digest;
use soci_index::format::reference::ManifestName;
use soci_index::image::ImageSource;
use soci_index::registry::{ClientOptions, Registry, RegistryError, Repository};

use crate::node::remote::elsewhere::IndexRule;

/// The registries that were spoken to, each with its connections and tokens.
#[derive(Debug)]
pub struct Registries {
    client: ClientOptions,
    rules: Vec<IndexRule>,
    known: Mutex<HashMap<String, Registry>>,
}

impl Registries {
    /// Reaches all registries by these options, and looks for indexes by these rules, too.
    #[must_use]
    pub fn new(client: ClientOptions, rules: Vec<IndexRule>) -> Self {
        Self { client, rules, known: Mutex::default() }
    }

    pub(super) fn source(
        &self,
        registry: &str,
        repository: &str,
        manifest: Digest,
    ) -> Result<ImageSource, RegistryError> {
        let repository = self.repository(registry, repository)?;
        Ok(ImageSource::in_registry(&repository, ManifestName::Digest(manifest)))
    }

    /// Where else indexes of images in a repository may be.
    pub(super) fn index_repositories(
        &self,
        registry: &str,
        repository: &str,
    ) -> Result<Vec<Repository>, RegistryError> {
        let rules = self.rules.iter().filter(|rule| rule.is_for(registry, repository));
        rules.map(|rule| self.repository(&rule.registry, &rule.repository)).collect()
    }

    fn repository(&self, registry: &str, repository: &str) -> Result<Repository, RegistryError> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known().get(registry).cloned();
        let registry = match found {
            Some(registry) => registry,
            None => {
                // Reads files, so not under the lock; a concurrent second caller uses the first one's result.
                let new = Registry::new(registry, self.client.clone())?;
                known().entry(registry.to_owned()).or_insert(new).clone()
            }
        };
        Ok(registry.repository(repository))
    }
}
