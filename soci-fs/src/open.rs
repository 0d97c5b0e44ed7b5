//! From an image to readers of its layers: finds the index, and streams the layers that have none.
//!
//! Every layer ends in the same place, the layer store, by one of three ways, chosen here and noted for the user:
//!
//! | layer | way |
//! |---|---|
//! | its diff_id was proven here, under whichever claim | by that: nothing is read |
//! | has a TOC or zTOC that is sound, may be used ([`TrustPolicy`]) and was not found to be wrong, and is not small | lazy: spans on demand |
//! | all others: small, without an index, index malformed | streamed whole, checked, indexed on the fly |
//!
//! The span index goes before AWS's; where a layer's part of it cannot be obtained or read, AWS's is asked.
//!
//! All layers are opened at the same time. What is opened lazily is kept under the claim that this image makes, and no
//! other image gets it unless it would have made the same ([`crate::layer::store::Claim`]). Invariant: a zTOC that does
//! not fit its layer never stops a mount, it only costs laziness, and the note says so.
//!
//! The room uses `layer` and `foresight`; `node` and `soci mount` use it. [`trust`] is the operator's policy.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use soci_index::find::choose::Choice;
use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use soci_index::format::profile::artifact::Published;
use soci_index::image::store::StoreError as BlobStoreError;
use soci_index::image::urls::UrlFetcher;
use soci_index::image::{ImageError, ImageSource, PlatformImage};
use soci_index::publish::build::Skip;
use soci_index::publish::profiles::ProfilesError;
use soci_index::registry::referrers::Listing;
use soci_index::registry::{RegistryError, Repository};
use tokio::runtime::Handle;
use tokio::sync::OnceCell;

use crate::foresight::profile::{self, Wanted, fetch, find_published};
use crate::layer::reader::{LayerReader, Policy};
use crate::layer::source::watched::Observer;
use crate::layer::stages::Stages;
use crate::layer::store::{Condemned, Store, StoreError};
use crate::layer::unpack::UnpackError;
use crate::open::trust::{Provisional, TrustPolicy};

mod find;
mod layer;
mod prefetch;
mod reopen;
pub mod trust;

pub use find::ask_early;
pub(crate) use find::windows_blob;
pub use layer::{NO_INDEX, OpenedLayer};
pub use reopen::{KeptLayer, LayerOrigin, reopen_layer};

/// How to open an image.
#[derive(Clone)]
pub struct OpenOptions {
    /// Told of the bytes of layers that are fetched whole.
    pub observer: Observer,
    /// Layers below this many compressed bytes are streamed whole.
    pub layer_bytes_min: u64,
    /// Whether layers that cannot be read lazily are fetched; else opening them fails.
    pub whole_layers: bool,
    /// Whether those are fetched that the index of an image leaves out, whatever becomes of images without an index.
    pub whole_beside_index: bool,
    /// How readers wait and fetch.
    pub policy: Policy,
    /// Use this index and no other.
    pub index: Option<Digest>,
    /// Whether that one may be of another image: its layers that this one lacks are of no use then.
    pub any_subject: bool,
    /// Which kinds of indexes are looked for when none is named.
    pub modes: IndexModes,
    /// Repositories other than the image's own that may hold its index. They are asked first.
    pub index_repositories: Vec<Repository>,
    /// The local index store; `None` keeps no index.
    pub index_store: Option<PathBuf>,
    /// Another program's store on this machine that may have indexes and their parts.
    pub content: Option<ImageSource>,
    /// How many layers are worked on at the same time, at least 1.
    pub parallel: usize,
    /// Which indexes may be used before they are proven.
    pub trust: Arc<TrustPolicy>,
    /// What refers to the image, where that was asked for before this.
    pub listing: Option<Arc<Listing>>,
    /// Which start-up profile of the image will be used: its pack is part of what is claimed of a layer.
    pub profile: profile::Choice,
    /// Fetches foreign layers from their URLs, if the operator allows it.
    pub urls: Option<UrlFetcher>,
    /// Where the times of opening are noted.
    pub stages: Arc<Stages>,
}

