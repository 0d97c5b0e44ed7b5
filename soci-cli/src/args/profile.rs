//! Arguments of the commands that make and publish start-up profiles.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use soci_index::format::gotime::duration;

use crate::args::{Access, Bounds, Foreign, OnePlatform};

/// `soci record`
#[derive(Debug, Args)]
#[command(after_help = "\
The image is mounted anew, with nothing of it in any cache, so that every read is seen. The command runs as you, with the
image as its root directory and its environment and working directory as the image says. It sees no files, devices,
processes and, without --network, no network of this machine, and gains no privileges; of root's it has few. CPU and
memory have no bounds, and the kernel is shared. As root it may write, to memory; other users need bubblewrap (bwrap)
and may not.

  soci record registry.example/app:v1 -- python3 -c 'import numpy'
  soci record registry.example/web:v1 --for 20s
  soci profile push registry.example/app:v1 default.profile --default --pack

With --container nothing is run: the profile is what the snapshotter of this machine noted when the container's image was
first started here, within a minute and a half of its pull ([profile] record = true, as it is by default).

  soci --namespace k8s.io record --container 6d1e3f1c8d6b")]
pub struct Record {
    /// The image
    #[arg(required_unless_present = "container")]
    pub image: Option<String>,
    /// What the snapshotter has noted of the first starts of this container's image
    #[arg(long, value_name = "ID", conflicts_with_all = ["image", "command", "time"])]
    pub container: Option<String>,
    /// What to run [default: what the image says]
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
    /// Where to write the profile
    #[arg(long, short = 'o', default_value = "default.profile", value_name = "FILE")]
    pub output: PathBuf,
    /// End the command after this time, for programs that do not end by themselves; 0 waits for its end
    #[arg(long = "for", value_parser = duration, default_value = "0", value_name = "TIME")]
    pub time: Duration,
    /// Let the command use the network of this machine
    #[arg(long, conflicts_with = "container")]
    pub network: bool,
    #[command(flatten)]
    pub platform: OnePlatform,
    /// Layers below this size are read whole at once
    #[arg(long, default_value_t = 10_485_760, value_name = "SIZE", value_parser = crate::args::size::layer, allow_negative_numbers = true)]
    pub min_layer_size: u64,
    #[command(flatten)]
    pub foreign: Foreign,
    /// Print one JSON document; what the command prints goes to standard error then
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub bounds: Bounds,
    #[command(flatten)]
    pub access: Access,
}

/// `soci inside`: what `soci record` runs in the namespaces that it has had made.
#[derive(Debug, Args)]
pub struct Inside {
    /// Where the image is mounted
    #[arg(long, value_name = "DIR")]
    pub image: PathBuf,
    /// An empty directory
    #[arg(long, value_name = "DIR")]
    pub room: PathBuf,
    /// Where the command starts, in the image
    #[arg(long, value_name = "DIR")]
    pub directory: String,
    /// A variable for the command; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub environment: Vec<String>,
    /// The network is the machine's
    #[arg(long)]
    pub network: bool,
    /// The command
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `soci profile`
#[derive(Debug, Subcommand)]
pub enum Profile {
    /// Push a profile beside its image
    Push(Box<PushProfile>),
    /// List the profiles of an image
    #[command(visible_alias = "ls")]
    List {
        /// The image
        image: String,
        #[command(flatten)]
        platform: OnePlatform,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        access: Box<Access>,
    },
    /// Show what a profile file names
    Show {
        /// The profile
        file: PathBuf,
        /// Print one JSON document, with every range
        #[arg(long)]
        json: bool,
    },
    /// Delete the published profiles of a name: their manifests, and nothing else
    #[command(visible_alias = "remove")]
    Rm {
        /// The image
        image: String,
        /// The profile's name
        name: String,
        #[command(flatten)]
        platform: OnePlatform,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        access: Box<Access>,
    },
    /// Make one profile of two: all that the first one names, then what the second one has besides
    Merge {
        /// The profile that comes first
        first: PathBuf,
        /// The other
        second: PathBuf,
        /// Where to write the result
        #[arg(long, short = 'o', value_name = "FILE")]
        output: PathBuf,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
}

/// `soci profile push`
#[derive(Debug, Args)]
pub struct PushProfile {
    /// The image
    pub image: String,
    /// The profile, as `soci record` wrote it
    pub file: PathBuf,
    /// Its name, of letters, digits, `-`, `_` and `.` alone
    #[arg(long, default_value = "default", value_name = "NAME")]
    pub name: String,
    /// Use it wherever the image is mounted and no other is named
    #[arg(long)]
    pub default: bool,
    /// Push the named bytes along, in order, so that a start-up gets all of them by one request
    #[arg(long)]
    pub pack: bool,
    /// Publish it for AWS's snapshotter, too: as prefetch artifacts in an index beside the image's own one of AWS's form
    ///
    /// The image's index is published once more, with lists of the spans that the profile names; lists that it had are
    /// replaced. Nodes use it with `[prefetch] enable = true` and `[pull_modes.soci_v1] enable = true`, when the registry
    /// lists it before the image's other indexes.
    #[arg(long)]
    pub as_prefetch: bool,
    /// The command that was recorded, shown by listings; an empty text publishes none [default: what `soci record` ran]
    #[arg(long, value_name = "TEXT")]
    pub command: Option<String>,
    /// Push into this repository, HOST/NAME, and not into the image's own
    #[arg(long, value_name = "REPOSITORY")]
    pub to: Option<String>,
    #[command(flatten)]
    pub platform: OnePlatform,
    /// For --pack: fetch layers that registries need not have (foreign, non-distributable) from the URLs that the image names; they
    /// are checked like all others
    #[arg(long)]
    pub foreign_layers: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub access: Access,
}
