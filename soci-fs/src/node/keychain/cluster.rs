//! Pull secrets of a Kubernetes cluster: the only place that knows its API.
//!
//! All secrets of the type `kubernetes.io/dockerconfigjson`, in all namespaces that the kubeconfig's user may list, are
//! kept in memory and watched, so that a look costs nothing and a changed secret counts at once. The watch begins when
//! the kubeconfig is there: on a node that is being set up it may come after this program.
//!
//! An image does not say which namespace's pod asks for it, so all secrets that match are candidates, and the registry
//! decides: a secret that it refuses leads to the next.
//!
//! Invariants: of a secret only `auths` is read; what cannot be read is named by namespace and name, never quoted;
//! while the cluster cannot be reached, what was known stays known.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::Secret as ClusterSecret;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Config};
use soci_index::registry::{Credentials, Keychain, Login};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::node::keychain::auths::Auths;
use crate::node::keychain::pattern::Pattern;

/// The type of secrets that hold credentials for registries, and the key that they are under.
const SECRET_TYPE: &str = "kubernetes.io/dockerconfigjson";
const SECRET_KEY: &str = ".dockerconfigjson";
/// Pause before the kubeconfig is looked for again.
const RETRY: Duration = Duration::from_secs(10);
/// How long a look waits for the first list of secrets.
const FIRST_LIST_WAIT: Duration = Duration::from_secs(5);

/// Credentials that one look finds. The first of each of so many namespaces are among them.
const CANDIDATES_MAX: usize = 256;

/// Namespace and name.
type SecretName = (String, String);

/// What is known of the cluster.
#[derive(Debug, Default)]
struct Known {
    secrets: BTreeMap<SecretName, Auths>,
    /// What a list in progress has brought.
    listing: BTreeMap<SecretName, Auths>,
    is_complete: bool,
    failure: Option<String>,
}

/// The pull secrets of a cluster.
#[derive(Debug)]
pub struct Cluster {
    known: watch::Receiver<Known>,
}

impl Cluster {
    /// Begins to watch, on `runtime`. The kubeconfig may not be there yet; none means the usual places, and what a pod
    /// finds in a cluster.
    #[must_use]
    pub fn watch(kubeconfig: Option<PathBuf>, runtime: &Handle) -> Self {
        let (sender, known) = watch::channel(Known::default());
        runtime.spawn(async move {
            while let Err(reason) = follow(kubeconfig.as_deref(), &sender).await {
                if sender.is_closed() {
                    return;
                }
                warn_of_failure(&sender, reason);
                tokio::time::sleep(RETRY).await;
            }
        });
        Self { known }
    }

    async fn look(&self, registry: &str, repository: &str) -> Result<Vec<Login>, String> {
        let mut known = self.known.clone();
        // Timed out, or the watch has ended: what is known by then decides.
        let _ = tokio::time::timeout(FIRST_LIST_WAIT, known.wait_for(|known| known.is_complete)).await;
        let known = self.known.borrow();
        let found = known.find(registry, repository);
        match (found.is_empty(), known.is_complete, &known.failure) {
            (true, false, Some(reason)) => Err(reason.clone()),
            (true, false, None) => Err("they have not been listed yet".to_owned()),
            (false, ..) | (true, true, _) => Ok(found),
        }
    }
}

impl Keychain for Cluster {
    fn name(&self) -> &'static str {
        "the cluster's pull secrets"
    }

    fn find<'a>(&'a self, registry: &'a str, repository: &'a str) -> BoxFuture<'a, Result<Vec<Login>, String>> {
        self.look(registry, repository).boxed()
    }
}

fn warn_of_failure(sender: &watch::Sender<Known>, reason: String) {
    sender.send_modify(|known| {
        if known.failure.as_ref() != Some(&reason) {
            tracing::warn!(reason, "the pull secrets of the cluster cannot be read; retrying");
        }
        known.failure = Some(reason);
    });
}

/// Watches the secrets until all receivers are dropped. Fails when it cannot begin.
async fn follow(kubeconfig: Option<&Path>, sender: &watch::Sender<Known>) -> Result<(), String> {
    let config = match kubeconfig {
        None => {
            Config::infer().await.map_err(|_| "no kubeconfig in the usual places, and no cluster around".to_owned())?
        }
        Some(path) => {
            let failed = |error: KubeconfigError| match error {
                // What the parser says quotes the file.
                KubeconfigError::Parse(_) => format!("{}: it is no kubeconfig", path.display()),
                other => format!("{}: {other}", path.display()),
            };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)?
        }
    };
    let client = Client::try_from(config).map_err(|error| error.to_string())?;
    let options = watcher::Config::default().fields(&format!("type={SECRET_TYPE}"));
    let mut events = watcher::watcher(Api::<ClusterSecret>::all(client), options).default_backoff().boxed();
    while let Some(event) = events.next().await {
        if sender.is_closed() {
            return Ok(());
        }
        match event {
            Ok(event) => sender.send_modify(|known| known.take(event)),
            Err(error) => warn_of_failure(sender, error.to_string()),
        }
    }
    Err("the watch ended".to_owned())
}

