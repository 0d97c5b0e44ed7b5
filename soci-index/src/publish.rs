//! Publishing: from an image to its SOCI index in a registry, in one streaming step.
//!
//! Order of things, so that nothing half-done can be found: zTOC blobs while the layers are read, then prefetch
//! artifacts and the configuration blob, then the manifest with the image as its `subject`, then the check that it is
//! listed. An interrupted run leaves blobs, never a manifest that misses one; the next run finds the blobs and goes on.
//! A run that finds the same index in place reads no layer and sends nothing.
//!
//! The room is the top of the crate: [`mod@build`] reads layers, [`known`] finds what need not be built again, [`v2`]
//! and [`convert`] make SOCI-enabled images, [`local`] keeps indexes on this machine, [`mod@verify`] checks one against
//! its layers.

pub mod build;
pub mod convert;
pub mod known;
pub mod local;
pub mod prefetched;
pub mod profiles;
pub mod refused;
mod report;
pub mod reuse;
pub mod v2;
pub mod verify;

use bytes::Bytes;

pub use self::report::{Done, Report, SpanReport};

use crate::find::choose::{Candidate, IndexPlace, choose};
use crate::find::discover::Refused;
use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::icon;
use crate::format::index_manifest::IndexManifest;
use crate::format::limits::Limits;
use crate::format::manifest::{ManifestError, PREFETCH, SociIndex, ZTOC, ZtocReference};
use crate::format::model::{Descriptor, media_type};
use crate::format::prefetch::{self, Wanted};
use crate::format::span_index::{SpanIndex, SpanReference};
use crate::format::ztoc::{Ztoc, ZtocError};
use crate::image::sink::{Nowhere, Sink, SinkError, ztoc_body};
use crate::image::store::StoreError;
use crate::image::{ImageError, ImageSource, PlatformImage};
use crate::publish::build::{BuildError, BuildOptions, Finished, LayerReport, LayerZtoc, Observer, build};
use crate::publish::known::Known;
use crate::publish::reuse::{Relied, ReusedFrom};
use crate::publish::v2::EnableError;
use crate::registry::{Body, RegistryError, Repository};

/// Why an index could not be published or stored.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A layer could not be indexed.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Where the index, or the image, should go.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// A layout: the local index store, or where a converted image goes.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the local index store holds is no index.
    #[error("the local index {digest} cannot be read: {source}")]
    Manifest { digest: Box<Digest>, source: ManifestError },
    /// The same of a span index.
    #[error("the local span index {digest} cannot be read: {source}")]
    SpanIndex { digest: Box<Digest>, source: ManifestError },
    /// A zTOC that exists already cannot be read.
    #[error("the zTOC {digest} cannot be read: {source}; --force builds it again")]
    Ztoc { digest: Box<Digest>, source: ZtocError },
    /// No layer can be indexed.
    #[error("no ztocs created, all layers either skipped or produced errors")]
    NothingToIndex { layers: Vec<LayerReport> },
    /// The image has no SOCI-enabled form.
    #[error("{image}: {source}")]
    Enable { image: String, source: EnableError },
    /// A manifest that the image's index lists is not there, so the image cannot be copied.
    #[error("{image}: the image index lists {digest}, which is not there: choose platforms whose manifests are")]
    Sparse { image: String, digest: Box<Digest> },
    /// A span index was to be put beside a converted image where nothing can refer to it.
    #[error("{target}: a span index can be put beside a converted image in a registry only; leave it out here")]
    NoReferrers { target: String },
    /// A span index was to be put beside a converted image, and the registry did not take it.
    #[error(
        "the span index has no place beside the new image, whose name is left as it was: {source}; the image alone, with AWS's index in it, needs none: --format aws, or no --span-index"
    )]
    Beside { source: RegistryError },
    /// An image that is signed would be replaced by one that is not.
    #[error(
        "{image} names {digest}, which is signed ({signatures}); the new image has another digest and no signature, so nothing was pushed"
    )]
    Signed { image: String, digest: Box<Digest>, signatures: String },
    /// The tag that was to be replaced names something else by now.
    #[error("{image} no longer names {expected} but {}: nothing was pushed under that tag", is_there(there.as_deref()))]
    Moved { image: String, expected: Box<Digest>, there: Option<Box<Digest>> },
}

