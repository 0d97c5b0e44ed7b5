//! The `soci` command: arguments, configuration and output over `soci-index` and `soci-fs`; no logic of its own.
//!
//! A library only so that the tests and the demonstration registry can be used from outside; its interface is the
//! command line.

pub mod args;
#[cfg(feature = "node")]
pub mod bench;
pub mod commands;
#[cfg(feature = "node")]
pub mod daemon;
#[cfg(feature = "mount")]
pub mod demo;
pub mod report;
pub mod webhook;

use args::config::Config;
use args::{Arguments, Command, Global, Ztoc};

/// Carries out a command.
///
/// # Errors
/// Whatever stopped it; [`report::exit::code`] knows the exit code.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let timeout = arguments.global.timeout;
    let config = Config::new(&arguments.global)?;
    let global = arguments.global;
    match arguments.command {
        Command::Create(create) => commands::create::run(&create, &config, &global),
        Command::Push(push) => commands::push::run(&push, &config, &global),
        Command::Publish(publish) => commands::publish::run(&publish, &global),
        Command::Convert(convert) => commands::convert::run(&convert, &config, &global),
        Command::ServeWebhook(serve) => commands::serve_webhook::run(&serve, &config, &global),
        Command::Verify(verify) => commands::verify::run(&verify, &config, &global),
        Command::Prefetch(prefetch) => commands::prefetch::run(&prefetch, &config),
        Command::RebuildDb { json } => commands::rebuild_db::run(json, &config, &global),
        Command::Index(index) => commands::index::run(&index, &config, &global),
        Command::Ztoc(ztoc) => run_ztoc(ztoc, &config, &global),
        #[cfg(feature = "mount")]
        Command::Mount(mount) => commands::mount::run(&mount, &config),
        #[cfg(feature = "mount")]
        Command::Pull(pull) => commands::pull::run(&pull, &config, &global),
        #[cfg(feature = "mount")]
        Command::Record(record) => commands::record::run(&record, &config, &global),
        #[cfg(feature = "mount")]
        Command::Inside(inside) => commands::record::inside::run(&inside),
        Command::Profile(profile) => commands::profile::run(&profile, &config, timeout),
        #[cfg(feature = "node")]
        Command::Rpull(rpull) => commands::rpull::run(&rpull, &global),
        #[cfg(feature = "mount")]
        Command::Umount(umount) => commands::mount::run_umount(&umount),
        #[cfg(feature = "node")]
        Command::Bench(bench) => commands::bench::run(&bench, &config, &global),
        #[cfg(feature = "mount")]
        Command::Demo(demo) => commands::demo::run(&demo, timeout),
        #[cfg(feature = "node")]
        Command::Status(status) => commands::status::run(&status, &config),
        Command::Doctor(doctor) => commands::doctor::run(&doctor, &config),
        Command::Completions(completions) => commands::help::completions(&completions),
        Command::Man(man) => commands::help::man(&man),
    }
}

fn run_ztoc(ztoc: Ztoc, config: &Config, global: &Global) -> anyhow::Result<()> {
    match ztoc {
        Ztoc::Create { layer, output, span_size, json } => commands::ztoc::create(&layer, &output, span_size, json),
        Ztoc::List { ztoc_digest, image_ref, quiet, json } => {
            commands::index::list_ztocs(config, ztoc_digest.as_deref(), image_ref.as_deref(), quiet, json)
        }
        Ztoc::Info { ztoc } => commands::ztoc::info(&commands::ztoc::get_file::ztoc(&ztoc, config, global)?),
        Ztoc::GetFile(arguments) => commands::ztoc::get_file::run(&arguments, config, global),
    }
}
