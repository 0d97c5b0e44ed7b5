//! What exists already of indexes, and where: what need not be built again.
//!
//! An edge. A zTOC, or the blobs of a span index, is looked for beside the image (version 1), in what the image itself
//! names (version 2), and, while layers are lacking one, beside the images of other tags of the repository: images of
//! one repository are versions of one thing and share their lower layers. A zTOC is the same on every machine, so one
//! that was built for another image can be reused, provided that it matches the layer: every client with push access
//! can push one that does not. [`crate::publish::reuse`] says what is relied on. Invariants: a layer's zTOC is taken
//! only if it was built with the same span size and notes; the blob's existence is checked before it is relied on; a
//! registry that cannot answer only costs rebuilding; what was built in this run is distinguished from what was found.

use futures_util::StreamExt;

use crate::find::Search;
use crate::find::choose::Candidate;
use crate::find::discover::Refused;
use crate::format::digest::Digest;
use crate::format::index_manifest::IndexManifest;
use crate::format::limits::Limits;
use crate::format::manifest::{
    DISABLE_XATTRS, IMAGE_MANIFEST_DIGEST, INDEX_DIGEST, INDEX_V1, INDEX_V2, LAYER_MEDIA_TYPE, SPAN_SIZE, SociIndex,
    ZTOC, ZtocReference,
};
use crate::format::model::{Descriptor, ImageIndex, ImageManifest};
use crate::format::platform::Platform;
use crate::format::reference::ManifestName;
use crate::format::span_index::{SPAN_INDEX, SpanIndex, SpanReference};
use crate::image::{ImageSource, PlatformImage};
use crate::publish::build::{self, BuildOptions, Existing, LayerReport};
use crate::publish::reuse::ReusedFrom;
use crate::publish::verify::{Checked, verify, verify_spans};
use crate::publish::{Job, PublishError};
use crate::registry::RegistryError;
use crate::registry::Repository;

/// Tags that are looked at concurrently.
const TAGS_AT_A_TIME: usize = 8;
/// SOCI indexes of one image that are looked at.
const PLATFORMS_MAX: usize = 8;

/// What exists already.
#[derive(Debug, Clone, Default)]
pub struct Known {
    ztocs: Vec<KnownIndex<ZtocReference>>,
    spans: Vec<KnownIndex<SpanReference>>,
}

#[derive(Debug, Clone)]
struct KnownIndex<R> {
    reference: R,
    origin: ImageSource,
    /// Whether the blobs were seen there.
    confirmed: bool,
    /// The index that lists it; `None` if it was made in this run.
    index: Option<Digest>,
    /// Whether it was built on this machine, in whatever run.
    built_here: bool,
}

impl<R> KnownIndex<R> {
    fn found(reference: R, origin: &ImageSource, index: Option<Digest>) -> Self {
        Self { reference, origin: origin.clone(), confirmed: false, index, built_here: false }
    }

    /// Whether what it is for is wanted and its blobs are there.
    async fn confirm(mut self, image: &PlatformImage, layer: Digest, blobs: &[Descriptor]) -> Option<Self> {
        image.manifest.layers.iter().find(|wanted| wanted.digest == layer)?;
        for blob in blobs.iter().filter(|_| !self.confirmed) {
            let is_there = self.origin.has_blob(blob).await.unwrap_or_else(|error| {
                tracing::debug!(%error, "a part of an index cannot be looked at: its layer is read again");
                false
            });
            is_there.then_some(())?;
        }
        self.confirmed = true;
        Some(self)
    }
}

impl Known {
    /// Notes what an index lists that a build by `options` would make again. `origin` has its blobs.
    pub(crate) fn add(&mut self, digest: Digest, index: &IndexManifest, origin: &ImageSource, options: &BuildOptions) {
        let index_digest = Some(digest);
        match index {
            IndexManifest::Soci(index) => {
                for reference in references(index, options) {
                    if !self.ztocs.iter().any(|known| known.reference.layer == reference.layer) {
                        self.ztocs.push(KnownIndex::found(reference, origin, index_digest));
                    }
                }
            }
            IndexManifest::Spans(index) => {
                for reference in index.references().filter(|one| one.span_bytes == options.index_span_bytes) {
                    if !self.spans.iter().any(|known| known.reference.layer == reference.layer) {
                        self.spans.push(KnownIndex::found(reference, origin, index_digest));
                    }
                }
            }
        }
    }

