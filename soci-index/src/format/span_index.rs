//! The manifest of a span index: which layers of an image have one, and where their blobs are.
//!
//! A manifest of its own beside AWS's, with the same image as its `subject`, so that each runtime finds what it reads
//! and is not disturbed by the other's. For each indexed layer it lists the TOC blob and the windows blob
//! ([`crate::format::compact`]). The TOC's descriptor says all that a reader has to know: of which layer it is, and
//! digest and size of its windows.
//!
//! The last blob is the icon ([`crate::format::icon`]), which no reader asks for.
//!
//! | annotation of a TOC | value |
//! |---|---|
//! | `vnd.soci.layer.digest` | the layer |
//! | `vnd.soci.span.size` | the span size that was asked for, in bytes of uncompressed layer |
//! | `vnd.soci.windows.digest`, `vnd.soci.windows.size` | the windows blob |
//!
//! Invariant: the same image gives the same manifest on every machine: it names neither its author nor its time.

use serde::{Deserialize, Serialize};

use crate::format::compact::{TOC, WINDOWS};
use crate::format::digest::Digest;
use crate::format::icon;
use crate::format::limits::Limits;
use crate::format::manifest::{self, EMPTY_CONFIG, ManifestError};
use crate::format::model::{Descriptor, media_type};

/// Configuration media type of a span index, which is also its artifact type. Harbor makes a name of what stands
/// between the vendor and `config`, and shows any other type as unknown.
pub const SPAN_INDEX: &str = "application/vnd.soci.span-index.config.v1+json";

/// The document in messages.
const WHAT: &str = "span index";
const LAYER_DIGEST: &str = "vnd.soci.layer.digest";
const SPAN_SIZE: &str = "vnd.soci.span.size";
const WINDOWS_DIGEST: &str = "vnd.soci.windows.digest";
const WINDOWS_SIZE: &str = "vnd.soci.windows.size";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SpanIndex {
    schema_version: u32,
    media_type: String,
    config: Descriptor,
    /// TOC and windows of each indexed layer, in the order of the image's layers; then the icon.
    pub layers: Vec<Descriptor>,
    /// The image manifest that it is for.
    pub subject: Descriptor,
}

/// The blobs of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanReference {
    pub layer: Digest,
    /// Digest and size of the TOC blob.
    pub toc: (Digest, u64),
    /// Digest and size of the windows blob.
    pub windows: (Digest, u64),
    /// Span size that was asked for.
    pub span_bytes: u64,
}

impl SpanReference {
    /// What a TOC's descriptor says; `None` unless it says all that is needed.
    #[must_use]
    pub fn of(toc: &Descriptor) -> Option<Self> {
        let note = |key: &str| toc.annotations.get(key);
        (toc.media_type == TOC).then_some(())?;
        Some(Self {
            layer: note(LAYER_DIGEST)?.parse().ok()?,
            toc: (toc.digest, toc.size),
            windows: (note(WINDOWS_DIGEST)?.parse().ok()?, note(WINDOWS_SIZE)?.parse().ok()?),
            span_bytes: note(SPAN_SIZE)?.parse().ok()?,
        })
    }

    /// The TOC as a manifest refers to it.
    #[must_use]
    pub(crate) fn toc_descriptor(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(TOC, self.toc.0, self.toc.1);
        let notes = [
            (LAYER_DIGEST, self.layer.to_string()),
            (SPAN_SIZE, self.span_bytes.to_string()),
            (WINDOWS_DIGEST, self.windows.0.to_string()),
            (WINDOWS_SIZE, self.windows.1.to_string()),
        ];
        descriptor.annotations.extend(notes.map(|(key, value)| (key.to_owned(), value)));
        descriptor
    }

    /// The windows blob as a manifest refers to it.
    #[must_use]
    pub fn windows_descriptor(&self) -> Descriptor {
        Descriptor::new(WINDOWS, self.windows.0, self.windows.1)
    }
}

impl SpanIndex {
    /// The span index of the image whose manifest is `subject`. Of `subject` only media type, digest and size count.
    #[must_use]
    pub fn new(layers: &[SpanReference], subject: &Descriptor) -> Self {
        Self {
            schema_version: 2,
            media_type: media_type::MANIFEST.to_owned(),
            config: Descriptor::of(SPAN_INDEX, EMPTY_CONFIG),
            layers: layers
                .iter()
                .flat_map(|layer| [layer.toc_descriptor(), layer.windows_descriptor()])
                .chain([icon::descriptor()])
                .collect(),
            subject: Descriptor::new(&subject.media_type, subject.digest, subject.size),
        }
    }

    /// Reads a span index.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, ManifestError> {
        let index: Self = manifest::read(WHAT, bytes, limits)?;
        manifest::check_kind(WHAT, &index.config, &[SPAN_INDEX])?;
        Ok(index)
    }

    /// The TOC of `layer`: the first one that names it.
    #[must_use]
    pub(crate) fn toc(&self, layer: &Digest) -> Option<&Descriptor> {
        self.layers.iter().find(|blob| SpanReference::of(blob).is_some_and(|reference| reference.layer == *layer))
    }

    /// All layers that it lists.
    pub fn references(&self) -> impl Iterator<Item = SpanReference> {
        self.layers.iter().filter_map(SpanReference::of)
    }

    /// The document.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        crate::format::gojson::encode(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let reference = SpanReference {
            layer: Digest::of(b"layer"),
            toc: (Digest::of(b"toc"), 3),
            windows: (Digest::of(b"windows"), 7),
            span_bytes: 262_144,
        };
        let subject = Descriptor::of(media_type::MANIFEST, b"{}");
        let json = SpanIndex::new(std::slice::from_ref(&reference), &subject).to_json();
        let read = SpanIndex::parse(&json, &Limits::DEFAULT).unwrap();
        assert_eq!(read.references().collect::<Vec<_>>(), std::slice::from_ref(&reference));
        assert_eq!(read.toc(&reference.layer), Some(&reference.toc_descriptor()));
        assert_eq!((read.toc(&Digest::of(b"another")), read.subject.digest), (None, subject.digest));
        assert_eq!((read.layers.len(), read.to_json()), (3, json));
        assert_eq!(read.layers[2], icon::descriptor());
    }

    #[test]
    fn others_are_refused() {
        let parse = |json: &str| SpanIndex::parse(json.as_bytes(), &Limits::DEFAULT).unwrap_err();
        assert!(matches!(parse("{}"), ManifestError::Json { .. }));
        let aws =
            crate::format::manifest::SociIndex::v1(&[], &[], &Descriptor::of(media_type::MANIFEST, b"{}")).to_json();
        let error = parse(&String::from_utf8(aws).unwrap());
        assert!(error.to_string().contains("amazon"), "{error}");
        let small = Limits { manifest_bytes_max: 10, ..Limits::DEFAULT };
        assert!(matches!(SpanIndex::parse(&[b' '; 11], &small), Err(ManifestError::TooLarge { .. })));
    }

    #[test]
    fn half_a_reference_is_none() {
        let mut toc = Descriptor::of(TOC, b"toc");
        assert_eq!(SpanReference::of(&toc), None);
        toc.annotations.insert(LAYER_DIGEST.to_owned(), Digest::of(b"layer").to_string());
        assert_eq!(SpanReference::of(&toc), None);
    }
}
