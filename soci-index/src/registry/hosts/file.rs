//! Reading `hosts.toml`: text in, hosts out.
//!
//! The keys are containerd's. At the top they are about `server`, or about the registry itself if there is no `server`;
//! in a `[host."URL"]` table about that host. The library's structures are walked by hand instead of deserialised,
//! because the order of the tables is the order of the hosts, and error messages need line numbers. Pure. Invariants:
//! an unknown capability, a value of the wrong kind and a URL that names more than a place are errors; an unknown key
//! is reported, because a newer containerd may know it.

use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};
use url::Url;

use crate::format::class::{Class, Classified};
use crate::format::gotime;
use crate::registry::credentials::Secret;
use crate::registry::hosts::{Capabilities, ClientCertificate, Host, HostRules, Hosts};

/// Why a file about hosts cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostsError {
    /// It is not TOML.
    #[error("{}:{line}: {what}", file.display())]
    Syntax {
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        what: String,
    },
    /// A key has a value that makes no sense.
    #[error("{}:{line}: {key}: {fault}", file.display())]
    Value {
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        key: String,
        fault: ValueFault,
    },
}

impl Classified for HostsError {
    fn class(&self) -> Class {
        Class::Usage
    }
}

/// What is wrong with a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueFault {
    /// Another kind of value is needed.
    #[error("expected {expected}")]
    Kind { expected: &'static str },
    /// A key that must be there is not.
    #[error("{key} is missing")]
    Missing { key: &'static str },
    /// The format of long ago.
    #[error("this is version 1 of the format, which is not read: write [[registry]] tables")]
    Version,
    /// Unknown capability.
    #[error("{name:?} is no capability: expected pull, resolve, push or referrers")]
    Capability { name: String },
    /// The host is not one.
    #[error(transparent)]
    Url(#[from] UrlFault),
    #[error("{text:?} is no duration: expected a number and a unit, like 500ms or 1m30s")]
    Duration { text: String },
}

/// Why a text names no host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlFault {
    /// Not a URL.
    #[error("this is no URL of a host")]
    Malformed,
    /// Neither http nor https.
    #[error("only http and https are spoken")]
    Scheme,
    /// A user, a password, a query or a fragment.
    #[error("the URL of a host has neither user nor query nor fragment")]
    More,
}

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostsFile {
    pub hosts: Hosts,
    /// Keys that have no meaning, with their lines.
    pub unknown: Vec<(usize, String)>,
}

/// Reads the text of `file`, beside which relative paths start.
///
/// # Errors
/// [`HostsError`].
pub(crate) fn parse(text: &str, file: &Path) -> Result<HostsFile, HostsError> {
    let mut reading = Reading::new(text, file);
    let table = reading.table()?;
    let table = table.get_ref();
    let (rules, override_path) = reading.rules(table, true)?;
    let mut hosts = Hosts { rules, ..Hosts::default() };
    for (key, value) in table {
        match key.get_ref().as_ref() {
            "server" => {
                let server = reading.text_of(key, value)?;
                if !server.is_empty() {
                    hosts.server = Some(reading.url(key, server, override_path)?);
                }
            }
            "host" => hosts.before = reading.hosts(key, value)?,
            _ => {}
        }
    }
    Ok(HostsFile { hosts, unknown: reading.unknown })
}

/// Reads the address of a host: https unless it says otherwise, and `/v2` below it unless `path_is_whole`.
///
/// # Errors
/// [`UrlFault`].
pub fn url(text: &str, path_is_whole: bool) -> Result<Url, UrlFault> {
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let mut url = Url::parse(&whole).map_err(|_| UrlFault::Malformed)?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(UrlFault::Scheme);
    }
    let named = !url.username().is_empty() || url.password().is_some();
    if named || url.query().is_some() || url.fragment().is_some() {
        return Err(UrlFault::More);
    }
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !path_is_whole && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    url.set_path(&path);
    Ok(url)
}

