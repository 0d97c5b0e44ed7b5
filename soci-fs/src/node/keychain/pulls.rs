//! What came with the pulls of the kubelet, which asks containerd through this daemon (see [`crate::node::grpc`]).
//!
//! The kubelet looks credentials up in a pod's pull secrets, which nothing else on the node can read, and sends them
//! with the request to pull. Every user who may create a pod can thereby have any credentials sent for any image, so
//! they count once containerd reports that the pull succeeded. Until then they are candidates for the image's
//! repository, after all that is known to be good, since the layers of this pull need them; a failed pull removes its
//! own candidates, and no others. Several are kept for an image: what was good last is tried first.
//!
//! They are kept for as long as the image is there. They are also needed by the process that comes after this one, so
//! every change is written to a file that the supervisor holds: one without a name, in memory, so that no disk ever
//! sees a password.
//!
//! Invariants: nothing takes the place of what was good but what was good later; credentials meant for another server
//! than the image's are not used; a file that cannot be read costs what it held, and nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use soci_index::format::reference::{Reference, RegistryReference};
use soci_index::registry::{Credentials, Keychain, Login, Secret};

use crate::node::keychain::auths;
use crate::node::keychain::pattern::Pattern;

/// Bytes of the file that the supervisor holds: more than what is kept takes with all that is around it in the file.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Bytes of all credentials that are kept: thousands of images, even with tokens of some kilobytes.
const KEPT_BYTES_MAX: usize = 16 << 20;
/// Bytes of the credentials of one pull. Identity tokens reach some kilobytes.
const AUTH_BYTES_MAX: usize = 64 << 10;
/// Images remembered; a node has hundreds.
const IMAGES_MAX: usize = 10_000;
/// Credentials remembered for an image: as many parties of a node as may be expected to use the same one.
const GOOD_MAX: usize = 8;
/// Candidates for a repository. Pulls that are in progress come after the good ones.
const CANDIDATES_MAX: usize = 64;

/// Credentials as a pull brings them; empty texts say nothing.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullAuth {
    pub user: String,
    pub password: String,
    /// Both of them in base64, with a colon in between.
    pub basic: String,
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
    fn bytes(&self) -> usize {
        [&self.user, &self.password, &self.basic, &self.server, &self.identity_token].map(String::len).iter().sum()
    }

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

/// Credentials of a good pull.
#[derive(Clone, Serialize, Deserialize)]
struct Pulled {
    /// Counts up: what was good last is believed most.
    turn: u64,
    auth: PullAuth,
}

/// What is known of an image, as it was written by this version or by one before, which kept only one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    One(Pulled),
    Several(Vec<Pulled>),
}

#[derive(Default, Serialize, Deserialize)]
struct PullsState {
    /// By the image as it was named; what was good last comes first.
    #[serde(deserialize_with = "written")]
    images: BTreeMap<String, Vec<Pulled>>,
    turn: u64,
    /// Of pulls in progress, which end with this process: by their number.
    #[serde(skip)]
    pending: BTreeMap<u64, (String, PullAuth)>,
}

impl PullsState {
    /// Forgets images until there are at most so many, with so many bytes: of the registry that has most of them,
    /// because any number can be sent to one that accepts any password.
    fn make_room(&mut self, images_max: usize, bytes_max: usize) {
        let size = |image: &str, pulled: &[Pulled]| {
            image.len() + pulled.iter().map(|pulled| pulled.auth.bytes()).sum::<usize>()
        };
        let mut bytes: usize = self.images.iter().map(|(image, pulled)| size(image, pulled)).sum();
        while self.images.len() > images_max || bytes > bytes_max {
            let mut registries: BTreeMap<&str, usize> = BTreeMap::new();
            for (image, pulled) in &self.images {
                *registries.entry(registry_of(image)).or_default() += size(image, pulled);
            }
            let Some((largest, _)) = registries.into_iter().max_by_key(|(_, bytes)| *bytes) else { return };
            let last = |pulled: &[Pulled]| pulled.first().map_or(0, |pulled| pulled.turn);
            let of_it = self.images.iter().filter(|(image, _)| registry_of(image) == largest);
            let oldest = of_it.min_by_key(|(_, pulled)| last(pulled)).map(|(image, _)| image.clone());
            let Some((image, pulled)) = oldest.and_then(|oldest| self.images.remove_entry(&oldest)) else { return };
            bytes -= size(&image, &pulled);
        }
    }
}

