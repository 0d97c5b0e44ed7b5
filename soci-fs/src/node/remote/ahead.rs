//! Start-ups of the images whose layers a node provides: fetched ahead by a profile, and remembered.
//!
//! When the layers of an image have been asked for, its profile is looked for while they are opened; when they are
//! open, what it names is fetched, and for a minute and a half the layers' readers are listened to, which is what the
//! node remembers of the image. Where there is no profile, what the files that are read name is fetched for as long. A
//! layer that images share is listened to for all of them, so a profile may name more than its image reads: that costs
//! bytes.
//!
//! Invariants: one such start per image at a time; nothing that goes wrong here keeps a layer from being provided.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::profile::Profile;
use soci_index::image::ImageSource;

use tokio::task::JoinSet;

use crate::foresight::mentions::{Follower, Names, Reach};
use crate::foresight::profile::{Memory, Recorder, Replay, ReplayOptions, Wanted, budget};
use crate::layer::reader::LayerReader;
use crate::node::remote::{ImageKey, RemoteLayers, Underway};
use crate::open::ImageOpener;
use crate::tree::Tree;

/// How long after its layers are there reads belong to the start-up of an image.
const START_UP: Duration = Duration::from_secs(90);

/// What is done with profiles. Nothing, by default.
#[derive(Debug, Clone, Default)]
pub struct ProfileOptions {
    /// Whether profiles are used: the published default, else what the node remembers.
    pub replay: bool,
    /// Whether AWS's prefetch artifacts are used, where no profile is published.
    pub prefetch: bool,
    /// Layers that are fetched ahead by such artifacts at the same time, over all images; `None` is no limit.
    pub prefetch_layers: Option<usize>,
    /// Whether what files name is fetched ahead, where there is no profile.
    pub follow_names: bool,
    /// Whether start-ups are recorded.
    pub record: bool,
    /// Where they are remembered.
    pub memory: Option<Memory>,
    /// Compressed bytes that a profile may prefetch without their being read; `None` is a share of the image.
    pub budget_bytes: Option<u64>,
    /// For how long reads belong to a start-up; `None` is a minute and a half.
    pub start_up: Option<Duration>,
}

/// Start-ups are not noted here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the snapshotter does not record starts: set `record = true` in [profile]")]
pub struct NotNoted;

/// The images whose start-up is in progress, each with what is noted of it.
#[derive(Debug, Default)]
pub(super) struct StartUps(Mutex<HashMap<Digest, Option<Recorder>>>);

impl StartUps {
    fn change<T>(&self, change: impl FnOnce(&mut HashMap<Digest, Option<Recorder>>) -> T) -> T {
        change(&mut self.0.lock())
    }

    /// Records that one begins; `false` if it is in progress.
    fn begin(&self, manifest: Digest) -> bool {
        self.change(|known| match known.entry(manifest) {
            Entry::Vacant(place) => {
                place.insert(None);
                true
            }
            Entry::Occupied(_) => false,
        })
    }
}

impl RemoteLayers {
    /// Runs ahead of a container of `image`, whose layers are being opened, unless that is in progress.
    pub(super) fn run_ahead(&self, key: &ImageKey, image: &Arc<ImageOpener>, layers: Vec<Underway<u16>>) {
        let options = &self.0.options.profiles;
        let manifest = key.manifest;
        if !(options.replay || options.prefetch || options.record || options.follow_names)
            || !self.0.start_ups.begin(manifest)
        {
            return;
        }
        let (this, key, image) = (self.clone(), key.clone(), Arc::clone(image));
        self.0.runtime.spawn(async move {
            this.start_up(&key, &image, layers).await;
            this.0.start_ups.change(|known| drop(known.remove(&manifest)));
        });
    }

