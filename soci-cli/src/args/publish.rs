//! The commands that make indexes and take them somewhere.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use soci_index::publish::build::Format;

use crate::args::{Access, Foreign, Platforms};

/// How to build indexes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Building")]
pub struct Building {
    /// Uncompressed bytes between two checkpoints of AWS's form: a number, or one with a unit, as 4MiB
    #[arg(long, default_value_t = 4_194_304, value_name = "SIZE", value_parser = crate::args::size::span, allow_negative_numbers = true)]
    pub span_size: u64,
    /// Leave layers below this size alone: they are read whole
    #[arg(long, default_value_t = 10_485_760, value_name = "SIZE", value_parser = crate::args::size::layer, allow_negative_numbers = true)]
    pub min_layer_size: u64,
    /// Leave out what an index can do without: `xattr` notes layers that have no extended attributes
    #[arg(long = "optimizations", value_name = "NAME")]
    pub optimizations: Vec<Optimization>,
    /// A file that programs want early: its spans are noted for runtimes to fetch at once; may be repeated
    #[arg(long = "prefetch-file", value_name = "PATH")]
    pub prefetch_files: Vec<String>,
    /// A JSON file with an array of such paths
    #[arg(long, value_name = "FILE")]
    pub prefetch_files_json: Option<PathBuf>,
    /// For publish and convert: how many other tags of the repository are looked at for layers that are indexed already,
    /// at a manifest or two each
    #[arg(long, default_value_t = soci_index::publish::reuse::REUSE_TAGS, value_name = "N")]
    pub reuse_tags: usize,
    #[command(flatten)]
    pub foreign: Foreign,
    /// Build again what exists already
    #[arg(long, short = 'f')]
    pub force: bool,
    /// Build again what would be reused of existing indexes, and reuse only what turns out to be the same
    #[arg(long)]
    pub verify_reused: bool,
}

/// Whose signatures count when something is reused, or signed.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Signing")]
pub struct Signers {
    /// Reuse what an index lists that is signed by this public key, a PEM file as cosign writes it, and do not sign again
    /// what is; may be repeated. With --sign-with, and for SOCI-enabled images, nothing else is reused
    #[arg(long = "key", value_name = "FILE")]
    pub keys: Vec<PathBuf>,
    /// The same for signatures by this certificate, or by one of this authority, a PEM file as notation uses; may be
    /// repeated
    #[arg(long = "certificate", value_name = "FILE")]
    pub certificates: Vec<PathBuf>,
}

/// Which forms of an index to make.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Building")]
pub struct Forms {
    /// Which forms of an index to make [default: both; with --v2: aws]. An image that is SOCI-enabled itself carries AWS's
    /// form; `both` puts the span index beside it, where the registry takes referrers
    #[arg(long, value_parser = index_format())]
    pub format: Option<Format>,
    #[command(flatten)]
    pub span_size: IndexSpanSize,
}

/// How fine a span index is.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Building")]
pub struct IndexSpanSize {
    /// Uncompressed bytes between two checkpoints of the span index; more in layers of over half a gigabyte
    #[arg(long, default_value_t = soci_index::format::compact::SPAN_BYTES, value_name = "SIZE", value_parser = crate::args::size::bytes, allow_negative_numbers = true)]
    pub index_span_size: u64,
}

/// What the commands that index images have in common.
#[derive(Debug, Clone, Args)]
pub struct Indexing {
    #[command(flatten)]
    pub building: Building,
    #[command(flatten)]
    pub forms: Forms,
    #[command(flatten)]
    pub platforms: Platforms,
    #[command(flatten)]
    pub access: Access,
}

/// The forms of an index, with what each means.
fn index_format() -> impl TypedValueParser<Value = Format> {
    let values = Format::NAMES.map(|(name, _, help)| PossibleValue::new(name).help(help));
    PossibleValuesParser::new(values).try_map(|text| text.parse())
}

/// What an index can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Optimization {
    /// Note layers without extended attributes.
    Xattr,
}

