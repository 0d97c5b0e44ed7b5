//! What images may make the daemon hold. A section of our own.

use serde::{Deserialize, Serialize};
use soci_fs::layer::limits::Caps;
use soci_index::format::limits::Limits as Bounds;

/// What images may make the daemon hold; what goes beyond is left to containerd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Decoded bytes of one span; a layer with larger ones is not read lazily. 0 is the default.
    pub max_span_bytes: u64,
    /// Bytes of memory for the tables of a layer, in addition to twice its compressed size. 0 is the default.
    pub max_table_bytes: u64,
    /// Bytes of memory for the tables of all open layers. 0 is the default.
    pub max_total_table_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let Caps { layer, total_table_bytes } = Caps::default();
        Self {
            max_span_bytes: layer.span_bytes_max,
            max_table_bytes: layer.table_bytes_least,
            max_total_table_bytes: total_table_bytes,
        }
    }
}

impl Limits {
    /// As the parsers know them.
    #[must_use]
    pub fn caps(&self) -> Caps {
        let given = |given: u64, default| if given == 0 { default } else { given };
        let Caps { layer, total_table_bytes } = Caps::default();
        Caps {
            layer: Bounds {
                span_bytes_max: given(self.max_span_bytes, layer.span_bytes_max),
                table_bytes_least: given(self.max_table_bytes, layer.table_bytes_least),
                ..layer
            },
            total_table_bytes: given(self.max_total_table_bytes, total_table_bytes),
        }
    }
}
