//! How the commands that index images build: their arguments, read once.

use std::sync::Arc;

use soci_index::publish::build::{BuildOptions, Format};
use soci_index::publish::reuse::Reuse;
use soci_index::trust::Trust;

use crate::args::{Building, Forms, IndexSpanSize, Indexing, Optimization};
use crate::commands::image;
use crate::report::exit::{Exit, fail};

#[derive(Debug, Clone)]
pub struct Build {
    pub options: BuildOptions,
    /// Whether to build again what exists already.
    pub force: bool,
}

impl Build {
    /// Reads the arguments. `signed_by` is whose signatures count for what is reused; `None` where all is that fits.
    ///
    /// # Errors
    /// When the list of files to prefetch cannot be read, and for a span size that cannot be.
    pub fn new(
        building: &Building,
        format: Format,
        span_size: &IndexSpanSize,
        signed_by: Option<Arc<Trust>>,
    ) -> anyhow::Result<Self> {
        let index_span_bytes = span_size.index_span_size;
        if !(1..=1 << 40).contains(&index_span_bytes) {
            return Err(fail(Exit::Usage, "--index-span-size must be between 1 and 2^40"));
        }
        let options = BuildOptions {
            format,
            span_bytes: building.span_size,
            index_span_bytes,
            layer_bytes_min: building.min_layer_size,
            note_xattrs: building.optimizations.contains(&Optimization::Xattr),
            prefetch: prefetch(building)?,
            reuse_tags: building.reuse_tags,
            reuse: Reuse { verified: building.verify_reused, signed_by },
            urls: image::foreign_layers(building.foreign.foreign_layers)?,
            ..BuildOptions::default()
        };
        Ok(Self { options, force: building.force })
    }

    /// For commands that can make either form of an index.
    ///
    /// # Errors
    /// As [`Build::new`].
    pub fn beside(indexing: &Indexing, signed_by: Option<Arc<Trust>>) -> anyhow::Result<Self> {
        let Forms { format, span_size } = &indexing.forms;
        Self::new(&indexing.building, format.unwrap_or(Format::Both), span_size, signed_by)
    }

    /// For images that carry AWS's form themselves.
    ///
    /// # Errors
    /// As [`Build::new`], and when that form is not wanted.
    pub fn within(indexing: &Indexing, signed_by: Option<Arc<Trust>>) -> anyhow::Result<Self> {
        let format = indexing.forms.format.unwrap_or(Format::Aws);
        if !format.has_ztoc() {
            let hint = "--format both puts a span index beside it";
            return Err(fail(Exit::Usage, format!("a SOCI-enabled image (--v2) carries AWS's form: {hint}")));
        }
        Self::new(&indexing.building, format, &indexing.forms.span_size, signed_by)
    }
}

/// The files that a start-up shall have early.
fn prefetch(building: &Building) -> anyhow::Result<Vec<String>> {
    let mut prefetch = building.prefetch_files.clone();
    if let Some(file) = &building.prefetch_files_json {
        let failed =
            |reason: String| fail(Exit::Usage, format!("failed to parse prefetch files: {}: {reason}", file.display()));
        let text = std::fs::read(file).map_err(|error| failed(error.to_string()))?;
        let listed: Vec<String> =
            serde_json::from_slice(&text).map_err(|error| failed(format!("expected an array of texts: {error}")))?;
        prefetch.extend(listed);
    }
    Ok(prefetch)
}