/// `soci create`
#[derive(Debug, Args)]
pub struct Create {
    /// The image: a plain name is that of an image in this machine's containerd if one was named (--address,
    /// --namespace, --content-store) or has it, else in a registry; `docker://NAME` always is, `containerd:NAME` never
    pub image: String,
    /// With --all-platforms: index those that containerd has, where one was not pulled
    #[arg(long, requires = "all_platforms")]
    pub skip_missing_platforms: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub indexing: Indexing,
}

/// `soci push`
#[derive(Debug, Args)]
pub struct Push {
    /// The image, in a registry
    pub image: String,
    /// What to do when the registry has an index of the image already
    #[arg(long, value_enum, default_value_t = Existing::Warn)]
    pub existing_index: Existing,
    /// Uploads at the same time; 0 means 3
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub max_concurrent_uploads: usize,
    /// Print only the digests of the indexes
    #[arg(long, short = 'q')]
    pub quiet: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub platforms: Platforms,
    #[command(flatten)]
    pub access: Access,
}

/// What to do with an index that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Existing {
    /// Say so and push.
    Warn,
    /// Push nothing.
    Skip,
    /// Push.
    Allow,
}

/// `soci publish`
#[derive(Debug, Args)]
#[command(after_help = PUBLISH_HELP)]
pub struct Publish {
    /// The image: in a registry, or anywhere else with --to
    pub image: String,
    /// Put the index into this repository instead of the image's own, HOST/NAME; for images beside which nothing can be
    /// pushed
    #[arg(long, value_name = "REPOSITORY", conflicts_with = "v2")]
    pub to: Option<String>,
    /// Write a SOCI-enabled image (version 2): its index is part of it, so any registry will do, but its digest is a
    /// new one. The tag then names the new image
    #[arg(long)]
    pub v2: bool,
    /// With --v2: the name of the new image [default: the same tag]
    #[arg(long = "as", value_name = "IMAGE", requires = "v2")]
    pub new_name: Option<String>,
    /// Run this command for each index that is in place, for example `cosign sign --yes --key k.key {}`; {} stands for
    /// HOST/REPOSITORY@DIGEST. With --v2 for the image manifests and the image, too
    #[arg(long, value_name = "COMMAND")]
    pub sign_with: Option<String>,
    /// With --v2: replace an image that is signed although the new one is not; without this, and without --sign-with,
    /// nothing is pushed then
    #[arg(long, requires = "v2")]
    pub replace_signed: bool,
    /// Read and build, but push nothing
    #[arg(long, conflicts_with = "v2")]
    pub dry_run: bool,
    /// End with code 10 instead of 0 when everything was in place already
    #[arg(long)]
    pub detailed_exit_code: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub signers: Signers,
    #[command(flatten)]
    pub indexing: Indexing,
}

const PUBLISH_HELP: &str = "\
Examples:
  soci publish registry.example/app:v1                       beside the image, as a referrer
  soci publish registry.example/app:v1 --v2                  as part of the image, under the same tag
  soci publish registry.example/app:v1 --v2 --format both    the same, and the span index beside it
  soci publish docker.io/library/python:3.13 --to registry.example/soci/index
  soci publish registry.example/app:v1 --all-platforms --json | jq -r '.images[].index.digest'

A second run reads no layer. Layers that other tags of the repository share are not read either. What is reused so is not
verified, unless --verify-reused is given: any client with push access can have put it there. With --sign-with, and with --v2,
only what is signed by a --key or --certificate is reused.
Exit codes are listed by `soci --help`.";

