//! Pulls an image through containerd so that its snapshotter can provide the layers.
//!
//! `ctr images pull` passes nothing about the image to a snapshotter, so it never provides anything. This does what
//! containerd's own client does for Kubernetes: the documents of the image go into containerd's content store, then
//! each layer, from the lowest up, is prepared with labels that name image, manifest and layer. Where the snapshotter
//! has the layer, nothing is downloaded; else the blob is, and containerd unpacks it.
//!
//! Everything is made under a lease, and the image's record comes last: an interrupted pull is garbage that containerd
//! collects when the lease is over, and a pull that is repeated goes on where the last one stopped.
//!
//! Invariants: a blob is in the content store only with the right digest, which containerd checks; a layer that was
//! unpacked has the tar that the image names, else its snapshot is not committed; names are those that containerd's own
//! clients use, so `ctr`, `nerdctl` and Kubernetes see the same image.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, RawManifest};
use soci_index::format::reference::RegistryReference;
use soci_index::image::urls::UrlFetcher;
use soci_index::image::{ImageError, ImageSource, PlatformImage};
use soci_index::publish::build::Skip;

use crate::node::grpc::containerd::{Containerd, ContainerdError, Labels, Lease, Prepared, SOURCE_LABEL};
use crate::node::remote::labels::{IMAGE, INDEX, LAYER, MANIFEST};
use crate::node::snapshots::LABEL_BYTES_MAX;

/// Names the snapshot that a prepared one is to become.
const TARGET: &str = "containerd.io/snapshot.ref";
/// This layer and those above it.
const LAYERS: &str = "containerd.io/snapshot/cri.image-layers";
/// What annotations of a layer begin with that become labels of its snapshot.
const INHERITED: &str = "containerd.io/snapshot/";

/// Why an image was not pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// The snapshotter is not one of containerd's.
    #[error("containerd has no snapshotter {name:?}, only {known}; `soci doctor` says what its configuration lacks")]
    NoSnapshotter { name: String, known: String },
    /// The image says of fewer layers what their tars are, or of more.
    #[error("{image} has {layers} layers, and its configuration names {tars} tars")]
    Layers { image: String, layers: usize, tars: usize },
    /// The layer is not with the image, and was not fetched from elsewhere.
    #[error("layer {layer} ({media_type}) cannot be pulled: {}", Skip::Foreign { urls: urls.clone() })]
    Foreign { layer: Box<Digest>, media_type: String, urls: Vec<String> },
    /// A layer is not what the image says.
    #[error("layer {layer}: its tar has the digest {found}, the image says {expected}")]
    WrongTar {
        layer: Box<Digest>,
        /// The image's `diff_id`.
        expected: Box<Digest>,
        found: String,
    },
}

impl Classified for PullError {
    fn class(&self) -> Class {
        match self {
            Self::Image(error) => error.class(),
            Self::Containerd(error) => error.class(),
            Self::NoSnapshotter { .. } => Class::Local,
            Self::Layers { .. } | Self::WrongTar { .. } | Self::Foreign { .. } => Class::Content,
        }
    }
}

/// What to pull, and how.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// The image's name.
    pub image: RegistryReference,
    /// The snapshotter that is to have the layers.
    pub snapshotter: String,
    /// An index that it is to use.
    pub index: Option<Digest>,
    /// Fetches foreign layers from their URLs, if the operator allows it.
    pub urls: Option<UrlFetcher>,
}

/// How a layer came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// It was here.
    Already,
    /// The snapshotter provides it.
    Provided,
    /// It was downloaded, so many bytes, and unpacked.
    Fetched(u64),
}

/// What became of a layer.
#[derive(Debug, Clone)]
pub struct PulledLayer {
    pub layer: Descriptor,
    pub came: Came,
    /// How long that took.
    pub time: Duration,
}

/// An image that was pulled.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// Its name in containerd.
    pub name: String,
    /// What the name means.
    pub target: Digest,
    /// Its layers, lowest first.
    pub layers: Vec<PulledLayer>,
}

