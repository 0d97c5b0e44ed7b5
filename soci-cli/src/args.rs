//! The command line as typed: the only place that knows clap.
//!
//! Names, flags and defaults are those of AWS's `soci` where both have a command, so that scripts and nerdctl keep
//! working. Values are parsed here into what the commands work with; what depends on the environment (homes, terminals)
//! is decided in [`crate::args::config`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use soci_index::format::gotime::duration;

mod bench;
pub mod config;
mod node;
mod profile;
mod publish;
mod serve;
mod size;

pub use bench::Bench;
pub use node::{Bounds, Doctor, Mount, Pull, Rpull, Status, Umount};
pub use profile::{Inside, Profile, PushProfile, Record};
pub use publish::{
    Building, Container, Convert, Create, Existing, Forms, IndexSpanSize, Indexing, Optimization, Prefetch, Publish,
    Push, Signers, Verify,
};
pub use serve::ServeWebhook;

/// Start containers without downloading them: index images, publish the indexes, mount images lazily.
#[derive(Debug, Parser)]
#[command(name = "soci", version = VERSION, propagate_version = true, max_term_width = 110)]
#[command(after_help = after_help())]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What this program is, and what it lacks.
const VERSION: &str = match (cfg!(feature = "mount"), cfg!(feature = "node")) {
    (_, true) => concat!("version v", env!("CARGO_PKG_VERSION")),
    (true, false) => concat!("version v", env!("CARGO_PKG_VERSION"), " (without the feature node)"),
    (false, false) => concat!("version v", env!("CARGO_PKG_VERSION"), " (without the features mount and node)"),
};

const WITHOUT_MOUNT: &str =
    "Not in this program, which is built without the feature `mount`: mount, umount, pull, record, demo\n";
const WITHOUT_NODE: &str =
    "Not in this program, which is built without the feature `node`: rpull, status, bench, images of containerd\n";

const STEPS: &str = "\
First steps:
  soci demo                              lazy loading here, without network or root
  soci publish registry.example/app:v1   index an image where it is
  soci mount registry.example/app:v1 D   read its files; only what is touched is fetched
";
const STEPS_WITHOUT_MOUNT: &str = "\
First steps:
  soci publish registry.example/app:v1   index an image where it is
  soci verify registry.example/app:v1    build its index again and compare
";

const IMAGES_AND_CODES: &str = "\
Images:
  HOST/REPOSITORY:TAG[@DIGEST]   oci:DIRECTORY[:NAME]   oci-archive:FILE[:NAME]
  docker-archive:FILE[:NAME]     containerd:NAME        NAME: a tag, a whole name, or @N

Exit codes:
  0 done, or nothing to do         4 registry or network
  1 any other failure              5 image or index damaged or unusable
  2 wrong usage                    6 nothing in the image can be indexed
  3 credentials missing, refused   7 this machine: disk, mount, containerd
                                   8 the registry refuses it (quota, policy, type, size)
                                   9 pushed, but the signing command failed
 10 everything was in place already (publish --detailed-exit-code)
130 interrupted (Ctrl-C); a mount or a server that it ends is done: 0";

fn after_help() -> String {
    let (mount, node) = (cfg!(feature = "mount"), cfg!(feature = "node"));
    let mut lacks = if mount { String::new() } else { WITHOUT_MOUNT.to_owned() };
    if !node {
        lacks.push_str(WITHOUT_NODE);
    }
    let parts = [lacks.as_str(), if mount { STEPS } else { STEPS_WITHOUT_MOUNT }, IMAGES_AND_CODES];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n")
}

/// Options that every command knows.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Everywhere")]
pub struct Global {
    /// Directory of the index store (`content/`) and of mounted layers (`layers/`) [default: /var/lib/soci-snapshotter-grpc
    /// for root, else soci in $XDG_DATA_HOME]
    #[arg(long, global = true, env = "SOCI_ROOT", value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Give up after this time, for example 90s or 5m; 0 waits as long as it takes
    #[arg(long, global = true, value_name = "TIME", value_parser = duration, default_value = "0")]
    pub timeout: Duration,
    /// Say more on standard error; SOCI_LOG takes finer filters
    #[arg(long, global = true)]
    pub debug: bool,
    /// Socket of containerd [default: /run/containerd/containerd.sock]. With it, or with --namespace, create takes plain
    /// names for images of containerd, and so does convert, also for what it writes
    #[arg(long, short = 'a', global = true, env = "CONTAINERD_ADDRESS", value_name = "SOCKET")]
    pub address: Option<String>,
    /// Namespace of containerd [default: default]
    #[arg(long, short = 'n', global = true, env = "CONTAINERD_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
    /// Where indexes are kept [default: soci, below --root]. With `containerd` create keeps them in containerd's content
    /// store, as long as containerd has the image; span indexes always stay below --root. With either, plain names are
    /// images of containerd
    #[arg(long, global = true, value_name = "soci|containerd", value_parser = content_store)]
    pub content_store: Option<ContentStore>,
}