/// `soci convert`
#[derive(Debug, Args)]
#[command(after_help = CONVERT_HELP, override_usage = "soci convert [OPTIONS] <SOURCE> <DESTINATION>")]
pub struct Convert {
    /// The image
    pub source: String,
    /// Where the SOCI-enabled image goes
    // Checked by the command, which says of a missing one what AWS's tool says.
    pub destination: Option<String>,
    /// Source and destination are files or directories with an OCI layout
    #[arg(long)]
    pub standalone: bool,
    /// With --standalone: what to write
    #[arg(long, default_value = "oci-archive", value_name = "oci-archive|oci-dir", value_parser = container)]
    pub format: Container,
    /// With --all-platforms: convert those that containerd has, where one was not pulled
    #[arg(long, requires = "all_platforms")]
    pub skip_missing_platforms: bool,
    /// Keep the annotations of the image index's entries; they tie attestations to their images. AWS's tool drops
    /// them, and so does this command without the option
    #[arg(long)]
    pub keep_annotations: bool,
    /// Put a span index beside the new image, too, in its repository: this project's runtime starts it faster by that.
    /// For destinations in a registry; the image itself stays the same
    #[arg(long, conflicts_with = "standalone")]
    pub span_index: bool,
    /// Replace an image in a registry that is signed although the new one is not; without this nothing is pushed then
    #[arg(long)]
    pub replace_signed: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub signers: Signers,
    #[command(flatten)]
    pub building: Building,
    #[command(flatten)]
    pub span_size: IndexSpanSize,
    #[command(flatten)]
    pub platforms: Platforms,
    #[command(flatten)]
    pub access: Access,
}

const CONVERT_HELP: &str = "\
Examples:
  soci convert registry.example/app:v1 registry.example/app:v1-soci
  soci convert registry.example/app:v1 registry.example/app:v1-soci --span-index
  soci convert oci:layout oci-archive:app.tar:v1 --all-platforms
  soci convert --standalone --format oci-dir layout layout-soci
  soci convert containerd:app:v1 containerd:app:v1-soci

An existing layout at a standalone destination is replaced; `oci:DIR:TAG` adds to it.

Plain names are images of containerd with --address, --namespace or --content-store (or CONTAINERD_ADDRESS,
CONTAINERD_NAMESPACE), and without these if /run/containerd/containerd.sock answers and has the source; else they are in
registries. `docker://NAME` always is, `containerd:NAME` never. --user, --span-index and --replace-signed mean registries, too.";

fn container(text: &str) -> Result<Container, String> {
    match text {
        "oci-archive" => Ok(Container::OciArchive),
        "oci-dir" => Ok(Container::OciDir),
        other => Err(format!("unsupported output format: {other}; must be one of [oci-archive oci-dir]")),
    }
}

/// What a standalone conversion writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// A tar file.
    OciArchive,
    /// A directory.
    OciDir,
}

/// `soci verify`
#[derive(Debug, Args)]
#[command(after_help = VERIFY_HELP)]
pub struct Verify {
    /// The image
    pub image: String,
    /// Check this index [default: the one that a runtime would use]
    #[arg(long, value_name = "DIGEST")]
    pub index: Option<String>,
    /// Look for the index in this repository, HOST/NAME, before looking beside the image; may be repeated
    #[arg(long, value_name = "REPOSITORY")]
    pub index_from: Vec<String>,
    /// Demand a signature by this public key, too, a PEM file as cosign writes it; may be repeated
    #[arg(long = "key", value_name = "FILE")]
    pub keys: Vec<PathBuf>,
    /// Demand a signature by this certificate, or by one of this authority, a PEM file as notation uses; may be repeated
    #[arg(long = "certificate", value_name = "FILE")]
    pub certificates: Vec<PathBuf>,
    #[command(flatten)]
    pub foreign: Foreign,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub platforms: Platforms,
    #[command(flatten)]
    pub access: Access,
}

const VERIFY_HELP: &str = "\
Reads every indexed layer once and builds its zTOC again. `identical` means bit by bit; `says the same in other bytes`
means another tool's name or time zone; anything else ends with exit code 5 and names the first file, span or number
that differs.";

/// `soci prefetch`
#[derive(Debug, Subcommand)]
pub enum Prefetch {
    /// List the prefetch artifacts
    #[command(visible_alias = "ls")]
    List {
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Describe a prefetch artifact
    Info {
        /// Its digest
        digest: String,
        /// Print the document itself, too
        #[arg(long)]
        json: bool,
    },
}
