//! Which hosts serve a registry: mirrors before it, and how each is reached.
//!
//! Operators say it in containerd's `hosts.toml`, in docker's directories of certificates, or (for the daemon) as a list
//! of mirrors; the meaning is containerd's in all three, so that a node has one truth. [`mod@file`] reads the text, this file
//! the directories. Nothing of the text is interpreted here, and no host is asked.
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

/// The file that says it.
const FILE: &str = "hosts.toml";
/// Where containerd and docker look for directories of hosts.
pub const DIRECTORIES: [&str; 2] = ["/etc/containerd/certs.d", "/etc/docker/certs.d"];

/// Where the hosts of a registry are written down. The default is nowhere: a registry is then reached by its own name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostSource {
    /// Mirrors by the name of the registry as images write it. They are asked before what the directories say.
    pub mirrors: BTreeMap<String, Vec<Host>>,
    /// Directories with one directory for each registry. They need not exist.
    pub directories: Vec<PathBuf>,
}

/// A host and how to treat it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The root of its API, usually ending in `/v2`.
    pub url: Url,
    /// How to treat it.
    pub rules: HostRules,
}

impl Host {
    /// A mirror that is named by its host, and that reads only. Hosts of this machine speak plain HTTP.
    ///
    /// # Errors
    /// [`file::UrlFault`] when the text names no host.
    pub fn mirror(text: &str, plain_http: bool) -> Result<Self, file::UrlFault> {
        let mut url = file::url(text, false)?;
        if (plain_http || redirect::is_loopback(&url)) && !text.contains("://") {
            url = file::url(&format!("http://{text}"), false)?;
        }
        Ok(Self { url, rules: HostRules { capabilities: Capabilities::READ, ..HostRules::default() } })
    }
}

/// How to treat a host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostRules {
    /// What it may be asked.
    pub capabilities: Capabilities,
    /// Files of certificates to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Proofs of who asks, for TLS.
    pub client_certificates: Vec<ClientCertificate>,
    /// Believe any certificate.
    pub skip_verify: bool,
    /// What to send with every request to it.
    pub headers: Vec<(String, Secret)>,
    /// How long to wait for a connection, if not as long as usual.
    pub dial_timeout: Option<Duration>,
    /// How long it may be silent, if not as long as usual.
    pub silence: Option<Duration>,
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
    pub const ALL: Self = Self { pull: true, resolve: true, push: true, referrers: true };
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
pub struct Hosts {
    /// Those before the last one.
    pub before: Vec<Host>,
    /// The last one; `None` is the registry itself.
    pub server: Option<Url>,
    /// How to treat the last one.
    pub rules: HostRules,
}

impl HostSource {
    /// The usual directories.
    #[must_use]
    pub fn of_this_system() -> Self {
        Self { mirrors: BTreeMap::new(), directories: DIRECTORIES.map(PathBuf::from).to_vec() }
    }

    /// The hosts of `registry`, a name as images write it. Reads files; the error is a reason in words.
    pub(crate) fn of(&self, registry: &str) -> Result<Hosts, String> {
        let mut hosts = match self.directories.iter().find_map(|root| directory_of(root, registry)) {
            Some(directory) => read(&directory)?,
            None => Hosts::default(),
        };
        if let Some(mirrors) = self.mirrors.get(registry) {
            hosts.before.splice(..0, mirrors.iter().cloned());
        }
        Ok(hosts)
    }
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

fn read(directory: &Path) -> Result<Hosts, String> {
    let path = directory.join(FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.is_empty() => match file::parse(&text, &path) {
            Ok(read) => {
                for (line, key) in read.unknown {
                    tracing::warn!(file = %path.display(), line, key, "a key that is not known has no effect");
                }
                return Ok(read.hosts);
            }
            Err(error) => tracing::error!(%error, "mirrors are not used: their file cannot be read"),
        },
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(format!("{}: {error}", path.display())),
    }
    let failed = |error: std::io::Error| format!("{}: {error}", directory.display());
    let mut listed = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        // A name that is no text names no certificate of ours.
        listed.extend(entry.map_err(failed)?.file_name().into_string());
    }
    Ok(Hosts { rules: docker_style(directory, listed), ..Hosts::default() })
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
        for (text, plain_http, expected) in [
            ("m.example", false, "https://m.example/v2"),
            ("m.example:443", true, "http://m.example:443/v2"),
            ("localhost:5000", false, "http://localhost:5000/v2"),
            ("https://localhost:5000", true, "https://localhost:5000/v2"),
            ("m.example/cache", false, "https://m.example/cache/v2"),
        ] {
            let host = Host::mirror(text, plain_http).unwrap();
            assert_eq!((host.url.as_str(), host.rules.capabilities), (expected, Capabilities::READ));
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
        let server = |source: &HostSource| source.of("r.example:5000").unwrap().server.map(String::from);
        assert_eq!(source.of("r.example:5000"), Ok(Hosts::default()));
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
        let named = Host { url: file::url("named", false).unwrap(), rules };
        source.mirrors.insert("r.example:5000".to_owned(), vec![named]);
        let before = source.of("r.example:5000").unwrap().before;
        let before: Vec<&str> = before.iter().map(|host| host.url.as_str()).collect();
        assert_eq!(before, ["https://named/v2", "https://in-the-file/v2"]);
        assert_eq!(source.of("other.example").unwrap().before, []);
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
            let hosts = source.of("r.example").unwrap();
            assert_eq!((hosts.before, hosts.server), (vec![], None), "{text:?}");
            assert_eq!(hosts.rules.ca_files, [directory.join("a.crt")], "{text:?}");
        }
    }
}