/// The registry in an image's name, as far as it is needed to distinguish registries.
fn registry_of(image: &str) -> &str {
    image.split_once('/').map_or("", |(registry, _)| registry)
}

fn written<'de, D: serde::Deserializer<'de>>(from: D) -> Result<BTreeMap<String, Vec<Pulled>>, D::Error> {
    let images: BTreeMap<String, Written> = BTreeMap::deserialize(from)?;
    let several = |written| match written {
        Written::One(pulled) => vec![pulled],
        Written::Several(pulled) => pulled,
    };
    Ok(images.into_iter().map(|(image, written)| (image, several(written))).collect())
}

/// The credentials of pulls.
pub struct Pulls {
    state: Mutex<PullsState>,
    /// What the next process will read.
    file: Option<Mutex<File>>,
}

impl fmt::Debug for Pulls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pulls").field("images", &self.state.lock().images.len()).finish_non_exhaustive()
    }
}

/// A pull in progress. Unless it is said to be good, its credentials are forgotten with it.
#[derive(Debug)]
#[must_use]
pub struct Pulling {
    pulls: Arc<Pulls>,
    number: u64,
}

impl Pulling {
    /// containerd has pulled the image with these credentials.
    pub fn good(self) {
        let mut state = self.pulls.state.lock();
        let Some((image, auth)) = state.pending.remove(&self.number) else { return };
        state.turn += 1;
        let turn = state.turn;
        let known = state.images.entry(image).or_default();
        known.retain(|pulled| pulled.auth != auth);
        known.insert(0, Pulled { turn, auth });
        known.truncate(GOOD_MAX);
        state.make_room(IMAGES_MAX, KEPT_BYTES_MAX);
        self.pulls.keep(&state);
    }
}

impl Drop for Pulling {
    fn drop(&mut self) {
        self.pulls.state.lock().pending.remove(&self.number);
    }
}

impl Pulls {
    /// What `file` holds, and what will come. Without a file it ends with the process.
    #[must_use]
    pub fn new(file: Option<File>) -> Self {
        let state = match file.as_ref().map(read) {
            None => PullsState::default(),
            Some(Ok(state)) => state,
            Some(Err(error)) => {
                tracing::warn!(%error, "the credentials of earlier pulls are lost; images that need them must be pulled again");
                PullsState::default()
            }
        };
        Self { state: Mutex::new(state), file: file.map(Mutex::new) }
    }

    /// Takes what comes with a pull that begins. `None` where there is nothing to take: an image without a proper name,
    /// which containerd will refuse, or no credentials that are meant for its registry.
    pub fn begin(self: &Arc<Self>, image: &str, auth: &PullAuth) -> Option<Pulling> {
        if auth.bytes() > AUTH_BYTES_MAX {
            tracing::warn!(image, bytes = auth.bytes(), "the credentials of a pull are too long to be kept");
            return None;
        }
        auth.credentials(&parse(image)?)?;
        let mut state = self.state.lock();
        state.turn += 1;
        let number = state.turn;
        state.pending.insert(number, (image.to_owned(), auth.clone()));
        Some(Pulling { pulls: Arc::clone(self), number })
    }

    /// Forgets an image that is removed.
    pub fn forget(&self, image: &str) {
        let mut state = self.state.lock();
        if state.images.remove(image).is_some() {
            self.keep(&state);
        }
    }

