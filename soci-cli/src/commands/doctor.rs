//! `soci doctor`: one line for each thing that lazy loading needs, and what to do where it is missing.
//!
//! Two subjects: this machine as a node, and an image with its registry. A pipeline that asks about an image is not to
//! fail because of the machine that it runs on, so with an image the machine is judged only if it is a node, or by
//! `--node`.
//!
//! Nothing is changed; with `--push` an upload is started and aborted. A check that cannot be made says so; it does not
//! count as passed.

#[cfg(feature = "node")]
mod node;
mod publishing;

use crate::args::Doctor;
use crate::args::config::Config;
use crate::commands::finding::Verdict;
use crate::commands::image;
#[cfg(not(feature = "node"))]
use crate::commands::without_node as node;
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Runs `doctor`.
///
/// # Errors
/// When something is wrong, with exit code 1, after all has been said.
pub fn run(arguments: &Doctor, config: &Config) -> anyhow::Result<()> {
    let mut findings = Vec::new();
    if arguments.image.is_none() || arguments.node || node::is_one(arguments, config) {
        findings.extend(node::findings(arguments, config)?);
    }
    if let Some(name) = &arguments.image {
        findings.extend(image::run_to_end(publishing::findings(arguments, name, config))?);
    }
    if arguments.json {
        output::json(&findings)?;
    } else {
        for finding in &findings {
            let mark = match finding.verdict {
                Verdict::Good => "ok   ",
                Verdict::Note => "note ",
                Verdict::Bad => "WRONG",
            };
            let fix = finding.fix.as_ref().map(|fix| format!("; {fix}")).unwrap_or_default();
            output::line(format!("{mark} {:<12} {}{fix}", finding.what, finding.found))?;
            for line in finding.paste.unwrap_or_default().lines() {
                output::line(format!("        {line}"))?;
            }
        }
    }
    match findings.iter().filter(|finding| finding.verdict == Verdict::Bad).count() {
        0 => Ok(()),
        count => Err(fail(Exit::Failure, format!("{count} of the checks found something wrong"))),
    }
}
