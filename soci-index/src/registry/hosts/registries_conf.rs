//! Reading `registries.conf`, which configures mirrors for podman, buildah, skopeo and CRI-O: text in, hosts out.
//!
//! Version 2 of the format. Its tables are about *prefixes*: a registry (`docker.io`), a part of one (`quay.io/team`),
//! or all subdomains of a name (`*.example.com`); the longest one that fits a repository decides. A table names mirrors
//! or a replacement for the registry, or blocks it. Mirrors and other places may keep images under other names, so that
//! names are rewritten, in scopes too.
//!
//! What is about short names, and credential helpers, is not ours. `insecure` means here: any certificate is believed,
//! and a mirror is tried over plain HTTP after that; for the registry itself plain HTTP is asked for by `--plain-http`.
//! Mirrors for tags alone (`pull-from-mirror = "tag-only"`) are not used: what a tag names is then read elsewhere
//! anyway.
//!
//! Pure. Invariants: a table that is blocked has no host; hosts of one table are asked in the order of the text, the
//! place itself last; a value of the wrong kind is an error, for what looks like a ban must not be passed over.

use std::path::{Path, PathBuf};

use toml::de::DeTable;
use url::Url;

use crate::registry::hosts::file::{self, HostsError, Key, Reading, UrlFault, Value, ValueFault};
use crate::registry::hosts::{Blocked, Capabilities, Host, HostRules, Hosts, Repositories};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MirrorTable {
    /// What it is about.
    pub prefix: Location,
    /// Where that is.
    pub location: Location,
    /// Whether certificates are not checked there.
    pub insecure: bool,
    /// Whether access is blocked.
    pub blocked: bool,
    /// Hosts that are asked first.
    pub mirrors: Vec<Mirror>,
    /// The file that says so.
    pub file: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mirror {
    pub location: Location,
    /// Whether certificates are not checked there.
    pub insecure: bool,
    /// What it is asked for.
    pub pull: PullFrom,
}

/// What a mirror is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum PullFrom {
    /// Everything.
    #[default]
    All,
    /// Content by digest.
    DigestOnly,
    /// Content by tag.
    TagOnly,
}

/// A registry, and a place on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Location {
    /// Host and port; a leading `*.` stands for any subdomain.
    pub host: String,
    /// The first part of repositories' names; empty for all.
    pub path: String,
}