/// Pulls one platform of an image. `note` is called for each layer when it is ready.
///
/// # Errors
/// [`PullError`]; what was fetched until then is used by the next try.
pub async fn pull(
    containerd: &Containerd,
    source: &ImageSource,
    root: &RawManifest,
    image: &PlatformImage,
    options: &PullOptions,
    note: &dyn Fn(&PulledLayer),
) -> Result<Pulled, PullError> {
    let known = containerd.snapshotters().await?;
    if !known.contains(&options.snapshotter) {
        return Err(PullError::NoSnapshotter { name: options.snapshotter.clone(), known: known.join(", ") });
    }
    let lease = Lease::begin(containerd, "rpull").await?;
    let pull = Pull { containerd: lease.containerd(), source, root, image, options, name: name(&options.image) };
    let pulled = pull.run(note).await;
    let ended = lease.end().await;
    let pulled = pulled?;
    // The image keeps what it needs by now; the lease would end by itself.
    if let Err(error) = ended {
        tracing::warn!(%error, "a lease stays until it expires");
    }
    Ok(pulled)
}

struct Pull<'a> {
    containerd: &'a Containerd,
    source: &'a ImageSource,
    root: &'a RawManifest,
    image: &'a PlatformImage,
    options: &'a PullOptions,
    name: String,
}

