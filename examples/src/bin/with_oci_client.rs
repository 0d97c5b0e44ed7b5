//! Indexes an image and publishes the index with a registry client of the caller's own, `oci-client`:
//! `with_oci_client localhost:5000/team/app:v1`.
//!
//! Only the indexing and the documents come from `soci-index`; every byte goes through the caller's client. What
//! [`soci_index::publish()`] does besides, this does not: reuse of what exists, fallback tags for registries without the
//! referrers API, the check that the index can be found.

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use soci_index::Indexer;
use soci_index::format::digest::Digest;
use soci_index::format::encoding::{Declared, Encoding};
use soci_index::format::index::Compression;
use soci_index::format::manifest::{EMPTY_CONFIG, SociIndex, ZtocReference};
use soci_index::format::model::{Descriptor, ImageManifest, media_type};
use soci_index::indexing::{Options, SPAN_BYTES};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let text = std::env::args().nth(1).context("usage: with_oci_client HOST/REPOSITORY:TAG")?;
    // The client is built without a choice of its own.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let image: Reference = text.parse()?;
    let protocol = ClientProtocol::HttpsExcept(vec![image.registry().to_owned()]);
    let protocol = if image.registry().starts_with("127.0.0.1:") { protocol } else { ClientProtocol::Https };
    let client = Client::new(ClientConfig { protocol, ..ClientConfig::default() });
    let auth = RegistryAuth::Anonymous;
    client.auth(&image, &auth, RegistryOperation::Push).await?;

    let (manifest, digest) = client.pull_image_manifest(&image, &auth).await?;
    let (raw, _) = client.pull_manifest_raw(&image, &auth, &[media_type::MANIFEST]).await?;
    let subject = Descriptor::new(media_type::MANIFEST, digest.parse()?, raw.len() as u64);
    let mut ztocs = Vec::new();
    for layer in ImageManifest::try_from(&manifest)?.layers {
        let Some(compression) = compression(&layer) else { continue };
        let (ztoc, size) = index(&client, &image, &layer, compression).await?;
        println!("layer {} -> ztoc {ztoc}", layer.digest);
        ztocs.push(ZtocReference {
            digest: ztoc,
            size,
            layer: layer.digest,
            layer_media_type: layer.media_type,
            span_bytes: SPAN_BYTES,
            disable_xattrs: false,
        });
    }
    anyhow::ensure!(!ztocs.is_empty(), "{text} has no layer that can be indexed");

    let config = Bytes::from_static(EMPTY_CONFIG);
    client.push_blob(&image, config, &Digest::of(EMPTY_CONFIG).to_string()).await?;
    let document = SociIndex::v1(&ztocs, &[], &subject).to_json();
    let digest = Digest::of(&document);
    let place = image.clone_with_digest(digest.to_string());
    client.push_manifest_raw(&place, document, media_type::MANIFEST.parse()?).await?;
    println!("published {digest} for {text}");
    Ok(())
}

/// How the layer is compressed, if it can be indexed.
fn compression(layer: &Descriptor) -> Option<Compression> {
    match Declared::by_media_type(&layer.media_type) {
        Declared::Layer(Encoding::Gzip) => Some(Compression::Gzip),
        Declared::Layer(Encoding::Tar) => Some(Compression::None),
        Declared::Layer(Encoding::Zstd) | Declared::Encrypted | Declared::Other => None,
    }
}

/// Indexes a layer while it is pulled, and pushes its zTOC.
async fn index(
    client: &Client,
    image: &Reference,
    layer: &Descriptor,
    compression: Compression,
) -> anyhow::Result<(Digest, u64)> {
    let mut indexer = Indexer::new(Options::of(compression))?;
    let mut stream = client.pull_blob_stream(image, &OciDescriptor::from(layer)).await?;
    while let Some(chunk) = stream.try_next().await? {
        indexer.push(&chunk, &mut |_| {})?;
    }
    let indexed = indexer.finish()?;
    anyhow::ensure!(indexed.layer_digest == layer.digest, "the layer has the digest {}", indexed.layer_digest);
    let encoded = indexed.into_ztoc()?.encode()?;
    let mut ztoc = Vec::new();
    encoded.pieces().for_each(|piece| ztoc.extend_from_slice(&piece));
    let (digest, size) = (Digest::of(&ztoc), ztoc.len() as u64);
    client.push_blob(image, ztoc, &digest.to_string()).await?;
    Ok((digest, size))
}