/// Where indexes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentStore {
    /// In the local index store.
    Soci,
    /// In containerd's content store.
    Containerd,
}

fn content_store(text: &str) -> Result<ContentStore, String> {
    match text {
        "" | "soci" => Ok(ContentStore::Soci),
        "containerd" => Ok(ContentStore::Containerd),
        other => Err(format!("unknown content store type: {other}; must be one of [soci containerd]")),
    }
}

/// Default address of containerd.
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

impl Global {
    /// Whether a containerd was named. Tools that call this program, nerdctl among them, do so when they mean the images
    /// in it.
    #[must_use]
    pub fn names_containerd(&self) -> bool {
        let is_named = [&self.address, &self.namespace].into_iter().flatten().any(|text| !text.is_empty());
        is_named || self.content_store.is_some()
    }

    /// The socket of containerd.
    #[must_use]
    pub fn containerd_socket(&self) -> &Path {
        let given = self.address.as_deref().filter(|text| !text.is_empty()).unwrap_or(CONTAINERD_SOCKET);
        Path::new(given.strip_prefix("unix://").unwrap_or(given))
    }

    /// The namespace in containerd.
    #[must_use]
    pub fn containerd_namespace(&self) -> &str {
        self.namespace.as_deref().filter(|text| !text.is_empty()).unwrap_or("default")
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Index an image into the local index store
    Create(Create),
    /// Push the newest local index of an image beside it in the registry
    Push(Push),
    /// Index an image and push the index, in one streaming step that keeps nothing on disk
    Publish(Publish),
    /// Make an image that carries its index within itself (version 2)
    Convert(Convert),
    /// Listen to a registry's events, and index every image that is pushed to it
    ServeWebhook(ServeWebhook),
    /// The indexes in the local index store
    #[command(subcommand)]
    Index(Index),
    /// Build an image's index again from its layers and compare: whether it can be trusted
    Verify(Verify),
    /// The prefetch artifacts in the local index store
    #[command(subcommand)]
    Prefetch(Prefetch),
    /// Bring the list of the local index store up to date: indexes whose manifest is gone leave it, those found in the store,
    /// and with --content-store containerd in containerd, enter it
    RebuildDb {
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// The zTOCs of single layers
    #[command(subcommand)]
    Ztoc(Ztoc),
    #[cfg(feature = "mount")]
    /// Mount an image; its files are fetched when they are read
    Mount(Mount),
    #[cfg(feature = "mount")]
    /// Fetch all of an image, on all cores, for `soci mount`s that need no registry
    Pull(Pull),
    #[cfg(feature = "mount")]
    /// Run a command in an image and note what it reads, for faster starts
    Record(Record),
    #[cfg(feature = "mount")]
    /// Run a command in the namespaces that `soci record` has had made
    #[command(hide = true)]
    Inside(Inside),
    /// Start-up profiles: publish what `soci record` noted
    #[command(subcommand)]
    Profile(Profile),
    #[cfg(feature = "node")]
    /// Pull an image through containerd so that its snapshotter provides the layers lazily, for users of ctr
    Rpull(Rpull),
    #[cfg(feature = "mount")]
    /// Unmount what `soci mount` mounted
    #[command(visible_alias = "unmount")]
    Umount(Umount),
    #[cfg(feature = "mount")]
    /// See lazy loading work: build, index and mount an image on this machine and compare with a full pull
    Demo(Demo),
    #[cfg(feature = "node")]
    /// Measure how fast images start with containerd's snapshotters, and what comes over the network
    Bench(Bench),
    #[cfg(feature = "node")]
    /// Show the layers that the snapshotter of this machine serves
    Status(Status),
    /// Check this machine, containerd and a registry for what lazy loading needs, and say how to fix it
    Doctor(Doctor),
    /// Print a script that completes soci's commands in a shell
    Completions(Completions),
    /// Write the manual pages
    Man(Man),
}

/// Which platforms of an image.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Platforms")]
pub struct Platforms {
    /// Platform, for example linux/arm64; may be repeated [default: this machine's]
    #[arg(long = "platform", short = 'p', value_name = "OS/ARCH")]
    pub platforms: Vec<String>,
    /// All platforms of the image
    #[arg(long)]
    pub all_platforms: bool,
}

/// Which platform of an image.
#[derive(Debug, Clone, Default, Args)]
pub struct OnePlatform {
    /// Platform, for example linux/arm64 [default: this machine's]
    #[arg(long, short = 'p', value_name = "OS/ARCH")]
    platform: Option<String>,
}

impl OnePlatform {
    /// Its name, if it is not this machine's.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.platform.as_deref()
    }
}

/// Whether foreign layers are fetched.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Foreign {
    /// Fetch layers that registries need not have (foreign, non-distributable) from the URLs that the image names; they
    /// are checked like all others
    #[arg(long)]
    pub foreign_layers: bool,
}

