//! Has an index signed by a program of the user's choice, once it is in the registry.
//!
//! Signing is left to established tools: `cosign sign --key k {}`, `notation sign {}`. The command line is split as a
//! shell would split it, but there is no shell: nothing in a reference can become a command. What the program prints
//! goes to standard error, because standard output belongs to our own document; it may ask for a passphrase.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use soci_index::format::digest::Digest;
use soci_index::publish::refused::refusal;
use soci_index::registry::Repository;
use soci_index::trust::Trust;
use soci_index::trust::fetch::{Verdict, search};

use crate::args::config;
use crate::report::exit::{Exit, fail};

/// What stands for the index in a command line.
const PLACE: &str = "{}";

/// Why an index was not signed. It is in the registry all the same.
#[derive(Debug, thiserror::Error)]
enum SignError {
    /// The command line makes no sense.
    #[error("the signing command {command:?} cannot be split into words: it is empty, or a quote is not closed")]
    Words { command: String },
    /// There is no such program.
    #[error(
        "the signing program {program} is not there, or cannot be run: install it, or name it by its path; nothing was done"
    )]
    NoProgram { program: String },
    /// The program did not start.
    #[error("{reference} was pushed and not signed: {program} cannot be started: {reason}")]
    NotStarted { reference: String, program: String, reason: String },
    /// The program failed.
    #[error("{reference} was pushed and not signed: {program} ended with {status}; what it said is above")]
    Failed { reference: String, program: String, status: ExitStatus },
}

impl SignError {
    const fn exit(&self) -> Exit {
        match self {
            Self::Words { .. } | Self::NoProgram { .. } => Exit::Usage,
            Self::NotStarted { .. } | Self::Failed { .. } => Exit::Signing,
        }
    }
}

/// Runs `command` for the index `reference`, `HOST/REPOSITORY@sha256:...`, and waits for it. `{}` in the command stands
/// for the reference; without it the reference is the last argument.
///
/// # Errors
/// When the program cannot be run, or ends with a failure. The index is in the registry all the same.
pub async fn sign(command: &str, reference: &str) -> anyhow::Result<()> {
    run(command, reference).await.map_err(|error| fail(error.exit(), error.to_string()))
}

async fn run(command: &str, reference: &str) -> Result<(), SignError> {
    let (program, arguments) = split_command(command, reference)?;
    let not_started = |reason: std::io::Error| SignError::NotStarted {
        reference: reference.to_owned(),
        program: program.clone(),
        reason: reason.to_string(),
    };
    let to_error = std::io::stderr().as_fd().try_clone_to_owned().map_err(not_started)?;
    let mut child = tokio::process::Command::new(&program);
    child.args(arguments).stdout(Stdio::from(to_error)).kill_on_drop(true);
    let status = child.status().await.map_err(not_started)?;
    if !status.success() {
        return Err(SignError::Failed { reference: reference.to_owned(), program, status });
    }
    Ok(())
}

/// Checks a command line, and that its program can be run, before anything is built or pushed.
///
/// # Errors
/// When it cannot be split into words, or there is no such program.
pub fn check(command: &str) -> anyhow::Result<()> {
    program(command).map_err(|error| fail(error.exit(), error.to_string()))
}

fn program(command: &str) -> Result<(), SignError> {
    let (program, _) = split_command(command, "")?;
    let is_there = match program.contains('/') {
        true => is_program(Path::new(&program)),
        false => config::search_path().iter().any(|directory| is_program(&directory.join(&program))),
    };
    if is_there { Ok(()) } else { Err(SignError::NoProgram { program }) }
}