    /// Notes what an index lists all of which was built on this machine.
    pub(crate) fn add_own(
        &mut self,
        digest: Digest,
        index: &IndexManifest,
        origin: &ImageSource,
        options: &BuildOptions,
    ) {
        self.add(digest, index, origin, options);
        self.ztocs.iter_mut().filter(|known| known.index == Some(digest)).for_each(|known| known.built_here = true);
        self.spans.iter_mut().filter(|known| known.index == Some(digest)).for_each(|known| known.built_here = true);
    }

    /// Notes what was made just now, or reused from `before`, and is in `origin`.
    pub fn add_built(&mut self, layers: &[LayerReport], origin: &ImageSource, before: &[ReusedFrom]) {
        // Of what was reused only that it was matters from now on.
        let found = |reused: bool| before.first().filter(|_| reused).map(|from| from.index);
        let is_own = |reused: bool| !reused || before.iter().all(|from| from.built_here);
        for layer in layers {
            if let Ok(ztoc) = &layer.outcome {
                let one = KnownIndex::found(ztoc.reference.clone(), origin, found(ztoc.origin.is_reused()));
                self.ztocs.push(KnownIndex { confirmed: true, built_here: is_own(ztoc.origin.is_reused()), ..one });
            }
            if let Some(spans) = &layer.spans {
                let one = KnownIndex::found(spans.reference.clone(), origin, found(spans.origin.is_reused()));
                self.spans.push(KnownIndex { confirmed: true, built_here: is_own(spans.origin.is_reused()), ..one });
            }
        }
    }

    /// All of another collection.
    pub(crate) fn extend(&mut self, other: &Self) {
        self.ztocs.extend_from_slice(&other.ztocs);
        self.spans.extend_from_slice(&other.spans);
    }