impl Default for OpenOptions {
    /// Every layer lazily if it can be, by any kind of index that the image has, with no index kept and no profile.
    fn default() -> Self {
        Self {
            observer: Arc::new(|_| {}),
            layer_bytes_min: 0,
            whole_layers: true,
            whole_beside_index: false,
            policy: Policy::default(),
            index: None,
            any_subject: false,
            modes: IndexModes::default(),
            index_repositories: Vec::new(),
            index_store: None,
            content: None,
            parallel: 1,
            trust: Arc::default(),
            listing: None,
            profile: profile::Choice::None,
            urls: None,
            stages: Arc::default(),
        }
    }
}

/// Which kinds of indexes are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexModes {
    /// Version 1: a manifest that refers to the image's. Every client with push access to the repository can add one.
    pub referring: bool,
    /// Version 2: a manifest that the image's own names in an annotation.
    pub annotated: bool,
}

impl IndexModes {
    /// Whether no index is looked for.
    #[must_use]
    pub const fn is_off(self) -> bool {
        !self.referring && !self.annotated
    }
}

impl Default for IndexModes {
    /// Both.
    fn default() -> Self {
        Self { referring: true, annotated: true }
    }
}

impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            observer: _,
            layer_bytes_min,
            whole_layers,
            whole_beside_index,
            policy,
            index,
            any_subject,
            modes,
            index_repositories,
            index_store,
            content,
            parallel,
            trust,
            listing,
            profile,
            urls,
            stages: _,
        } = self;
        f.debug_struct("OpenOptions")
            .field("urls", urls)
            .field("layer_bytes_min", layer_bytes_min)
            .field("whole_layers", whole_layers)
            .field("whole_beside_index", whole_beside_index)
            .field("policy", policy)
            .field("index", index)
            .field("any_subject", any_subject)
            .field("modes", modes)
            .field("index_repositories", index_repositories)
            .field("index_store", index_store)
            .field("content", content)
            .field("parallel", parallel)
            .field("trust", trust)
            .field("listing", listing)
            .field("profile", profile)
            .finish_non_exhaustive()
    }
}

/// Why an image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registry could not be asked for an index.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The local index store is broken.
    #[error("the local index store: {0}")]
    IndexStore(#[from] BlobStoreError),
    /// The index that was asked for is not there.
    #[error("there is no index {digest} of the image in the local store or beside the image")]
    NoSuchIndex { digest: Box<Digest> },
    /// No place has a part of the index.
    #[error("no place has the index's blob {blob}: {tried}")]
    NoPart { blob: Box<Digest>, tried: String },
    /// The layer cannot be read lazily, and nothing else was allowed.
    #[error("layer {layer} cannot be read lazily: {reason}")]
    NotLazy {
        layer: Box<Digest>,
        reason: String,
        /// Whether the image's index says that it can be.
        is_indexed: bool,
    },
    /// The profile that was named cannot be obtained.
    #[error(transparent)]
    Profile(#[from] ProfilesError),
    /// What the image says of the layer was found to be wrong before.
    #[error("layer {layer}: {reason}; the image is damaged or was tampered with: pull one that was built anew")]
    Condemned { layer: Box<Digest>, reason: String },
    /// The layer is no tar, or nothing can be known of it.
    #[error("layer {layer} ({media_type}) cannot be shown: {reason}")]
    NotALayer { layer: Box<Digest>, media_type: String, reason: String },
    /// The layer is not with the image, and was not fetched from elsewhere.
    #[error("layer {layer} ({media_type}) cannot be shown: {}", Skip::Foreign { urls: urls.clone() })]
    Foreign { layer: Box<Digest>, media_type: String, urls: Vec<String> },
    /// A layer could not be streamed.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// The layer store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The work was cut off: the process is shutting down.
    #[error("opening was abandoned")]
    Abandoned,
}

impl Classified for OpenError {
    fn class(&self) -> Class {
        match self {
            Self::Image(error) => error.class(),
            Self::Registry(error) => error.class(),
            Self::IndexStore(error) => error.class(),
            Self::NoSuchIndex { .. } | Self::NotLazy { .. } | Self::Abandoned => Class::Other,
            Self::NoPart { .. } => Class::Other,
            Self::Condemned { .. } | Self::NotALayer { .. } | Self::Foreign { .. } => Class::Content,
            Self::Profile(error) => error.class(),
            Self::Unpack(error) => error.class(),
            Self::Store(_) => Class::Local,
        }
    }
}

/// How a layer was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Its files are fetched when they are read.
    Lazy,
    /// It was here already, whole.
    Kept,
    /// It was fetched whole, for this reason.
    Streamed(String),
}

