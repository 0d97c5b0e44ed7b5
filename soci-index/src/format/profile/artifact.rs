//! The manifest by which a profile is found beside its image.
//!
//! It is an OCI image manifest whose `subject` is the image's own manifest, so registries list it among the image's
//! referrers. An image can have several, each with a name; the choice among them is the same everywhere: the one of the
//! wanted name, else the one that is marked as default, the newest of these by the time that it says, then the smallest
//! digest. Without a name and without a default, none is used: an untrusted profile among an image's referrers costs
//! bytes only if it is marked as the default.
//!
//! The last blob is the icon ([`crate::format::icon`]). The manifest vouches for the profile blob by digest, and the
//! profile for each range of its pack by SHA-256.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::format::digest::Digest;
use crate::format::icon;
use crate::format::manifest::EMPTY_CONFIG;
use crate::format::model::{Descriptor, ImageManifest, annotation, media_type};
use crate::format::profile::{PACK, PROFILE};
use crate::format::ztoc::rfc3339;

/// What kind of artifact it is; also the media type of its configuration, for registries that know only that. Harbor
/// makes a name of what stands between the vendor and `config`, and shows any other type as unknown.
pub const ARTIFACT: &str = "application/vnd.soci.start-profile.config.v1+json";
/// Annotation: the profile's name.
pub(crate) const NAME: &str = "dev.soci.profile.name";
/// Annotation: `true` on the one that is used when none is named.
pub(crate) const DEFAULT: &str = "dev.soci.profile.default";
/// Annotation: the command that was recorded.
pub(crate) const COMMAND: &str = "dev.soci.profile.command";
/// Characters of a name at most. Stops a list from being filled with one.
const NAME_MAX: usize = 128;

/// A published profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Its manifest.
    pub digest: Digest,
    pub name: String,
    /// Whether it is used when none is named.
    pub is_default: bool,
    /// When it was made, by RFC 3339; empty when it does not say.
    pub created: String,
    /// The command that was recorded; empty when it does not say.
    pub command: String,
    pub profile: Descriptor,
    pub pack: Option<Descriptor>,
}

/// What a new manifest says.
#[derive(Debug, Clone)]
pub struct Notes {
    /// A name, see [`is_name`].
    pub name: String,
    /// Whether it is to be used when none is named.
    pub is_default: bool,
    /// When it was made, by RFC 3339.
    pub created: String,
    /// The command that was recorded, if that is known.
    pub command: Option<String>,
}

/// Whether a text can be a profile's name: letters, digits, `-`, `_`, `.`, 1 to 128 of them.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let fits = |letter: u8| letter.is_ascii_alphanumeric() || b"-_.".contains(&letter);
    (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(fits)
}

/// The manifest of a profile of the image `subject`.
#[must_use]
pub(crate) fn manifest(
    notes: &Notes,
    profile: &Descriptor,
    pack: Option<&Descriptor>,
    subject: &Descriptor,
) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Document {
        schema_version: u32,
        media_type: &'static str,
        artifact_type: &'static str,
        config: Descriptor,
        layers: Vec<Descriptor>,
        subject: Descriptor,
        annotations: BTreeMap<&'static str, String>,
    }
    let mut annotations = BTreeMap::from([(NAME, notes.name.clone()), (annotation::CREATED, notes.created.clone())]);
    if notes.is_default {
        annotations.insert(DEFAULT, "true".to_owned());
    }
    if let Some(command) = &notes.command {
        annotations.insert(COMMAND, command.clone());
    }
    let document = Document {
        schema_version: 2,
        media_type: media_type::MANIFEST,
        artifact_type: ARTIFACT,
        config: Descriptor::of(ARTIFACT, EMPTY_CONFIG),
        layers: std::iter::once(profile).chain(pack).cloned().chain([icon::descriptor()]).collect(),
        subject: Descriptor::new(&subject.media_type, subject.digest, subject.size),
        annotations,
    };
    crate::format::gojson::encode(&document)
}

/// Reads a manifest that is listed beside `image`; why it is none of ours.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn parse(digest: Digest, bytes: &[u8], image: &Digest) -> Result<Published, String> {
    let manifest: ImageManifest = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    manifest.check_referrer(ARTIFACT, image)?;
    let blob = |kind| manifest.layers.iter().find(|layer| layer.media_type == kind).cloned();
    let profile = blob(PROFILE).ok_or("it has no profile blob that this program can read")?;
    let note = |key: &str| manifest.annotations.get(key).cloned().unwrap_or_default();
    let name = note(NAME);
    if !is_name(&name) {
        return Err("it has no proper name".to_owned());
    }
    let is_default = note(DEFAULT) == "true";
    let (created, command, pack) = (note(annotation::CREATED), note(COMMAND), blob(PACK));
    Ok(Published { digest, name, is_default, created, command, profile, pack })
}

/// Puts the ones that are preferred first: defaults, then the newest, then the smallest digest.
pub(crate) fn order(published: &mut [Published]) {
    let key =
        |one: &Published| (!one.is_default, std::cmp::Reverse(rfc3339::parse(one.created.as_bytes())), one.digest);
    published.sort_by_key(key);
}

/// The one to use, of an ordered list.
#[must_use]
pub fn choose<'a>(published: &'a [Published], name: Option<&str>) -> Option<&'a Published> {
    match name {
        Some(name) => published.iter().find(|one| one.name == name),
        None => published.iter().find(|one| one.is_default),
    }
}
