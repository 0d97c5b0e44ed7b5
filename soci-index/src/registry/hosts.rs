//! Which hosts serve a registry: mirrors before it, and how each is reached.
//!
//! Operators say it in containerd's `hosts.toml`, in docker's directories of certificates, or (for the daemon) as a
//! list of mirrors; the meaning is containerd's in all three, so that a node has one truth. On hosts with podman and
//! its relatives it is `registries.conf` instead, which applies if no `hosts.toml` applies to the registry.
//! [`mod@file`] and `registries_conf` read the texts, this file the directories. Nothing of the text is interpreted
//! here, and no host is asked.
//!
//! Invariants: the order is that of the file, and the registry itself comes last; a file that cannot be understood is
//! named in the log with its line, and the directory then counts as one in docker's style, as containerd does; values
//! of headers are never shown.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

use crate::registry::credentials::Secret;
use crate::registry::redirect;

pub mod file;
mod registries_conf;

/// The file that says it.
const FILE: &str = "hosts.toml";
/// Where containerd and docker look for directories of hosts.
pub const DIRECTORIES: [&str; 2] = ["/etc/containerd/certs.d", "/etc/docker/certs.d"];
/// Where podman and its relatives look: a file, and a directory of files that end in `.conf`.
pub(crate) const REGISTRIES_CONF: [&str; 2] = ["/etc/containers/registries.conf", "/etc/containers/registries.conf.d"];

/// Where the hosts of a registry are written down. The default is nowhere: a registry is then reached by its own name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostSource {
    /// Mirrors by the name of the registry as images write it. They are asked before what the directories say.
    pub mirrors: BTreeMap<String, Vec<Host>>,
    /// Directories with one directory for each registry. They need not exist.
    pub directories: Vec<PathBuf>,
    /// Files in the form of `registries.conf`, and directories of such files. They need not exist.
    pub registries_conf: Vec<PathBuf>,
}

/// A host and how to treat it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The root of its API, usually ending in `/v2`.
    pub url: Url,
    /// The same over plain HTTP, where the host may have no TLS. It is not used if anything is said of the host's TLS.
    pub plain: Option<Url>,
    /// How to treat it.
    pub rules: HostRules,
}

impl Host {
    /// A host whose scheme is not said: on this machine it may be either, elsewhere it is https.
    pub(crate) fn perhaps_plain(url: Url, plain: Url, rules: HostRules) -> Self {
        let plain = redirect::is_loopback(&url).then_some(plain);
        Self { url, plain, rules }
    }

    /// A mirror that is named by its host, and that reads only.
    ///
    /// # Errors
    /// [`file::UrlFault`] when the text names no host.
    pub fn mirror(text: &str, plain_http: bool) -> Result<Self, file::UrlFault> {
        let rules = HostRules { capabilities: Capabilities::READ, ..HostRules::default() };
        let url = file::url(text, false)?;
        if text.contains("://") {
            return Ok(Self { url, plain: None, rules });
        }
        let plain = file::url(&format!("http://{text}"), false)?;
        match plain_http {
            true => Ok(Self { url: plain, plain: None, rules }),
            false => Ok(Self::perhaps_plain(url, plain, rules)),
        }
    }
}

/// How to treat a host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostRules {
    /// What it may be asked.
    pub capabilities: Capabilities,
    /// Files of certificates to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Client certificates for TLS.
    pub client_certificates: Vec<ClientCertificate>,
    /// Believe any certificate.
    pub skip_verify: bool,
    /// What to send with every request to it.
    pub headers: Vec<(String, Secret)>,
    /// How long to wait for a connection, if not as long as usual.
    pub dial_timeout: Option<Duration>,
    /// How long it may be silent, if not as long as usual.
    pub silence: Option<Duration>,
    /// For which repositories it is, and what they are called there; `None` is all, by their own names.
    pub repositories: Option<Repositories>,
}

impl HostRules {
    /// Whether anything is said of the host's TLS.
    pub(crate) const fn has_tls(&self) -> bool {
        self.skip_verify || !self.ca_files.is_empty() || !self.client_certificates.is_empty()
    }
}

/// Some repositories of a registry, and their names elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Repositories {
    /// Those of this name or below it. Empty is all.
    pub below: String,
    /// But not those.
    pub except: Vec<String>,
    /// What stands there in place of `below`.
    pub instead: String,
}