impl Pull<'_> {
    async fn run(&self, note: &dyn Fn(&PulledLayer)) -> Result<Pulled, PullError> {
        let (manifest, config) = (&self.image.manifest, &self.image.config);
        let (layers, tars) = (manifest.layers.len(), config.diff_ids.len());
        if layers != tars {
            return Err(PullError::Layers { image: self.name.clone(), layers, tars });
        }
        self.documents().await?;
        let (mut pulled, mut parent) = (Vec::new(), String::new());
        for (position, (layer, diff_id)) in manifest.layers.iter().zip(&config.diff_ids).enumerate() {
            let chain = chain_id(&parent, diff_id);
            let start = Instant::now();
            let came = self.layer(position, layer, diff_id, &parent, &chain).await?;
            let layer = PulledLayer { layer: layer.clone(), came, time: start.elapsed() };
            note(&layer);
            pulled.push(layer);
            parent = chain;
        }
        // By this the garbage collector knows that the image needs its snapshots.
        let label = format!("containerd.io/gc.ref.snapshot.{}", self.options.snapshotter);
        self.containerd.label_content(&manifest.config.digest, &Labels::from([(label, parent)])).await?;
        self.containerd.put_image(&self.name, &self.root.descriptor()).await?;
        Ok(Pulled { name: self.name.clone(), target: self.root.digest, layers: pulled })
    }

    /// Puts index, manifest and configuration into the content store, each with labels for what it refers to.
    async fn documents(&self) -> Result<(), PullError> {
        let (manifest, raw) = (&self.image.manifest, &self.image.raw);
        if self.root.digest != raw.digest {
            let labels = self.labels([("m.0".to_owned(), raw.digest)]);
            self.document(&self.root.descriptor(), &self.root.bytes, &labels).await?;
        }
        let layers = manifest.layers.iter().enumerate().map(|(number, layer)| (format!("l.{number}"), layer.digest));
        let labels = self.labels(layers.chain([("config".to_owned(), manifest.config.digest)]));
        self.document(&raw.descriptor(), &raw.bytes, &labels).await?;
        self.document(&manifest.config, &self.image.raw_config, &self.labels([])).await
    }

    async fn document(&self, descriptor: &Descriptor, bytes: &bytes::Bytes, labels: &Labels) -> Result<(), PullError> {
        if self.containerd.label_content(&descriptor.digest, labels).await? {
            return Ok(());
        }
        let (whole, at) = (bytes.clone(), self.containerd.upload_offset(descriptor).await?);
        if let Some(offset) = at {
            let rest = whole.slice(usize::try_from(offset).unwrap_or(usize::MAX).min(whole.len())..);
            let chunks = futures_util::stream::iter([Ok::<_, std::convert::Infallible>(rest)]);
            self.containerd.upload(descriptor, offset, chunks, labels).await?;
        }
        // Created concurrently by another client.
        self.containerd.label_content(&descriptor.digest, labels).await?;
        Ok(())
    }

    fn labels(&self, references: impl IntoIterator<Item = (String, Digest)>) -> Labels {
        let reference = |(what, digest)| (format!("containerd.io/gc.ref.content.{what}"), Digest::to_string(&digest));
        let mut labels: Labels = references.into_iter().map(reference).collect();
        let image = &self.options.image;
        labels.insert(format!("{SOURCE_LABEL}{}", image.registry()), image.repository().to_owned());
        labels
    }

    async fn layer(
        &self,
        position: usize,
        layer: &Descriptor,
        diff_id: &Digest,
        parent: &str,
        chain: &str,
    ) -> Result<Came, PullError> {
        let snapshotter = &self.options.snapshotter;
        if self.containerd.has_snapshot(snapshotter, chain).await? {
            return Ok(Came::Already);
        }
        let key = format!("extract-{:x} {chain}", unique());
        let labels = self.snapshot_labels(position, layer, chain);
        let mounts = match self.containerd.prepare(snapshotter, &key, parent, labels).await? {
            Prepared::Exists if self.containerd.has_snapshot(snapshotter, chain).await? => return Ok(Came::Provided),
            Prepared::Exists => {
                let message = format!("it says that {chain} exists, and does not have it");
                let what = format!("prepare layer {}", layer.digest);
                return Err(ContainerdError::Refused { what, code: "unexpected answer", message }.into());
            }
            Prepared::Mounts(mounts) => mounts,
        };
        let unpacked = async {
            let bytes = self.blob(layer).await?;
            let found = self.containerd.apply(layer, mounts).await?;
            if found != diff_id.to_string() {
                let (layer, expected) = (Box::new(layer.digest), Box::new(*diff_id));
                return Err(PullError::WrongTar { layer, expected, found });
            }
            self.containerd.commit(snapshotter, chain, &key).await?;
            Ok(Came::Fetched(bytes))
        };
        let unpacked = unpacked.await;
        if unpacked.is_err()
            && let Err(error) = self.containerd.remove_snapshot(snapshotter, &key).await
        {
            tracing::warn!(key, %error, "a snapshot that was not filled stays until the lease expires");
        }
        unpacked
    }

    /// Brings a layer into the content store; gives the bytes that were downloaded.
    async fn blob(&self, layer: &Descriptor) -> Result<u64, PullError> {
        let labels = self.labels([]);
        let Some(offset) = self.containerd.upload_offset(layer).await? else {
            self.containerd.label_content(&layer.digest, &labels).await?;
            return Ok(0);
        };
        let wanted = offset.min(layer.size)..layer.size;
        let rest = if !layer.is_foreign() || self.source.has_blob(layer).await? {
            self.source.read_range(layer, wanted)
        } else if let Some(urls) = self.options.urls.as_ref().filter(|_| !layer.urls.is_empty()) {
            urls.read(layer, wanted)
        } else {
            let (media_type, urls) = (layer.media_type.clone(), layer.urls.clone());
            return Err(PullError::Foreign { layer: Box::new(layer.digest), media_type, urls });
        };
        self.containerd.upload(layer, offset, rest, &labels).await?;
        Ok(layer.size.saturating_sub(offset))
    }

    fn snapshot_labels(&self, position: usize, layer: &Descriptor, chain: &str) -> Labels {
        let above = self.image.manifest.layers.iter().skip(position).map(|layer| layer.digest);
        let mut labels = inherited(&layer.annotations);
        labels.extend([
            (TARGET.to_owned(), chain.to_owned()),
            (IMAGE.to_owned(), self.name.clone()),
            (MANIFEST.to_owned(), self.image.descriptor.digest.to_string()),
            (LAYER.to_owned(), layer.digest.to_string()),
            (LAYERS.to_owned(), list(above, LABEL_BYTES_MAX - LAYERS.len())),
        ]);
        if let Some(index) = self.options.index {
            labels.insert(INDEX.to_owned(), index.to_string());
        }
        labels
    }
}