/// What became of a layer.
#[derive(Debug, Clone)]
pub struct LayerNote {
    pub layer: Descriptor,
    /// How it was opened.
    pub way: Way,
    /// How long that took.
    pub time: Duration,
}

/// An image whose layers can be read.
#[derive(Debug)]
pub struct OpenedImage {
    /// The layers, lowest first.
    pub readers: Vec<LayerReader>,
    /// How each was opened, in the same order.
    pub notes: Vec<LayerNote>,
    /// The index that is used, if any.
    pub index: Option<Digest>,
    /// The profile that was chosen.
    pub profile: Option<Wanted>,
    /// Where that index is, and why the others were passed over.
    pub choice: Choice,
    /// Bytes of the index manifest and of all zTOCs that were read, from wherever.
    pub index_bytes: u64,
}

/// An image whose index was looked for and whose layers can be opened one by one. Clones share nothing that changes.
#[derive(Debug)]
pub struct ImageOpener {
    source: ImageSource,
    image: PlatformImage,
    store: Arc<Store>,
    options: OpenOptions,
    runtime: Handle,
    found: Option<find::OpenIndex>,
    /// Why the index may not be used.
    doubt: Option<String>,
    profile: Option<Published>,
    /// The pack whose pages may be shown before they are compared.
    pack: Option<Digest>,
    /// AWS's index, looked for when the span index turned out to be of no use.
    fallback: OnceCell<Option<find::OpenIndex>>,
}

impl ImageOpener {
    /// Finds the index of `image`. Readers will run their work on `runtime`.
    ///
    /// # Errors
    /// [`OpenError`] when no registry can be asked, or the named index does not exist.
    pub async fn new(
        source: ImageSource,
        image: PlatformImage,
        store: Arc<Store>,
        options: OpenOptions,
        runtime: Handle,
    ) -> Result<Self, OpenError> {
        let index = async {
            // An index that is not used need not be fetched.
            if options.trust.provisional() == Provisional::Deny {
                return Ok((None, options.trust.doubt(None, &image.descriptor.digest, &[]).await));
            }
            find::find_trusted(&source, &image, &options).await
        };
        let profile = find_published(&source, &image.descriptor.digest, options.listing.as_deref(), &options.profile);
        let (index, profile) = tokio::join!(index, profile);
        let ((found, doubt), profile) = (index?, optional(profile, &options.profile)?);
        let pack = match &profile {
            Some(published) => usable_pack(&source, &store, &options, published).await,
            None => None,
        };
        Ok(Self { source, image, store, options, runtime, found, doubt, profile, pack, fallback: OnceCell::new() })
    }

    #[must_use]
    pub const fn image(&self) -> &PlatformImage {
        &self.image
    }

    /// The image's referrers, if they were requested recently.
    #[must_use]
    pub fn listing(&self) -> Option<&Listing> {
        self.options.listing.as_deref().filter(|listing| listing.is_of(&self.image.descriptor.digest))
    }

    /// Where the image is.
    #[must_use]
    pub const fn source(&self) -> &ImageSource {
        &self.source
    }

    /// Where the parts of its index are, if they are not beside the image.
    #[must_use]
    pub fn index_from(&self) -> Option<ImageSource> {
        self.found.as_ref().and_then(|found| found.elsewhere(&self.source))
    }

    /// The profile that was chosen by the options.
    #[must_use]
    pub const fn profile(&self) -> Option<&Published> {
        self.profile.as_ref()
    }

    /// Fetches the profile that was chosen.
    ///
    /// # Errors
    /// [`OpenError::Profile`] for one that was named; an unavailable default is only logged.
    pub async fn fetch_profile(&self) -> Result<Option<Wanted>, OpenError> {
        let Some(published) = &self.profile else { return Ok(None) };
        optional(fetch(&self.source, published).await.map(Some), &self.options.profile)
    }

