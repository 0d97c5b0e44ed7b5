//! The span index of a converted image: pushed beside it, with the new image manifest as its subject.
//!
//! The image itself carries AWS's index, and is that tool's byte for byte; ours refers to it from outside, as it does
//! to images that are left as they are. Order of things: the manifest that it refers to is there before it, and the
//! name of the image comes after it, so that every client that finds the image finds both.

use bytes::Bytes;

use crate::format::digest::Digest;
use crate::format::model::Descriptor;
use crate::format::platform::Platform;
use crate::format::span_index::{SPAN_INDEX, SpanIndex};
use crate::publish::known;
use crate::publish::v2::Enabled;
use crate::publish::{Done, PublishError, Report, SpanReport, refer, span_references};
use crate::registry::Repository;

/// Pushes the span index of each of `reports`, whose images had the manifests `images` before; the result is added to
/// the reports. `force` pushes what is there already.
pub(super) async fn push(
    repository: &Repository,
    enabled: &Enabled,
    images: impl Iterator<Item = Digest>,
    reports: &mut [(Platform, Report)],
    force: bool,
) -> Result<(), PublishError> {
    for (image, (_, report)) in images.zip(reports) {
        let spans = span_references(&report.layers);
        let Some(manifest) = enabled.manifest_of(&image).filter(|_| !spans.is_empty()) else { continue };
        let subject = Descriptor::of(manifest.media_type, &manifest.bytes);
        let json = Bytes::from(SpanIndex::new(&spans, &subject).to_json());
        let (index, index_size) = (Digest::of(&json), json.len() as u64);
        let there = match force {
            true => Vec::new(),
            false => known::refers(repository, &subject.digest, &[SPAN_INDEX]).await?.0,
        };
        let is_there = there.iter().any(|there| there.digest == index);
        let done = match is_there {
            true => Done::UpToDate,
            false => refer(repository, json).await.map_err(|source| PublishError::Beside { source })?,
        };
        report.spans = Some(SpanReport { index, index_size, done });
    }
    Ok(())
}

/// Whether all span indexes were there already.
pub(super) fn were_there(reports: &[(Platform, Report)]) -> bool {
    reports.iter().filter_map(|(_, report)| report.spans.as_ref()).all(|spans| spans.done == Done::UpToDate)
}
