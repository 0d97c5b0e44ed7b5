//! `soci pull`: downloads the whole image into this machine's layer store, for offline mounts.
//!
//! With an index the spans of a layer are inflated concurrently, without one whole layers are: so the slower of network
//! and cores decides. What is here is proven before the command says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::TryStreamExt as _;
use soci_fs::layer::proof;
use soci_fs::layer::unpack::LayerClaim;
use soci_fs::open::{OpenOptions, OpenedImage, open_image};
use soci_index::image::{ImageSource, PlatformImage};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::args::config::Config;
use crate::args::{Global, Pull};
use crate::commands::choice;
use crate::commands::image::{self, block_on};
use crate::commands::layers::{free_store, open_options};
use crate::report::output;
use crate::report::progress::Progress;

/// How often the bar is moved.
const TICK: Duration = Duration::from_millis(100);

/// Runs the command.
///
/// # Errors
/// When the image cannot be read, a layer is not what the image says, or the store cannot be written.
pub fn run(arguments: &Pull, config: &Config, global: &Global) -> anyhow::Result<()> {
    let start = Instant::now();
    let reference = image::reference(&arguments.image)?;
    let client = image::client_options(&arguments.access)?;
    arguments.bounds.set();
    config.keep_private()?;
    let store = Arc::new(free_store(&config.layers())?);
    let opened = block_on(global.timeout, async {
        let source = ImageSource::open(&reference, &client).await?;
        let (image, listing) = image::of_platform_with_listing(&source, arguments.platform.name()).await?;
        let size = image.manifest.layers.iter().map(|layer| layer.size).sum();
        let progress = Arc::new(Progress::bytes("fetching", Some(size)));
        let (fetched, shown) = (AtomicU64::new(0), Arc::clone(&progress));
        let options = OpenOptions {
            observer: Arc::new(move |bytes| shown.at(fetched.fetch_add(bytes, Ordering::Relaxed) + bytes)),
            listing,
            urls: image::foreign_layers(arguments.foreign.foreign_layers)?,
            // No signer need be trusted: all of it is proven before it is used.
            ..open_options(config, arguments.min_layer_size)
        };
        let opened = open_image(&source, &image, &store, &options, &Handle::current()).await?;
        complete(&opened, &image, &progress).await?;
        progress.finish();
        Ok(opened)
    })
    .with_context(|| reference.to_string())?;
    say(arguments, &opened, start.elapsed())
}

/// Fetches what is lacking of all layers concurrently, and proves them.
async fn complete(opened: &OpenedImage, image: &PlatformImage, progress: &Progress) -> anyhow::Result<()> {
    let layers = image.manifest.layers.iter().zip(&image.config.diff_ids);
    let claims =
        layers.map(|(layer, diff_id)| LayerClaim { digest: layer.digest, size: layer.size, diff_id: *diff_id });
    let layers = opened.readers.iter().zip(claims).map(Ok::<_, anyhow::Error>);
    let work = futures_util::stream::iter(layers).try_for_each_concurrent(None, |(reader, claim)| async move {
        if reader.store().is_proven() {
            return Ok(reader.fetching().complete().await?);
        }
        // Hashed as it comes: a pass of its own at the end would leave the line and the other cores idle.
        let (landed, so_far) = watch::channel(0);
        let fetching = async move { anyhow::Ok(reader.fetching().complete_telling(&landed).await?) };
        let proving = async { anyhow::Ok(proof::prove_as_it_comes(reader, claim, so_far).await?) };
        tokio::try_join!(fetching, proving)?;
        Ok(())
    });
    let fetched = || opened.readers.iter().map(|reader| reader.counts().fetched_bytes).sum::<u64>();
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(TICK) => progress.at(fetched()),
        }
    }
}

fn say(arguments: &Pull, opened: &OpenedImage, time: Duration) -> anyhow::Result<()> {
    let fetched: u64 = opened.readers.iter().map(|reader| reader.counts().fetched_bytes).sum();
    let bytes: u64 = opened.readers.iter().map(|reader| reader.store().size()).sum();
    if arguments.json {
        let mut document = serde_json::json!({
            "image": arguments.image,
            "index": opened.index,
            "layers": opened.notes.iter().map(|note| note.layer.digest).collect::<Vec<_>>(),
            "bytesFetched": fetched,
            "bytesUnpacked": bytes,
            "seconds": time.as_secs_f64(),
        });
        document.as_object_mut().into_iter().for_each(|document| document.extend(choice::json(&opened.choice)));
        return output::json(&document);
    }
    let chosen = opened.choice.chosen.as_ref();
    let how = chosen.map_or_else(|| "without an index".to_owned(), |chosen| format!("by {}", choice::describe(chosen)));
    output::line(format!(
        "{} layers are here and proven, {how}: {} fetched, {} unpacked, {}; `soci mount {} DIR` works offline now",
        opened.notes.len(),
        output::size(fetched),
        output::size(bytes),
        output::time(time),
        arguments.image,
    ))
}