impl Classified for PublishError {
    fn class(&self) -> Class {
        match self {
            Self::Build(error) => error.class(),
            Self::Image(error) => error.class(),
            Self::Registry(error) | Self::Beside { source: error } => error.class(),
            Self::Store(error) => error.class(),
            Self::Sink(error) => error.class(),
            Self::NothingToIndex { .. } => Class::NothingToIndex,
            Self::Moved { .. } => Class::Other,
            Self::NoReferrers { .. } | Self::Signed { .. } => Class::Usage,
            Self::Manifest { .. }
            | Self::SpanIndex { .. }
            | Self::Ztoc { .. }
            | Self::Enable { .. }
            | Self::Sparse { .. } => Class::Content,
        }
    }
}

fn is_there(there: Option<&Digest>) -> String {
    there.map_or_else(|| "nothing".to_owned(), ToString::to_string)
}

/// What is to be indexed, and how.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub source: &'a ImageSource,
    pub image: &'a PlatformImage,
    pub options: &'a BuildOptions,
    /// Build again what exists already.
    pub force: bool,
    /// Receives progress events.
    pub observer: &'a Observer,
}

impl std::fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("image", &self.image.descriptor.digest).finish_non_exhaustive()
    }
}

/// Indexes an image and publishes the index in `repository`, which need not be the image's own. `known` are zTOCs that
/// are somewhere already: those of another platform of the image, say.
///
/// # Errors
/// [`PublishError`]. After an error no new manifest is in the repository.
pub async fn publish(job: &Job<'_>, repository: &Repository, known: &Known) -> Result<Report, PublishError> {
    let existing = existing(job, Some(repository), known).await?;
    if let Some(report) = existing.hidden(job) {
        return Ok(report);
    }
    // That nothing may be put there is found out before the first layer is read.
    if !existing.known.lacking(job.image, job.options).is_empty() {
        repository.try_put().await?;
    }
    let blobs = put_blobs(job, &existing.known, repository).await?;
    let mut made = Vec::new();
    for json in blobs.documents(job)? {
        let done = if existing.has(&json) { Done::UpToDate } else { refer(repository, json.clone()).await? };
        made.push(Document { json, done });
    }
    let used_instead = existing.used_instead(&made);
    Ok(Report { used_instead, ..blobs.report_all(made) })
}

/// Pushes an index whose blobs are there.
pub(crate) async fn refer(repository: &Repository, json: Bytes) -> Result<Done, RegistryError> {
    for blob in icon::constant_blobs(&json) {
        repository.push_blob(&Digest::of(blob), Body::Bytes(Bytes::from_static(blob)), None).await?;
    }
    let pushed = repository.push_referrer(media_type::MANIFEST, json).await?;
    Ok(Done::Published(pushed.found_by, pushed.visibility))
}

/// The layers' parts of the span index.
pub(crate) fn span_references(layers: &[LayerReport]) -> Vec<SpanReference> {
    layers.iter().filter_map(|layer| Some(layer.spans.as_ref()?.reference.clone())).collect()
}

/// Indexes an image and throws the result away.
///
/// # Errors
/// [`PublishError`].
pub async fn rehearse(job: &Job<'_>, repository: Option<&Repository>, known: &Known) -> Result<Report, PublishError> {
    let existing = existing(job, repository, known).await?;
    if let Some(report) = existing.hidden(job) {
        return Ok(report);
    }
    let blobs = put_blobs(job, &existing.known, &Nowhere).await?;
    let made = blobs.documents(job)?.into_iter().map(|json| {
        let done = if existing.has(&json) { Done::UpToDate } else { Done::Nothing };
        Document { json, done }
    });
    let made = made.collect();
    Ok(blobs.report_all(made))
}

/// An index and what was done with it.
pub(crate) struct Document {
    pub(crate) json: Bytes,
    pub(crate) done: Done,
}

/// What is there already, with all its blobs.
#[derive(Default)]
struct Existing {
    /// The indexes of this very image, the one that is used first.
    indexes: Vec<Candidate>,
    /// Those that the registry refuses to show.
    refused: Vec<Refused>,
    known: Known,
}

impl Existing {
    fn has(&self, json: &[u8]) -> bool {
        let digest = Digest::of(json);
        self.indexes.iter().any(|index| index.digest == digest)
    }