    /// How many parts of indexes there are.
    #[must_use]
    pub(crate) const fn len(&self) -> usize {
        self.ztocs.len() + self.spans.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How indexes refer to them.
    #[must_use]
    pub(crate) fn existing(&self) -> Existing {
        Existing {
            ztocs: self.ztocs.iter().map(|known| known.reference.clone()).collect(),
            spans: self.spans.iter().map(|known| known.reference.clone()).collect(),
        }
    }

    /// The source that has a zTOC, or the TOC of a span index.
    #[must_use]
    pub(crate) fn origin(&self, blob: &Digest) -> Option<&ImageSource> {
        let ztoc = self.ztocs.iter().find(|known| known.reference.digest == *blob).map(|known| &known.origin);
        ztoc.or_else(|| self.spans.iter().find(|known| known.reference.toc.0 == *blob).map(|known| &known.origin))
    }

    /// The index that lists a zTOC, or the TOC of a span index; `None` if it was made in this run.
    #[must_use]
    pub(crate) fn found_in(&self, blob: &Digest) -> Option<ReusedFrom> {
        let ztoc = self.ztocs.iter().find(|known| known.reference.digest == *blob);
        let ztoc = ztoc.map(|known| (known.index, &known.origin, known.built_here));
        let spans = || self.spans.iter().find(|known| known.reference.toc.0 == *blob);
        let spans = || spans().map(|known| (known.index, &known.origin, known.built_here));
        let (index, origin, built_here) = ztoc.or_else(spans)?;
        Some(ReusedFrom { index: index?, place: origin.place(), built_here })
    }

    /// Builds what was found again, if that is wanted, and forgets what turns out to be something else.
    pub(crate) async fn verify(&mut self, job: &Job<'_>) -> Result<(), PublishError> {
        if !job.options.reuse.verified {
            return Ok(());
        }
        let (subject, urls) = (job.image.raw.descriptor(), job.options.urls.as_ref());
        let (ztocs, spans) = (std::mem::take(&mut self.ztocs), std::mem::take(&mut self.spans));
        for known in ztocs {
            let index = SociIndex::v1(std::slice::from_ref(&known.reference), &[], &subject);
            if known.index.is_none()
                || is_good(&verify(job.source, job.image, &index, &known.origin, urls, job.observer).await?)
            {
                self.ztocs.push(known);
            }
        }
        for known in spans {
            let index = SpanIndex::new(std::slice::from_ref(&known.reference), &subject);
            if known.index.is_none()
                || is_good(&verify_spans(job.source, job.image, &index, &known.origin, urls, job.observer).await?)
            {
                self.spans.push(known);
            }
        }
        Ok(())
    }

    /// The layers of `image` of which something is wanted that is not known.
    #[must_use]
    pub(crate) fn lacking(&self, image: &PlatformImage, options: &BuildOptions) -> Vec<Digest> {
        let wanted = image.manifest.layers.iter().filter(|layer| is_indexed(layer, options));
        let known = |layer: &Digest| {
            let ztoc = self.ztocs.iter().any(|known| known.reference.layer == *layer);
            let spans = self.spans.iter().any(|known| known.reference.layer == *layer);
            (ztoc || !options.format.has_ztoc()) && (spans || !options.format.has_spans())
        };
        wanted.map(|layer| layer.digest).filter(|layer| !known(layer)).collect()
    }

    /// Forgets what `image` has no use for and what a clean-up has taken away.
    pub(crate) async fn confirm(&mut self, image: &PlatformImage) {
        let (ztocs, spans) = (std::mem::take(&mut self.ztocs), std::mem::take(&mut self.spans));
        for known in ztocs {
            let blob = Descriptor::new(ZTOC, known.reference.digest, known.reference.size);
            let layer = known.reference.layer;
            self.ztocs.extend(known.confirm(image, layer, &[blob]).await);
        }
        for known in spans {
            let blobs = [known.reference.toc_descriptor(), known.reference.windows_descriptor()];
            let layer = known.reference.layer;
            self.spans.extend(known.confirm(image, layer, &blobs).await);
        }
    }
}

/// Whether all that was checked is right.
fn is_good(checked: &[Checked]) -> bool {
    for wrong in checked.iter().filter(|checked| !checked.verdict.is_good()) {
        let (blob, layer) = (&wrong.blob, &wrong.layer);
        tracing::warn!(%blob, %layer, "what exists of an index is WRONG ({:?}): it is built again", wrong.verdict);
    }
    checked.iter().all(|checked| checked.verdict.is_good())
}

/// Whether a layer gets an index at all.
fn is_indexed(layer: &Descriptor, options: &BuildOptions) -> bool {
    layer.size >= options.layer_bytes_min && build::compression(&layer.media_type).is_ok()
}

/// The zTOCs of an index that a build by `options` would make again.
fn references(index: &SociIndex, options: &BuildOptions) -> Vec<ZtocReference> {
    let reference = |(layer, descriptor): (Digest, &Descriptor)| {
        let note = |key: &str| descriptor.annotations.get(key);
        let disable_xattrs = note(DISABLE_XATTRS).is_some_and(|value| value == "true");
        let span_bytes = note(SPAN_SIZE)?.parse().ok()?;
        // Without the optimisation nothing is noted; with it, only a build can decide whether to.
        (disable_xattrs == options.note_xattrs && span_bytes == options.span_bytes).then_some(())?;
        Some(ZtocReference {
            digest: descriptor.digest,
            size: descriptor.size,
            layer,
            layer_media_type: note(LAYER_MEDIA_TYPE)?.clone(),
            span_bytes,
            disable_xattrs,
        })
    };
    index.ztocs().filter_map(reference).collect()
}

/// What refers to `image` in `repository`.
#[derive(Debug, Default)]
pub(crate) struct ExistingIndexes {
    /// Its indexes, the one that is used first.
    pub(crate) indexes: Vec<Candidate>,
    /// Those that the registry refuses to show.
    pub(crate) refused: Vec<Refused>,
    pub(crate) known: Known,
}

/// What is known of `image` in `repository`.
pub(crate) async fn beside(
    repository: &Repository,
    image: &PlatformImage,
    options: &BuildOptions,
) -> Result<ExistingIndexes, RegistryError> {
    let origin = ImageSource::of_repository(repository);
    let (indexes, refused) = indexes(repository, &image.descriptor.digest, options).await?;
    let mut beside = ExistingIndexes { refused, ..ExistingIndexes::default() };
    for index in indexes {
        if options.reuse.allows(&origin, &[index.digest]).await {
            beside.known.add(index.digest, &index.index, &origin, options);
        }
        beside.indexes.push(index);
    }
    Ok(beside)
}

/// The indexes of the wanted forms that refer to an image, the one that is used first. Whatever is wrong with one, it
/// is none.
async fn indexes(
    repository: &Repository,
    image: &Digest,
    options: &BuildOptions,
) -> Result<(Vec<Candidate>, Vec<Refused>), RegistryError> {
    let format = options.format;
    let kinds = [format.has_spans().then_some(SPAN_INDEX), format.has_ztoc().then_some(INDEX_V1)];
    let kinds: Vec<&'static str> = kinds.into_iter().flatten().collect();
    refers(repository, image, &kinds).await
}

/// The same of certain kinds, and those that the registry refuses to show.
pub(crate) async fn refers(
    repository: &Repository,
    image: &Digest,
    kinds: &[&'static str],
) -> Result<(Vec<Candidate>, Vec<Refused>), RegistryError> {
    let own = ImageSource::of_repository(repository);
    let search = Search { referring: kinds, own: Some(&own), thorough: true, ..Search::of(*image) };
    // Only a layout on this machine can make it fail.
    let gathered = search.gather().await.unwrap_or_default();
    match gathered.failure() {
        Some(error) => Err(error.clone()),
        None => {
            let refused = gathered.refused().to_vec();
            Ok((gathered.order(None).candidates, refused))
        }
    }
}

/// What the manifest of an image names itself: its version 2 index.
pub(crate) async fn named(source: &ImageSource, image: &PlatformImage, options: &BuildOptions, known: &mut Known) {
    if let Some((digest, index)) = named_by(source, &image.descriptor.digest, &image.manifest, options).await {
        known.add(digest, &index, source, options);
    }
}

/// Looks at the images of the repository's other tags for the layers that are lacking a zTOC.
pub(crate) async fn beside_tags(
    repository: &Repository,
    own: Option<&str>,
    image: &PlatformImage,
    options: &BuildOptions,
    known: &mut Known,
) {
    let lacking = known.lacking(image, options);
    if lacking.is_empty() || options.reuse_tags == 0 {
        return;
    }
    let tags = match repository.tags().await {
        Ok(tags) => nearest(tags, own, options.reuse_tags),
        Err(error) => {
            tracing::debug!(%error, "the repository's other tags cannot be looked at for layers of the same kind");
            return;
        }
    };
    let lacking = &lacking;
    let found = futures_util::stream::iter(tags)
        .map(|tag| async move { of_tag(repository, tag, &image.platform, lacking, options).await })
        .buffered(TAGS_AT_A_TIME);
    let mut found = std::pin::pin!(found);
    let origin = ImageSource::of_repository(repository);
    while let Some(indexes) = found.next().await {
        indexes.iter().for_each(|(digest, index)| known.add(*digest, index, &origin, options));
        if known.lacking(image, options).is_empty() {
            break;
        }
    }
}

/// The indexes of a tag's image for `platform`, if it shares one of the `wanted` layers. Whatever goes wrong, there are
/// none.
async fn of_tag(
    repository: &Repository,
    tag: String,
    platform: &Platform,
    wanted: &[Digest],
    options: &BuildOptions,
) -> Vec<(Digest, IndexManifest)> {
    let mut found = Vec::new();
    let Ok(Some(root)) = repository.manifest(&ManifestName::Tag(tag)).await else { return found };
    let mut manifests = Vec::new();
    if root.descriptor().is_index() {
        let Ok(index) = serde_json::from_slice::<ImageIndex>(&root.bytes) else { return found };
        let fits = |entry: &&Descriptor| entry.may_be_image() && entry.platform.as_ref() == Some(platform);
        if let Some(entry) = index.manifests.iter().find(fits)
            && let Ok(Some(raw)) = repository.manifest(&ManifestName::Digest(entry.digest)).await
        {
            manifests.push(raw);
        }
    } else {
        manifests.push(root);
    }
    let origin = ImageSource::of_repository(repository);
    for raw in manifests {
        let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&raw.bytes) else { continue };
        if !manifest.layers.iter().any(|layer| wanted.contains(&layer.digest)) {
            continue;
        }
        if options.format.has_ztoc() {
            found.extend(named_by(&origin, &raw.digest, &manifest, options).await);
        }
        for index in indexes(repository, &raw.digest, options).await.unwrap_or_default().0 {
            if options.reuse.allows(&origin, &[index.digest]).await {
                found.push((index.digest, index.index));
            }
        }
    }
    found
}

/// The SOCI indexes that an image index of version 2 lists, and the span indexes beside their images.
pub(crate) async fn listed(source: &ImageSource, root: &ImageIndex, options: &BuildOptions, known: &mut Known) {
    let is_soci =
        |entry: &&Descriptor| entry.kind() == INDEX_V2 && entry.annotations.contains_key(IMAGE_MANIFEST_DIGEST);
    for entry in root.manifests.iter().filter(is_soci).take(PLATFORMS_MAX) {
        if let Ok(Some(raw)) = source.manifest(entry).await
            && let Ok(index) = SociIndex::parse(&raw.bytes, &Limits::DEFAULT)
            && options.reuse.allows(source, &[entry.digest]).await
        {
            known.add(entry.digest, &IndexManifest::Soci(index), source, options);
        }
        if let (true, Some(repository)) = (options.format.has_spans(), source.repository())
            && let Some(image) = entry.annotations.get(IMAGE_MANIFEST_DIGEST).and_then(|image| image.parse().ok())
            && let Ok((there, _)) = refers(repository, &image, &[SPAN_INDEX]).await
        {
            for index in there {
                if options.reuse.allows(source, &[index.digest]).await {
                    known.add(index.digest, &index.index, source, options);
                }
            }
        }
    }
}

/// The index that `manifest`, whose digest is `image`, names, if it may be reused.
async fn named_by(
    source: &ImageSource,
    image: &Digest,
    manifest: &ImageManifest,
    options: &BuildOptions,
) -> Option<(Digest, IndexManifest)> {
    let digest: Digest = manifest.annotations.get(INDEX_DIGEST)?.parse().ok()?;
    let raw = source.manifest_by_digest(digest).await.ok()??;
    let index = SociIndex::parse(&raw.bytes, &Limits::DEFAULT).ok()?;
    options.reuse.allows(source, &[digest, *image]).await.then_some((digest, IndexManifest::Soci(index)))
}

/// The tags that most likely share layers with `own`: the adjacent ones in version order, and the usual names.
fn nearest(mut tags: Vec<String>, own: Option<&str>, most: usize) -> Vec<String> {
    // Fallback tags, signatures and the like are no images.
    tags.retain(|tag| !tag.starts_with("sha256-") && !tag.starts_with("sha512-") && Some(tag.as_str()) != own);
    tags.sort_by_cached_key(|tag| natural(tag));
    let place = own.map_or(tags.len(), |own| tags.partition_point(|tag| natural(tag) < natural(own)));
    let usual = |tag: &String| matches!(tag.as_str(), "latest" | "main" | "master" | "stable");
    let distance = |index: usize| if index < place { 2 * (place - index) - 1 } else { 2 * (index - place) };
    let mut order: Vec<usize> = (0..tags.len()).collect();
    order.sort_by_key(|index| (!tags.get(*index).is_some_and(usual), distance(*index)));
    order.into_iter().take(most).filter_map(|index| tags.get(index).cloned()).collect()
}

/// A text's parts, numbers as numbers, so that `v1.10` comes after `v1.9`.
fn natural(text: &str) -> Vec<(u64, String)> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let words = rest.find(|letter: char| letter.is_ascii_digit()).unwrap_or(rest.len());
        let (word, after) = rest.split_at(words);
        let digits = after.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(digits);
        parts.push((0, word.to_owned()));
        parts.push((number.parse().unwrap_or(u64::MAX), String::new()));
        rest = after;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_nearby_come_first() {
        let tags = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let all = tags("v1.10 v1.2 latest v1.9 v2.0 sha256-00 v1.11 v1.10-rc1");
        assert_eq!(nearest(all.clone(), Some("v1.10"), 4), tags("latest v1.10-rc1 v1.9 v1.11"));
        assert_eq!(nearest(all.clone(), None, 2), tags("latest v2.0"));
        assert_eq!(nearest(all, Some("v0"), 3), tags("latest v1.2 v1.9"));
        assert!(nearest(Vec::new(), Some("x"), 3).is_empty());
    }
}
