//! The indexes of an image, as the registry has them: which of its answers are of them, and how much they take.
//!
//! What belongs to an index is asked of the index manifests, not guessed from media types or sizes: the manifests that the
//! list of the image's referrers names and the one that the image with AWS's index names itself, that list, and all blobs
//! of theirs.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail};
use soci_index::find::discover::{self, Discovery, Which};
use soci_index::format::digest::Digest;
use soci_index::format::index_manifest::{IndexManifest, REFERRING};
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{INDEX_DIGEST, INDEX_V2};
use soci_index::format::model::ImageManifest;
use soci_index::format::platform::PlatformSelection;
use soci_index::format::reference::{ManifestName, Reference};
use soci_index::format::span_index::{SPAN_INDEX, SpanIndex};
use soci_index::image::ImageSource;
use soci_index::registry::{ClientOptions, CredentialSource, Repository, fallback};
use soci_tests::answers::Answer;
use soci_tests::registry::client;

use super::images::{Image, Shelf};
use super::machine::Kind;
use crate::report::{Goal, Report};

/// What the span index may take, in units of the layer.
const STORAGE_GOAL: f64 = 0.03;

/// What there is of an image's indexes.
#[derive(Debug)]
pub(crate) struct Indexes {
    /// Paths of manifests and blobs in the registry.
    paths: BTreeSet<String>,
    /// Sizes of each layer, and of its TOC and windows together.
    layers: Vec<(u64, u64)>,
}

impl Indexes {
    /// Asks the registry.
    pub(crate) async fn of(shelf: &Shelf, image: &Image) -> anyhow::Result<Self> {
        let repository = client(&shelf.registry.address).repository(&format!("cold/{}", image.name));
        let mut indexes = Self { paths: BTreeSet::new(), layers: Vec::new() };
        let (digest, manifest) = resolve(&shelf.name(image, Kind::Soci.tag())).await?;
        indexes.paths.insert(format!("/v2/{}/manifests/{}", repository.name(), fallback::tag(&digest)));
        for entry in repository.referrers(&digest, None).await?.entries {
            if REFERRING.contains(&entry.kind()) {
                indexes.add(&repository, entry.digest, entry.kind()).await?;
            }
        }
        // One of an earlier run may be listed beside it: what counts is the one that a start takes.
        let found = discover::preferred_on_registry(&repository, &digest, Which::Newest, &[SPAN_INDEX]).await?;
        let Discovery::Found(found) = found else { bail!("{}: no span index is found", repository.name()) };
        let spans = SpanIndex::parse(&found.raw, &Limits::DEFAULT)?;
        for layer in &manifest.layers {
            let found = spans.references().find(|reference| reference.layer == layer.digest);
            let found = found.with_context(|| format!("the span index has nothing of layer {}", layer.digest))?;
            indexes.layers.push((layer.size, found.toc.1 + found.windows.1));
        }
        let (_, named) = resolve(&shelf.name(image, Kind::Aws.tag())).await?;
        let named = named.annotations.get(INDEX_DIGEST).context("the image for AWS's daemon names no index")?;
        indexes.add(&repository, named.parse()?, INDEX_V2).await?;
        Ok(indexes)
    }

    /// Notes an index manifest and its blobs.
    async fn add(&mut self, repository: &Repository, digest: Digest, kind: &str) -> anyhow::Result<()> {
        let raw = repository.manifest(&ManifestName::Digest(digest)).await?;
        let raw = raw.with_context(|| format!("the index {digest} is listed and not there"))?;
        let index = IndexManifest::parse(kind, &raw.bytes, &Limits::DEFAULT)?;
        let name = repository.name();
        self.paths.insert(format!("/v2/{name}/manifests/{digest}"));
        for blob in index.blobs().iter().map(|blob| blob.digest).chain([digest]) {
            self.paths.insert(format!("/v2/{name}/blobs/{blob}"));
        }
        Ok(())
    }

    /// Bytes of these indexes among what was sent.
    pub(crate) fn bytes_in(&self, answers: &[Answer]) -> u64 {
        let of_index = |answer: &&Answer| answer.is_content() && self.paths.contains(&answer.path);
        answers.iter().filter(of_index).map(|answer| answer.bytes).sum()
    }

    /// Reports what the span index takes in the registry.
    pub(crate) fn add_storage(&self, image: &Image, report: &mut Report) {
        let whole = self.layers.iter().fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
        let largest = self.layers.iter().copied().max().unwrap_or_default();
        for (what, (layer, index)) in [("its layers'", whole), ("its largest layer's, that layer alone", largest)] {
            let figure = format!("storage of the span index of {}: bytes, in units of {what}", image.name);
            report.add(figure, Goal::AtMost(STORAGE_GOAL), "", vec![index as f64 / layer as f64]);
        }
    }
}

/// The image manifest of this machine's platform.
async fn resolve(name: &str) -> anyhow::Result<(Digest, ImageManifest)> {
    let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
    let reference: Reference = name.parse()?;
    let image = ImageSource::open(&reference, &options).await?.resolve(&PlatformSelection::Host).await?.pop();
    let image = image.with_context(|| format!("{name} has nothing for this platform"))?;
    Ok((image.raw.digest, image.manifest))
}
