//! Converting: from an image to a SOCI-enabled one (version 2), in the same place or another.
//!
//! An edge: [`crate::publish::v2`] says what the documents are. Order of things: zTOCs while layers are read, then the
//! layers themselves where the image goes to another place, then manifests, then span indexes that refer to these, if
//! any, and last the image index under its name; so an interrupted run leaves nothing that can be found. The result
//! depends on the image alone: converting twice, or a converted image again, gives the same bytes, and what is in place
//! already is not written again. Layers are read every time, but for those whose zTOC is listed by an index that is
//! signed ([`crate::publish::reuse::Reuse`]) or was built on this machine (`local::BUILT_HERE`): content that any
//! client may have pushed must not become part of an image.

mod beside;
mod destination;
mod signed;

use std::collections::BTreeMap;

use bytes::Bytes;

pub use self::destination::Target;

use self::destination::OpenTarget;
use crate::format::digest::Digest;
use crate::format::manifest::{EMPTY_CONFIG, SociIndex};
use crate::format::model::{Descriptor, ImageIndex, ImageManifest, RawManifest, media_type};
use crate::format::platform::{Platform, PlatformSelection, best};
use crate::format::v2_document::{EntryPlatform, Index, ManifestEntry};
use crate::image::layout::Layout;
use crate::image::sink::Nowhere;
use crate::image::{ImageSource, PlatformImage};
use crate::publish::build::{BuildOptions, Observer};
use crate::publish::known::{self, Known};
use crate::publish::v2::{self, Document, Enabled, EntryNotes, Indexed};
use crate::publish::{Done, Job, PublishError, Report, local, put_blobs};

#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// How to build the zTOCs. They are always made; a format with spans asks for a span index beside the image, too.
    pub build: BuildOptions,
    /// Which platforms get an index. The others stay in the image.
    pub platforms: PlatformSelection,
    /// What becomes of the annotations of the image index's entries.
    pub notes: EntryNotes,
    /// Build again what exists already.
    pub force: bool,
    /// What the target's tag must still name at the end, if that matters: the next image may be pushed concurrently,
    /// and this conversion must not overwrite it.
    pub replaces: Option<Digest>,
    /// The local index store: what was built here is not built again.
    pub local: Option<Layout>,
    /// Whether an image that is signed may be replaced under its name by one that is not.
    pub replaces_signed: bool,
}

/// What became of an image.
#[derive(Debug, Clone)]
pub struct Converted {
    /// Digest of the new image index.
    pub digest: Digest,
    pub size: u64,
    /// Digest of the image as it was.
    pub was: Digest,
    /// Whether the target was this very image already, with its span indexes, so that nothing was written.
    pub up_to_date: bool,
    /// The platforms that were indexed, each with its report.
    pub images: Vec<(Platform, Report)>,
    /// Platforms without a layer that can be indexed.
    pub skipped: Vec<(Platform, Report)>,
    /// The version 2 indexes, by platform.
    pub indexes: Vec<(Platform, Bytes)>,
    /// What a policy may want signed, children first: SOCI indexes, span indexes, image manifests, the image index.
    pub signable: Vec<Digest>,
}

/// Makes `source` a SOCI-enabled image at `target`. `observer` gives each image's observer when its turn comes.
///
/// # Errors
/// [`PublishError`]. After an error the target's name is what it was.
pub async fn convert(
    source: &ImageSource,
    target: &Target,
    options: &ConvertOptions,
    observer: impl Fn(&PlatformImage) -> Observer,
) -> Result<Converted, PublishError> {
    if options.build.format.has_spans() && target.repository().is_none() {
        return Err(PublishError::NoReferrers { target: target.to_string() });
    }
    let root = Root::read(source, target).await?;
    let signed = if options.replaces_signed { None } else { signed::find(target).await? };
    let images = source.resolve(&options.platforms).await?;
    let mut place = target.open().await?;
    tracing::debug!(image = %source, "converting");
    let conversion = Conversion { source, root: &root, target, options };
    let converted = conversion.run(&images, &mut *place, signed, observer).await;
    place.close().await;
    converted
}

/// What is converted, and to where.
struct Conversion<'c> {
    source: &'c ImageSource,
    root: &'c Root,
    target: &'c Target,
    options: &'c ConvertOptions,
}

