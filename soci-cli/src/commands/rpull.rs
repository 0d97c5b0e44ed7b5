//! `soci rpull`: pull an image through containerd, with its snapshotter providing the layers.

use std::time::Instant;

use serde_json::json;
use soci_fs::node::grpc::containerd::Containerd;
use soci_fs::node::rpull::{self, Came, PullOptions, Pulled, PulledLayer};
use soci_index::format::reference::Reference;
use soci_index::image::ImageSource;

use crate::args::{Global, Rpull};
use crate::commands::image::{self, block_on};
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// containerd's snapshotter of this project, as nerdctl wants it to be called.
const SNAPSHOTTER: &str = "soci";

/// Runs the command.
///
/// # Errors
/// When the image cannot be read, or containerd does not take it.
pub fn run(arguments: &Rpull, global: &Global) -> anyhow::Result<()> {
    let Reference::Registry(name) = image::reference(&arguments.image)? else {
        return Err(fail(Exit::Usage, format!("{} is not in a registry", arguments.image)));
    };
    let options = image::client_options(&arguments.access)?;
    let selection = image::one_platform(arguments.platform.name())?;
    let index = arguments.soci_index_digest.as_deref().map(str::parse).transpose();
    let index = index.map_err(|error| fail(Exit::Usage, format!("--soci-index-digest: {error}")))?;
    let snapshotter = arguments.access.peer.snapshotter.clone().unwrap_or_else(|| SNAPSHOTTER.to_owned());
    let urls = image::foreign_layers(arguments.foreign_layers)?;
    let pulling = PullOptions { image: name.clone(), snapshotter, index, urls };
    let start = Instant::now();
    let pulled = block_on(global.timeout, async {
        let containerd = Containerd::connect(global.containerd_socket(), global.containerd_namespace()).await?;
        let source = ImageSource::open(&Reference::Registry(name), &options).await?;
        let (root, mut images) = source.resolve_with_root(&selection).await?;
        let image = images.pop().filter(|_| images.is_empty());
        let image =
            image.ok_or_else(|| fail(Exit::Usage, "one platform of the image is pulled: name it by --platform"))?;
        let note = |layer: &PulledLayer| tracing::info!(layer = %layer.layer.digest, "{}", came(layer.came));
        Ok(rpull::pull(&containerd, &source, &root, &image, &pulling, &note).await?)
    })?;
    if arguments.json {
        return output::json(&document(&pulled, &pulling.snapshotter, start.elapsed().as_secs_f64()));
    }
    print(&pulled, &pulling.snapshotter)?;
    let next = format!("ctr run --rm --snapshotter {} {} NAME", pulling.snapshotter, pulled.name);
    output::line(format!("{} pulled in {}; {next}", pulled.name, output::time(start.elapsed())))
}

fn came(came: Came) -> String {
    match came {
        Came::Already => "was here".to_owned(),
        Came::Provided => "provided by the snapshotter".to_owned(),
        Came::Fetched(bytes) => format!("{} fetched and unpacked", output::size(bytes)),
    }
}

fn print(pulled: &Pulled, snapshotter: &str) -> anyhow::Result<()> {
    let row = |layer: &PulledLayer| {
        let size = output::size(layer.layer.size);
        vec![layer.layer.digest.to_string(), size, came(layer.came), output::time(layer.time)]
    };
    let rows: Vec<Vec<String>> = pulled.layers.iter().map(row).collect();
    output::table(&["LAYER", "SIZE", "CAME", "TIME"], &rows)?;
    let fetched = pulled.layers.iter().filter(|layer| matches!(layer.came, Came::Fetched(_))).count();
    if fetched > 0 && snapshotter == SNAPSHOTTER {
        output::line(format!(
            "{fetched} layers were left to containerd; the snapshotter's log says why, soci doctor what may be missing"
        ))?;
    }
    Ok(())
}

fn document(pulled: &Pulled, snapshotter: &str, seconds: f64) -> serde_json::Value {
    let layer = |layer: &PulledLayer| {
        let (how, bytes) = match layer.came {
            Came::Already => ("already", 0),
            Came::Provided => ("provided", 0),
            Came::Fetched(bytes) => ("fetched", bytes),
        };
        json!({
            "digest": layer.layer.digest, "size": layer.layer.size, "came": how,
            "fetchedBytes": bytes, "seconds": layer.time.as_secs_f64(),
        })
    };
    json!({
        "image": pulled.name, "target": pulled.target, "snapshotter": snapshotter, "seconds": seconds,
        "layers": pulled.layers.iter().map(layer).collect::<Vec<_>>(),
    })
}
