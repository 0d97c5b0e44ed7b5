//! How layer blobs are encoded: what a media type says of it, and what the first bytes show.
//!
//! Bytes win. Builders have pushed gzip under the media type of plain tar and the other way round, and container
//! engines look at the bytes, so an image that runs elsewhere must not fail here for its label.

/// How a layer blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    Gzip,
    /// Not at all.
    Tar,
    /// zstd, any number of frames.
    Zstd,
}

/// Bytes of a blob that suffice for [`Encoding::sniff`].
pub const SNIFF_BYTES: u64 = 4;

impl Encoding {
    /// The encoding that a blob's first bytes show.
    #[must_use]
    pub const fn sniff(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable frame before it.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::Tar,
        }
    }

    /// Its usual name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Tar => "tar",
            Self::Zstd => "zstd",
        }
    }
}

/// What the media type of a layer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// A tar in this encoding.
    Layer(Encoding),
    /// Encrypted: without the key nothing can be known of it.
    Encrypted,
    /// Something else, or a tar in an encoding that is not known here.
    Other,
}

impl Declared {
    /// Reads a media type.
    #[must_use]
    pub fn by_media_type(text: &str) -> Self {
        if text.ends_with("+encrypted") {
            Self::Encrypted
        } else if text.ends_with("gzip") {
            Self::Layer(Encoding::Gzip)
        } else if text.ends_with("zstd") {
            Self::Layer(Encoding::Zstd)
        } else if text.ends_with(".tar") {
            Self::Layer(Encoding::Tar)
        } else {
            Self::Other
        }
    }
}

/// Whether a media type is that of a layer that registries need not have: it is fetched from the URLs of its
/// descriptor.
#[must_use]
pub(crate) fn is_foreign(media_type: &str) -> bool {
    media_type.contains(".foreign.") || media_type.contains(".nondistributable.")
}

/// Why a blob of this media type is not shown or indexed as a tar; `None` if it may be one.
#[must_use]
pub fn obstacle(media_type: &str) -> Option<&'static str> {
    match Declared::by_media_type(media_type) {
        Declared::Encrypted => Some("it is encrypted"),
        Declared::Other if media_type.starts_with("application/wasm") || media_type.contains(".wasm.") => {
            Some("it is WebAssembly, not a file system layer")
        }
        Declared::Layer(_) | Declared::Other => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes() {
        for (first, expected) in [
            (&b""[..], Encoding::Tar),
            (b"\x1f", Encoding::Tar),
            (b"\x1f\x8b", Encoding::Gzip),
            (b"\x28\xb5\x2f\xfd\x04", Encoding::Zstd),
            (b"\x51\x2a\x4d\x18", Encoding::Zstd),
            (b"./\0\0", Encoding::Tar),
        ] {
            assert_eq!(Encoding::sniff(first), expected, "{first:?}");
        }
    }

    #[test]
    fn media_types() {
        let (oci, docker) = ("application/vnd.oci.image.layer", "application/vnd.docker.image.rootfs");
        for (text, declared, foreign, obstacle_there) in [
            (format!("{oci}.v1.tar"), Declared::Layer(Encoding::Tar), false, false),
            (format!("{oci}.v1.tar+gzip"), Declared::Layer(Encoding::Gzip), false, false),
            (format!("{oci}.v1.tar+zstd"), Declared::Layer(Encoding::Zstd), false, false),
            (format!("{oci}.v1.tar+gzip+encrypted"), Declared::Encrypted, false, true),
            (format!("{oci}.nondistributable.v1.tar+gzip"), Declared::Layer(Encoding::Gzip), true, false),
            (format!("{docker}.foreign.diff.tar.gzip"), Declared::Layer(Encoding::Gzip), true, false),
            (format!("{docker}.diff.tar.gzip"), Declared::Layer(Encoding::Gzip), false, false),
            ("application/wasm".to_owned(), Declared::Other, false, true),
            ("application/vnd.wasm.content.layer.v1+wasm".to_owned(), Declared::Other, false, true),
            (String::new(), Declared::Other, false, false),
        ] {
            assert_eq!(Declared::by_media_type(&text), declared, "{text}");
            assert_eq!(is_foreign(&text), foreign, "{text}");
            assert_eq!(obstacle(&text).is_some(), obstacle_there, "{text}");
        }
    }
}