impl Location {
    /// Reads `HOST[:PORT][/PATH]`.
    fn parse(text: &str, wildcards: bool) -> Result<Self, UrlFault> {
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        let wildcard = host.strip_prefix("*.");
        if text.contains("://") {
            return Err(UrlFault::Scheme);
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
        let path = path.trim_end_matches('/');
        let leads_away = path.split('/').any(|part| matches!(part, "." | "..")) || path.starts_with('/');
        if !path.bytes().all(plain) || leads_away || (wildcard.is_some() && !(wildcards && path.is_empty())) {
            return Err(UrlFault::Malformed);
        }
        let url = file::url(wildcard.unwrap_or(host), false)?;
        if url.path() != "/v2" {
            return Err(UrlFault::Malformed);
        }
        Ok(Self { host: host.to_owned(), path: path.to_owned() })
    }

    /// How many characters of `registry` it names, if it is about it.
    fn fits(&self, registry: &str) -> Option<usize> {
        match self.host.strip_prefix('*') {
            Some(domain) => registry.strip_suffix(domain).is_some_and(|rest| !rest.is_empty()).then_some(domain.len()),
            None => (self.host == registry).then_some(usize::MAX),
        }
    }

    fn url(&self, scheme: &str) -> Result<Url, UrlFault> {
        file::url(&format!("{scheme}://{}", self.host), false)
    }

    /// The host there, which is treated by these rules.
    fn host(&self, rules: HostRules) -> Result<Host, UrlFault> {
        Ok(Host::perhaps_plain(self.url("https")?, self.url("http")?, rules))
    }
}

/// Reads the text of `file`.
///
/// # Errors
/// [`HostsError`].
pub(crate) fn parse(text: &str, file: &Path) -> Result<Vec<MirrorTable>, HostsError> {
    let mut reading = Reading::new(text, file);
    let table = reading.table()?;
    let mut entries = Vec::new();
    for (key, value) in table.get_ref() {
        match key.get_ref().as_ref() {
            "registry" => {
                for item in tables(&reading, key, value)? {
                    entries.push(entry(&mut reading, key, item)?);
                }
            }
            // What the first version of the format began with.
            "registries" => return Err(reading.fault(key, value, ValueFault::Version)),
            _ => {}
        }
    }
    Ok(entries)
}

fn tables<'v, 't>(
    reading: &Reading<'_>,
    key: &Key<'t>,
    value: &'v Value<'t>,
) -> Result<Vec<&'v DeTable<'t>>, HostsError> {
    let failed = || reading.kind(key, value, "tables in double brackets");
    let items = value.get_ref().as_array().ok_or_else(failed)?;
    items.iter().map(|item| item.get_ref().as_table().ok_or_else(failed)).collect()
}

fn entry(reading: &mut Reading<'_>, name: &Key<'_>, table: &DeTable<'_>) -> Result<MirrorTable, HostsError> {
    let (mut prefix, mut location) = (None, None);
    let (mut insecure, mut blocked, mut by_digest, mut mirrors) = (false, false, false, Vec::new());
    for (key, value) in table {
        match key.get_ref().as_ref() {
            "prefix" => prefix = self::location(reading, key, value, true)?,
            "location" => location = self::location(reading, key, value, false)?,
            "insecure" => insecure = reading.flag(key, value)?,
            "blocked" => blocked = reading.flag(key, value)?,
            "mirror-by-digest-only" => by_digest = reading.flag(key, value)?,
            "mirror" => {
                for item in tables(reading, key, value)? {
                    mirrors.push(mirror(reading, key, item)?);
                }
            }
            _ => {}
        }
    }
    if by_digest {
        mirrors.iter_mut().for_each(|mirror| mirror.pull = PullFrom::DigestOnly);
    }
    let missing = || reading.missing(name, "prefix or location");
    let prefix = prefix.or_else(|| location.clone()).ok_or_else(missing)?;
    let location = location.unwrap_or_else(|| prefix.clone());
    Ok(MirrorTable { prefix, location, insecure, blocked, mirrors, file: reading.file().to_owned() })
}

fn mirror(reading: &mut Reading<'_>, name: &Key<'_>, table: &DeTable<'_>) -> Result<Mirror, HostsError> {
    let (mut location, mut insecure, mut pull) = (None, false, PullFrom::All);
    for (key, value) in table {
        match key.get_ref().as_ref() {
            "location" => location = self::location(reading, key, value, false)?,
            "insecure" => insecure = reading.flag(key, value)?,
            "pull-from-mirror" => {
                pull = match reading.text_of(key, value)? {
                    "" | "all" => PullFrom::All,
                    "digest-only" => PullFrom::DigestOnly,
                    "tag-only" => PullFrom::TagOnly,
                    _ => return Err(reading.kind(key, value, "all, digest-only or tag-only")),
                };
            }
            _ => {}
        }
    }
    let location = location.ok_or_else(|| reading.missing(name, "location"))?;
    Ok(Mirror { location, insecure, pull })
}

/// A place; none if the text is empty.
fn location(
    reading: &Reading<'_>,
    key: &Key<'_>,
    value: &Value<'_>,
    wildcards: bool,
) -> Result<Option<Location>, HostsError> {
    let text = reading.text_of(key, value)?;
    if text.is_empty() {
        return Ok(None);
    }
    Location::parse(text, wildcards).map(Some).map_err(|fault| reading.fault(key, value, fault.into()))
}

/// The hosts of `registry` by these tables, of which a later one replaces an earlier one about the same; `None` if
/// there is none about it.
///
/// # Errors
/// [`UrlFault`] when an address cannot be made of a place.
pub(crate) fn hosts(entries: &[MirrorTable], registry: &str) -> Result<Option<Hosts>, UrlFault> {
    let mut fitting: Vec<(&MirrorTable, usize)> = Vec::new();
    for entry in entries {
        let Some(length) = entry.prefix.fits(registry) else { continue };
        // Names beat wildcards, and the longest wildcard the others.
        fitting.retain(|(other, known)| other.prefix.path != entry.prefix.path || *known > length);
        if !fitting.iter().any(|(other, _)| other.prefix.path == entry.prefix.path) {
            fitting.push((entry, length));
        }
    }
    if fitting.is_empty() {
        return Ok(None);
    }
    let paths: Vec<&str> = fitting.iter().map(|(entry, _)| entry.prefix.path.as_str()).collect();
    let mut hosts = Hosts::default();
    let mut elsewhere = Vec::new();
    for (entry, _) in &fitting {
        let path = &entry.prefix.path;
        let longer = paths.iter().filter(|other| *other != path && Repositories::is_below(other, path));
        let area = Repositories {
            below: path.clone(),
            except: longer.map(|path| (*path).to_owned()).collect(),
            instead: path.clone(),
        };
        if entry.blocked {
            hosts.blocked.push(Blocked { repositories: area, file: entry.file.clone() });
            continue;
        }
        for mirror in &entry.mirrors {
            hosts.before.extend(of_mirror(mirror, &area)?);
        }
        let is_wildcard = entry.location.host.starts_with('*');
        let stays = is_wildcard || (entry.location.host == registry && entry.location.path == *path);
        if stays && path.is_empty() {
            hosts.rules.skip_verify = entry.insecure;
        } else if !stays || entry.insecure {
            let place = Location {
                host: if is_wildcard { registry.to_owned() } else { entry.location.host.clone() },
                ..entry.location.clone()
            };
            let repositories = Some(Repositories { instead: place.path.clone(), ..area });
            let rules = HostRules { skip_verify: entry.insecure, repositories, ..HostRules::default() };
            hosts.before.push(place.host(rules)?);
            elsewhere.push(path.clone());
        }
    }
    if !elsewhere.is_empty() {
        hosts.rules.repositories = Some(Repositories { except: elsewhere, ..Repositories::default() });
    }
    Ok(Some(hosts))
}

fn of_mirror(mirror: &Mirror, area: &Repositories) -> Result<Vec<Host>, UrlFault> {
    let capabilities = match mirror.pull {
        PullFrom::All => Capabilities::READ,
        PullFrom::DigestOnly => Capabilities { resolve: false, ..Capabilities::READ },
        PullFrom::TagOnly => return Ok(Vec::new()),
    };
    let repositories = Some(Repositories { instead: mirror.location.path.clone(), ..area.clone() });
    let rules = HostRules { capabilities, skip_verify: mirror.insecure, repositories, ..HostRules::default() };
    let mut hosts = vec![mirror.location.host(rules.clone())?];
    if mirror.insecure {
        let rules = HostRules { skip_verify: false, ..rules };
        hosts.push(Host { url: mirror.location.url("http")?, plain: None, rules });
    }
    Ok(hosts)
}

#[cfg(test)]
mod tests;
