//! `soci record`: run a command in an image and note what it reads.
//!
//! The layer store is a new one in a directory of its own, and so is the mount: neither has anything in a cache, so
//! every page that the command needs is a read that is seen. Both are gone when the command ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use soci_fs::foresight::profile::Recorder;
use soci_fs::fuse::image::Image;
use soci_fs::fuse::mount::{Lazy, MountOptions, mount};
use soci_fs::layer::private::ensure_private_dir;
use soci_fs::layer::store::Store;
use soci_fs::open::{OpenOptions, open_image};
use soci_index::format::limits::Limits;
use soci_index::format::profile::Profile;
use soci_index::image::{ImageSource, PlatformImage};
use tokio::runtime::Handle;

use crate::args::config::Config;
use crate::args::{Global, Record};
use crate::commands::image::{self, run_to_end};
use crate::commands::layers::open_options;
use crate::commands::profile::{document, write};
#[cfg(not(feature = "node"))]
use crate::commands::without_node as container;
use crate::report::exit::{Exit, fail};
use crate::report::output;
use crate::report::signals::Signals;

#[cfg(feature = "node")]
mod container;
mod enter;
pub mod inside;

use enter::{Ending, RecordedRun, Terms};

/// What an interrupt during the preparations leads to.
const INTERRUPTED: &str = "interrupted before the command was started";

/// Runs the command.
///
/// # Errors
/// When the image cannot be mounted, or the command fails; what it read until then is written nevertheless.
pub fn run(arguments: &Record, config: &Config, global: &Global) -> anyhow::Result<()> {
    let name = match (&arguments.container, &arguments.image) {
        (Some(id), _) => return container::run(arguments, id, config, global),
        (None, Some(name)) => name,
        (None, None) => return Err(fail(Exit::Usage, "name an image, or a container by --container")),
    };
    crate::commands::mount::check_device()?;
    run_to_end(record(arguments, name, config))
}

async fn record(arguments: &Record, name: &str, config: &Config) -> anyhow::Result<()> {
    let client = image::client_options(&arguments.access)?;
    let reference = image::reference(name)?;
    let resolving = async {
        let source = ImageSource::open(&reference, &client).await?;
        let found = image::of_platform(&source, arguments.platform.name()).await?;
        Ok((source, found))
    };
    let (source, found) = image::interruptible(resolving, INTERRUPTED).await?;
    let run = RecordedRun::new(&found.raw_config, &arguments.command, arguments.network)?;
    arguments.bounds.set();
    config.keep_private()?;
    ensure_private_dir(&config.layers())?;
    let scratch = tempfile::Builder::new().prefix("record-").tempdir_in(config.layers());
    let scratch = scratch.with_context(|| format!("creating a directory in {}", config.layers().display()))?;
    let (mountpoint, room) = (scratch.path().join("image"), scratch.path().join("room"));
    for directory in [&mountpoint, &room] {
        std::fs::create_dir(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let store = Arc::new(Store::open(&scratch.path().join("store"))?);
    let urls = image::foreign_layers(arguments.foreign.foreign_layers)?;
    let open = OpenOptions { urls, ..open_options(config, arguments.min_layer_size) };
    let opening = async { Ok(open_image(&source, &found, &store, &open, &Handle::current()).await?) };
    let opened = image::interruptible(opening, INTERRUPTED).await?;
    let recorder = Recorder::new(Limits::DEFAULT);
    opened.readers.iter().for_each(|reader| recorder.attach(reader));
    let image = Arc::new(Image::new(opened.readers).context("merging the layers")?);
    let options = MountOptions { source: reference.to_string(), ..MountOptions::default() };
    let mut signals = Signals::catch()?;
    let mounted = mount(Arc::clone(&image), &mountpoint, &options, Handle::current())?;
    let start = Instant::now();
    let terms = Terms { time: arguments.time, quiet: arguments.json };
    let ending = run.run(&mountpoint, &room, terms, &mut signals).await;
    let time = start.elapsed();
    let unmounter = mounted.unmounter();
    unmounter.unmount(Lazy::Yes)?;
    drop(mounted);
    let ending = ending?;
    let profile = recorder.profile()?.with_command(&run.line());
    if profile.ranges().is_empty() {
        return Err(fail(Exit::Failure, format!("{run} read nothing of {reference} ({ending})")));
    }
    if recorder.is_full() {
        tracing::warn!("the command reads more than a profile can name; the rest is left out");
    }
    write(&arguments.output, &profile)?;
    say(arguments, &found, &profile, &run, (&ending, time))?;
    match ending {
        Ending::Stopped => Ok(()),
        Ending::Interrupted => {
            let written = arguments.output.display();
            Err(fail(Exit::Interrupted, format!("interrupted; what {run} read until then is in {written}")))
        }
        Ending::Exited(status) if status.success() => Ok(()),
        Ending::Exited(_) => {
            let written = arguments.output.display();
            Err(fail(Exit::Failure, format!("{run}: {ending}; what it read is in {written} all the same")))
        }
    }
}

fn say(
    arguments: &Record,
    image: &PlatformImage,
    profile: &Profile,
    run: &RecordedRun,
    (ending, time): (&Ending, Duration),
) -> anyhow::Result<()> {
    let file = &arguments.output;
    if arguments.json {
        let mut document = document(file, profile);
        document["image"] = arguments.image.clone().into();
        document["digest"] = image.descriptor.digest.to_string().into();
        document["seconds"] = time.as_secs_f64().into();
        document["ending"] = ending.to_string().into();
        return output::json_beside(file, &document);
    }
    let (bytes, ranges, time) = (output::size(profile.bytes()), profile.ranges().len(), output::time(time));
    let shown = file.display();
    output::line_beside(file, format!("{shown}: {bytes} in {ranges} ranges, read within {time} by {run}"))
}
