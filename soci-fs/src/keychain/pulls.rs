//! What came with the pulls of the kubelet, which asks containerd through this daemon (see [`crate::grpc`]).
//!
//! The kubelet looks credentials up in a pod's pull secrets, which no one else on the node can read, and sends them with
//! the request to pull. They are kept per image for as long as the image is there. They are also needed by the process
//! that comes after this one, so every change is written to a file that the supervisor holds: one without a name, in
//! memory, so that no disk ever sees a password.
//!
//! Invariants: a pull without credentials does not replace what is known; credentials meant for another server than the
//! image's are not used; a file that cannot be read costs what it held, and nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use soci_index::image::reference::{Reference, RegistryReference};
use soci_index::registry::{Credentials, Keychain, Login, Secret};

use super::auths;
use super::pattern::Pattern;

/// Bytes of the file that the supervisor holds: tens of thousands of images.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Images remembered; a node has hundreds.
const IMAGES_MAX: usize = 10_000;

/// Credentials as a pull brings them; empty texts say nothing.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullAuth {
    /// The user.
    pub user: String,
    /// The password.
    pub password: String,
    /// Both of them in base64, with a colon in between.
    pub basic: String,
    /// For which server.
    pub server: String,
    /// To be exchanged for access tokens.
    pub identity_token: String,
}

impl fmt::Debug for PullAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullAuth").field("user", &self.user).field("server", &self.server).finish_non_exhaustive()
    }
}

impl PullAuth {
    fn credentials(&self, image: &RegistryReference) -> Option<Credentials> {
        let is_meant = |server: Pattern| server.matches(image.registry(), image.repository());
        if !self.server.is_empty() && !Pattern::parse(&self.server).is_some_and(is_meant) {
            return None;
        }
        if !self.identity_token.is_empty() {
            return Some(Credentials::IdentityToken(Secret::new(&self.identity_token)));
        }
        if !self.user.is_empty() || !self.password.is_empty() {
            let password = Secret::new(&self.password);
            return Some(Credentials::Password { user: self.user.clone(), password });
        }
        auths::basic(&self.basic)
    }
}

/// What is known of a pulled image.
#[derive(Clone, Serialize, Deserialize)]
struct Pulled {
    /// Counts up; the latest pull of a repository is believed.
    turn: u64,
    auth: PullAuth,
}

#[derive(Default, Serialize, Deserialize)]
struct State {
    /// By the image as it was named.
    images: BTreeMap<String, Pulled>,
    turn: u64,
}

/// The credentials of pulls.
pub struct Pulls {
    state: Mutex<State>,
    /// What the next process will read.
    file: Option<Mutex<File>>,
}

impl fmt::Debug for Pulls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pulls").field("images", &self.lock().images.len()).finish_non_exhaustive()
    }
}

impl Pulls {
    /// What `file` holds, and what will come. Without a file it ends with the process.
    #[must_use]
    pub fn new(file: Option<File>) -> Self {
        let state = match file.as_ref().map(read) {
            None => State::default(),
            Some(Ok(state)) => state,
            Some(Err(error)) => {
                tracing::warn!(%error, "the credentials of earlier pulls are lost; images that need them must be pulled again");
                State::default()
            }
        };
        Self { state: Mutex::new(state), file: file.map(Mutex::new) }
    }

    /// Notes what came with a pull. An image without a proper name is left alone: containerd will refuse it.
    pub fn note(&self, image: &str, auth: &PullAuth) {
        let Some(name) = parse(image) else { return };
        if auth.credentials(&name).is_none() {
            return;
        }
        let mut state = self.lock();
        state.turn += 1;
        let pulled = Pulled { turn: state.turn, auth: auth.clone() };
        state.images.insert(image.to_owned(), pulled);
        while state.images.len() > IMAGES_MAX {
            let oldest = state.images.iter().min_by_key(|(_, pulled)| pulled.turn).map(|(image, _)| image.clone());
            oldest.and_then(|oldest| state.images.remove(&oldest));
        }
        self.keep(&state);
    }

    /// Forgets an image that is removed.
    pub fn forget(&self, image: &str) {
        let mut state = self.lock();
        if state.images.remove(image).is_some() {
            self.keep(&state);
        }
    }

    fn look(&self, registry: &str, repository: &str) -> Option<Credentials> {
        let state = self.lock();
        let known = state.images.iter().filter_map(|(image, pulled)| Some((parse(image)?, pulled)));
        let of_it = known.filter(|(image, _)| image.registry() == registry && image.repository() == repository);
        of_it.max_by_key(|(_, pulled)| pulled.turn).and_then(|(image, pulled)| pulled.auth.credentials(&image))
    }

