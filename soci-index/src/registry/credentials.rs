//! Where user names and passwords come from.
//!
//! Explicit ones, docker's files and programs, or a [`Keychain`] supplied by the node's daemon: the kubelet's plugins,
//! secrets of a cluster, credentials of a `PullImage` call. Several are asked in order, and each may know several
//! credentials. They are candidates: if a registry refuses one, the next is tried, so that no source's credentials hide
//! another's. After all those of a chain, which brings together what several parties know, comes the try without any.
//!
//! Credentials are looked up for the registry that the user named, or for a mirror under the mirror's own name, and for
//! no other host: challenges, redirects and token realms have no influence. A keychain also receives the repository,
//! because two images of one registry may need different ones. Invariants: nothing is remembered here, so what changed
//! outside is found by the next look; one source that fails does not hide what another knows, but a search that found
//! nothing names the failure; secrets are never shown.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

mod docker;

/// A text that never shows itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for code that sends or stores it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where to take credentials from.
#[derive(Debug, Clone, Default)]
pub enum CredentialSource {
    /// Docker's configuration and credential programs.
    #[default]
    DockerConfig,
    /// This file in the form of docker's config.json.
    File(PathBuf),
    /// A user name and a password.
    Password { user: String, password: Secret },
    /// A token that is exchanged for access tokens.
    IdentityToken(Secret),
    /// A keychain, queried for every repository.
    Keychain(Arc<dyn Keychain>),
    /// All of these, until one knows something that is not refused.
    Chain(Vec<Self>),
    /// None.
    Anonymous,
}

impl CredentialSource {
    /// How to speak of what the user has named; where it is looked up nothing is known yet.
    pub(crate) fn describe(&self) -> &'static str {
        match self {
            Self::Password { user, password } => {
                Credentials::Password { user: user.clone(), password: password.clone() }.describe()
            }
            Self::IdentityToken(token) => Credentials::IdentityToken(token.clone()).describe(),
            Self::Chain(sources) => sources.first().map_or_else(|| Credentials::Anonymous.describe(), Self::describe),
            Self::DockerConfig | Self::File(_) | Self::Keychain(_) | Self::Anonymous => {
                Credentials::Anonymous.describe()
            }
        }
    }
}

/// Knows credentials.
pub trait Keychain: Send + Sync + fmt::Debug {
    /// What it is called in messages.
    fn name(&self) -> &'static str;

    /// The credentials for `repository` on `registry`, in the order in which they are to be tried. The repository is
    /// written as in the image's name, and so is the registry, unless a mirror is asked: then it is the mirror's host,
    /// with its port.
    ///
    /// # Errors
    /// A reason in words, without anything secret.
    fn find<'a>(&'a self, registry: &'a str, repository: &'a str) -> BoxFuture<'a, Result<Vec<Login>, String>>;
}

/// Credentials and their scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    pub credentials: Credentials,
    /// When to look again; `None` is when they are refused.
    pub until: Option<Instant>,
    /// Whether they are for every repository of the registry.
    pub whole_registry: bool,
}

/// Proof of the client's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// None.
    Anonymous,
    /// A name and a password.
    Password { user: String, password: Secret },
    /// To be exchanged for access tokens.
    IdentityToken(Secret),
}

impl Credentials {
    /// How to speak of them.
    pub(crate) fn describe(&self) -> &'static str {
        match self {
            Self::Anonymous => "no credentials: log in with docker login, or give a user and a password",
            Self::Password { .. } => "with a user name and password",
            Self::IdentityToken(_) => "with an identity token",
        }
    }
}

/// What a search has come to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FoundLogin {
    /// What to try.
    pub(crate) login: Login,
    /// Whether this has been refused before, as everything else that is known.
    pub(crate) is_refused: bool,
}

/// Finds the first credentials for `repository` on `registry` that are not among the `refused` ones; if there are none
/// left, the first of all; anonymous ones if none are known.
///
/// # Errors
/// A reason in words, when nothing was found and a source could not be asked.
pub(crate) async fn find(
    registry: &str,
    repository: &str,
    source: &CredentialSource,
    refused: &[Credentials],
) -> Result<FoundLogin, String> {
    let candidates = candidates(registry, repository, source, refused).await?;
    let none = Login { credentials: Credentials::Anonymous, until: None, whole_registry: candidates.whole_registry };
    let is_chain = matches!(source, CredentialSource::Chain(_));
    let found = match (candidates.fresh, candidates.refused) {
        (Some(login), _) => FoundLogin { login, is_refused: false },
        (None, Some(_)) if is_chain && !refused.contains(&Credentials::Anonymous) => {
            FoundLogin { login: Login { whole_registry: false, ..none }, is_refused: false }
        }
        (None, Some(login)) => FoundLogin { login, is_refused: true },
        (None, None) => FoundLogin { login: none, is_refused: refused.contains(&Credentials::Anonymous) },
    };
    Ok(found)
}

/// The first of the candidates that is not refused, and the first that is.
#[derive(Debug)]
struct Candidates {
    fresh: Option<Login>,
    refused: Option<Login>,
    /// Whether no question was about this repository only.
    whole_registry: bool,
}

impl Candidates {
    fn of(logins: impl IntoIterator<Item = Login>, whole_registry: bool, refused: &[Credentials]) -> Self {
        let mut candidates = Self { fresh: None, refused: None, whole_registry };
        for login in logins.into_iter().filter(|login| login.credentials != Credentials::Anonymous) {
            let place = match refused.contains(&login.credentials) {
                true => &mut candidates.refused,
                false => &mut candidates.fresh,
            };
            place.get_or_insert(login);
        }
        candidates
    }
}