/// Notes on a layer that are meant for its snapshot, as containerd's own client passes them on: some snapshotters learn
/// by them what they may trust, as stargz's does the digest of a layer's table of contents. What containerd would
/// refuse for its length is left out.
fn inherited(annotations: &BTreeMap<String, String>) -> Labels {
    let fits = |(key, value): &(&String, &String)| key.len() + value.len() <= LABEL_BYTES_MAX;
    let notes = annotations.iter().filter(|(key, _)| key.starts_with(INHERITED)).filter(fits);
    notes.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// As many digests as fit, with commas in between.
fn list(digests: impl Iterator<Item = Digest>, bytes: usize) -> String {
    let mut list = String::new();
    for digest in digests {
        let text = digest.to_string();
        if list.len() + 1 + text.len() > bytes {
            break;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(&text);
    }
    list
}

/// The name of the snapshot of a layer: of the digests of all tars up to it. Source: the image specification,
/// `ChainID`.
fn chain_id(parent: &str, diff_id: &Digest) -> String {
    if parent.is_empty() {
        diff_id.to_string()
    } else {
        Digest::of(format!("{parent} {diff_id}").as_bytes()).to_string()
    }
}

/// The image's name as containerd writes it.
fn name(image: &RegistryReference) -> String {
    let tag = image.tag().map(|tag| format!(":{tag}")).unwrap_or_default();
    let digest = image.digest().map(|digest| format!("@{digest}")).unwrap_or_default();
    format!("{}/{}{tag}{digest}", image.registry(), image.repository())
}

/// A number that no other pull of this machine has.
fn unique() -> u128 {
    soci_index::clock::since_epoch().as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_containerd_s() {
        let digest = Digest::of(b"x");
        for (text, expected) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("localhost:5000/team/app:v1", "localhost:5000/team/app:v1".to_owned()),
            (&format!("h.example/a@{digest}"), format!("h.example/a@{digest}")),
        ] {
            assert_eq!(name(&text.parse().unwrap()), expected);
        }
    }

    /// The example of the image specification's text has no numbers; these were computed by `sha256sum`.
    #[test]
    fn chains() {
        let diff_id = Digest::of(b"a");
        let first = chain_id("", &diff_id);
        assert_eq!(first, diff_id.to_string());
        let both = "sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb \
                    sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb";
        assert_eq!(chain_id(&first, &diff_id), Digest::of(both.as_bytes()).to_string());
    }

    #[test]
    fn annotations_for_snapshots_are_passed_on() {
        let toc = ("containerd.io/snapshot/stargz/toc.digest".to_owned(), "sha256:00".to_owned());
        let long = ("containerd.io/snapshot/long".to_owned(), "x".repeat(LABEL_BYTES_MAX));
        let other = ("org.opencontainers.image.title".to_owned(), "a".to_owned());
        assert_eq!(inherited(&BTreeMap::from([toc.clone(), long, other])), BTreeMap::from([toc]));
    }

    #[test]
    fn lists_are_cut_at_a_comma() {
        let digests = || (0..100_u8).map(|number| Digest::of(&[number]));
        let whole = list(digests().take(2), 1000);
        assert_eq!(whole.split(',').count(), 2);
        let cut = list(digests(), LABEL_BYTES_MAX - LAYERS.len());
        assert_eq!(cut.split(',').count(), 56);
        assert!(cut.split(',').zip(digests()).all(|(text, digest)| text == digest.to_string()));
    }
}