pub(super) type Key<'t> = Spanned<DeString<'t>>;
pub(super) type Value<'t> = Spanned<DeValue<'t>>;

/// A file being read.
pub(super) struct Reading<'t> {
    text: &'t str,
    file: &'t Path,
    unknown: Vec<(usize, String)>,
}

impl<'t> Reading<'t> {
    pub(super) fn new(text: &'t str, file: &'t Path) -> Self {
        Self { text, file, unknown: Vec::new() }
    }

    pub(super) fn file(&self) -> &'t Path {
        self.file
    }

    /// The whole of it.
    pub(super) fn table(&self) -> Result<Spanned<DeTable<'t>>, HostsError> {
        DeTable::parse(self.text).map_err(|error| HostsError::Syntax {
            file: self.file.to_owned(),
            line: self.line(error.span().map_or(0, |span| span.start)),
            what: error.message().to_owned(),
        })
    }

    /// What a table lacks; `key` leads to the table.
    pub(super) fn missing(&self, key: &Key<'_>, missing: &'static str) -> HostsError {
        HostsError::Value {
            file: self.file.to_owned(),
            line: self.line(key.span().start),
            key: key.get_ref().to_string(),
            fault: ValueFault::Missing { key: missing },
        }
    }

    fn line(&self, at: usize) -> usize {
        let before = &self.text.as_bytes()[..at.min(self.text.len())];
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }

    pub(super) fn fault(&self, key: &Key<'_>, value: &Value<'_>, fault: ValueFault) -> HostsError {
        // A table begins where its header stands, which is where its key is.
        let at = if value.get_ref().is_table() { key.span().start } else { value.span().start };
        HostsError::Value { file: self.file.to_owned(), line: self.line(at), key: key.get_ref().to_string(), fault }
    }

    pub(super) fn kind(&self, key: &Key<'_>, value: &Value<'_>, expected: &'static str) -> HostsError {
        self.fault(key, value, ValueFault::Kind { expected })
    }

    pub(super) fn text_of<'v>(&self, key: &Key<'_>, value: &'v Value<'_>) -> Result<&'v str, HostsError> {
        value.get_ref().as_str().ok_or_else(|| self.kind(key, value, "a text"))
    }

    pub(super) fn flag(&self, key: &Key<'_>, value: &Value<'_>) -> Result<bool, HostsError> {
        value.get_ref().as_bool().ok_or_else(|| self.kind(key, value, "true or false"))
    }

    /// A text, or a list of texts.
    fn texts(&self, key: &Key<'_>, value: &Value<'_>) -> Result<Vec<String>, HostsError> {
        if let Some(text) = value.get_ref().as_str() {
            return Ok(vec![text.to_owned()]);
        }
        let expected = "a text or a list of texts";
        let items = value.get_ref().as_array().ok_or_else(|| self.kind(key, value, expected))?;
        let text = |item: &Value<'_>| item.get_ref().as_str().map(str::to_owned);
        items.iter().map(|item| text(item).ok_or_else(|| self.kind(key, item, expected))).collect()
    }

    fn url(&self, key: &Key<'_>, text: &str, path_is_whole: bool) -> Result<Url, HostsError> {
        url(text, path_is_whole).map_err(|fault| HostsError::Value {
            file: self.file.to_owned(),
            line: self.line(key.span().start),
            key: key.get_ref().to_string(),
            fault: fault.into(),
        })
    }

    /// The path that a text names, seen from the file.
    fn path(&self, text: &str) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("")).join(text)
    }

    /// The hosts of the `host` tables, in the order in which they are written.
    fn hosts(&mut self, key: &Key<'_>, value: &Value<'_>) -> Result<Vec<Host>, HostsError> {
        let tables = value.get_ref().as_table().ok_or_else(|| self.kind(key, value, "tables"))?;
        let mut tables: Vec<_> = tables.iter().collect();
        tables.sort_by_key(|(name, _)| name.span().start);
        let mut hosts = Vec::new();
        for (name, value) in tables {
            let table = value.get_ref().as_table().ok_or_else(|| self.kind(name, value, "a table"))?;
            let (rules, override_path) = self.rules(table, false)?;
            hosts.push(Host { url: self.url(name, name.get_ref(), override_path)?, plain: None, rules });
        }
        Ok(hosts)
    }

    /// The keys of one host, and whether its path is whole.
    fn rules(&mut self, table: &DeTable<'_>, is_top: bool) -> Result<(HostRules, bool), HostsError> {
        let (mut rules, mut override_path) = (HostRules::default(), false);
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "capabilities" => rules.capabilities = self.capabilities(key, value)?,
                "ca" => rules.ca_files = self.texts(key, value)?.iter().map(|text| self.path(text)).collect(),
                "client" => rules.client_certificates = self.client(key, value)?,
                "skip_verify" => rules.skip_verify = self.flag(key, value)?,
                "header" => rules.headers = self.headers(key, value)?,
                "override_path" => override_path = self.flag(key, value)?,
                "dial_timeout" => {
                    let text = self.text_of(key, value)?;
                    let fault = || ValueFault::Duration { text: text.to_owned() };
                    let found = gotime::duration(text).map_err(|_| self.fault(key, value, fault()))?;
                    // Go takes zero for "no limit of mine".
                    rules.dial_timeout = Some(found).filter(|found| !found.is_zero());
                }
                "server" | "host" if is_top => {}
                other => self.unknown.push((self.line(key.span().start), other.to_owned())),
            }
        }
        Ok((rules, override_path))
    }

    fn capabilities(&self, key: &Key<'_>, value: &Value<'_>) -> Result<Capabilities, HostsError> {
        let items = value.get_ref().as_array().ok_or_else(|| self.kind(key, value, "a list of capabilities"))?;
        let mut found = Capabilities::NONE;
        for item in items {
            match self.text_of(key, item)? {
                "pull" => found.pull = true,
                "resolve" => found.resolve = true,
                "push" => found.push = true,
                "referrers" => found.referrers = true,
                other => return Err(self.fault(key, item, ValueFault::Capability { name: other.to_owned() })),
            }
        }
        // An empty list says nothing, and nothing said is everything.
        Ok(if found == Capabilities::NONE { Capabilities::ALL } else { found })
    }

    /// One file with certificate and key, a list of such files, or a list of pairs.
    fn client(&self, key: &Key<'_>, value: &Value<'_>) -> Result<Vec<ClientCertificate>, HostsError> {
        let expected = "a file, a list of files, or a list of pairs of certificate and key";
        let both = |text: &str| ClientCertificate { certificate: self.path(text), key: None };
        if let Some(text) = value.get_ref().as_str() {
            return Ok(vec![both(text)]);
        }
        let items = value.get_ref().as_array().ok_or_else(|| self.kind(key, value, expected))?;
        let mut found = Vec::new();
        for item in items {
            if let Some(text) = item.get_ref().as_str() {
                found.push(both(text));
                continue;
            }
            let pair: Vec<&str> = match item.get_ref().as_array() {
                Some(pair) => pair.iter().filter_map(|part| part.get_ref().as_str()).collect(),
                None => Vec::new(),
            };
            let [certificate, secret] = pair[..] else { return Err(self.kind(key, item, expected)) };
            let secret = (!secret.is_empty()).then(|| self.path(secret));
            found.push(ClientCertificate { certificate: self.path(certificate), key: secret });
        }
        Ok(found)
    }

    fn headers(&self, key: &Key<'_>, value: &Value<'_>) -> Result<Vec<(String, Secret)>, HostsError> {
        let table = value.get_ref().as_table().ok_or_else(|| self.kind(key, value, "a table of headers"))?;
        let mut found = Vec::new();
        for (name, value) in table {
            let values = self.texts(name, value)?.into_iter();
            found.extend(values.map(|text| (name.get_ref().to_string(), Secret::new(text))));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