impl Conversion<'_> {
    async fn run(
        &self,
        images: &[PlatformImage],
        place: &mut dyn OpenTarget,
        signed: Option<PublishError>,
        observer: impl Fn(&PlatformImage) -> Observer,
    ) -> Result<Converted, PublishError> {
        let Self { source, root, target, options } = *self;
        // What is signed stays: nothing is sent, unless it is for a span index beside it.
        let blobs_go_to = match &signed {
            Some(_) if !options.build.format.has_spans() => &Nowhere,
            _ => place.sink(),
        };
        // That nothing may be put there is found out before the first layer is read; of an image that was converted
        // before perhaps nothing will be.
        let earlier = earlier(place).await;
        if !earlier.as_ref().is_some_and(|(_, root)| signed::is_converted(&root.bytes)) {
            blobs_go_to.try_put().await?;
        }
        let mut built = Known::default();
        if let (Some((there, root)), false) = (&earlier, options.force)
            && let Ok(index) = serde_json::from_slice::<ImageIndex>(&root.bytes)
        {
            known::listed(there, &index, &options.build, &mut built).await;
        }
        let (mut indexed, mut reports, mut skipped, mut indexes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        if let (Some(local), false) = (&options.local, options.force) {
            let (there, name) = (place.as_source(), target.kept_in());
            local::built_here(local, name.as_deref().map(|name| (&there, name)), &options.build, &mut built)?;
        }
        for image in images {
            let observer = observer(image);
            let job = Job { source, image, options: &options.build, force: options.force, observer: &observer };
            let known = known_of(&job, &built, place.is_home_of(source)).await?;
            let blobs = put_blobs(&job, &known, blobs_go_to).await?;
            built.add_built(&blobs.layers, &place.as_source(), &blobs.reused_from);
            match blobs.v2() {
                Ok(index) => {
                    let json = Bytes::from(index.to_json());
                    let platform = soci_platform(&options.platforms, images, image, root);
                    reports.push((image.platform.clone(), blobs.report(&json, Done::Stored)));
                    indexes.push((image.platform.clone(), json.clone()));
                    indexed.push(Indexed { image: image.descriptor.digest, platform, index: json });
                }
                Err(PublishError::NothingToIndex { .. }) => {
                    skipped.push((image.platform.clone(), blobs.report(EMPTY_CONFIG, Done::Nothing)));
                }
                Err(error) => return Err(error),
            }
        }
        if indexed.is_empty() {
            let layers = skipped.into_iter().flat_map(|(_, report)| report.layers).collect();
            return Err(PublishError::NothingToIndex { layers });
        }
        let enabled = v2::enable(&root.index, &root.children, &indexed, options.notes)
            .map_err(|error| PublishError::Enable { image: source.to_string(), source: error })?;
        let is_there = place.holds(&enabled.index.digest).await?;
        if let Some(signed) = signed.filter(|_| !is_there) {
            return Err(signed);
        }
        // A part of an image that is there may have gone since.
        let is_written = !is_there || place.as_source().is_partial();
        if is_written {
            self.put_manifests(&enabled, place).await?;
        }
        if let (true, Some(repository)) = (options.build.format.has_spans(), target.repository()) {
            let images = indexed.iter().map(|one| one.image);
            beside::push(repository, &enabled, images, &mut reports, options.force).await?;
        }
        if is_written {
            if let Some(expected) = &options.replaces {
                place.expect(expected).await?;
            }
            place.finish(source, &enabled.index).await?;
        }
        let (digest, size) = (enabled.index.digest, enabled.index.bytes.len() as u64);
        let up_to_date = is_there && beside::were_there(&reports);
        let signable = signable(&enabled, &reports);
        Ok(Converted { digest, size, was: root.digest, up_to_date, images: reports, skipped, indexes, signable })
    }

    /// Puts everything where the image goes but its index, which gives it its name.
    async fn put_manifests(&self, enabled: &Enabled, place: &mut dyn OpenTarget) -> Result<(), PublishError> {
        place.sink().put_bytes(Bytes::from_static(EMPTY_CONFIG)).await?;
        let socis: Vec<&Document> = enabled.manifests.iter().filter(|made| is_soci(&made.bytes)).collect();
        for made in enabled.manifests.iter().filter(|made| !is_soci(&made.bytes)) {
            let is_whole = enabled.indexed.contains(&made.digest);
            self.copy_blobs(&made.bytes, made.digest, is_whole, place).await?;
        }
        for made in socis.iter().copied().chain(enabled.manifests.iter().filter(|made| !is_soci(&made.bytes))) {
            place.sink().put_manifest(made.media_type, &made.digest, made.bytes.clone()).await?;
        }
        for entry in &enabled.untouched {
            self.copy_tree(entry, place).await?;
        }
        Ok(())
    }

    /// Copies what a manifest needs: all of it if it has to be whole, else what there is.
    async fn copy_blobs(
        &self,
        manifest: &[u8],
        digest: Digest,
        is_whole: bool,
        place: &mut dyn OpenTarget,
    ) -> Result<(), PublishError> {
        let source = self.source;
        let parsed: ImageManifest =
            serde_json::from_slice(manifest).map_err(|error| malformed(source, digest, &error))?;
        if place.is_home_of(source) {
            return Ok(());
        }
        for blob in std::iter::once(&parsed.config).chain(&parsed.layers) {
            // Foreign layers that the source lacks are with neither.
            let may_lack = blob.is_foreign() || (!is_whole && self.target.may_lack(source));
            if !may_lack || source.has_blob(blob).await? {
                place.copy(source, blob).await?;
            }
        }
        Ok(())
    }

    /// Copies an entry that stays as it is, and all below it: an artifact, an attestation, another platform's SOCI
    /// index, or a whole index.
    async fn copy_tree(&self, entry: &ManifestEntry, place: &mut dyn OpenTarget) -> Result<(), PublishError> {
        let source = self.source;
        if place.is_home_of(source) {
            return Ok(());
        }
        // In a store that collects what is not referred to, what is there is linked all the same.
        let mut open = vec![(
            Descriptor::new(&entry.media_type, entry.digest, entry.size),
            self.root.children.get(&entry.digest).cloned(),
        )];
        let mut found: Vec<(Descriptor, Bytes)> = Vec::new();
        while let Some((descriptor, known)) = open.pop() {
            let bytes = match known {
                Some(bytes) => bytes,
                None => match source.manifest(&descriptor).await? {
                    Some(raw) => raw.bytes,
                    None if self.target.may_lack(source) => continue,
                    None => {
                        let (image, digest) = (source.to_string(), Box::new(descriptor.digest));
                        return Err(PublishError::Sparse { image, digest });
                    }
                },
            };
            if descriptor.is_index() {
                let index: ImageIndex =
                    serde_json::from_slice(&bytes).map_err(|error| malformed(source, descriptor.digest, &error))?;
                open.extend(index.manifests.into_iter().map(|child| (child, None)));
            } else {
                self.copy_blobs(&bytes, descriptor.digest, false, place).await?;
            }
            found.push((descriptor, bytes));
        }
        // Children before what lists them.
        for (descriptor, bytes) in found.into_iter().rev() {
            place.sink().put_manifest(&descriptor.media_type, &descriptor.digest, bytes).await?;
        }
        Ok(())
    }
}