    /// Those that are used instead of what was made here, by the rules of [`crate::find`].
    fn used_instead(&self, made: &[Document]) -> Vec<Digest> {
        let is_made = |digest: &Digest| made.iter().any(|made| Digest::of(&made.json) == *digest);
        let mut instead = Vec::new();
        for json in made.iter().map(|made| &made.json) {
            let spans = SpanIndex::parse(json, &Limits::DEFAULT).map(IndexManifest::Spans);
            let Ok(index) = spans.or_else(|_| SociIndex::parse(json, &Limits::DEFAULT).map(IndexManifest::Soci)) else {
                continue;
            };
            let kind = index.kind();
            let of_form = self.indexes.iter().filter(|other| other.index.kind() == kind).cloned();
            let (digest, raw, place) = (Digest::of(json), json.clone(), IndexPlace::Beside);
            let ours = Candidate { digest, raw, index, created: None, place, cached: false };
            let first = choose(of_form.chain([ours]).collect(), None).chosen.map(|chosen| chosen.digest);
            instead.extend(first.filter(|first| !is_made(first)));
        }
        instead
    }
}

async fn existing(job: &Job<'_>, repository: Option<&Repository>, known: &Known) -> Result<Existing, PublishError> {
    let (true, Some(repository)) = (!job.force, repository) else { return Ok(Existing::default()) };
    let known::ExistingIndexes { mut indexes, refused, known: mut all } =
        known::beside(repository, job.image, job.options).await?;
    let before = all.len();
    all.confirm(job.image).await;
    // What a clean-up has taken away is built again.
    if all.len() < before {
        indexes.clear();
    }
    all.extend(known);
    known::named(job.source, job.image, job.options, &mut all).await;
    // Only images of the target repository are indexed and queried.
    let own = job.source.repository();
    if let Some(images) = own.filter(|images| images.to_string() == repository.to_string()) {
        known::beside_tags(images, job.source.tag(), job.image, job.options, &mut all).await;
    }
    all.confirm(job.image).await;
    all.verify(job).await?;
    Ok(Existing { indexes, refused, known: all })
}

/// What an index is made of, put where it goes.
pub(crate) struct Blobs {
    pub(crate) layers: Vec<LayerReport>,
    ztocs: Vec<ZtocReference>,
    prefetch: Vec<(Digest, Descriptor)>,
    missing: Vec<String>,
    reused: Option<Relied>,
    pub(crate) reused_from: Vec<ReusedFrom>,
}

/// Builds the zTOCs that are not known, and puts them all, and the prefetch artifacts, into `sink`.
pub(crate) async fn put_blobs(job: &Job<'_>, known: &Known, sink: &dyn Sink) -> Result<Blobs, PublishError> {
    let keep = |finished: Finished| async move {
        match finished {
            Finished::Ztoc(reference, encoded) => sink.put(&reference.digest, ztoc_body(&encoded)).await?,
            Finished::Spans { toc, windows } => {
                sink.put_bytes(toc).await?;
                sink.put_bytes(windows).await?;
            }
        }
        Ok::<_, PublishError>(())
    };
    let mut layers = build(job.source, job.image, job.options, &known.existing(), job.observer, keep).await?;
    for ztoc in layers.iter_mut().filter_map(|layer| layer.outcome.as_mut().ok()).filter(|ztoc| ztoc.origin.is_reused())
    {
        tracing::debug!(ztoc = %ztoc.reference.digest, layer = %ztoc.reference.layer, "the layer is indexed already");
        let Some(origin) = known.origin(&ztoc.reference.digest) else { continue };
        sink.copy(origin, &Descriptor::new(ZTOC, ztoc.reference.digest, ztoc.reference.size)).await?;
        look_through(ztoc, origin, job.options).await?;
    }
    for spans in layers.iter().filter_map(|layer| layer.spans.as_ref()).filter(|spans| spans.origin.is_reused()) {
        let Some(origin) = known.origin(&spans.reference.toc.0) else { continue };
        for blob in [spans.reference.toc_descriptor(), spans.reference.windows_descriptor()] {
            sink.copy(origin, &blob).await?;
        }
    }
    let ztocs: Vec<LayerZtoc> = layers.iter().filter_map(|layer| layer.outcome.as_ref().ok()).cloned().collect();
    let found: Vec<(Digest, Vec<Wanted>)> =
        ztocs.iter().map(|ztoc| (ztoc.reference.layer, ztoc.wanted.clone())).collect();
    let plan = prefetch::choose(&found, &job.options.prefetch);
    let mut artifacts = Vec::new();
    for (layer, artifact) in plan.layers {
        let json = Bytes::from(artifact.to_json());
        artifacts.push((layer, Descriptor::of(PREFETCH, &json)));
        sink.put_bytes(json).await?;
    }
    let ztocs = ztocs.into_iter().map(|ztoc| ztoc.reference).collect();
    let mut reused_from = Vec::new();
    for layer in &layers {
        let ztoc = layer.outcome.as_ref().ok().filter(|ztoc| ztoc.origin.is_reused()).map(|ztoc| ztoc.reference.digest);
        let spans = layer.spans.as_ref().filter(|spans| spans.origin.is_reused()).map(|spans| spans.reference.toc.0);
        reused_from.extend(ztoc.into_iter().chain(spans).filter_map(|blob| known.found_in(&blob)));
    }
    reused_from.sort_by_key(|from| from.index);
    reused_from.dedup();
    let reused = (!reused_from.is_empty()).then(|| match job.options.reuse.relied() {
        Relied::Verified => Relied::Verified,
        _ if reused_from.iter().all(|from| from.built_here) => Relied::BuiltHere,
        relied => relied,
    });
    Ok(Blobs { layers, ztocs, prefetch: artifacts, missing: plan.missing, reused, reused_from })
}

