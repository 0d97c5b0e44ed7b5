//! Docker's and podman's configuration files and the credential programs that they name.
//!
//! `config.json` (in `$DOCKER_CONFIG` or `~/.docker`) with its `auths`, `credHelpers` and `credsStore`, then podman's
//! `auth.json`. The library for these files is given their content only: by itself it does not distinguish a missing
//! file, which is normal, from a broken one, which is not. Invariants: a program's "credentials not found" means that
//! there are none, any other failure of it is an error; a program's output is never shown.

use std::ffi::OsString;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::registry::credentials::{Credentials, Secret};

/// Looks in all files that the environment names. Blocks: it reads files and runs programs.
pub(super) fn find(registry: &str) -> Result<Credentials, String> {
    for file in files(|name| std::env::var_os(name)) {
        match in_file(registry, &file)? {
            None | Some(Credentials::Anonymous) => {}
            Some(found) => return Ok(found),
        }
    }
    Ok(Credentials::Anonymous)
}

/// Where docker and podman keep their logins, by the environment.
fn files(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let below = |name: &str, rest: &str| {
        let directory = variable(name).filter(|value| !value.is_empty())?;
        Some(Path::new(&directory).join(rest))
    };
    let docker = below("DOCKER_CONFIG", "config.json").or_else(|| below("HOME", ".docker/config.json"));
    let podman = match variable("REGISTRY_AUTH_FILE").filter(|value| !value.is_empty()) {
        Some(file) => vec![PathBuf::from(file)],
        None => [below("XDG_RUNTIME_DIR", "containers/auth.json"), below("HOME", ".config/containers/auth.json")]
            .into_iter()
            .flatten()
            .collect(),
    };
    docker.into_iter().chain(podman).collect()
}

/// Looks in one file; `None` when it does not exist. Blocks, too.
pub(super) fn in_file(registry: &str, file: &Path) -> Result<Option<Credentials>, String> {
    for key in keys(registry) {
        let opened = match File::open(file) {
            Ok(opened) => opened,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("{}: {error}", file.display())),
        };
        let answer = docker_credential::get_credential_from_reader(BufReader::new(opened), key);
        match found(answer).map_err(|reason| format!("{}: {reason}", file.display()))? {
            Credentials::Anonymous => {}
            credentials => return Ok(Some(credentials)),
        }
    }
    Ok(Some(Credentials::Anonymous))
}

/// The names under which a registry may be listed.
fn keys(registry: &str) -> Vec<&str> {
    match registry {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => {
            vec!["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"]
        }
        other => vec![other],
    }
}

fn found(answer: Result<DockerCredential, CredentialRetrievalError>) -> Result<Credentials, String> {
    match answer {
        Ok(DockerCredential::IdentityToken(token)) if !token.is_empty() => {
            Ok(Credentials::IdentityToken(Secret::new(token)))
        }
        Ok(DockerCredential::UsernamePassword(user, password)) if !user.is_empty() || !password.is_empty() => {
            Ok(Credentials::Password { user, password: Secret::new(password) })
        }
        Ok(_) | Err(CredentialRetrievalError::NoCredentialConfigured | CredentialRetrievalError::ConfigNotFound) => {
            Ok(Credentials::Anonymous)
        }
        Err(CredentialRetrievalError::HelperFailure { helper, stdout, stderr }) => {
            let not_found = |text: &str| text.to_ascii_lowercase().contains("credentials not found");
            if not_found(&stdout) || not_found(&stderr) {
                return Ok(Credentials::Anonymous);
            }
            Err(format!("{helper} failed; run it by hand to see why"))
        }
        Err(other) => Err(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_text(text: &str, registry: &str) -> Result<Credentials, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        in_file(registry, file.path()).map(|found| found.expect("the file is there"))
    }

    fn password(user: &str, password: &str) -> Credentials {
        Credentials::Password { user: user.into(), password: Secret::new(password) }
    }

    #[test]
    fn docker_config_keys() {
        // "u:p" in base64.
        for (key, registry, expected) in [
            ("h.example", "h.example", password("u", "p")),
            ("https://h.example/v1/", "h.example", password("u", "p")),
            ("https://index.docker.io/v1/", "docker.io", password("u", "p")),
            ("docker.io", "docker.io", password("u", "p")),
            ("localhost:5000", "localhost:5000", password("u", "p")),
            ("localhost:5000", "localhost:5001", Credentials::Anonymous),
            ("h.example", "h.example.evil", Credentials::Anonymous),
        ] {
            let text = format!(r#"{{"auths":{{"{key}":{{"auth":"dTpw"}}}}}}"#);
            assert_eq!(in_text(&text, registry), Ok(expected), "{key} {registry}");
        }
        let text = r#"{"auths":{"h":{"auth":"dTpw","identitytoken":"t"}}}"#;
        assert_eq!(in_text(text, "h"), Ok(Credentials::IdentityToken(Secret::new("t"))));
        assert_eq!(in_text("{}", "h"), Ok(Credentials::Anonymous));
        assert!(in_text("{", "h").is_err());
        assert!(in_text(r#"{"credHelpers":{"h":"no-such-program-anywhere"}}"#, "h").is_err());
    }

    #[test]
    fn files_by_the_environment() {
        for (variables, expected) in [
            (&[][..], &[][..]),
            (&[("HOME", "/h")], &["/h/.docker/config.json", "/h/.config/containers/auth.json"]),
            (
                &[("HOME", "/h"), ("DOCKER_CONFIG", "/d"), ("XDG_RUNTIME_DIR", "/x")],
                &["/d/config.json", "/x/containers/auth.json", "/h/.config/containers/auth.json"],
            ),
            (&[("REGISTRY_AUTH_FILE", "/a"), ("HOME", "/h"), ("DOCKER_CONFIG", "")], &["/h/.docker/config.json", "/a"]),
        ] {
            let look =
                |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(*value));
            assert_eq!(files(look), expected.iter().map(PathBuf::from).collect::<Vec<_>>());
        }
    }

    /// A machine without any stored login.
    #[test]
    fn missing_files() {
        let missing = PathBuf::from("/no/such/config.json");
        assert_eq!(in_file("h", &missing), Ok(None));
    }

    #[test]
    fn programs() {
        let failed = |stdout: &str, stderr: &str| {
            found(Err(CredentialRetrievalError::HelperFailure {
                helper: "docker-credential-x".into(),
                stdout: stdout.into(),
                stderr: stderr.into(),
            }))
        };
        assert_eq!(failed("credentials not found in native keychain\n", ""), Ok(Credentials::Anonymous));
        let error = failed("", "panic: hunter2").unwrap_err();
        assert!(error.contains("docker-credential-x") && !error.contains("hunter2"), "{error}");
    }
}
