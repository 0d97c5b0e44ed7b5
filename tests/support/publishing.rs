//! Publishing with the binary, and looking for what was published as a node does.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use soci_index::find::discover::{Discovery, SOCI_INDEX_V1, Which, on_registry};
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use soci_index::format::span_index::SPAN_INDEX;
use soci_index::registry::Repository;
use soci_index::registry::referrers::ApiAnswer;

use crate::image::{Image, tar, text};
use crate::{run, soci};

/// What comes of publishing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every client finds it by the referrers API.
    Native,
    /// Every client finds it by the fallback tag.
    Tag,
    /// It is found by the API, with a warning that contains this.
    NativeBut(&'static str),
    /// It is found by the fallback tag, with a warning that contains this.
    TagBut(&'static str),
    /// It is refused, with a message that contains this.
    Refused(&'static str),
}

impl Outcome {
    /// Whether the referrers API is where it is found.
    #[must_use]
    pub fn is_native(self) -> bool {
        matches!(self, Self::Native | Self::NativeBut(_))
    }
}

/// An image of two layers.
#[must_use]
pub fn image() -> Image {
    let base = tar(&[("bin/tool", text(1, 1_500_000)), ("etc/conf", text(2, 500))]);
    let top = tar(&[("app/data", text(3, 700_000)), ("app/main", text(4, 100))]);
    Image::gzip(vec![base, top])
}

/// `soci publish`, with the logins of a directory.
#[must_use]
pub fn publish(name: &str, login: &Path) -> Command {
    let mut command = soci();
    command.args(["publish", name, "--min-layer-size", "1000", "--span-size", "262144", "--json"]);
    command.env("DOCKER_CONFIG", login);
    command
}

/// Publishes, compares what is said with `outcome`, and looks for the index. Says whether there is one.
///
/// # Panics
/// When anything else comes of it.
pub async fn publish_and_find(
    name: &str,
    image: &Image,
    repository: &Repository,
    login: &Path,
    outcome: Outcome,
) -> bool {
    let output = run(&mut publish(name, login));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    if let Outcome::Refused(reason) = outcome {
        assert_eq!(output.status.code(), Some(4), "{message}");
        assert!(message.contains(reason) && message.contains("--to") && message.contains("--v2"), "{message}");
        return false;
    }
    assert!(output.status.success(), "{message}");
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let said = &said["images"][0];
    assert_eq!(said["status"], "published", "{said}");
    let by = if outcome.is_native() { "the referrers API" } else { "the fallback tag" };
    assert_eq!(said["foundBy"], by, "{said}");
    let warnings = said["warnings"].as_array().unwrap();
    match outcome {
        Outcome::NativeBut(part) | Outcome::TagBut(part) => {
            assert_eq!(warnings.len(), 1, "{said}");
            assert!(warnings[0].as_str().unwrap().contains(part), "{said}");
        }
        Outcome::Native | Outcome::Tag | Outcome::Refused(_) => assert_eq!(warnings.len(), 0, "{said}"),
    }

    let index: Digest = said["index"]["digest"].as_str().unwrap().parse().unwrap();
    let entry = looked_up(repository, &image.digest(), outcome).await;
    assert_eq!((entry.digest, entry.kind()), (index, SOCI_INDEX_V1));
    let has_right_size = entry.size == said["index"]["size"].as_u64().unwrap();
    assert_eq!(has_right_size, !matches!(outcome, Outcome::NativeBut(_)));
    let found = on_registry(repository, &image.digest(), Which::Newest).await.unwrap();
    assert!(matches!(&found, Discovery::Found(found) if found.digest == index && found.others == 0), "{found:?}");
    true
}

/// What a client that goes by the specification finds, and only where it must look: the API, or else the tag.
async fn looked_up(repository: &Repository, image: &Digest, outcome: Outcome) -> Descriptor {
    let mut entries = match repository.referrers_api(image, Some(SOCI_INDEX_V1)).await.unwrap() {
        ApiAnswer::Listed(entries) if outcome.is_native() => entries,
        ApiAnswer::Unsupported(_) if !outcome.is_native() => repository.fallback_entries(image).await.unwrap().unwrap(),
        other => panic!("{other:?}"),
    };
    // A fallback tag lists all that refers to the image.
    entries.retain(|entry| entry.kind() != SPAN_INDEX);
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

/// Publishes what is in place already: next to nothing is sent.
///
/// # Panics
/// When it is not found to be in place.
pub fn publish_again(name: &str, login: &Path, bytes_sent_max: u64) {
    let output = run(&mut publish(name, login));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["images"][0]["status"], "up to date", "{said}");
    assert!(said["bytesSent"].as_u64().unwrap() <= bytes_sent_max, "{said}");
}
