//! The command that indexes images announced by a registry webhook.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use soci_index::format::gotime::duration;

use crate::args::{Indexing, Signers};

/// `soci serve-webhook`
#[derive(Debug, Clone, Args)]
#[command(after_help = SERVE_WEBHOOK_HELP)]
pub struct ServeWebhook {
    /// The registry whose images are indexed: HOST, or HOST:PORT. No other one is ever contacted for what an event says
    #[arg(long, value_name = "HOST")]
    pub registry: String,
    /// Where to listen
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8480")]
    pub listen: SocketAddr,
    /// Also answer /healthz and /metrics here: a separate listener that events cannot keep busy. For probes [default:
    /// nowhere else]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub health_listen: Option<SocketAddr>,
    /// A file with the value that the Authorization header of events must have, the whole of it
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Accept unauthenticated events on an address that is not this machine's own
    #[arg(long, conflicts_with = "token_file")]
    pub no_auth: bool,
    /// Only repositories like this one, in which * is any text and ? any letter; may be repeated [default: all]
    #[arg(long = "match", value_name = "PATTERN")]
    pub patterns: Vec<String>,
    /// Images that are indexed at the same time
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = at_least_one)]
    pub jobs: usize,
    /// Images that may wait; events beyond that are refused, to be sent again
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = at_least_one)]
    pub queue: usize,
    /// At the end, wait so long for what is in progress; the rest is done after the next start
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "30s")]
    pub drain: Duration,
    /// Put indexes into this repository instead of the images' own, HOST/NAME
    #[arg(long, value_name = "REPOSITORY", conflicts_with = "v2")]
    pub to: Option<String>,
    /// Make the images SOCI-enabled ones (version 2), under the same tags
    #[arg(long)]
    pub v2: bool,
    /// Run this command for each index that was published, as `soci publish --sign-with` does
    #[arg(long, value_name = "COMMAND")]
    pub sign_with: Option<String>,
    /// With --v2: replace images that are signed although the new ones are not; without this, and without --sign-with,
    /// these are left alone
    #[arg(long, requires = "v2")]
    pub replace_signed: bool,
    #[command(flatten)]
    pub signers: Signers,
    #[command(flatten)]
    pub indexing: Indexing,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| format!("{text:?} is no number above 0"))
}

const SERVE_WEBHOOK_HELP: &str = "\
Events: Harbor's PUSH_ARTIFACT, in its default form or as CloudEvents, and the notifications of the distribution
project's registry. Only what has a tag is indexed. All platforms are, unless some are named.

  POST /webhook   events              GET /jobs      what waits, runs and has ended (with the token)
  GET /metrics    for Prometheus      GET /healthz   ok (both also at --health-listen)

A request to another path is answered with 404 and logged. What a policy of the registry forbids (412, read-only mode, a
full quota) rests, from two minutes to a day, and is tried again when its repository has another event.

A request's head has 5 seconds and 32 KiB, a connection 30 seconds; there are 256 connections, 64 of one peer (an IPv4
address, or a network of 64 bits of IPv6). Beyond that the oldest one that has sent no head gives way.

Example:
  soci serve-webhook --registry harbor.example --listen 0.0.0.0:8480 --token-file /run/secrets/token --match 'team/*'

What was accepted is kept in `webhook/queue.json` below --root until it is done.";