fn is_soci(bytes: &[u8]) -> bool {
    SociIndex::parse(bytes, &crate::format::limits::Limits::DEFAULT).is_ok()
}

/// What a policy may want signed, children first.
fn signable(enabled: &Enabled, reports: &[(Platform, Report)]) -> Vec<Digest> {
    let (socis, images): (Vec<&Document>, Vec<&Document>) =
        enabled.manifests.iter().partition(|made| is_soci(&made.bytes));
    let spans = reports.iter().filter_map(|(_, report)| Some(report.spans.as_ref()?.index));
    let as_descriptor = |entry: &ManifestEntry| Descriptor {
        artifact_type: Some(entry.artifact_type.clone()).filter(|kind| !kind.is_empty()),
        annotations: entry.annotations.clone().into_iter().collect(),
        ..Descriptor::new(&entry.media_type, entry.digest, entry.size)
    };
    // What is no image is no container's: attestations, and the SOCI indexes of platforms that stay as they were.
    let is_known = |entry: &ManifestEntry| entry.platform.as_ref().is_none_or(|platform| platform.os != "unknown");
    let untouched = enabled.untouched.iter().filter(|entry| is_known(entry) && as_descriptor(entry).may_be_image());
    let children =
        socis.into_iter().map(|made| made.digest).chain(spans).chain(images.into_iter().map(|made| made.digest));
    children.chain(untouched.map(|entry| entry.digest)).chain([enabled.index.digest]).collect()
}

/// What the target is now: an earlier conversion, most likely. That there is none is no error.
async fn earlier(place: &dyn OpenTarget) -> Option<(ImageSource, RawManifest)> {
    let there = place.as_image()?;
    let root = there.root().await.ok()?;
    Some((there, root))
}

