//! The grammar of the distribution project for names of images on registries: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`.
//!
//! Read by hand: the regular expression by which the libraries read it takes 40 ms to compile, which every command
//! would pay before its first question to a registry. The tests hold this against such a library. Two differences are
//! meant: hosts may be IPv6 addresses in brackets, and repositories have no upper-case letters, also where the first
//! part looks like a host and is none.
//!
//! Source: distribution's `reference` package (`regexp.go`, `normalize.go`), and the distribution specification for
//! tags.

use std::net::Ipv6Addr;

/// Where names without a host are.
const DOCKER_HUB: &str = "docker.io";
/// What that was called once.
const DOCKER_HUB_LEGACY: &str = "index.docker.io";
/// Where Docker Hub keeps what has no name of a user.
const OFFICIAL: &str = "library";
/// The tag that is meant when nothing is said.
const LATEST: &str = "latest";

const REPOSITORY_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;

/// What a name says, with defaults put in. The digest is not looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parts<'a> {
    pub(super) registry: String,
    pub(super) repository: String,
    pub(super) tag: Option<&'a str>,
    pub(super) digest: Option<&'a str>,
}

/// Why a text is no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum GrammarError {
    #[error("there is nothing")]
    Empty,
    #[error("{0:?} is no host")]
    Host(String),
    #[error(
        "{0:?} cannot be part of a repository's name: lower-case letters and digits, between them '.', '_', '__' or '-'"
    )]
    Part(String),
    #[error("the repository's name has {0} bytes, more than {REPOSITORY_BYTES_MAX}")]
    Long(usize),
    #[error("{0:?} is no tag: up to {TAG_BYTES_MAX} letters, digits, '_', '.' and '-', the first not '.' or '-'")]
    Tag(String),
}

/// Takes a name apart.
///
/// # Errors
/// [`GrammarError`].
pub(super) fn parse(text: &str) -> Result<Parts<'_>, GrammarError> {
    if text.is_empty() {
        return Err(GrammarError::Empty);
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    // A colon before the last slash belongs to the host.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
        return Err(GrammarError::Tag(tag.to_owned()));
    }
    let (registry, repository) = split_host(name)?;
    for part in repository.split('/') {
        if !is_part(part) {
            return Err(GrammarError::Part(part.to_owned()));
        }
    }
    let repository = match registry.as_str() {
        DOCKER_HUB if !repository.contains('/') => format!("{OFFICIAL}/{repository}"),
        _ => repository.to_owned(),
    };
    if repository.len() > REPOSITORY_BYTES_MAX {
        return Err(GrammarError::Long(repository.len()));
    }
    let tag = if digest.is_none() { tag.or(Some(LATEST)) } else { tag };
    Ok(Parts { registry, repository, tag, digest })
}

/// The host, and what follows it. A first part is a host only if it could be no part of a repository's name, or is
/// `localhost`.
fn split_host(name: &str) -> Result<(String, &str), GrammarError> {
    let Some((first, rest)) = name.split_once('/') else { return Ok((DOCKER_HUB.to_owned(), name)) };
    if let Some(bracketed) = first.strip_prefix('[') {
        let host = || GrammarError::Host(first.to_owned());
        let (address, port) = bracketed.split_once(']').ok_or_else(host)?;
        let address: Ipv6Addr = address.parse().map_err(|_| host())?;
        return if is_port(port) { Ok((format!("[{address}]{port}"), rest)) } else { Err(host()) };
    }
    if !first.contains(['.', ':']) && first != "localhost" {
        return Ok((DOCKER_HUB.to_owned(), name));
    }
    // Underscores are let through: what has them is no name of a machine, and still in use.
    if !is_host(first) && !is_part(first) {
        return Err(GrammarError::Host(first.to_owned()));
    }
    Ok((if first == DOCKER_HUB_LEGACY { DOCKER_HUB } else { first }.to_owned(), rest))
}

fn is_host(text: &str) -> bool {
    let (name, port) = text.split_at(text.find(':').unwrap_or(text.len()));
    let is_label = |label: &str| {
        let letters = |letter: u8| letter.is_ascii_alphanumeric() || letter == b'-';
        !label.is_empty() && label.bytes().all(letters) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.split('.').all(is_label) && is_port(port)
}

/// Nothing, or a colon and digits.
fn is_port(text: &str) -> bool {
    match text.strip_prefix(':') {
        Some(digits) => !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit()),
        None => text.is_empty(),
    }
}