    /// The index that is used, if any.
    #[must_use]
    pub fn index(&self) -> Option<Digest> {
        self.found.as_ref().map(|found| found.digest)
    }

    /// Why the index is not used, if that is so.
    #[must_use]
    pub fn doubt(&self) -> Option<&str> {
        self.doubt.as_deref()
    }
}

/// Opens all layers of `image`. Readers run their work on `runtime`.
///
/// # Errors
/// [`OpenError`]; what was fetched until then stays in the store.
pub async fn open_image(
    source: &ImageSource,
    image: &PlatformImage,
    store: &Arc<Store>,
    options: &OpenOptions,
    runtime: &Handle,
) -> Result<OpenedImage, OpenError> {
    let opener =
        ImageOpener::new(source.clone(), image.clone(), Arc::clone(store), options.clone(), runtime.clone()).await?;
    let layers = image.manifest.layers.iter().zip(&image.config.diff_ids);
    let mut unique: HashMap<(Digest, Digest), &Descriptor> = HashMap::new();
    for (layer, diff_id) in layers {
        unique.insert((layer.digest, *diff_id), layer);
    }
    let open = async |diff_id, layer| Ok::<_, OpenError>(((layer, diff_id), opener.open_layer(layer, diff_id).await?));
    let work = unique.iter().map(|((_, diff_id), layer)| open(*diff_id, *layer)).collect::<Vec<_>>();
    let opened = futures_util::stream::iter(work).buffer_unordered(options.parallel.max(1));
    let opened = async { opened.try_collect::<Vec<((&Descriptor, Digest), OpenedLayer)>>().await };
    let (opened, profile) = tokio::try_join!(opened, opener.fetch_profile())?;
    let index_bytes = opened.iter().map(|(_, layer)| layer.index_bytes).sum();
    let opened: HashMap<(Digest, Digest), OpenedLayer> =
        opened.into_iter().map(|((layer, diff_id), opened)| ((layer.digest, diff_id), opened)).collect();
    let all = || image.manifest.layers.iter().zip(&image.config.diff_ids);
    let in_order = || all().filter_map(|(layer, diff_id)| opened.get(&(layer.digest, *diff_id)));
    Ok(OpenedImage {
        readers: in_order().map(|layer| layer.reader.clone()).collect(),
        notes: in_order().map(|layer| layer.note.clone()).collect(),
        index: opener.index(),
        profile,
        choice: opener.found.as_ref().map(|found| found.choice.clone()).unwrap_or_default(),
        index_bytes,
    })
}

/// What became of a profile: a default is a convenience, one that was named must be there.
fn optional<T>(found: Result<Option<T>, ProfilesError>, choice: &profile::Choice) -> Result<Option<T>, OpenError> {
    match (found, choice) {
        (Err(error), profile::Choice::Named(_)) => Err(error.into()),
        // The finder of the index says it.
        (Err(ProfilesError::Registry(RegistryError::NoReferrers { .. })), _) => Ok(None),
        (Err(error), _) => {
            tracing::warn!(%error, "no published profile is available");
            Ok(None)
        }
        (Ok(found), _) => Ok(found),
    }
}

/// The pack of a profile, if its pages may be shown before they are compared.
async fn usable_pack(
    source: &ImageSource,
    store: &Store,
    options: &OpenOptions,
    published: &Published,
) -> Option<Digest> {
    let pack = published.pack.as_ref()?.digest;
    if let Some(reason) = store.condemned(Condemned::Pack(pack)) {
        tracing::warn!(profile = published.name, %pack, reason, "a start-up pack that was found to be wrong is not used");
        return None;
    }
    let doubt = match source.repository() {
        Some(repository) => options.trust.pack_doubt(repository, &published.digest).await,
        None => {
            let is_allowed = options.trust.provisional() == Provisional::Allow;
            (!is_allowed).then(|| "signatures are looked for in registries only".to_owned())
        }
    };
    if let Some(doubt) = doubt {
        tracing::info!(%source, profile = published.name, %pack, doubt, "a start-up pack is not used");
        return None;
    }
    Some(pack)
}
