//! The `soci` command: arguments, configuration and output over `soci-index` and `soci-fs`; no logic of its own.
//!
//! A library only so that the tests and the demonstration registry can be used from outside; its interface is the
//! command line.

pub mod args;
pub mod bench;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod door;
pub mod exit;
pub mod logging;
pub mod output;
pub mod progress;
pub mod webhook;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use soci_index::digest::Digest;

use args::{Arguments, Command, Ztoc};
use config::Config;
use exit::{Exit, fail};

/// Carries out a command.
///
/// # Errors
/// Whatever stopped it; [`exit::code`] knows the exit code.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let timeout = arguments.global.timeout;
    let config = Config::new(&arguments.global)?;
    let global = arguments.global;
    match arguments.command {
        Command::Create(create) => commands::create::run(&create, &config, &global),
        Command::Push(push) => commands::push::run(&push, &config, timeout),
        Command::Publish(publish) => commands::publish::run(&publish, &global),
        Command::Convert(convert) => commands::convert::run(&convert, &global),
        Command::ServeWebhook(serve) => commands::serve_webhook::run(&serve, &config, &global),
        Command::Verify(verify) => commands::verify::run(&verify, &config, &global),
        Command::Prefetch(prefetch) => commands::prefetch::run(&prefetch, &config),
        // Without --quiet AWS's command is silent, too; the word goes to standard error.
        Command::RebuildDb => {
            tracing::info!("nothing to rebuild: the index store has no database beside it");
            Ok(())
        }
        Command::Index(index) => commands::index::run(&index, &config),
        Command::Ztoc(ztoc) => run_ztoc(ztoc, &config),
        Command::Mount(mount) => commands::mount::run(&mount, &config),
        Command::Pull(pull) => commands::pull::run(&pull, &config, &global),
        Command::Record(record) => commands::record::run(&record, &config, &global),
        Command::Inside(inside) => commands::record::inside::run(&inside),
        Command::Profile(profile) => commands::profile::run(&profile, &config, timeout),
        Command::Rpull(rpull) => commands::rpull::run(&rpull, &global),
        Command::Umount(umount) => commands::mount::run_umount(&umount),
        Command::Bench(bench) => commands::bench::run(&bench, &config, &global),
        Command::Demo(demo) => commands::demo::run(&demo, timeout),
        Command::Status(status) => commands::status::run(&status, &config),
        Command::Doctor(doctor) => commands::doctor::run(&doctor, &config),
        Command::Completions(completions) => commands::help::completions(&completions),
        Command::Man(man) => commands::help::man(&man),
    }
}

fn run_ztoc(ztoc: Ztoc, config: &Config) -> anyhow::Result<()> {
    match ztoc {
        Ztoc::Create { layer, output, span_size, json } => commands::ztoc::create(&layer, &output, span_size, json),
        Ztoc::List { ztoc_digest, image_ref, quiet, json } => {
            commands::index::list_ztocs(config, ztoc_digest.as_deref(), image_ref.as_deref(), quiet, json)
        }
        Ztoc::Info { ztoc } => commands::ztoc::info(&open_ztoc(&ztoc, config)?.0),
        Ztoc::GetFile { ztoc, file, layer, output } => {
            let (ztoc, digest) = open_ztoc(&ztoc, config)?;
            let layer = match layer {
                Some(layer) => layer,
                None => stored_layer(digest, config)?,
            };
            commands::ztoc::get_file(&ztoc, &file, &layer, output.as_deref())
        }
    }
}

/// A zTOC by its digest in the local store, or by the name of a file; and the digest of its layer if that is known.
fn open_ztoc(name: &str, config: &Config) -> anyhow::Result<(Bytes, Option<Digest>)> {
    match name.parse::<Digest>() {
        Ok(digest) if !Path::new(name).exists() => {
            let (file, layer) = commands::index::ztoc_file(config, &digest)?;
            Ok((commands::ztoc::read_file(&file)?, layer))
        }
        _ => Ok((commands::ztoc::read_file(&PathBuf::from(name))?, None)),
    }
}

/// A layer blob that happens to be in the local store.
fn stored_layer(digest: Option<Digest>, config: &Config) -> anyhow::Result<PathBuf> {
    let file =
        digest.map(|digest| config.index_store().join("blobs").join(digest.algorithm().name()).join(digest.hex()));
    file.filter(|file| file.exists()).ok_or_else(|| {
        let which = digest.map(|digest| format!(" {digest}")).unwrap_or_default();
        fail(Exit::Usage, format!("the layer{which} is not in the local store: name its file with --layer"))
    })
}