    fn look(&self, registry: &str, repository: &str) -> Vec<Credentials> {
        let state = self.state.lock();
        let of_it =
            |image: &str| parse(image).filter(|image| image.registry() == registry && image.repository() == repository);
        let known = state.images.iter().filter_map(|(image, pulled)| Some((of_it(image)?, pulled)));
        let mut good: Vec<(u64, Option<Credentials>)> = known
            .flat_map(|(image, pulled)| pulled.iter().map(move |one| (one.turn, one.auth.credentials(&image))))
            .collect();
        good.sort_by_key(|(turn, _)| std::cmp::Reverse(*turn));
        let pending = state.pending.values().filter_map(|(image, auth)| auth.credentials(&of_it(image)?));
        let mut found = Vec::new();
        for credentials in good.into_iter().filter_map(|(_, credentials)| credentials).chain(pending) {
            if found.len() < CANDIDATES_MAX && !found.contains(&credentials) {
                found.push(credentials);
            }
        }
        found
    }

    fn keep(&self, state: &PullsState) {
        let Some(file) = &self.file else { return };
        let mut file = file.lock();
        if let Err(error) = write(&mut file, state) {
            tracing::warn!(%error, "the credentials of pulls will be lost with this process");
        }
    }
}

impl Keychain for Pulls {
    fn name(&self) -> &'static str {
        "the credentials of the kubelet's pulls"
    }

    fn find<'a>(&'a self, registry: &'a str, repository: &'a str) -> BoxFuture<'a, Result<Vec<Login>, String>> {
        let login = |credentials| Login { credentials, until: None, whole_registry: false };
        let logins = self.look(registry, repository).into_iter().map(login).collect();
        std::future::ready(Ok(logins)).boxed()
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

fn read(mut file: &File) -> io::Result<PullsState> {
    file.rewind()?;
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut text)?;
    if text.is_empty() {
        return Ok(PullsState::default());
    }
    // What the parser says may quote a password.
    serde_json::from_slice(&text).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it was left half written"))
}