impl Repositories {
    /// Whether `name` is `place` or below it.
    #[must_use]
    pub(crate) fn is_below(name: &str, place: &str) -> bool {
        place.is_empty() || name.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// Whether a repository is among them.
    #[must_use]
    pub(crate) fn contains(&self, name: &str) -> bool {
        Self::is_below(name, &self.below) && !self.except.iter().any(|place| Self::is_below(name, place))
    }

    /// What one of them is called there.
    #[must_use]
    pub(crate) fn rename(&self, name: &str) -> String {
        let rest = name.strip_prefix(&self.below).unwrap_or(name).trim_start_matches('/');
        match (self.instead.as_str(), rest) {
            ("", rest) => rest.to_owned(),
            (instead, "") => instead.to_owned(),
            (instead, rest) => format!("{instead}/{rest}"),
        }
    }
}

/// Blocked repositories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blocked {
    pub repositories: Repositories,
    /// The file that says so.
    pub file: PathBuf,
}

/// A certificate with its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The certificate, a PEM file.
    pub certificate: PathBuf,
    /// The key; without it, the certificate's file holds it too.
    pub key: Option<PathBuf>,
}

/// What a host may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Blobs, and manifests by digest.
    pub pull: bool,
    /// Which manifest a tag names.
    pub resolve: bool,
    /// To take blobs and manifests.
    pub push: bool,
    /// What refers to a manifest.
    pub referrers: bool,
}

impl Capabilities {
    /// Everything.
    pub(crate) const ALL: Self = Self { pull: true, resolve: true, push: true, referrers: true };
    /// Everything but pushing.
    pub const READ: Self = Self { push: false, ..Self::ALL };
    /// Nothing.
    pub const NONE: Self = Self { pull: false, resolve: false, push: false, referrers: false };
}

impl Default for Capabilities {
    fn default() -> Self {
        Self::ALL
    }
}

/// All hosts of a registry, in the order in which they are asked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Hosts {
    /// Those before the last one.
    pub before: Vec<Host>,
    /// The last one; `None` is the registry itself.
    pub server: Option<Url>,
    /// How to treat the last one.
    pub rules: HostRules,
    /// Blocked prefixes.
    pub blocked: Vec<Blocked>,
}

impl HostSource {
    /// The usual directories of containerd and docker. A node has these and no others: there containerd decides.
    #[must_use]
    pub fn of_this_system() -> Self {
        Self { directories: DIRECTORIES.map(PathBuf::from).to_vec(), ..Self::default() }
    }

    /// The same with the usual files of podman and its relatives.
    #[must_use]
    pub fn with_registries_conf(self) -> Self {
        Self { registries_conf: REGISTRIES_CONF.map(PathBuf::from).to_vec(), ..self }
    }

    /// The hosts of `registry`, a name as images write it. Reads files; the error is a reason in words.
    pub(crate) fn for_registry(&self, registry: &str) -> Result<Hosts, String> {
        let directory = self.directories.iter().find_map(|root| directory_of(root, registry));
        let said = directory.as_deref().map(said).transpose()?.flatten();
        let mut hosts = match said {
            Some(hosts) => hosts,
            None => {
                let certificates = directory.as_deref().map(certificates).transpose()?.unwrap_or_default();
                self.by_registries_conf(registry)?.unwrap_or_default().with_certificates(certificates)
            }
        };
        if let Some(mirrors) = self.mirrors.get(registry) {
            hosts.before.splice(..0, mirrors.iter().cloned());
        }
        Ok(hosts)
    }

    /// What `registries.conf` says, if anything.
    fn by_registries_conf(&self, registry: &str) -> Result<Option<Hosts>, String> {
        let mut entries = Vec::new();
        for path in &self.registries_conf {
            for file in files_of(path)? {
                let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
                entries.extend(registries_conf::parse(&text, &file).map_err(|error| error.to_string())?);
            }
        }
        let failed = |fault: file::UrlFault| format!("a location in registries.conf: {fault}");
        registries_conf::hosts(&entries, registry).map_err(failed)
    }
}

impl Hosts {
    /// Adds what was found for the registry itself in docker's style.
    fn with_certificates(mut self, found: HostRules) -> Self {
        self.rules.ca_files = found.ca_files;
        self.rules.client_certificates = found.client_certificates;
        self
    }
}

/// A file, or the files of a directory by their names; nothing, if there is nothing.
fn files_of(path: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Ok(found) if !found.is_dir() => return Ok(vec![path.to_owned()]),
        Ok(_) => {}
        Err(error) => return Err(failed(error)),
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        files.push(entry.map_err(failed)?.path());
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "conf"));
    files.sort();
    Ok(files)
}