/// What exists already: in the target, in what the image names, among the image's referrers and, if it stays in its
/// repository, in related tags.
async fn known_of(job: &Job<'_>, built: &Known, is_home: bool) -> Result<Known, PublishError> {
    let mut known = built.clone();
    if !job.force {
        known::named(job.source, job.image, job.options, &mut known).await;
        if let Some(repository) = job.source.repository() {
            if !known.lacking(job.image, job.options).is_empty() {
                known.extend(&known::beside(repository, job.image, job.options).await?.known);
            }
            if is_home {
                known::beside_tags(repository, job.source.tag(), job.image, job.options, &mut known).await;
            }
        }
    }
    known.confirm(job.image).await;
    known.verify(job).await?;
    Ok(known)
}

/// The platform as the SOCI index's entry names it: the one asked for, else the image's own, as AWS's tool does.
fn soci_platform(
    selection: &PlatformSelection,
    images: &[PlatformImage],
    image: &PlatformImage,
    root: &Root,
) -> EntryPlatform {
    let entry = root.index.manifests.iter().find(|entry| entry.digest == image.descriptor.digest);
    let own = entry.and_then(|entry| entry.platform.clone()).unwrap_or_else(|| EntryPlatform::from(&image.platform));
    match selection {
        PlatformSelection::All | PlatformSelection::AllPresent => own,
        PlatformSelection::Host if root.single => own,
        PlatformSelection::Host => EntryPlatform::from(&Platform::host()),
        PlatformSelection::Only(wanted) => {
            let is_it = |wanted: &&Platform| {
                best(wanted, images.iter().map(|image| &image.platform))
                    .and_then(|place| images.get(place))
                    .is_some_and(|best| best.descriptor.digest == image.descriptor.digest)
            };
            wanted.iter().find(is_it).map_or(own, EntryPlatform::from)
        }
    }
}

/// The image as it is: its index, and the manifests that the index lists.
struct Root {
    digest: Digest,
    index: Index,
    children: BTreeMap<Digest, Bytes>,
    /// Whether the image is one manifest, for which an index was made.
    single: bool,
}

impl Root {
    async fn read(source: &ImageSource, target: &Target) -> Result<Self, PublishError> {
        let roots = source.roots().await?;
        let (digest, mut index) = if roots.entries.len() > 1 {
            let mut entries = source.index_json().await?.unwrap_or_default();
            // Attestations of the platforms have no tag.
            if source.tag().is_some() {
                entries.retain(|entry| roots.entries.iter().any(|root| root.digest == entry.digest));
            }
            let index = Index::of(entries);
            (Digest::of(&index.to_json()), index)
        } else {
            let root = source.root_of(roots).await?;
            let index = if root.descriptor().is_index() {
                Index::parse(&root.bytes).map_err(|error| malformed(source, root.digest, &error))?
            } else {
                Index::of(vec![source.root_entry(&root).await?])
            };
            (root.digest, index)
        };
        let mut children = BTreeMap::new();
        for entry in index.manifests.iter().filter(|entry| !media_type::is_index(&entry.media_type)) {
            let descriptor = Descriptor::new(&entry.media_type, entry.digest, entry.size);
            if let Some(raw) = source.manifest(&descriptor).await? {
                children.insert(entry.digest, raw.bytes);
            }
        }
        // Parts may have been left out when the image was saved or pulled. A registry lists what it has, and among
        // pulled images one is as complete as the other.
        if source.repository().is_none() && !target.may_lack(source) {
            let listed = index.manifests.len();
            index
                .manifests
                .retain(|entry| children.contains_key(&entry.digest) || media_type::is_index(&entry.media_type));
            if listed > 1 && index.manifests.len() == 1 && children.len() == 1 {
                index = Index::of(index.manifests);
            }
        }
        let single = index.manifests.len() == 1 && children.len() == 1;
        if single && let Some(entry) = index.manifests.first_mut().filter(|entry| entry.platform.is_none()) {
            // A list of platforms must say which one this is; only the configuration knows.
            let images = source.resolve(&PlatformSelection::All).await?;
            entry.platform = images.first().map(|image| EntryPlatform::from(&image.platform));
        }
        Ok(Self { digest, index, children, single })
    }
}

fn malformed(source: &ImageSource, digest: Digest, error: &serde_json::Error) -> PublishError {
    let reason = error.to_string();
    PublishError::Enable {
        image: source.to_string(),
        source: v2::EnableError::Malformed { digest: Box::new(digest), reason },
    }
}