/// Writes over what is there and then cuts off the rest: a process killed in between leaves a document that is damaged,
/// and no more is lost than with it.
fn write(file: &mut File, state: &PullsState) -> io::Result<()> {
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

    fn users(pulls: &Pulls, registry: &str, repository: &str) -> Vec<String> {
        let user = |credentials| match credentials {
            Credentials::Password { user, .. } => user,
            other => panic!("{other:?}"),
        };
        pulls.look(registry, repository).into_iter().map(user).collect()
    }

    fn good(pulls: &Arc<Pulls>, image: &str, user: &str) {
        pulls.begin(image, &auth(user)).unwrap().good();
    }

    #[test]
    fn what_was_good_last_comes_first() {
        let pulls = Arc::new(Pulls::new(None));
        good(&pulls, "h.example/team/app:1", "one");
        good(&pulls, "h.example/team/app:2", "two");
        good(&pulls, "busybox", "hub");
        assert_eq!(users(&pulls, "h.example", "team/app"), ["two", "one"]);
        assert_eq!(users(&pulls, "docker.io", "library/busybox"), ["hub"]);
        assert_eq!(users(&pulls, "h.example", "team/other"), [""; 0]);
        assert_eq!(users(&pulls, "mirror.example", "team/app"), [""; 0]);
        // A pull without credentials says nothing about those before.
        assert!(pulls.begin("h.example/team/app:2", &PullAuth::default()).is_none());
        good(&pulls, "h.example/team/app:1", "one");
        assert_eq!(users(&pulls, "h.example", "team/app"), ["one", "two"]);
        pulls.forget("h.example/team/app:1");
        assert_eq!(users(&pulls, "h.example", "team/app"), ["two"]);
        pulls.forget("h.example/team/app:2");
        assert_eq!(users(&pulls, "h.example", "team/app"), [""; 0]);
        // Many parties of one image: those that were good last are kept.
        for number in 0..20 {
            good(&pulls, "h.example/team/app:1", &number.to_string());
        }
        let kept: Vec<String> = (12..20).rev().map(|number| number.to_string()).collect();
        assert_eq!(users(&pulls, "h.example", "team/app"), kept);
    }

    /// Every user who may create a pod can have the kubelet send anything for any image.
    #[test]
    fn a_refused_pull_takes_nothing_away() {
        let pulls = Arc::new(Pulls::new(None));
        good(&pulls, "h.example/team/app:1", "owner");
        for image in ["h.example/team/app:1", "h.example/team/app:evil"] {
            let bad = pulls.begin(image, &auth("bad")).unwrap();
            // Its own layers may need them, and the owner's come first.
            assert_eq!(users(&pulls, "h.example", "team/app"), ["owner", "bad"]);
            drop(bad);
            assert_eq!(users(&pulls, "h.example", "team/app"), ["owner"]);
        }
        let many: Vec<_> =
            (0..1000).map(|number| pulls.begin("h.example/team/app:1", &auth(&format!("bad{number}")))).collect();
        let found = users(&pulls, "h.example", "team/app");
        assert_eq!((found.len(), found[0].as_str()), (CANDIDATES_MAX, "owner"));
        drop(many);
        // The first pull of an image has nothing but its own.
        let first = pulls.begin("h.example/new/app:1", &auth("new")).unwrap();
        assert_eq!(users(&pulls, "h.example", "new/app"), ["new"]);
        first.good();
        assert_eq!(users(&pulls, "h.example", "new/app"), ["new"]);
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
        let pulls = Arc::new(Pulls::new(Some(file.try_clone().unwrap())));
        for number in 0..3 {
            good(&pulls, &format!("h.example/team/app:{number}"), &format!("user-{number}"));
        }
        good(&pulls, "h.example/team/app:1", "another");
        let _under_way = pulls.begin("h.example/team/app:1", &auth("unknown"));
        pulls.forget("h.example/team/app:2");
        let next = Pulls::new(Some(file.try_clone().unwrap()));
        assert_eq!(users(&next, "h.example", "team/app"), ["another", "user-1", "user-0"]);
        // One that was killed while it wrote.
        file.set_len(20).unwrap();
        let after = Arc::new(Pulls::new(Some(file.try_clone().unwrap())));
        assert_eq!(users(&after, "h.example", "team/app"), [""; 0]);
        good(&after, "h.example/team/app:9", "nine");
        assert_eq!(users(&Pulls::new(Some(file)), "h.example", "team/app"), ["nine"]);
    }

    /// A registry that takes any password displaces no other registry's credentials.
    #[test]
    fn the_largest_registry_makes_room() {
        let mut state = PullsState::default();
        let mut put = |registry: &str, number: usize, bytes: usize| {
            state.turn += 1;
            let auth = PullAuth { password: "p".repeat(bytes), ..auth("u") };
            let pulled = vec![Pulled { turn: state.turn, auth }];
            state.images.insert(format!("{registry}/team/app:{number}"), pulled);
        };
        (0..3).for_each(|number| put("h.example", number, 10));
        (0..20).for_each(|number| put("evil.example", number, 1000));
        state.make_room(100, 10_000);
        assert_eq!(state.images.keys().filter(|image| image.starts_with("h.example")).count(), 3);
        let evil: Vec<_> = state.images.keys().filter(|image| image.starts_with("evil.example")).collect();
        assert!(evil.len() < 10 && evil.iter().any(|image| image.ends_with(":19")), "{evil:?}");
        state.make_room(1, 10_000);
        assert_eq!(state.images.len(), 1);
        let pulls = Arc::new(Pulls::new(None));
        assert!(pulls.begin("h.example/a", &PullAuth { password: "p".repeat(100_000), ..auth("u") }).is_none());
    }

    #[test]
    fn what_an_older_version_wrote_is_read() {
        let mut file = tempfile::tempfile().unwrap();
        let text = r#"{"images":{"h.example/team/app:1":{"turn":3,"auth":{"user":"u","password":"p","basic":"","server":"","identity_token":""}}},"turn":3}"#;
        file.write_all(text.as_bytes()).unwrap();
        assert_eq!(users(&Pulls::new(Some(file)), "h.example", "team/app"), ["u"]);
    }
}
