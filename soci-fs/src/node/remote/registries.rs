//! The registries that a node speaks to, and where else it looks for indexes.

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;
use soci_index::format::digest::Digest;
use soci_index::format::reference::ManifestName;
use soci_index::image::ImageSource;
use soci_index::registry::{ClientOptions, Registry, RegistryError, Repository, RequestHeaders};

use crate::node::remote::elsewhere::IndexRule;

/// The registries that were spoken to, each with its connections and tokens.
#[derive(Debug)]
pub struct Registries {
    client: ClientOptions,
    rules: Vec<IndexRule>,
    /// Names of the headers that clients may add to requests.
    custom_headers: Vec<String>,
    known: Mutex<HashMap<String, Registry>>,
}

impl Registries {
    /// Reaches all registries by these options, and looks for indexes by these rules, too. Of the headers that labels
    /// ask for, those in `custom_headers` are sent.
    #[must_use]
    pub fn new(client: ClientOptions, rules: Vec<IndexRule>, custom_headers: Vec<String>) -> Self {
        Self { client, rules, custom_headers, known: Mutex::default() }
    }

    /// Those of the headers that labels ask for that are sent.
    pub(super) fn allowed(&self, asked: &BTreeMap<String, String>) -> RequestHeaders {
        let is_listed = |name: &str| self.custom_headers.iter().any(|listed| listed.eq_ignore_ascii_case(name));
        let listed = asked.iter().filter(|(name, _)| is_listed(name));
        let listed = listed.map(|(name, value)| (name.clone(), value.clone())).collect();
        RequestHeaders::new(listed).unwrap_or_else(|error| {
            tracing::warn!(%error, "headers that a label asks for are not sent");
            RequestHeaders::default()
        })
    }

    pub(super) fn source(
        &self,
        registry: &str,
        repository: &str,
        manifest: Digest,
        headers: &RequestHeaders,
    ) -> Result<ImageSource, RegistryError> {
        let repository = self.repository(registry, repository)?.with_headers(headers.clone());
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
        let known = || self.known.lock();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_sent_if_the_operator_lists_them() {
        let registries = Registries::new(ClientOptions::default(), Vec::new(), vec!["X-Request-Id".to_owned()]);
        let allowed = |asked: &[(&str, &str)]| {
            let asked = asked.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            registries.allowed(&asked).iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>()
        };
        assert_eq!(allowed(&[("x-request-id", "7"), ("x-other", "8")]), ["x-request-id: 7"]);
        assert_eq!(allowed(&[("x-request-id", "7\r\nInjected: 8")]), [""; 0]);
        assert_eq!(allowed(&[]), [""; 0]);
    }
}
