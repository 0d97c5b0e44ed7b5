//! `soci completions` and `soci man`: made from the definition of the command line.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;

use crate::args::{Arguments, Completions, Man};
use crate::report::output;

/// Prints the completion script of a shell.
///
/// # Errors
/// When standard output is closed.
pub fn completions(arguments: &Completions) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "soci", &mut script);
    output::bytes(&script)
}

/// Writes a page for `soci` and one for each command.
///
/// # Errors
/// When the directory cannot be written.
pub fn man(arguments: &Man) -> anyhow::Result<()> {
    let directory = &arguments.directory;
    std::fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    write_pages(directory).with_context(|| format!("writing to {}", directory.display()))?;
    output::line(format!("manual pages written to {}", directory.display()))
}

/// The pages are made aside, since their generator truncates whatever has the name of one.
fn write_pages(directory: &Path) -> std::io::Result<()> {
    let made = tempfile::tempdir()?;
    clap_mangen::generate_to(Arguments::command(), made.path())?;
    for page in std::fs::read_dir(made.path())? {
        let page = page?;
        soci_index::image::output::write(&directory.join(page.file_name()), &std::fs::read(page.path())?)?;
    }
    Ok(())
}