    fn keep(&self, state: &State) {
        let Some(file) = &self.file else { return };
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write(&mut file, state) {
            tracing::warn!(%error, "the credentials of pulls will be lost with this process");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Keychain for Pulls {
    fn name(&self) -> &'static str {
        "the credentials of the kubelet's pulls"
    }

    fn find<'a>(&'a self, registry: &'a str, repository: &'a str) -> BoxFuture<'a, Result<Option<Login>, String>> {
        let credentials = self.look(registry, repository);
        let login = credentials.map(|credentials| Login { credentials, until: None, whole_registry: false });
        std::future::ready(Ok(login)).boxed()
    }
}

fn parse(image: &str) -> Option<RegistryReference> {
    match image.parse() {
        Ok(Reference::Registry(image)) => Some(image),
        Ok(
            Reference::Layout { .. }
            | Reference::Archive { .. }
            | Reference::Saved { .. }
            | Reference::Containerd { .. },
        )
        | Err(_) => None,
    }
}

fn read(mut file: &File) -> io::Result<State> {
    file.rewind()?;
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut text)?;
    if text.is_empty() {
        return Ok(State::default());
    }
    // What the parser says may quote a password.
    serde_json::from_slice(&text).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it was left half written"))
}

/// Writes over what is there and then cuts off the rest: a process killed in between leaves a document that is damaged,
/// and no more is lost than with it.
fn write(file: &mut File, state: &State) -> io::Result<()> {
    let text = serde_json::to_vec(state)?;
    file.rewind()?;
    file.write_all(&text)?;
    file.set_len(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(user: &str) -> PullAuth {
        PullAuth { user: user.to_owned(), password: "p".to_owned(), ..PullAuth::default() }
    }

    fn user(pulls: &Pulls, registry: &str, repository: &str) -> Option<String> {
        match pulls.look(registry, repository)? {
            Credentials::Password { user, .. } => Some(user),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_latest_pull_of_a_repository_is_believed() {
        let pulls = Pulls::new(None);
        pulls.note("h.example/team/app:1", &auth("one"));
        pulls.note("h.example/team/app:2", &auth("two"));
        pulls.note("busybox", &auth("hub"));
        assert_eq!(user(&pulls, "h.example", "team/app").as_deref(), Some("two"));
        assert_eq!(user(&pulls, "docker.io", "library/busybox").as_deref(), Some("hub"));
        assert_eq!(user(&pulls, "h.example", "team/other"), None);
        assert_eq!(user(&pulls, "mirror.example", "team/app"), None);
        // A pull without credentials says nothing about those before.
        pulls.note("h.example/team/app:2", &PullAuth::default());
        assert_eq!(user(&pulls, "h.example", "team/app").as_deref(), Some("two"));
        pulls.forget("h.example/team/app:2");
        assert_eq!(user(&pulls, "h.example", "team/app").as_deref(), Some("one"));
        pulls.forget("h.example/team/app:1");
        assert_eq!(user(&pulls, "h.example", "team/app"), None);
    }

    #[test]
    fn forms_and_servers() {
        let password = |user: &str| Credentials::Password { user: user.into(), password: Secret::new("p") };
        let image = parse("h.example/team/app:1").unwrap();
        for (auth, expected) in [
            (PullAuth { basic: "dTpw".into(), ..PullAuth::default() }, Some(password("u"))),
            (PullAuth { server: "https://h.example/v2/".into(), ..auth("u") }, Some(password("u"))),
            (PullAuth { server: "other.example".into(), ..auth("u") }, None),
            (PullAuth { identity_token: "t".into(), ..auth("u") }, Some(Credentials::IdentityToken(Secret::new("t")))),
            (PullAuth::default(), None),
        ] {
            assert_eq!(auth.credentials(&image), expected, "{auth:?}");
        }
        let shown = format!("{:?}", PullAuth { password: "hunter2".into(), ..auth("u") });
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn the_next_process_knows_them_too() {
        let file = tempfile::tempfile().unwrap();
        let pulls = Pulls::new(Some(file.try_clone().unwrap()));
        for number in 0..3 {
            pulls.note(&format!("h.example/team/app:{number}"), &auth(&format!("user-{number}")));
        }
        pulls.forget("h.example/team/app:2");
        let next = Pulls::new(Some(file.try_clone().unwrap()));
        assert_eq!(user(&next, "h.example", "team/app").as_deref(), Some("user-1"));
        // One that was killed while it wrote.
        file.set_len(20).unwrap();
        let after = Pulls::new(Some(file.try_clone().unwrap()));
        assert_eq!(user(&after, "h.example", "team/app"), None);
        after.note("h.example/team/app:9", &auth("nine"));
        assert_eq!(user(&Pulls::new(Some(file)), "h.example", "team/app").as_deref(), Some("nine"));
    }
}