    async fn start_up(&self, key: &ImageKey, image: &ImageOpener, layers: Vec<Underway<u16>>) {
        let options = &self.0.options.profiles;
        let source = image.source().clone();
        let (published, _) = tokio::join!(image.fetch_profile(), futures_util::future::join_all(layers));
        let published = published.ok().flatten();
        let remembered = || {
            let profile = options.memory.as_ref().filter(|_| options.replay)?.load(&key.manifest)?;
            Some(Wanted { name: "of this node".to_owned(), profile: Arc::new(profile), published: None })
        };
        let (readers, trees) = self.open_layers(image).await;
        let start_up = options.start_up.unwrap_or(START_UP);
        let recorder = Recorder::for_time(Limits::DEFAULT, start_up);
        if options.record {
            readers.iter().for_each(|reader| recorder.attach(reader));
            let recorder = recorder.clone();
            self.0.start_ups.change(|known| known.insert(key.manifest, Some(recorder)));
        }
        let image_bytes = image.image().manifest.layers.iter().map(|layer| layer.size).sum();
        let replay_options =
            ReplayOptions { budget_bytes: options.budget_bytes.unwrap_or_else(|| budget(image_bytes)) };
        let prefetched = match &published {
            None if options.prefetch => image.prefetched(&readers).await,
            _ => Vec::new(),
        };
        let is_prefetched = !prefetched.is_empty();
        let wanted = if is_prefetched { None } else { published.or_else(remembered) };
        let mut prefetching = self.prefetch(key, prefetched, &source, &readers);
        let follower = (options.follow_names && wanted.is_none() && !is_prefetched).then(|| {
            let layers = trees.into_iter().zip(readers.iter().map(|reader| Arc::clone(reader.index())));
            Follower::start(Names::of_layers(layers.collect()), readers.clone(), Reach::default(), &self.0.runtime)
        });
        let replay = wanted.map(|wanted| {
            tracing::info!(image = %key, profile = wanted.name, bytes = wanted.profile.bytes(), "fetching ahead by a profile");
            Replay::start(wanted, source, readers, replay_options, &self.0.runtime)
        });
        let listens = options.record || follower.is_some();
        tokio::time::sleep(if listens { start_up } else { Duration::ZERO }).await;
        drop(follower);
        self.remember(key, &recorder);
        if let Some(replay) = replay {
            replay.finished().await;
        }
        while prefetching.join_next().await.is_some() {}
    }

    /// Fetches what prefetch artifacts name, each of one layer, a limited number at a time.
    fn prefetch(
        &self,
        key: &ImageKey,
        wanted: Vec<Wanted>,
        source: &ImageSource,
        readers: &[LayerReader],
    ) -> JoinSet<()> {
        let mut running = JoinSet::new();
        for wanted in wanted {
            let Some(reader) = readers.iter().find(|reader| wanted.profile.layers() == [reader.digest()]) else {
                continue;
            };
            let budget_bytes = self.0.options.profiles.budget_bytes;
            let options =
                ReplayOptions { budget_bytes: budget_bytes.unwrap_or_else(|| budget(reader.index().compressed_size)) };
            let (this, image, source, reader) = (self.clone(), key.to_string(), source.clone(), reader.clone());
            let work = async move {
                let Ok(_permit) = this.0.prefetching.acquire().await else { return };
                let (layer, bytes) = (reader.digest(), wanted.profile.bytes());
                tracing::info!(image, %layer, bytes, "fetching ahead by a prefetch artifact");
                Replay::start(wanted, source, vec![reader], options, &this.0.runtime).finished().await;
            };
            running.spawn_on(work, &self.0.runtime);
        }
        running
    }

    /// What is noted of the start-up of the image with this manifest: of the one in progress, else what is remembered.
    ///
    /// # Errors
    /// [`NotNoted`] where nothing ever is.
    pub fn noted(&self, manifest: &Digest) -> Result<Option<Profile>, NotNoted> {
        let options = &self.0.options.profiles;
        if !options.record {
            return Err(NotNoted);
        }
        let under_way = self.0.start_ups.change(|known| known.get(manifest).cloned().flatten());
        let noted = under_way.and_then(|recorder| recorder.profile().ok()).filter(|noted| !noted.ranges().is_empty());
        let remembered = options.memory.as_ref().and_then(|memory| memory.load(manifest));
        // A start that found most of its files in the kernel's cache was hardly seen.
        Ok(noted.into_iter().chain(remembered).max_by_key(Profile::bytes))
    }

    fn remember(&self, key: &ImageKey, recorder: &Recorder) {
        let Some(memory) = &self.0.options.profiles.memory else { return };
        match memory.remember(&key.manifest, recorder) {
            Ok(()) => {}
            Err(error) => tracing::warn!(image = %key, %error, "a start-up is not remembered"),
        }
    }

    /// The readers and trees of an image's layers that are open, lowest first.
    async fn open_layers(&self, image: &ImageOpener) -> (Vec<LayerReader>, Vec<Arc<Tree>>) {
        let layers = image.image().manifest.layers.iter().zip(&image.image().config.diff_ids);
        let mut open = Vec::new();
        for (layer, diff_id) in layers {
            let Some(slot) = self.shared_slot(image, layer, *diff_id).await else { continue };
            open.extend(self.0.forest.reader(slot).zip(self.0.forest.tree(slot)));
        }
        open.into_iter().unzip()
    }
}
