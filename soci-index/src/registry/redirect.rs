//! Where a server may send us: redirects, upload locations, next pages and token realms.
//!
//! The rules come from published advisories on registry clients. A credential belongs to one *origin* (scheme, host and
//! port) and never leaves it. A target is refused when it would make the connection less safe than the one that named
//! it: plain HTTP after HTTPS, a link-local address (cloud metadata), a loopback address named by a server elsewhere,
//! or credentials inside the URL. Pure functions of URLs.

use crate::format::class::{Class, Classified};
use std::fmt;
use std::net::IpAddr;

use url::{Host, Url};

/// A URL that may be shown: without user, password, query and fragment.
#[derive(Clone, PartialEq, Eq)]
pub struct ShownUrl(String);

impl ShownUrl {
    /// Cuts everything secret off `url`.
    #[must_use]
    pub(crate) fn new(url: &Url) -> Self {
        let query = if url.query().is_some() { "?..." } else { "" };
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        Self(format!("{}://{}{port}{}{query}", url.scheme(), url.host_str().unwrap_or_default(), url.path()))
    }

    /// The part before the path: scheme, host and, if it is not the usual one, port.
    #[must_use]
    pub(crate) fn origin(&self) -> &str {
        let host = self.0.find("://").map_or(0, |scheme| scheme + 3);
        self.0[host..].find('/').map_or(&self.0, |path| &self.0[..host + path])
    }
}

impl fmt::Display for ShownUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ShownUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a target is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Not a URL.
    #[error("it is not a URL")]
    Malformed,
    /// Neither http nor https.
    #[error("only http and https are followed")]
    Scheme,
    /// From https to http.
    #[error("it would leave https for plain http")]
    Downgrade,
    /// An address on this machine or link, named by a server elsewhere.
    #[error("it names a local address that the registry itself is not on")]
    LocalAddress,
    /// `user:password@` in the URL.
    #[error("it carries credentials")]
    Credentials,
    /// A page on another origin.
    #[error("it is on another origin")]
    OtherOrigin,
}

impl Classified for TargetError {
    fn class(&self) -> Class {
        Class::Registry
    }
}

/// Whether a credential for `a` may be sent to `b`.
#[must_use]
pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// Resolves a `Location` (relative or absolute) against the URL that was asked.
///
/// # Errors
/// [`TargetError`] when it must not be followed.
pub(crate) fn target(base: &Url, location: &str) -> Result<Url, TargetError> {
    let url = base.join(location).map_err(|_| TargetError::Malformed)?;
    check(base, &url)?;
    Ok(url)
}

/// Resolves a `Link`, which must stay on the origin.
///
/// # Errors
/// [`TargetError`] when it must not be followed.
pub(crate) fn page(base: &Url, link: &str) -> Result<Url, TargetError> {
    let url = target(base, link)?;
    if same_origin(base, &url) { Ok(url) } else { Err(TargetError::OtherOrigin) }
}

/// Checks the token realm that the registry at `base` named. Public names elsewhere are normal (a registry and its
/// token service often differ); addresses of private networks are not, unless the registry has the same address.
///
/// # Errors
/// [`TargetError`] when no secret may be sent there.
pub(crate) fn realm(base: &Url, realm: &str) -> Result<Url, TargetError> {
    let url = Url::parse(realm).map_err(|_| TargetError::Malformed)?;
    check(base, &url)?;
    if address(&url).is_some_and(is_private) && base.host() != url.host() {
        return Err(TargetError::LocalAddress);
    }
    Ok(url)
}

fn check(base: &Url, url: &Url) -> Result<(), TargetError> {
    match url.scheme() {
        "https" => {}
        "http" if base.scheme() == "http" => {}
        "http" => return Err(TargetError::Downgrade),
        _ => return Err(TargetError::Scheme),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(TargetError::Credentials);
    }
    let link_local = address(url).is_some_and(is_link_local) && base.host() != url.host();
    if link_local || (is_loopback(url) && !is_loopback(base)) {
        return Err(TargetError::LocalAddress);
    }
    Ok(())
}

/// Whether the URL's host is this machine.
#[must_use]
pub(crate) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.');
            name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost")
        }
        _ => address(url).is_some_and(|address| address.is_loopback() || address.is_unspecified()),
    }
}