async fn candidates(
    registry: &str,
    repository: &str,
    source: &CredentialSource,
    refused: &[Credentials],
) -> Result<Candidates, String> {
    let everywhere = |credentials| {
        let login = Login { credentials, until: None, whole_registry: true };
        Candidates::of([login], true, refused)
    };
    match source {
        CredentialSource::Anonymous => Ok(everywhere(Credentials::Anonymous)),
        CredentialSource::Password { user, password } => {
            Ok(everywhere(Credentials::Password { user: user.clone(), password: password.clone() }))
        }
        CredentialSource::IdentityToken(token) => Ok(everywhere(Credentials::IdentityToken(token.clone()))),
        CredentialSource::File(file) => {
            let (registry, file) = (registry.to_owned(), file.clone());
            let missing = format!("{} does not exist", file.display());
            blocking(move || docker::in_file(&registry, &file)).await?.map(everywhere).ok_or(missing)
        }
        CredentialSource::DockerConfig => {
            let registry = registry.to_owned();
            blocking(move || docker::find(&registry)).await.map(everywhere)
        }
        CredentialSource::Keychain(keychain) => {
            let found = keychain.find(registry, repository).await;
            let found = found.map_err(|reason| format!("{}: {reason}", keychain.name()))?;
            Ok(Candidates::of(found, false, refused))
        }
        CredentialSource::Chain(sources) => first(registry, repository, sources, refused).await,
    }
}

async fn first(
    registry: &str,
    repository: &str,
    sources: &[CredentialSource],
    refused: &[Credentials],
) -> Result<Candidates, String> {
    let mut failures = Vec::new();
    let mut all = Candidates { fresh: None, refused: None, whole_registry: true };
    for source in sources {
        match Box::pin(candidates(registry, repository, source, refused)).await {
            Ok(Candidates { fresh: Some(login), .. }) => return Ok(Candidates { fresh: Some(login), ..all }),
            Ok(found) => {
                all.whole_registry &= found.whole_registry;
                all.refused = all.refused.or(found.refused);
            }
            Err(reason) => {
                tracing::warn!(registry, repository, reason, "a source of credentials failed");
                failures.push(reason);
            }
        }
    }
    if failures.is_empty() || all.refused.is_some() { Ok(all) } else { Err(failures.join("; ")) }
}

/// Files are read and programs run: not on the threads that move bytes.
async fn blocking<T: Send + 'static>(search: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(search).await.unwrap_or_else(|_| Err("the search was cut off".to_owned()))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn password(user: &str, password: &str) -> Credentials {
        Credentials::Password { user: user.into(), password: Secret::new(password) }
    }

    /// Knows one repository, or fails.
    #[derive(Debug)]
    struct One(Result<&'static str, &'static str>);

    impl Keychain for One {
        fn name(&self) -> &'static str {
            "one"
        }

        fn find<'a>(&'a self, _: &'a str, repository: &'a str) -> BoxFuture<'a, Result<Vec<Login>, String>> {
            let found = self.0.map(|known| {
                let credentials = password(known, "p");
                let login = Login { credentials, until: None, whole_registry: false };
                if known == repository { vec![login] } else { Vec::new() }
            });
            std::future::ready(found.map_err(str::to_owned)).boxed()
        }
    }

    #[tokio::test]
    async fn the_first_that_knows_something_wins() {
        let keychain = |known| CredentialSource::Keychain(Arc::new(One(known)));
        let sources = |last| CredentialSource::Chain(vec![CredentialSource::Anonymous, keychain(Err("broken")), last]);
        let found = find("h", "a", &sources(keychain(Ok("a"))), &[]).await.unwrap().login;
        assert_eq!((found.credentials, found.whole_registry), (password("a", "p"), false));
        // No source knows it, and one could not be queried.
        assert_eq!(find("h", "b", &sources(keychain(Ok("a"))), &[]).await, Err("one: broken".to_owned()));
        let chain = CredentialSource::Chain(vec![keychain(Ok("a")), CredentialSource::Anonymous]);
        let found = find("h", "b", &chain, &[]).await.unwrap().login;
        assert_eq!((found.credentials, found.whole_registry), (Credentials::Anonymous, false));
    }

    #[tokio::test]
    async fn what_is_refused_leads_to_the_next_and_at_last_to_the_first() {
        let given = |user: &str| CredentialSource::Password { user: user.into(), password: Secret::new("p") };
        let chain =
            CredentialSource::Chain(vec![given("a"), CredentialSource::Keychain(Arc::new(One(Ok("r")))), given("b")]);
        let mut refused = Vec::new();
        for expected in [password("a", "p"), password("r", "p"), password("b", "p"), Credentials::Anonymous] {
            let found = find("h", "r", &chain, &refused).await.unwrap();
            assert_eq!((&found.login.credentials, found.is_refused), (&expected, false));
            refused.push(expected);
        }
        let found = find("h", "r", &chain, &refused).await.unwrap();
        assert_eq!((found.login.credentials, found.is_refused), (password("a", "p"), true));
        // What was given by hand is meant.
        let found = find("h", "r", &given("a"), &refused).await.unwrap();
        assert_eq!((found.login.credentials, found.is_refused), (password("a", "p"), true));
    }

    #[tokio::test]
    async fn a_named_file_must_exist() {
        let missing = CredentialSource::File("/no/such/config.json".into());
        assert!(find("h", "a", &missing, &[]).await.unwrap_err().contains("/no/such/config.json"));
    }

    #[test]
    fn secrets_stay_hidden() {
        let shown = format!("{:?}", password("me", "hunter2"));
        assert!(shown.contains("me") && !shown.contains("hunter2"), "{shown}");
    }
}
