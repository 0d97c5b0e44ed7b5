//! Arguments of the commands for nodes: those that need FUSE, containerd or the snapshotter.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use soci_fs::layer::limits::Caps;
use soci_fs::open::trust::Provisional;
use soci_index::format::gotime::duration;
use soci_index::format::limits::Limits;

use crate::args::{Access, Foreign, OnePlatform};

/// What an image may make the program hold.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Limits")]
pub struct Bounds {
    /// Decoded bytes of one span; a layer with larger ones is not read lazily [default: 67108864]
    #[arg(long, value_name = "SIZE", value_parser = crate::args::size::bytes, allow_negative_numbers = true)]
    pub max_span_bytes: Option<u64>,
    /// Bytes of memory for the tables of a layer, in addition to twice its compressed size [default: 67108864]
    #[arg(long, value_name = "SIZE", value_parser = crate::args::size::bytes, allow_negative_numbers = true)]
    pub max_table_bytes: Option<u64>,
    /// Bytes of memory for the tables of all layers [default: 1073741824]
    #[arg(long, value_name = "SIZE", value_parser = crate::args::size::bytes, allow_negative_numbers = true)]
    pub max_total_table_bytes: Option<u64>,
}

impl Bounds {
    /// Has them apply to all that this process does.
    pub fn set(&self) {
        let Caps { layer, total_table_bytes } = Caps::default();
        soci_fs::layer::limits::set(Caps {
            layer: Limits {
                span_bytes_max: self.max_span_bytes.unwrap_or(layer.span_bytes_max),
                table_bytes_least: self.max_table_bytes.unwrap_or(layer.table_bytes_least),
                ..layer
            },
            total_table_bytes: self.max_total_table_bytes.unwrap_or(total_table_bytes),
        });
    }
}

/// `soci mount`
#[derive(Debug, Args)]
pub struct Mount {
    /// The image
    pub image: String,
    /// Where: an empty directory
    pub directory: PathBuf,
    #[command(flatten)]
    pub platform: OnePlatform,
    /// Return when the mount is ready and serve it in the background
    #[arg(long)]
    pub detach: bool,
    /// Use this index, of the local store or beside the image [default: the newest one that is found]
    #[arg(long, value_name = "DIGEST")]
    pub index: Option<String>,
    /// Look for the index in this repository, HOST/NAME, before looking beside the image; may be repeated
    #[arg(long, value_name = "REPOSITORY")]
    pub index_from: Vec<String>,
    /// Layers below this size are read whole at once
    #[arg(long, default_value_t = 10_485_760, value_name = "SIZE", value_parser = crate::args::size::layer, allow_negative_numbers = true)]
    pub min_layer_size: u64,
    #[command(flatten)]
    pub foreign: Foreign,
    /// When an index is used that this machine has not proven: a forged one could show other content until it is
    #[arg(long, value_parser = provisional(), default_value = "allow", value_name = "POLICY")]
    pub provisional: Provisional,
    /// Public key whose signatures count for --provisional require-signature, a PEM file as cosign writes it; may be
    /// repeated
    #[arg(long = "key", value_name = "FILE")]
    pub keys: Vec<PathBuf>,
    /// Certificate of a signer, or of an authority for signers, as notation uses it; may be repeated
    #[arg(long = "certificate", value_name = "FILE")]
    pub certificates: Vec<PathBuf>,
    /// Fetch what this published profile names ahead of all reads [default: the one that is published as default, else
    /// what this machine saw at the last mount]
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// Fetch nothing ahead by a profile, and remember none
    #[arg(long, conflicts_with = "profile")]
    pub no_profile: bool,
    /// Compressed bytes that a profile may prefetch without their being read [default: a quarter of the image, 16 MiB
    /// at least, 512 MiB at most]
    #[arg(long, value_name = "SIZE", value_parser = crate::args::size::bytes, allow_negative_numbers = true)]
    pub profile_budget: Option<u64>,
    /// Do not fetch ahead what the files that are read name, libraries and modules, where there is no profile
    #[arg(long)]
    pub no_follow_names: bool,
    /// Let other users see the mount (as root always)
    #[arg(long)]
    pub allow_other: bool,
    /// Honour set-user-ID programs and device files of the image: for an image that is trusted with this machine, and
    /// for root only
    #[arg(long)]
    pub suid: bool,
    /// Longest wait for one read before it fails
    #[arg(long, default_value = "60s", value_parser = duration, value_name = "TIME")]
    pub read_timeout: Duration,
    /// Serve as the process that `--detach` started
    #[arg(long, hide = true)]
    pub serve_detached: bool,
    /// Write the process id of the serving process to this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Print a JSON document, of one line, when the mount is ready, and another one when it has ended
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub bounds: Bounds,
    #[command(flatten)]
    pub access: Access,
}

/// `soci pull`
#[derive(Debug, Args)]
pub struct Pull {
    /// The image
    pub image: String,
    #[command(flatten)]
    pub platform: OnePlatform,
    /// Layers below this size are read whole, by one core each
    #[arg(long, default_value_t = 10_485_760, value_name = "SIZE", value_parser = crate::args::size::layer, allow_negative_numbers = true)]
    pub min_layer_size: u64,
    #[command(flatten)]
    pub foreign: Foreign,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub bounds: Bounds,
    #[command(flatten)]
    pub access: Access,
}

/// The policies, with what each means.
fn provisional() -> impl TypedValueParser<Value = Provisional> {
    let values = Provisional::NAMES.map(|(name, _, help)| PossibleValue::new(name).help(help));
    PossibleValuesParser::new(values).try_map(|text| text.parse())
}

/// `soci umount`
#[derive(Debug, Args)]
pub struct Umount {
    /// Where the image is mounted
    pub directory: PathBuf,
    /// Detach now, even if files are open
    #[arg(long, short = 'l')]
    pub lazy: bool,
}

/// `soci rpull`
#[derive(Debug, Args)]
#[command(after_help = "\
The snapshotter is the one called soci, unless --snapshotter or CONTAINERD_SNAPSHOTTER names another.

  soci rpull registry.example/team/app:v1
  ctr run --rm --snapshotter soci registry.example/team/app:v1 test")]
pub struct Rpull {
    /// The image, in a registry
    pub image: String,
    #[command(flatten)]
    pub platform: OnePlatform,
    /// Use this index and no other
    #[arg(long, value_name = "DIGEST")]
    pub soci_index_digest: Option<String>,
    /// Fetch layers that registries need not have (foreign, non-distributable) from the URLs that the image names, where the
    /// snapshotter leaves them to containerd; they are checked like all others
    #[arg(long)]
    pub foreign_layers: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub access: Access,
}

/// `soci status`
#[derive(Debug, Args)]
pub struct Status {
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `soci doctor`
#[derive(Debug, Args)]
pub struct Doctor {
    /// An image: it and its registry are checked, and this machine only where it runs the snapshotter, or by --node
    pub image: Option<String>,
    /// Check this machine, too, although an image is named
    #[arg(long)]
    pub node: bool,
    /// See whether this login may push an index: an upload is begun and cancelled, nothing is written
    #[arg(long, requires = "image")]
    pub push: bool,
    /// containerd's configuration file
    #[arg(long, default_value = "/etc/containerd/config.toml", value_name = "FILE")]
    pub containerd_config: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub access: Access,
}
