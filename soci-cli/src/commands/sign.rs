//! Has an index signed by a program of the user's choice, once it is in the registry.
//!
//! Signing is left to those who do it well: `cosign sign --key k {}`, `notation sign {}`. The command line is split as a
//! shell would split it, but there is no shell: nothing in a reference can become a command. What the program prints goes
//! to standard error, because standard output belongs to our own document; it may ask for a passphrase.

use std::os::fd::AsFd as _;
use std::process::{ExitStatus, Stdio};

/// What stands for the index in a command line.
const PLACE: &str = "{}";

/// Why an index was not signed. It is in the registry all the same.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The command line makes no sense.
    #[error("the signing command {command:?} cannot be split into words: it is empty, or a quote is not closed")]
    Words {
        /// As given.
        command: String,
    },
    /// The program did not start.
    #[error("{reference} was pushed and not signed: {program} cannot be started: {reason}")]
    NotStarted {
        /// The index.
        reference: String,
        /// The program.
        program: String,
        /// What the system said.
        reason: String,
    },
    /// The program failed.
    #[error("{reference} was pushed and not signed: {program} ended with {status}; what it said is above")]
    Failed {
        /// The index.
        reference: String,
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
    },
}

/// Runs `command` for the index `reference`, `HOST/REPOSITORY@sha256:...`, and waits for it. `{}` in the command stands
/// for the reference; without it the reference is the last argument.
///
/// # Errors
/// [`SignError`].
pub async fn sign(command: &str, reference: &str) -> anyhow::Result<()> {
    let (program, arguments) = words(command, reference)?;
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
        return Err(SignError::Failed { reference: reference.to_owned(), program, status }.into());
    }
    Ok(())
}

/// Checks a command line before anything is pushed.
///
/// # Errors
/// [`SignError::Words`].
pub fn check(command: &str) -> Result<(), SignError> {
    words(command, "").map(|_| ())
}

/// The program and its arguments.
fn words(command: &str, reference: &str) -> Result<(String, Vec<String>), SignError> {
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
    use crate::exit::{Exit, code};

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
            let (program, arguments) = words(command, REFERENCE).unwrap();
            assert_eq!([vec![program], arguments].concat(), expected, "{command}");
        }
        let embedded = words("s --image={}@", "r").unwrap().1;
        assert_eq!(embedded, ["--image=r@"]);
        for command in ["", "  ", "s 'open", "''", "# only a comment"] {
            assert!(matches!(check(command), Err(SignError::Words { .. })), "{command}");
        }
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
