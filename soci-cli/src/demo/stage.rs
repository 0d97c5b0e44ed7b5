//! The demonstration's registry and image.

use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::platform::{Platform, PlatformSelection};
use soci_index::format::reference::ManifestName;
use soci_index::image::ImageSource;
use soci_index::publish;
use soci_index::publish::build::{BuildOptions, Format, Observer};
use soci_index::publish::known::Known;
use soci_index::registry::{Body, ClientOptions, CredentialSource, Registry, Repository};

use crate::demo::recipe::{Recipe, pack};
use crate::demo::registry::DemoRegistry;

/// Round trip to the demonstration's registry: that of a registry in the same data centre.
pub const LATENCY: Duration = Duration::from_millis(2);

/// Spans of AWS's form of the index: the demonstration's layers are small.
pub const SPAN_BYTES: u64 = 1 << 20;

/// Least size of a layer that gets an index.
pub const LAYER_BYTES_MIN: u64 = 1 << 20;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A registry with the image in it. The registry ends with this value.
#[derive(Debug)]
pub struct Stage {
    pub registry: DemoRegistry,
    /// The image's name in it.
    pub name: String,
}

impl Stage {
    /// Makes the image and pushes it.
    ///
    /// # Errors
    /// When a file cannot be packed, or the registry not started.
    pub async fn new(recipe: &Recipe) -> anyhow::Result<Self> {
        let registry = DemoRegistry::start(LATENCY).await.context("starting the demonstration's registry")?;
        let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
        let repository = Registry::new(&registry.host(), options)?.repository("demo/app");
        let mut layers = Vec::new();
        for files in &recipe.layers {
            let files = files.clone();
            layers.push(tokio::task::spawn_blocking(move || compress(&pack(&files, None)?)));
        }
        let script = recipe.script.clone();
        layers.push(tokio::task::spawn_blocking(move || {
            compress(&pack(&std::collections::BTreeMap::new(), Some(&script))?)
        }));
        let mut packed = Vec::new();
        for layer in layers {
            packed.push(layer.await.context("packing a layer")??);
        }
        push(&repository, packed).await?;
        let name = format!("{}/demo/app:latest", registry.host());
        Ok(Self { registry, name })
    }

    /// Publishes both forms of the image's index in the registry, as `soci publish` would.
    ///
    /// # Errors
    /// When the image cannot be indexed.
    pub async fn publish(&self) -> anyhow::Result<publish::Report> {
        let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
        let source = ImageSource::open(&self.name.parse()?, &options).await?;
        let Some(repository) = source.repository() else { anyhow::bail!("{} is in a registry", self.name) };
        let image = source.resolve(&PlatformSelection::Host).await?.pop().context("the image has a platform")?;
        let building = BuildOptions {
            format: Format::Both,
            span_bytes: SPAN_BYTES,
            layer_bytes_min: LAYER_BYTES_MIN,
            ..BuildOptions::default()
        };
        let observer: Observer = std::sync::Arc::new(|_| {});
        let job =
            publish::Job { source: &source, image: &image, options: &building, force: false, observer: &observer };
        Ok(publish::publish(&job, repository, &Known::default()).await?)
    }
}

/// A layer and the digest of its tar.
struct Packed {
    blob: Bytes,
    diff_id: Digest,
}

fn compress(tar: &[u8]) -> anyhow::Result<Packed> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(tar).context("compressing a layer")?;
    Ok(Packed { blob: encoder.finish().context("compressing a layer")?.into(), diff_id: Digest::of(tar) })
}

async fn push(repository: &Repository, layers: Vec<Packed>) -> anyhow::Result<()> {
    let host = Platform::host();
    let config = json!({
        "architecture": host.architecture(),
        "os": host.os(),
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>() },
    });
    let config = Bytes::from(config.to_string());
    let describe = |kind: &str, blob: &Bytes| -> Value {
        json!({ "mediaType": kind, "digest": Digest::of(blob), "size": blob.len() })
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type::MANIFEST,
        "config": describe(media_type::CONFIG, &config),
        "layers": layers.iter().map(|layer| describe(GZIP, &layer.blob)).collect::<Vec<_>>(),
    });
    for blob in layers.into_iter().map(|layer| layer.blob).chain([config]) {
        repository.push_blob(&Digest::of(&blob), Body::Bytes(blob), None).await?;
    }
    let (tag, manifest) = (ManifestName::Tag("latest".to_owned()), Bytes::from(manifest.to_string()));
    repository.push_manifest(&tag, media_type::MANIFEST, manifest).await?;
    Ok(())
}
