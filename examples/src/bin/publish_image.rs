//! Publishes the index of an image in a registry, as `soci publish` does: `publish_image localhost:5000/team/app:v1`.

use std::sync::Arc;

use anyhow::Context;
use soci_index::format::platform::PlatformSelection;
use soci_index::image::ImageSource;
use soci_index::publish::build::{BuildOptions, Observer, Progress};
use soci_index::publish::known::Known;
use soci_index::publish::{Job, publish};
use soci_index::registry::ClientOptions;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let reference = std::env::args().nth(1).context("usage: publish_image HOST/REPOSITORY:TAG")?;
    let source = ImageSource::open(&reference.parse()?, &ClientOptions::default()).await?;
    let Some(repository) = source.repository() else { anyhow::bail!("{reference} is not in a registry") };
    let observer: Observer = Arc::new(|event| {
        if let Progress::LayerDone { layer } = event {
            eprintln!("indexed {layer}");
        }
    });
    for image in source.resolve(&PlatformSelection::All).await? {
        let options = &BuildOptions::default();
        let job = Job { source: &source, image: &image, options, force: false, observer: &observer };
        let report = publish(&job, repository, &Known::default()).await?;
        println!("{}: {} ({:?})", image.platform, report.index, report.done);
    }
    Ok(())
}
