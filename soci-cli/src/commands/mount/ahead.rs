//! What a mount prefetches, and what it records for the next time.
//!
//! The profile is looked for while the layers are opened. One that was named must be there; a default is a convenience,
//! so when it cannot be obtained, that is said and the mount goes on with what this machine remembers itself.

use std::time::Duration;

use soci_fs::foresight::mentions::{Follower, Reach};
use soci_fs::foresight::profile::{Choice, Memory, Recorder, Replay, ReplayOptions, Wanted, budget};
use soci_fs::fuse::image::Image;
use soci_fs::layer::reader::LayerReader;
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::image::{ImageSource, PlatformImage};
use tokio::runtime::Handle;

use crate::args::Mount;
use crate::args::config::Config;
use crate::report::exit::{Exit, fail};

/// How long after the mount reads belong to the start-up, which is remembered.
const START_UP: Duration = Duration::from_secs(60);

/// How a mount runs ahead of programs.
pub(super) struct Plan {
    choice: Choice,
    memory: Memory,
    image: Digest,
    options: ReplayOptions,
}

/// What runs ahead of a mount's readers, and what listens to them.
pub(super) struct Ahead {
    replay: Option<Replay>,
    follower: Option<Follower>,
    remembering: Option<(Recorder, Memory, Digest)>,
}

/// The profile that is meant.
pub(super) fn choice(arguments: &Mount) -> Choice {
    match &arguments.profile {
        _ if arguments.no_profile => Choice::None,
        Some(name) => Choice::Named(name.clone()),
        None => Choice::Default,
    }
}

impl Plan {
    pub(super) fn new(arguments: &Mount, config: &Config, image: &PlatformImage) -> Self {
        let image_bytes = image.manifest.layers.iter().map(|layer| layer.size).sum();
        let options = ReplayOptions { budget_bytes: arguments.profile_budget.unwrap_or_else(|| budget(image_bytes)) };
        let memory = Memory::new(config.profiles());
        Self { choice: choice(arguments), memory, image: image.descriptor.digest, options }
    }

    /// Runs ahead of `readers` by the profile that was published, if there is one.
    ///
    /// # Errors
    /// When a profile was named and is not there.
    pub(super) fn follow(
        self,
        source: &ImageSource,
        readers: &[LayerReader],
        published: Option<Wanted>,
    ) -> anyhow::Result<Ahead> {
        if let (Choice::Named(name), None) = (&self.choice, &published) {
            let hint = format!("`soci profile list {source}` shows what there is");
            return Err(fail(Exit::Failure, format!("{source} has no profile {name}; {hint}")));
        }
        let is_published = published.is_some();
        let remembered = || {
            let profile = self.memory.load(&self.image)?.into();
            Some(Wanted { name: "of this machine".to_owned(), profile, published: None })
        };
        let wanted = match self.choice {
            Choice::None => None,
            Choice::Named(_) => published,
            Choice::Default => published.or_else(remembered),
        };
        let replay = wanted
            .map(|wanted| Replay::start(wanted, source.clone(), readers.to_vec(), self.options, &Handle::current()));
        let remembers = self.choice == Choice::Default && !is_published;
        let remembering = remembers.then(|| {
            let recorder = Recorder::for_time(Limits::DEFAULT, START_UP);
            for reader in readers {
                recorder.attach(reader);
            }
            (recorder, self.memory, self.image)
        });
        Ok(Ahead { replay, follower: None, remembering })
    }
}

impl Ahead {
    /// Fetches what the files that are read name, if there is no profile.
    pub(super) fn follow_names(&mut self, image: &Image) {
        if self.replay.is_none() {
            self.follower =
                Some(Follower::start(image.names(), image.layers().to_vec(), Reach::default(), &Handle::current()));
        }
    }

    /// Ends with the mount: remembers what its start-up read.
    pub(super) fn end(self) {
        let Some((recorder, memory, image)) = self.remembering else { return };
        if let Err(error) = memory.remember(&image, &recorder) {
            tracing::warn!(%error, "this machine does not remember the start-up");
        }
    }
}
