//! Small images with real contents, made in memory.

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use soci_cli::demo::recipe::{Recipe, pack};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_index::registry::{Body, Repository};

/// An image: blobs and a manifest.
#[derive(Debug, Clone)]
pub struct Image {
    /// Layers and configuration.
    pub blobs: Vec<Bytes>,
    pub manifest: Bytes,
    /// Uncompressed layers.
    pub tars: Vec<Vec<u8>>,
}

/// Media type of a gzip layer.
pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

impl Image {
    /// An image of the given layers: media type, blob, uncompressed tar.
    ///
    /// # Panics
    /// Never for such input.
    #[must_use]
    pub fn new(layers: Vec<(&str, Vec<u8>, Vec<u8>)>) -> Self {
        let diff_ids: Vec<String> = layers.iter().map(|(.., tar)| Digest::of(tar).to_string()).collect();
        let (architecture, os) =
            (std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64"), "linux");
        let config = json!({ "architecture": architecture, "os": os, "rootfs": { "type": "layers", "diff_ids": diff_ids }, "config": {} });
        let config = Bytes::from(config.to_string());
        let describe =
            |kind: &str, bytes: &[u8]| json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type::MANIFEST,
            "config": describe(media_type::CONFIG, &config),
            "layers": layers.iter().map(|(kind, blob, _)| describe(kind, blob)).collect::<Vec<_>>(),
        });
        let tars = layers.iter().map(|(.., tar)| tar.clone()).collect();
        let mut blobs: Vec<Bytes> = layers.into_iter().map(|(_, blob, _)| Bytes::from(blob)).collect();
        blobs.push(config);
        Self { blobs, manifest: Bytes::from(manifest.to_string()), tars }
    }

    /// Gzip layers of the given tars.
    #[must_use]
    pub fn gzip(tars: Vec<Vec<u8>>) -> Self {
        Self::new(tars.into_iter().map(|tar| (GZIP, gzip(&tar, 6), tar)).collect())
    }

    /// Digest of the manifest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// Pushes the image under `tag`.
    ///
    /// # Panics
    /// When the registry refuses it.
    pub async fn push(&self, repository: &Repository, tag: &str) {
        self.push_as(repository, tag, media_type::MANIFEST).await;
    }

    /// Pushes the image with a manifest of this media type.
    ///
    /// # Panics
    /// When the registry refuses it.
    pub async fn push_as(&self, repository: &Repository, tag: &str, kind: &str) {
        for blob in &self.blobs {
            let digest = Digest::of(blob);
            repository.push_blob(&digest, Body::Bytes(blob.clone()), None).await.expect("blob");
        }
        let name = ManifestName::Tag(tag.to_owned());
        repository.push_manifest(&name, kind, self.manifest.clone()).await.expect("manifest");
    }
}

/// Compresses as `gzip -LEVEL` would.
///
/// # Panics
/// Never: memory takes all.
#[must_use]
pub fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(data).expect("memory");
    encoder.finish().expect("memory")
}

/// The layer at the bottom of images that run: this machine's shell and tools, `extra` as a file, and places to mount
/// at.
///
/// # Panics
/// When this machine has no shell.
#[must_use]
pub fn shell_layer(extra: (&str, &str)) -> Vec<u8> {
    let mut files = Recipe::of_this_machine().expect("a shell").layers.swap_remove(0);
    for tool in ["/bin/mkdir", "/bin/rm"] {
        // Their libraries are those of the others.
        files.insert(tool.into(), tool.into());
    }
    pack(&files, Some(&(extra.0.into(), extra.1.to_owned()))).expect("files that can be read")
}

/// A tar of regular files, in the order given, with directories before them.
///
/// # Panics
/// When a name is longer than a tar holds.
#[must_use]
pub fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut directories = std::collections::BTreeSet::new();
    for (name, content) in files {
        for (slash, _) in name.match_indices('/') {
            if directories.insert(&name[..=slash]) {
                let mut header = header(0o755);
                header.set_entry_type(tar::EntryType::Directory);
                builder.append_data(&mut header, &name[..=slash], &[][..]).expect("directory");
            }
        }
        let mut header = header(0o644);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, &content[..]).expect("file");
    }
    builder.into_inner().expect("memory")
}

fn header(mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_mtime(1_700_000_000);
    header.set_size(0);
    header
}

/// Bytes that look like text and compress about threefold, the same for the same seed.
#[must_use]
pub fn text(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(length + 16);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = [b"span", b"tree", b"root", b"time"][(state >> 60) as usize & 3];
        out.extend_from_slice(word);
        out.extend_from_slice((state >> 40 & 0xfff).to_string().as_bytes());
        out.push(b' ');
    }
    out.truncate(length);
    out
}
