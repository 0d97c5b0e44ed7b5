//! `soci record --container`: what the snapshotter of this machine has noted of a container's start.
//!
//! The snapshotter listens to an image's layers for a while after it has provided them, so what it has noted are the
//! first starts of the image on this machine. Later ones read from the kernel's cache, which cannot be observed.

use anyhow::Context as _;
use soci_fs::node::grpc::containerd::Containerd;
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::profile::Profile;
use soci_index::format::reference::Reference;

use crate::args::config::Config;
use crate::args::{Global, Record};
use crate::commands::image::block_on;
use crate::commands::profile::{document, write};
use crate::commands::{image, source};
use crate::daemon::ask;

use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Writes what was noted of the start of container `id`.
///
/// # Errors
/// When there is no such container, or nothing was noted of its image.
pub(super) fn run(arguments: &Record, id: &str, config: &Config, global: &Global) -> anyhow::Result<()> {
    let (name, snapshotter, manifest) = block_on(global.timeout, image_of(arguments, id, global))?;
    let answer = ask::get(&config.root, &format!("/noted/{manifest}"))?;
    if answer.status != 200 {
        let hint = format!(
            "nothing is noted of {name} ({manifest}), the image of container {id} on snapshotter {snapshotter}: {}. \
             `soci record {name} -- COMMAND` records a start anew",
            String::from_utf8_lossy(&answer.body).trim()
        );
        return Err(fail(Exit::Failure, hint));
    }
    let profile = Profile::decode(&answer.body, &Limits::DEFAULT).context("the profile that the snapshotter gives")?;
    write(&arguments.output, &profile)?;
    if arguments.json {
        let mut document = document(&arguments.output, &profile);
        document["image"] = name.into();
        document["digest"] = manifest.to_string().into();
        document["container"] = id.into();
        return output::json_beside(&arguments.output, &document);
    }
    let said = format!(
        "{}: {} in {} ranges, read by the first starts of {name} on this machine",
        arguments.output.display(),
        output::size(profile.bytes()),
        profile.ranges().len(),
    );
    output::line_beside(&arguments.output, said)
}

/// The name of a container's image, its snapshotter, and the manifest that fits this machine.
async fn image_of(arguments: &Record, id: &str, global: &Global) -> anyhow::Result<(String, String, Digest)> {
    let containerd = Containerd::connect(global.containerd_socket(), global.containerd_namespace()).await?;
    let container = containerd.container(id).await?;
    if container.image.is_empty() {
        return Err(fail(Exit::Usage, format!("container {id} was made without an image")));
    }
    let reference = Reference::Containerd { name: container.image.clone() };
    let found = source::open(&reference, &image::client_options(&arguments.access)?, global).await?;
    let platform = image::of_platform(&found, arguments.platform.name()).await?;
    Ok((container.image, container.snapshotter, platform.descriptor.digest))
}