fn is_program(file: &Path) -> bool {
    file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Has manifests of a repository signed, in this order, but for those that bear a good signature by one of `trust`.
///
/// # Errors
/// As [`sign`].
pub async fn sign_all(
    command: &str,
    repository: &Repository,
    manifests: &[Digest],
    trust: &Trust,
) -> anyhow::Result<()> {
    let now = soci_index::clock::seconds();
    for digest in manifests {
        if !trust.is_empty()
            && let signed @ Verdict::Good(_) = search(repository, digest, trust, now).await
        {
            tracing::info!("{repository}@{digest} is {signed} already");
            continue;
        }
        sign(command, &format!("{repository}@{digest}")).await?;
    }
    Ok(())
}

/// Warns of signed manifests that the registry refuses to serve to clients.
pub async fn look_back(repository: &Repository, manifests: &[Digest]) {
    for digest in manifests {
        if let Some(reason) = refusal(repository, digest).await {
            let hint = "have it signed as the registry demands, or have unsigned content admitted";
            tracing::warn!("{repository}@{digest} exists, but no client can read it: {reason}; {hint}");
        }
    }
}

/// The program and its arguments.
fn split_command(command: &str, reference: &str) -> Result<(String, Vec<String>), SignError> {
    let words = shlex::split(command).unwrap_or_default();
    let mut words = words.into_iter();
    let program = words.next().filter(|program| !program.is_empty());
    let program = program.ok_or_else(|| SignError::Words { command: command.to_owned() })?;
    let mut arguments: Vec<String> = words.collect();
    if arguments.iter().any(|argument| argument.contains(PLACE)) {
        for argument in &mut arguments {
            *argument = argument.replace(PLACE, reference);
        }
    } else {
        arguments.push(reference.to_owned());
    }
    Ok((program, arguments))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::exit::{Exit, code};

    const REFERENCE: &str = "h.example/a@sha256:00; $(touch /tmp/x) 'y";

    #[test]
    fn command_lines() {
        for (command, expected) in [
            ("cosign sign", &["cosign", "sign", REFERENCE][..]),
            ("cosign sign --key 'my key' {}", &["cosign", "sign", "--key", "my key", REFERENCE]),
            ("s {} --again {}", &["s", REFERENCE, "--again", REFERENCE]),
            (r#"s "a b"\ c"#, &["s", "a b c", REFERENCE]),
            ("$SHELL -c *", &["$SHELL", "-c", "*", REFERENCE]),
        ] {
            let (program, arguments) = split_command(command, REFERENCE).unwrap();
            assert_eq!([vec![program], arguments].concat(), expected, "{command}");
        }
        let embedded = split_command("s --image={}@", "r").unwrap().1;
        assert_eq!(embedded, ["--image=r@"]);
        for command in ["", "  ", "s 'open", "''", "# only a comment"] {
            assert!(matches!(super::program(command), Err(SignError::Words { .. })), "{command}");
        }
        let place = tempfile::tempdir().unwrap();
        let (text, gone) = (place.path().join("text"), place.path().join("gone"));
        std::fs::write(&text, "no program").unwrap();
        for program in [text.to_str().unwrap(), gone.to_str().unwrap(), "/", "no-such-program-anywhere"] {
            let refused = super::program(&format!("{program} sign")).unwrap_err();
            assert!(matches!(&refused, SignError::NoProgram { program: named } if named == program), "{refused}");
        }
        assert!(check("sh -c true").is_ok() && check("/bin/sh -c true").is_ok());
    }

    #[tokio::test]
    async fn the_program_decides() {
        let place = tempfile::tempdir().unwrap();
        let note = place.path().join("note");
        let script = format!(r#"sh -c 'printf %s "$1" > {}' sh"#, note.display());
        sign(&script, REFERENCE).await.unwrap();
        assert_eq!(std::fs::read_to_string(note).unwrap(), REFERENCE);

        let error = sign("sh -c 'exit 3'", REFERENCE).await.unwrap_err();
        assert_eq!(code(&error), Exit::Signing);
        assert!(error.to_string().contains("pushed and not signed: sh ended with exit status: 3"), "{error}");
        let error = sign("/no/such/program", REFERENCE).await.unwrap_err();
        assert_eq!(code(&error), Exit::Signing);
        assert!(error.to_string().contains("/no/such/program cannot be started"), "{error}");
        assert_eq!(code(&sign("'", REFERENCE).await.unwrap_err()), Exit::Usage);
    }
}