/// The IP address that the URL spells out; a mapped IPv4 address counts as what it maps.
fn address(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Domain(_) => None,
        Host::Ipv4(address) => Some(address.into()),
        Host::Ipv6(address) => Some(IpAddr::V6(address).to_canonical()),
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn is_private(address: IpAddr) -> bool {
    let by_kind = match address {
        IpAddr::V4(address) => address.is_private(),
        IpAddr::V6(address) => address.is_unique_local(),
    };
    by_kind || is_link_local(address) || address.is_loopback() || address.is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn origins() {
        for (a, b, expected) in [
            ("https://h/x", "https://h:443/y?z", true),
            ("https://h", "http://h", false),
            ("https://h", "https://h:444", false),
            ("https://h", "https://H", true),
            ("https://h", "https://h.evil", false),
        ] {
            assert_eq!(same_origin(&url(a), &url(b)), expected, "{a} {b}");
        }
    }

    #[test]
    fn targets() {
        for (base, location, expected) in [
            ("https://r/v2/a", "/v2/b?x=1", Ok("https://r/v2/b?x=1")),
            ("https://r/v2/a", "https://s3/b?sig=1", Ok("https://s3/b?sig=1")),
            ("https://r/v2/a", "//s3/b", Ok("https://s3/b")),
            ("https://r/v2/a", "https://10.0.0.1/b", Ok("https://10.0.0.1/b")),
            ("https://r/v2/a", "http://s3/b", Err(TargetError::Downgrade)),
            ("https://r/v2/a", "ftp://s3/b", Err(TargetError::Scheme)),
            ("https://r/v2/a", "https://u:p@s3/b", Err(TargetError::Credentials)),
            ("https://r/v2/a", "https://169.254.169.254/b", Err(TargetError::LocalAddress)),
            ("https://r/v2/a", "https://[::ffff:169.254.169.254]/b", Err(TargetError::LocalAddress)),
            ("https://r/v2/a", "https://localhost/b", Err(TargetError::LocalAddress)),
            ("https://r/v2/a", "https://2130706433/b", Err(TargetError::LocalAddress)),
            ("https://r/v2/a", "https://[::1]/b", Err(TargetError::LocalAddress)),
            ("http://127.0.0.1:1/a", "http://127.0.0.1:2/b", Ok("http://127.0.0.1:2/b")),
            ("http://localhost:1/a", "http://127.0.0.1:2/b", Ok("http://127.0.0.1:2/b")),
            ("https://r/v2/a", "https://[", Err(TargetError::Malformed)),
        ] {
            let found = target(&url(base), location);
            assert_eq!(found.as_ref().map(Url::as_str).map_err(|e| *e), expected, "{location}");
        }
    }

    #[test]
    fn realms_and_pages() {
        for (base, text, expected) in [
            ("https://r", "https://auth.example/token", Ok(())),
            ("https://r", "http://auth.example/token", Err(TargetError::Downgrade)),
            ("http://r", "http://auth.example/token", Ok(())),
            ("https://r", "https://10.1.2.3/token", Err(TargetError::LocalAddress)),
            ("https://10.1.2.3:5000", "https://10.1.2.3/token", Ok(())),
            ("https://r", "https://[fd00::1]/token", Err(TargetError::LocalAddress)),
            ("https://r", "/token", Err(TargetError::Malformed)),
        ] {
            assert_eq!(realm(&url(base), text).map(|_| ()), expected, "{base} {text}");
        }
        assert!(page(&url("https://r/a"), "/b?n=1").is_ok());
        assert_eq!(page(&url("https://r/a"), "https://s/b"), Err(TargetError::OtherOrigin));
    }

    #[test]
    fn nothing_secret_is_shown() {
        let shown = ShownUrl::new(&url("https://user:pass@h:8443/path?X-Amz-Signature=secret#frag"));
        assert_eq!(shown.to_string(), "https://h:8443/path?...");
        assert_eq!(format!("{shown:?}"), "https://h:8443/path?...");
        assert_eq!(shown.origin(), "https://h:8443");
        assert_eq!(ShownUrl::new(&url("http://[::1]")).origin(), "http://[::1]");
    }
}