impl Known {
    /// All that is meant for an image, each credential once. Namespaces take turns, each with its most specific
    /// credentials first: write access to the secrets of one, however many and of whatever patterns, cannot displace
    /// those of another.
    fn find(&self, registry: &str, repository: &str) -> Vec<Login> {
        let mut namespaces: BTreeMap<&str, Vec<&(Pattern, Credentials)>> = BTreeMap::new();
        for ((namespace, _), auths) in &self.secrets {
            namespaces.entry(namespace).or_default().extend(auths.find(registry, repository));
        }
        let mut turns: Vec<_> = namespaces.into_values().collect();
        for turn in &mut turns {
            turn.sort_by_key(|(pattern, _)| std::cmp::Reverse(pattern.length()));
        }
        let rounds = turns.iter().map(Vec::len).max().unwrap_or_default();
        let mut found: Vec<Login> = Vec::new();
        for (_, credentials) in (0..rounds).flat_map(|round| turns.iter().filter_map(move |turn| turn.get(round))) {
            if found.len() < CANDIDATES_MAX && !found.iter().any(|login| login.credentials == *credentials) {
                found.push(Login { credentials: credentials.clone(), until: None, whole_registry: false });
            }
        }
        found
    }

    fn take(&mut self, event: Event<ClusterSecret>) {
        match event {
            Event::Init => self.listing.clear(),
            Event::InitApply(secret) => {
                if let Some((name, auths)) = read(&secret) {
                    self.listing.insert(name, auths);
                }
            }
            Event::InitDone => {
                self.secrets = std::mem::take(&mut self.listing);
                (self.is_complete, self.failure) = (true, None);
                tracing::info!(secrets = self.secrets.len(), "the pull secrets of the cluster are known");
            }
            Event::Apply(secret) => match read(&secret) {
                Some((name, auths)) => drop(self.secrets.insert(name, auths)),
                None => drop(self.secrets.remove(&name_of(&secret))),
            },
            Event::Delete(secret) => drop(self.secrets.remove(&name_of(&secret))),
        }
    }
}

fn name_of(secret: &ClusterSecret) -> SecretName {
    let name = |text: &Option<String>| text.clone().unwrap_or_default();
    (name(&secret.metadata.namespace), name(&secret.metadata.name))
}

fn read(secret: &ClusterSecret) -> Option<(SecretName, Auths)> {
    let name = name_of(secret);
    // A server that does not know the selector sends them all.
    if secret.type_.as_deref() != Some(SECRET_TYPE) {
        return None;
    }
    let document = secret.data.as_ref().and_then(|data| data.get(SECRET_KEY))?;
    match Auths::parse(&document.0) {
        Ok(auths) => Some((name, auths)),
        Err(reason) => {
            tracing::warn!(namespace = name.0, name = name.1, reason, "a pull secret cannot be read");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    fn secret(name: &str, kind: &str, document: &str) -> ClusterSecret {
        let mut secret = ClusterSecret { type_: Some(kind.to_owned()), ..ClusterSecret::default() };
        secret.metadata.name = Some(name.to_owned());
        secret.metadata.namespace = Some("team".to_owned());
        secret.data = Some(BTreeMap::from([(SECRET_KEY.to_owned(), ByteString(document.as_bytes().to_vec()))]));
        secret
    }

    fn of(user: &str) -> String {
        format!(r#"{{"auths":{{"registry.example":{{"username":"{user}","password":"p"}}}}}}"#)
    }

    fn users(known: &Known) -> Vec<String> {
        let users = known.find("registry.example", "team/app").into_iter().map(|login| match login.credentials {
            Credentials::Password { user, .. } => user,
            other => panic!("{other:?}"),
        });
        users.collect()
    }

    #[test]
    fn secrets_come_and_go() {
        let mut known = Known::default();
        known.take(Event::Init);
        known.take(Event::InitApply(secret("a", SECRET_TYPE, &of("a"))));
        known.take(Event::InitApply(secret("b", "Opaque", &of("b"))));
        known.take(Event::InitApply(secret("c", SECRET_TYPE, "no document")));
        assert!(users(&known).is_empty() && !known.is_complete);
        known.take(Event::InitDone);
        assert!(known.is_complete);
        assert_eq!(users(&known), ["a"]);
        known.take(Event::Apply(secret("d", SECRET_TYPE, &of("d"))));
        known.take(Event::Apply(secret("a", SECRET_TYPE, &of("changed"))));
        assert_eq!(users(&known), ["changed", "d"]);
        // One that turned into something else is no longer good.
        known.take(Event::Apply(secret("a", SECRET_TYPE, "{")));
        known.take(Event::Delete(secret("d", SECRET_TYPE, &of("d"))));
        assert!(users(&known).is_empty());
        // While the list is made anew, the old one is used.
        known.take(Event::Apply(secret("e", SECRET_TYPE, &of("e"))));
        known.take(Event::Init);
        assert_eq!(users(&known), ["e"]);
        known.take(Event::InitDone);
        assert!(users(&known).is_empty());
    }

    /// Secrets of one namespace cannot displace all those of another by length or by number.
    #[test]
    fn each_namespace_has_its_turn() {
        let mut known = Known::default();
        let mut put = |namespace: &str, name: &str, entries: &[(&str, &str)]| {
            let entries =
                entries.iter().map(|(pattern, user)| format!(r#""{pattern}":{{"username":"{user}","password":"p"}}"#));
            let document = format!(r#"{{"auths":{{{}}}}}"#, entries.collect::<Vec<_>>().join(","));
            let mut secret = secret(name, SECRET_TYPE, &document);
            secret.metadata.namespace = Some(namespace.to_owned());
            known.take(Event::Apply(secret));
        };
        for number in 0..400 {
            put("evil", &format!("s{number}"), &[("registry.example/team/app", &format!("evil-{number}"))]);
        }
        put("owner", "pull", &[("*.example", "widest"), ("registry.example", "owner"), ("other.example", "elsewhere")]);
        put("copy", "pull", &[("registry.example", "owner")]);
        let users = users(&known);
        assert_eq!(users.len(), CANDIDATES_MAX);
        assert_eq!(users[..4], ["owner", "evil-0", "evil-1", "widest"], "each once, and in turn");
    }
}