/// The directory of a registry below `root`, if there is one.
fn directory_of(root: &Path, registry: &str) -> Option<PathBuf> {
    let is_directory = |path: &PathBuf| match std::fs::metadata(path) {
        Ok(found) => found.is_dir(),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => false,
        Err(error) => {
            tracing::warn!(directory = %path.display(), %error, "cannot look for a registry's hosts");
            false
        }
    };
    names(registry).into_iter().map(|name| root.join(name)).find(is_directory)
}

/// Under which names a registry's directory may be kept. A name that would lead elsewhere has none.
fn names(registry: &str) -> Vec<String> {
    if registry.contains('/') || matches!(registry, "" | "." | "..") {
        return Vec::new();
    }
    let mut names = vec![registry.to_owned(), "_default".to_owned()];
    if let Some((host, port)) = registry.rsplit_once(':')
        && !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit())
    {
        names.insert(0, format!("{host}_{port}_"));
    }
    names
}

/// What a directory's `hosts.toml` says, if there is one that can be read.
fn said(directory: &Path) -> Result<Option<Hosts>, String> {
    let path = directory.join(FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.is_empty() => match file::parse(&text, &path) {
            Ok(read) => {
                for (line, key) in read.unknown {
                    tracing::warn!(file = %path.display(), line, key, "a key that is not known has no effect");
                }
                return Ok(Some(read.hosts));
            }
            Err(error) => tracing::error!(%error, "mirrors are not used: their file cannot be read"),
        },
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(format!("{}: {error}", path.display())),
    }
    Ok(None)
}

/// What a directory holds in docker's style.
fn certificates(directory: &Path) -> Result<HostRules, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", directory.display());
    let mut listed = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        // A name that is no text names no certificate of ours.
        listed.extend(entry.map_err(failed)?.file_name().into_string());
    }
    Ok(docker_style(directory, listed))
}