/// Looks for the files that are wanted early by a zTOC that was there before.
async fn look_through(ztoc: &mut LayerZtoc, origin: &ImageSource, options: &BuildOptions) -> Result<(), PublishError> {
    if options.prefetch.is_empty() {
        return Ok(());
    }
    let (digest, limits) = (ztoc.reference.digest, &options.limits);
    let blob = Descriptor::new(ZTOC, digest, ztoc.reference.size);
    let bytes = origin.blob_bytes(&blob, limits.ztoc_bytes_max).await?;
    let decoded = Ztoc::decode(&bytes, limits);
    let decoded = decoded.map_err(|source| PublishError::Ztoc { digest: Box::new(digest), source })?;
    ztoc.wanted = prefetch::find(&decoded, &options.prefetch);
    Ok(())
}

impl Blobs {
    /// The version 1 index of the job's image.
    fn v1(&self, job: &Job<'_>) -> Result<SociIndex, PublishError> {
        self.check()?;
        // The subject is named by the manifest's own media type and size: that is what runtimes compare.
        Ok(SociIndex::v1(&self.ztocs, &self.prefetch, &job.image.raw.descriptor()))
    }

    /// The version 2 index.
    pub(crate) fn v2(&self) -> Result<SociIndex, PublishError> {
        self.check()?;
        Ok(SociIndex::v2(&self.ztocs, &self.prefetch))
    }

    /// What refers to the job's image, in the forms that it asks for: AWS's first. A layer may have only one of them.
    pub(crate) fn documents(&self, job: &Job<'_>) -> Result<Vec<Bytes>, PublishError> {
        let spans = span_references(&self.layers);
        let mut documents = Vec::new();
        if job.options.format.has_ztoc() && (spans.is_empty() || !self.ztocs.is_empty()) {
            documents.push(Bytes::from(self.v1(job)?.to_json()));
        }
        if !spans.is_empty() {
            documents.push(Bytes::from(SpanIndex::new(&spans, &job.image.raw.descriptor()).to_json()));
        }
        if documents.is_empty() {
            return Err(PublishError::NothingToIndex { layers: self.layers.clone() });
        }
        Ok(documents)
    }

    fn check(&self) -> Result<(), PublishError> {
        if self.ztocs.is_empty() {
            return Err(PublishError::NothingToIndex { layers: self.layers.clone() });
        }
        Ok(())
    }

    /// A report on the documents of [`Blobs::documents`].
    pub(crate) fn report_all(self, made: Vec<Document>) -> Report {
        let mut made = made.into_iter();
        let first = made.next().unwrap_or(Document { json: Bytes::new(), done: Done::Nothing });
        let spans = made.next().map(|Document { json, done }| SpanReport {
            index: Digest::of(&json),
            index_size: json.len() as u64,
            done,
        });
        Report { spans, ..self.report(&first.json, first.done) }
    }

    pub(crate) fn report(self, json: &[u8], done: Done) -> Report {
        Report {
            index: Digest::of(json),
            index_size: json.len() as u64,
            spans: None,
            layers: self.layers,
            prefetch: self.prefetch.into_iter().map(|(layer, artifact)| (layer, artifact.digest)).collect(),
            missing: self.missing,
            done,
            reused: self.reused,
            reused_from: self.reused_from,
            used_instead: Vec::new(),
        }
    }
}

/// Reads an index that is kept somewhere.
fn parse(digest: &Digest, json: &[u8]) -> Result<SociIndex, PublishError> {
    let parsed = SociIndex::parse(json, &Limits::DEFAULT);
    parsed.map_err(|source| PublishError::Manifest { digest: Box::new(*digest), source })
}