/// Runs of lower-case letters and digits, with a separator between each two.
fn is_part(text: &str) -> bool {
    let is_word = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    let mut separators = text.split(is_word).filter(|separator| !separator.is_empty());
    text.starts_with(is_word)
        && text.ends_with(is_word)
        && separators.all(|between| matches!(between, "." | "_" | "__") || between.bytes().all(|letter| letter == b'-'))
}

fn is_tag(text: &str) -> bool {
    let is_first = |letter: u8| letter.is_ascii_alphanumeric() || letter == b'_';
    text.len() <= TAG_BYTES_MAX
        && text.bytes().next().is_some_and(is_first)
        && text.bytes().all(|letter| is_first(letter) || matches!(letter, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use oci_spec::distribution::Reference as Judge;
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// Holds what is read here against the library, which reads by the regular expression.
    fn compare(text: &str) {
        match (parse(text), text.parse::<Judge>()) {
            (Ok(ours), Ok(theirs)) => {
                let theirs = (theirs.registry(), theirs.repository(), theirs.tag(), theirs.digest());
                assert_eq!((&*ours.registry, &*ours.repository, ours.tag, ours.digest), theirs, "{text:?}");
            }
            // Digests are validated by the digest parser.
            (Ok(ours), Err(fault)) => assert!(ours.digest.is_some(), "{text:?}: {fault}"),
            (Err(fault), Ok(theirs)) => {
                let upper = theirs.repository().contains(|letter: char| letter.is_ascii_uppercase());
                assert!(upper && matches!(fault, GrammarError::Part(_)), "{text:?}: {fault}");
            }
            (Err(_), Err(_)) => {}
        }
    }

    #[test]
    fn as_the_library_reads_them() {
        let long = "a".repeat(255);
        let (tags, hosted) = ([128, 129].map(|length| format!("a:{}", "t".repeat(length))), format!("h.e/{long}"));
        for text in [
            "a",
            "a/b",
            "a/b/c",
            "docker.io/a",
            "docker.io/a/b",
            "index.docker.io/a",
            "localhost/a",
            "localhost",
            "LOCALHOST/a",
            "a.b/c",
            "a:5/c",
            "a:5",
            "a:/c",
            "a:x/c",
            "A.b/c",
            "A/c",
            "-a.b/c",
            "a-.b/c",
            "a..b/c",
            ".a/b",
            "a./b",
            "a_b.c/d",
            "a_b.c:5/d",
            "a.b",
            "a..b",
            "a__b",
            "a___b",
            "a---b",
            "a-_b",
            "a.-b",
            "a-",
            "_a",
            "a/",
            "/a",
            "a//b",
            "a:b:c",
            "a/b:c/d",
            "a:_t",
            "a:.t",
            "a:-t",
            "a:t.-_T",
            "a:",
            ":a",
            "a@",
            "@a",
            "a b",
            "a\n",
            "ä",
            "a:5/b:c",
            "x:1/y:2/z",
            &long,
            &hosted,
            &tags[0],
            &tags[1],
        ] {
            compare(text);
            compare(&format!("{text}@sha256:{HEX}"));
        }
        assert_eq!(parse(&hosted).unwrap().repository, long);
        assert_eq!(parse(&format!("{hosted}a")), Err(GrammarError::Long(256)));
    }

    #[test]
    fn addresses_in_brackets() {
        for (text, registry) in [("[::1]/a", "[::1]"), ("[::1]:5000/a", "[::1]:5000"), ("[0:0::1]:5/a:t", "[::1]:5")] {
            assert_eq!(parse(text).unwrap().registry, registry);
        }
        for text in ["[::1]", "[::1]a/b", "[::1].a/b", "[::1]:/b", "[::1]:x/b", "[zz]/b", "[::1/b", "[]/b"] {
            assert!(matches!(parse(text), Err(GrammarError::Host(_) | GrammarError::Tag(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_another_name_than_the_library(text in "[aA0._:/@-]{0,12}") {
            compare(&text);
        }

        #[test]
        fn nor_of_longer_ones(
            parts in prop::collection::vec("[a-z0-9]{1,3}([._-]{0,2}[a-zA-Z0-9]{1,2}){0,2}", 1..4),
            host in "([a-zA-Z0-9._-]{1,6}(:[0-9x]{0,3})?/)?",
            tag in "(:[a-zA-Z0-9._-]{0,4})?",
        ) {
            compare(&format!("{host}{}{tag}", parts.join("/")));
        }
    }
}