/// How to talk to registries.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Registry")]
pub struct Access {
    /// User and password; without it the docker configuration and its helpers are asked
    #[arg(long, short = 'u', value_name = "USER[:PASSWORD]")]
    pub user: Option<String>,
    /// Read the password from standard input
    #[arg(long, requires = "user")]
    pub password_stdin: bool,
    /// Use HTTP without TLS (registries on this machine are asked for TLS first, and spoken to without if they have none)
    #[arg(long)]
    pub plain_http: bool,
    /// Certificate authority to trust besides the system's, a PEM file
    #[arg(long, alias = "tlscacert", value_name = "FILE")]
    pub tls_ca_cert: Option<PathBuf>,
    /// Certificate to show to the registry, a PEM file; it may hold the key, too
    #[arg(long, alias = "tlscert", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The key of that certificate, a PEM file
    #[arg(long, alias = "tlskey", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Directories with a hosts.toml for each registry, separated by commas [default: /etc/containerd/certs.d and
    /// /etc/docker/certs.d; after these, /etc/containers/registries.conf]
    #[arg(long, value_name = "DIR", value_delimiter = ',')]
    pub hosts_dir: Vec<PathBuf>,
    #[command(flatten)]
    pub peer: PeerAccess,
}

/// Options of AWS's `soci push` that it accepts without effect. Here they have the effect that their names promise, but
/// for the snapshotter, which no command of this program needs to know.
#[derive(Debug, Clone, Default, Args)]
pub struct PeerAccess {
    /// Do not check the registry's certificate
    #[arg(long, short = 'k')]
    pub skip_verify: bool,
    /// A refresh token, exchanged for access tokens
    #[arg(long, hide = true, value_name = "TOKEN", conflicts_with = "user")]
    pub refresh: Option<String>,
    /// Show requests, as --debug does
    #[arg(long, hide = true)]
    pub http_dump: bool,
    /// Show requests, as --debug does
    #[arg(long, hide = true)]
    pub http_trace: bool,
    /// Name of containerd's snapshotter
    #[arg(long, hide = true, env = "CONTAINERD_SNAPSHOTTER", value_name = "NAME")]
    pub snapshotter: Option<String>,
}

impl Command {
    /// Whether requests are to be shown.
    #[must_use]
    pub fn shows_requests(&self) -> bool {
        let access = match self {
            Self::Create(create) => &create.indexing.access,
            Self::Push(push) => &push.access,
            Self::Publish(publish) => &publish.indexing.access,
            Self::Convert(convert) => &convert.access,
            Self::Verify(verify) => &verify.access,
            _ => return false,
        };
        access.peer.http_dump || access.peer.http_trace
    }
}

