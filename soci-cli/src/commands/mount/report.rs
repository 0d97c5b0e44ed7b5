//! What `soci mount` says of a mount: when it is ready, and when it has ended. Sentences, or with `--json` a document
//! of one line each, so that a program learns of the mount while the command serves it.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use soci_fs::fuse::image::Image;
use soci_fs::layer::status::LayerStatus;
use soci_fs::open::{LayerNote, NO_INDEX, Way};
use soci_index::find::choose::Choice;
use soci_index::format::reference::Reference;
use soci_index::image::PlatformImage;

use crate::args::config::Config;
use crate::commands::choice;
use crate::report::output;

/// What is mounted, and how it was opened.
pub(super) struct Report {
    pub(super) reference: Reference,
    pub(super) found: PlatformImage,
    pub(super) choice: Choice,
    pub(super) notes: Vec<LayerNote>,
}

impl Report {
    /// Says that the mount is ready; in the background the layers are left out.
    pub(super) fn ready(&self, directory: &Path, time: Duration, detached: bool) -> anyhow::Result<()> {
        let (reference, shown, time) = (&self.reference, directory.display(), output::time(time));
        let chosen = self.choice.chosen.as_ref();
        let how =
            chosen.map_or_else(|| "without an index".to_owned(), |chosen| format!("by {}", choice::describe(chosen)));
        let what = format!("mounted {reference} on {shown} in {time}, {how}");
        if detached {
            output::line(format!("{what} (process {})", std::process::id()))?;
            return self.hint().map_or(Ok(()), output::line);
        }
        self.layers()?;
        self.hint().map_or(Ok(()), output::line)?;
        output::line(format!("{what}; `soci umount {shown}` or Ctrl-C ends it"))
    }

    /// The same for programs.
    pub(super) fn ready_json(&self, directory: &Path, time: Duration, config: &Config) -> anyhow::Result<()> {
        let chosen = self.choice.chosen.as_ref();
        let layer = |note: &LayerNote| {
            let (way, reason) = match &note.way {
                Way::Lazy => ("lazy", None),
                Way::Kept => ("kept", None),
                Way::Streamed(reason) => ("whole", Some(reason)),
            };
            let index = chosen.filter(|_| way == "lazy").map(|chosen| chosen.index.form());
            json!({
                "digest": note.layer.digest, "size": note.layer.size, "way": way, "reason": reason, "index": index,
            })
        };
        let mut document = json!({
            "event": "mounted",
            "image": self.reference.to_string(),
            "digest": self.found.descriptor.digest,
            "platform": self.found.platform.to_string(),
            "mountpoint": directory,
            "root": config.root,
            "process": std::process::id(),
            "index": chosen.map(|chosen| chosen.digest),
            "layers": self.notes.iter().map(layer).collect::<Vec<_>>(),
            "seconds": time.as_secs_f64(),
        });
        document.as_object_mut().into_iter().for_each(|document| document.extend(choice::json(&self.choice)));
        output::json_line(&document)
    }

    /// What helps where there is no index.
    fn hint(&self) -> Option<String> {
        let lacks_index = |note: &LayerNote| matches!(&note.way, Way::Streamed(reason) if reason == NO_INDEX);
        let reference = &self.reference;
        let hint =
            format!("the image has no index: `soci publish {reference}` makes the next mount fetch only what is read");
        self.notes.iter().any(lacks_index).then_some(hint)
    }

    /// Says how each layer was opened.
    fn layers(&self) -> anyhow::Result<()> {
        let row = |note: &LayerNote| {
            let way = match &note.way {
                Way::Lazy => "on demand".to_owned(),
                Way::Kept => "all here".to_owned(),
                Way::Streamed(reason) => format!("fetched: {reason}"),
            };
            vec![note.layer.digest.to_string(), output::size(note.layer.size), way]
        };
        output::table(&["LAYER", "SIZE", "FILES"], &self.notes.iter().map(row).collect::<Vec<_>>())
    }
}

/// Says what was fetched.
pub(super) fn ended(image: &Image, directory: &Path, json: bool) -> anyhow::Result<()> {
    let status = image.status();
    let sum = |count: fn(&LayerStatus) -> u64| status.layers.iter().map(count).sum::<u64>();
    let (fetched, all) = (sum(|layer| layer.fetched_bytes), sum(|layer| layer.compressed_bytes));
    let (present, spans) = (sum(|layer| layer.present_spans.into()), sum(|layer| layer.spans.into()));
    let (requests, late) = (sum(|layer| layer.requests), sum(|layer| layer.late_reads));
    let waited = status.layers.iter().map(|layer| layer.waited_seconds).sum::<f64>();
    if json {
        return output::json_line(&json!({
            "event": "unmounted",
            "mountpoint": directory,
            "bytesFetched": fetched,
            "bytes": all,
            "requests": requests,
            "presentSpans": present,
            "spans": spans,
            "lateReads": late,
            "waitedSeconds": waited,
            "layers": status.layers,
        }));
    }
    let (fetched, all) = (output::size(fetched), output::size(all));
    output::line(format!(
        "unmounted; {fetched} of {all} fetched in {requests} requests, {present} of {spans} spans are here; {late} reads \
         waited for them, {waited:.1} s in all",
    ))
}