/// What docker reads out of the names in a directory: `*.crt` is an authority, `*.cert` with `*.key` a client's proof.
fn docker_style(directory: &Path, mut names: Vec<String>) -> HostRules {
    names.sort();
    let mut rules = HostRules::default();
    for name in &names {
        if name.ends_with(".crt") {
            rules.ca_files.push(directory.join(name));
        } else if let Some(stem) = name.strip_suffix(".cert") {
            let key = format!("{stem}.key");
            let key = names.contains(&key).then(|| directory.join(key));
            rules.client_certificates.push(ClientCertificate { certificate: directory.join(name), key });
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_directories() {
        for (registry, expected) in [
            ("docker.io", &["docker.io", "_default"][..]),
            ("r.example:5000", &["r.example_5000_", "r.example:5000", "_default"]),
            ("[::1]:5000", &["[::1]_5000_", "[::1]:5000", "_default"]),
            ("[::1]", &["[::1]", "_default"]),
            ("..", &[]),
            ("a/../b", &[]),
            ("", &[]),
        ] {
            assert_eq!(names(registry), expected, "{registry}");
        }
    }

    #[test]
    fn mirrors_by_name() {
        for (text, plain_http, expected, plain) in [
            ("m.example", false, "https://m.example/v2", None),
            ("m.example:443", true, "http://m.example:443/v2", None),
            ("localhost:5000", false, "https://localhost:5000/v2", Some("http://localhost:5000/v2")),
            ("localhost:5000", true, "http://localhost:5000/v2", None),
            ("https://localhost:5000", true, "https://localhost:5000/v2", None),
            ("m.example/cache", false, "https://m.example/cache/v2", None),
        ] {
            let host = Host::mirror(text, plain_http).unwrap();
            assert_eq!((host.url.as_str(), host.rules.capabilities), (expected, Capabilities::READ));
            assert_eq!(host.plain.as_ref().map(Url::as_str), plain, "{text}");
        }
        assert_eq!(Host::mirror("", true), Err(file::UrlFault::Malformed));
    }

    #[test]
    fn certificates_in_dockers_style() {
        let listed = ["z.key", "b.crt", "client.key", "client.cert", "a.crt", "both.cert", "notes.txt", ".crt.old"];
        let rules = docker_style(Path::new("/d"), listed.map(str::to_owned).to_vec());
        assert_eq!(rules.ca_files, [PathBuf::from("/d/a.crt"), PathBuf::from("/d/b.crt")]);
        let pair = |certificate: &str, key: Option<&str>| ClientCertificate {
            certificate: certificate.into(),
            key: key.map(PathBuf::from),
        };
        assert_eq!(
            rules.client_certificates,
            [pair("/d/both.cert", None), pair("/d/client.cert", Some("/d/client.key"))]
        );
    }

    #[test]
    fn the_first_directory_that_exists_wins() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |root: &Path, name: &str, text: &str| {
            std::fs::create_dir_all(root.join(name)).unwrap();
            std::fs::write(root.join(name).join(FILE), text).unwrap();
        };
        let directories = vec!["/no/such/place".into(), first.path().to_owned(), second.path().to_owned()];
        let mut source = HostSource { directories, ..HostSource::default() };
        let server = |source: &HostSource| source.for_registry("r.example:5000").unwrap().server.map(String::from);
        assert_eq!(source.for_registry("r.example:5000"), Ok(Hosts::default()));
        let places = [
            (second.path(), "_default"),
            (second.path(), "r.example:5000"),
            (first.path(), "_default"),
            (first.path(), "r.example:5000"),
            (first.path(), "r.example_5000_"),
        ];
        for (number, (root, name)) in places.into_iter().enumerate() {
            write(root, name, &format!("server = 'https://h{number}'\n"));
            assert_eq!(server(&source), Some(format!("https://h{number}/v2")), "{name}");
        }
        // A mirror that is named by other means comes before the file's, and only for its registry.
        write(first.path(), "r.example_5000_", "[host.'https://in-the-file']\n");
        let rules = HostRules::default();
        let named = Host { url: file::url("named", false).unwrap(), plain: None, rules };
        source.mirrors.insert("r.example:5000".to_owned(), vec![named]);
        let before = source.for_registry("r.example:5000").unwrap().before;
        let before: Vec<&str> = before.iter().map(|host| host.url.as_str()).collect();
        assert_eq!(before, ["https://named/v2", "https://in-the-file/v2"]);
        assert_eq!(source.for_registry("other.example").unwrap().before, []);
    }

    #[test]
    fn registries_conf_counts_where_no_hosts_file_does() {
        let root = tempfile::tempdir().unwrap();
        let (certificates, conf, more) =
            (root.path().join("certs.d"), root.path().join("r.conf"), root.path().join("r.conf.d"));
        for directory in [certificates.join("docker.style"), certificates.join("h.example"), more.clone()] {
            std::fs::create_dir_all(directory).unwrap();
        }
        std::fs::write(certificates.join("docker.style/a.crt"), "").unwrap();
        std::fs::write(certificates.join("h.example/hosts.toml"), "[host.'https://by-hosts-toml']").unwrap();
        let table = |name: &str, mirror: &str| {
            format!("[[registry]]\nprefix = '{name}'\n[[registry.mirror]]\nlocation = '{mirror}'\n")
        };
        let text = ["docker.style", "h.example", "x.example"].map(|name| table(name, "by-conf")).concat();
        std::fs::write(&conf, text).unwrap();
        std::fs::write(more.join("1.conf"), table("x.example", "by-one")).unwrap();
        std::fs::write(more.join("2.conf"), table("x.example", "by-two")).unwrap();
        std::fs::write(more.join("3.txt"), "no toml at all").unwrap();
        let source = HostSource {
            directories: vec![certificates.clone()],
            registries_conf: vec![conf.clone(), more, root.path().join("absent")],
            ..HostSource::default()
        };
        for (registry, expected) in [
            ("h.example", "https://by-hosts-toml/v2"),
            ("docker.style", "https://by-conf/v2"),
            ("x.example", "https://by-two/v2"),
        ] {
            let hosts = source.for_registry(registry).unwrap();
            let urls: Vec<&str> = hosts.before.iter().map(|host| host.url.as_str()).collect();
            assert_eq!(urls, [expected], "{registry}");
        }
        assert_eq!(
            source.for_registry("docker.style").unwrap().rules.ca_files,
            [certificates.join("docker.style/a.crt")]
        );
        assert_eq!(source.for_registry("other.example"), Ok(Hosts::default()));
        // A file that cannot be read may hold a ban.
        std::fs::write(&conf, "[[registry]]\nblocked = 1\n").unwrap();
        let shown = source.for_registry("other.example").unwrap_err();
        assert_eq!(shown, format!("{}:2: blocked: expected true or false", conf.display()));
    }

    #[test]
    fn a_file_that_cannot_be_read_leaves_the_certificates() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("r.example");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("a.crt"), "").unwrap();
        let source = HostSource { directories: vec![root.path().to_owned()], ..HostSource::default() };
        for text in [None, Some(""), Some("server = "), Some("capabilities = ['fly']")] {
            if let Some(text) = text {
                std::fs::write(directory.join(FILE), text).unwrap();
            }
            let hosts = source.for_registry("r.example").unwrap();
            assert_eq!((hosts.before, hosts.server), (vec![], None), "{text:?}");
            assert_eq!(hosts.rules.ca_files, [directory.join("a.crt")], "{text:?}");
        }
    }
}
