//! Which images a credential is for: the patterns of Kubernetes, and the older keys of docker's configuration.
//!
//! `registry.example`, `*.registry.example:8080/team`, `https://index.docker.io/v1/`. A host's parts may hold `*` and
//! `?`, each matching within one part; the port must be the same; the path is a prefix. Source of the rules: the
//! kubelet's documentation of `matchImages`, and its own reading of docker's keys (a scheme and a trailing `/v1/` or
//! `/v2/` say nothing). Pure.

use crate::layer::glob::is_like;

/// Names that Docker Hub goes by; the first is the one that image references use.
const DOCKER_HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// A pattern of images.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pattern {
    host: Vec<String>,
    port: Option<String>,
    /// Without slashes around it.
    path: String,
}

impl Pattern {
    /// Reads a pattern; `None` if there is no host in it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
        let (authority, path) = text.split_once('/').unwrap_or((text, ""));
        let mut path = path.trim_matches('/');
        for version in ["v1", "v2"] {
            path = match path.strip_prefix(version) {
                Some("") => "",
                Some(rest) if rest.starts_with('/') => rest.trim_matches('/'),
                _ => path,
            };
        }
        let (host, port) = split_port(authority);
        (!host.is_empty()).then(|| Self { host: parts(host), port: port.map(str::to_owned), path: path.to_owned() })
    }

    /// Whether it is meant for `repository` on `registry`, both as image references spell them.
    #[must_use]
    pub fn matches(&self, registry: &str, repository: &str) -> bool {
        let (host, port) = split_port(registry);
        let host = parts(host);
        self.port.as_deref() == port
            && self.host.len() == host.len()
            && self.host.iter().zip(&host).all(|(pattern, part)| is_like(pattern.as_bytes(), part.as_bytes()))
            && repository.starts_with(&self.path)
    }

    /// How much it says: among several that match, the one that says most is meant.
    pub(super) fn length(&self) -> (usize, usize) {
        // A star says nothing.
        let said = self.host.iter().flat_map(|part| part.bytes()).filter(|letter| !matches!(letter, b'*' | b'?'));
        (self.path.len(), said.count())
    }

    /// Whether it is meant for all repositories.
    #[must_use]
    pub fn is_of_whole_registry(&self) -> bool {
        self.path.is_empty()
    }
}

fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        // The colons of an IPv6 address are within brackets.
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

fn parts(host: &str) -> Vec<String> {
    let host = host.to_ascii_lowercase();
    let host = if DOCKER_HUB.contains(&host.as_str()) { DOCKER_HUB[0] } else { &host };
    host.split('.').map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelet_s_rules() {
        for (pattern, registry, repository, matches) in [
            ("registry.example", "registry.example", "team/app", true),
            ("registry.example", "registry.example:5000", "team/app", false),
            ("registry.example:5000", "registry.example:5000", "team/app", true),
            ("registry.example", "other.registry.example", "team/app", false),
            ("*.registry.example", "other.registry.example", "team/app", true),
            ("*.registry.example", "a.b.registry.example", "team/app", false),
            ("*.*.registry.example", "a.b.registry.example", "team/app", true),
            ("app*.registry.example", "app-1.registry.example", "x", true),
            ("app?.registry.example", "app-1.registry.example", "x", false),
            ("registry.*", "registry.example", "x", true),
            ("registry.example/team", "registry.example", "team/app", true),
            ("registry.example/team/app", "registry.example", "team", false),
            ("registry.example/other", "registry.example", "team/app", false),
            ("https://registry.example/v2/", "registry.example", "team/app", true),
            ("http://registry.example/v1/team/", "registry.example", "team/app", true),
            ("registry.example/v2x", "registry.example", "v2x/app", true),
            ("https://index.docker.io/v1/", "docker.io", "library/busybox", true),
            ("docker.io", "docker.io", "library/busybox", true),
            ("[::1]:5000", "[::1]:5000", "a", true),
            ("[::1]", "[::1]:5000", "a", false),
            ("REGISTRY.example", "registry.example", "a", true),
        ] {
            assert_eq!(
                Pattern::parse(pattern).unwrap().matches(registry, repository),
                matches,
                "{pattern} {registry}/{repository}"
            );
        }
        assert_eq!((Pattern::parse(""), Pattern::parse("https:///v1/"), Pattern::parse(":5000")), (None, None, None));
        assert!(Pattern::parse("h/v1/").unwrap().is_of_whole_registry());
        assert!(!Pattern::parse("h/team").unwrap().is_of_whole_registry());
    }
}