/// `soci index`
#[derive(Debug, Subcommand)]
pub enum Index {
    /// List the indexes
    #[command(visible_alias = "ls")]
    List(IndexList),
    /// Print an index manifest
    Info {
        /// Digest of the index
        digest: String,
    },
    /// Remove indexes, and the zTOCs that no other index uses. The span index of an image goes with the last of the others
    #[command(visible_alias = "rm")]
    Remove {
        /// Digests of indexes
        #[arg(required_unless_present = "image", conflicts_with = "image")]
        digests: Vec<String>,
        /// All indexes of this image
        #[arg(long = "ref", value_name = "IMAGE")]
        image: Option<String>,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
}

/// `soci index list`
#[derive(Debug, Args)]
pub struct IndexList {
    /// Only those of this image
    #[arg(long = "ref", value_name = "IMAGE")]
    pub image: Option<String>,
    /// Span indexes, too. Without this only indexes of AWS's forms are shown, as AWS's tool shows them
    #[arg(long)]
    pub span_indexes: bool,
    /// Print only digests
    #[arg(long, short = 'q')]
    pub quiet: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub platforms: Platforms,
}

/// `soci ztoc`
#[derive(Debug, Subcommand)]
pub enum Ztoc {
    /// Index one layer file
    Create {
        /// The layer: gzip or plain tar; - reads standard input
        layer: PathBuf,
        /// Where to write the zTOC; - writes standard output
        #[arg(long, short = 'o', value_name = "FILE")]
        output: PathBuf,
        /// Uncompressed bytes between two checkpoints, for example 4194304 or 4MiB
        #[arg(long, default_value_t = 4_194_304, value_name = "SIZE", value_parser = size::span, allow_negative_numbers = true)]
        span_size: u64,
        /// Print digests and counts as JSON
        #[arg(long)]
        json: bool,
    },
    /// List the zTOCs in the local index store
    #[command(visible_alias = "ls")]
    List {
        /// Only this one
        #[arg(long, value_name = "DIGEST")]
        ztoc_digest: Option<String>,
        /// Only those of this image
        #[arg(long, value_name = "IMAGE")]
        image_ref: Option<String>,
        /// Print only digests
        #[arg(long, short = 'q')]
        quiet: bool,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Describe a zTOC and its files
    Info {
        /// A digest in the local index store, or a file
        ztoc: String,
    },
    /// Extract one file of a layer by its zTOC, decoding only the spans that hold it
    GetFile(Box<GetFile>),
}

/// `soci ztoc get-file`
#[derive(Debug, Args)]
pub struct GetFile {
    /// A digest in the local index store, or a file
    pub ztoc: String,
    /// Name of the file in the layer
    pub file: String,
    /// The layer: a local file; without it the local index store, containerd, and the image that was indexed, in its
    /// registry or layout, are searched
    #[arg(long, value_name = "FILE")]
    pub layer: Option<PathBuf>,
    /// Where to write the content, exactly [default: standard output, followed by a newline]
    #[arg(long, short = 'o', value_name = "FILE")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub access: Access,
}

/// `soci demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// Use this image instead of one made from this machine's files
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Program to run in the mounted image, by a shell in it [default: python3 -c 'print()' or true]
    #[arg(long, value_name = "COMMAND")]
    pub command: Option<String>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub access: Access,
}

/// `soci completions`
#[derive(Debug, Args)]
pub struct Completions {
    /// Which shell
    pub shell: clap_complete::Shell,
}

/// `soci man`
#[derive(Debug, Args)]
pub struct Man {
    /// Directory to write them to
    pub directory: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_sound() {
        Arguments::command().debug_assert();
    }

    /// Commands that have no `--json`, and why.
    #[cfg(feature = "node")]
    const WITHOUT_JSON: [(&str, &str); 8] = [
        ("index info", "what it prints is JSON"),
        ("ztoc info", "what it prints is JSON"),
        ("ztoc get-file", "what it prints is the file"),
        ("serve-webhook", "it serves; its state is in webhook/queue.json and at /health"),
        ("inside", "it becomes another program"),
        ("umount", "it says nothing but by its exit code"),
        ("completions", "what it prints is a program"),
        ("man", "it writes files"),
    ];

    /// Every command can be asked by a program.
    #[cfg(feature = "node")]
    #[test]
    fn every_command_has_a_document() {
        fn leaves(command: &clap::Command, name: &str, found: &mut Vec<(String, bool)>) {
            for command in command.get_subcommands() {
                let name = format!("{name} {}", command.get_name()).trim().to_owned();
                if command.has_subcommands() {
                    leaves(command, &name, found);
                } else {
                    found.push((name, command.get_arguments().any(|argument| argument.get_id() == "json")));
                }
            }
        }
        let mut found = Vec::new();
        leaves(&Arguments::command(), "", &mut found);
        let lacking: Vec<&str> =
            found.iter().filter(|(_, has_json)| !has_json).map(|(name, _)| name.as_str()).collect();
        let mut known: Vec<&str> = lacking.clone();
        known.retain(|name| WITHOUT_JSON.iter().any(|(known, _)| known == name));
        assert_eq!(lacking, known, "without --json, and without a reason");
        assert_eq!(known.len(), WITHOUT_JSON.len(), "a reason without need");
    }

    /// The command lines that nerdctl runs.
    #[test]
    fn command_lines_of_nerdctl_parse() {
        for line in [
            "soci --address /run/containerd/containerd.sock --namespace default create --all-platforms --span-size 1 --min-layer-size 0 r/i:t",
            "soci --address A --namespace N convert --platform linux/amd64 --span-size 1 --min-layer-size 0 r/i:t r/i:soci",
            "soci --address A --namespace N push --all-platforms --skip-verify --plain-http --hosts-dir /etc/a,/etc/b r/i:t",
            "soci --address A --namespace N push --platform linux/amd64 --platform linux/arm64 -q r/i:t",
            "soci push --user u:p --existing-index skip r/i:t",
            "soci push --refresh t --tlscert c --tlskey k --http-dump --http-trace --snapshotter soci -k r/i:t",
        ] {
            Arguments::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }
}
