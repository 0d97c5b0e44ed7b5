//! The kubelet's credential provider plugins: programs that know passwords which are made anew every few hours.
//!
//! The kubelet's own two settings are read, the file of `--image-credential-provider-config` and the directory of
//! `--image-credential-provider-bin-dir`, so that a node is configured once. A plugin gets the image on its standard
//! input and answers with credentials by image pattern (`CredentialProviderRequest` and `-Response` of
//! `credentialprovider.kubelet.k8s.io`). All plugins whose `matchImages` match are asked; what they know is tried in
//! the order of the file.
//!
//! The file is read at every look, so a change needs no restart. What a plugin said is not kept here: the registry
//! client keeps it for as long as the answer says, and asks again after a refusal.
//!
//! Invariants: only programs of that directory are run, and a name cannot lead out of it; an answer is bounded in size
//! and time; neither the answer nor what the program says on standard error is ever shown.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use soci_index::format::gotime;
use soci_index::registry::{Credentials, Keychain, Login};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::Instant;

use crate::node::keychain::auths::{AuthEntry, Auths};
use crate::node::keychain::pattern::Pattern;

/// How long a plugin may take, as long as the kubelet lets it.
const TIME_MAX: Duration = Duration::from_secs(60);
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// How long credentials are used that should not be kept at all: a plugin run per request would be too expensive.
const LIFE_MIN: Duration = Duration::from_secs(10);

/// The plugins of a node.
#[derive(Debug, Clone)]
pub struct Plugins {
    config: PathBuf,
    directory: PathBuf,
}

/// `CredentialProviderConfig`, as far as it is needed.
#[derive(Debug, Deserialize)]
struct Config {
    providers: Vec<Provider>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    match_images: Vec<String>,
    #[serde(default)]
    default_cache_duration: Option<String>,
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    /// The plugin needs the token of a pod's service account, which a snapshotter does not get.
    #[serde(default)]
    token_attributes: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'static str,
    api_version: &'a str,
    image: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PluginResponse {
    cache_key_type: CacheKey,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, AuthEntry>>,
}

/// For what an answer is good.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
enum CacheKey {
    Image,
    Registry,
    Global,
}

impl Plugins {
    /// The plugins in `directory` that the file `config` names. Nothing is read yet.
    #[must_use]
    pub const fn new(config: PathBuf, directory: PathBuf) -> Self {
        Self { config, directory }
    }

    async fn ask(&self, registry: &str, repository: &str) -> Result<Vec<Login>, String> {
        let shown = self.config.display();
        let text = tokio::fs::read_to_string(&self.config).await.map_err(|error| format!("{shown}: {error}"))?;
        let config: Config = serde_saphyr::from_str(&text).map_err(|error| {
            // What the parser says quotes the file, which may hold a secret in a variable.
            let line = error.location().map(|location| format!(":{}", location.line())).unwrap_or_default();
            format!("{shown}{line}: not of the form of a CredentialProviderConfig")
        })?;
        let (mut logins, mut failures) = (Vec::new(), Vec::new());
        for provider in config.providers.iter().filter(|provider| provider.is_for(registry, repository)) {
            let answer = async {
                let answer = self.run(provider, registry, repository).await?;
                provider.logins(answer, registry, repository)
            };
            match answer.await {
                Ok(some) => logins.extend(some),
                Err(reason) => failures.push(format!("plugin {:?}: {reason}", provider.name)),
            }
        }
        if failures.is_empty() || !logins.is_empty() { Ok(logins) } else { Err(failures.join("; ")) }
    }

    async fn run(&self, provider: &Provider, registry: &str, repository: &str) -> Result<PluginResponse, String> {
        if provider.token_attributes.is_some() {
            return Err("it wants the token of a pod's service account, which only the kubelet has".to_owned());
        }
        let image = format!("{registry}/{repository}");
        let request = Request { kind: "CredentialProviderRequest", api_version: &provider.api_version, image: &image };
        let request = serde_json::to_vec(&request).map_err(|error| error.to_string())?;
        let mut command = Command::new(provider.program(&self.directory)?);
        command.args(provider.args.iter().flatten()).kill_on_drop(true);
        command.envs(provider.env.iter().flatten().map(|variable| (&variable.name, &variable.value)));
        match tokio::time::timeout(TIME_MAX, exchange(command, &request)).await {
            Ok(answer) => {
                serde_json::from_slice(&answer?).map_err(|_| "its answer is not of the agreed form".to_owned())
            }
            Err(_) => Err(format!("it did not answer within {} s", TIME_MAX.as_secs())),
        }
    }
}

/// Runs a plugin to its end.
async fn exchange(mut command: Command, request: &[u8]) -> Result<Vec<u8>, String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| format!("it cannot be started: {error}"))?;
    let (input, output) = (child.stdin.take(), child.stdout.take());
    let write = async {
        if let Some(mut input) = input {
            // A plugin that ignores its input may exit before reading it.
            let _ = input.write_all(request).await;
        }
    };
    let read = async {
        let mut answer = Vec::new();
        if let Some(output) = output {
            output.take(ANSWER_BYTES_MAX + 1).read_to_end(&mut answer).await?;
        }
        Ok::<_, std::io::Error>(answer)
    };
    let (answer, ()) = tokio::join!(read, write);
    let answer = answer.map_err(|error| format!("its answer cannot be read: {error}"))?;
    if answer.len() as u64 > ANSWER_BYTES_MAX {
        return Err("its answer is too long".to_owned());
    }
    match child.wait().await {
        Ok(status) if status.success() => Ok(answer),
        Ok(status) => Err(format!("it failed ({status}); run it by hand to see why")),
        Err(error) => Err(error.to_string()),
    }
}

impl Provider {
    fn is_for(&self, registry: &str, repository: &str) -> bool {
        let patterns = self.match_images.iter().filter_map(|text| Pattern::parse(text));
        patterns.into_iter().any(|pattern| pattern.matches(registry, repository))
    }

    fn program(&self, directory: &Path) -> Result<PathBuf, String> {
        let is_plain =
            !self.name.is_empty() && self.name != "." && self.name != ".." && !self.name.contains(['/', ' ']);
        if is_plain { Ok(directory.join(&self.name)) } else { Err("its name is none of a program".to_owned()) }
    }

    fn logins(&self, answer: PluginResponse, registry: &str, repository: &str) -> Result<Vec<Login>, String> {
        let auths = Auths::of(answer.auth.unwrap_or_default());
        let life = answer.cache_duration.as_deref().or(self.default_cache_duration.as_deref()).unwrap_or("0");
        let life = gotime::duration(life).map_err(|error| format!("its cache duration: {error}"))?;
        // A life beyond the clock's range lasts until they are refused.
        let until = Instant::now().checked_add(life.max(LIFE_MIN));
        let login = |(pattern, credentials): &(Pattern, Credentials)| Login {
            credentials: credentials.clone(),
            until,
            whole_registry: answer.cache_key_type != CacheKey::Image && pattern.is_of_whole_registry(),
        };
        Ok(auths.find(registry, repository).into_iter().map(login).collect())
    }
}

impl Keychain for Plugins {
    fn name(&self) -> &'static str {
        "the kubelet's credential plugins"
    }

    fn find<'a>(&'a self, registry: &'a str, repository: &'a str) -> BoxFuture<'a, Result<Vec<Login>, String>> {
        self.ask(registry, repository).boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use soci_index::registry::Secret;

    use super::*;

    /// A node with a plugin whose script is `script`.
    struct Node {
        directory: tempfile::TempDir,
    }

    impl Node {
        fn new(script: &str, config: &str) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let program = directory.path().join("plugin");
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            std::fs::write(directory.path().join("config.yaml"), config).unwrap();
            Self { directory }
        }

        async fn find(&self, registry: &str, repository: &str) -> Result<Option<Login>, String> {
            let at = |name: &str| self.directory.path().join(name);
            let plugins = Plugins::new(at("config.yaml"), at(""));
            // A program that was just written may still be open in a process that another test is starting.
            for _ in 0..20 {
                match plugins.find(registry, repository).await {
                    Err(reason) if reason.contains("Text file busy") => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    other => return other.map(|logins| logins.into_iter().next()),
                }
            }
            Err("busy".to_owned())
        }
    }

    const CONFIG: &str = "apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: plugin
    matchImages: [\"*.registry.example\", \"registry.example/team\"]
    defaultCacheDuration: \"12h\"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: [--one, two]
    env:
      - name: GREETING
        value: hello
";

    /// Answers with its request, as a password.
    const ECHO: &str = r#"told=$(cat | base64 -w0)
printf '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","auth":{"*.registry.example":{"username":"%s","password":"%s"}}}' "$GREETING $*" "$told""#;

    #[tokio::test]
    async fn a_plugin_is_told_the_image() {
        let node = Node::new(ECHO, CONFIG);
        let login = node.find("eu.registry.example", "team/app").await.unwrap().unwrap();
        let Credentials::Password { user, password } = login.credentials else { panic!("{login:?}") };
        assert_eq!(user, "hello --one two");
        use base64::Engine as _;
        let request = base64::engine::general_purpose::STANDARD.decode(password.expose()).unwrap();
        let request: serde_json::Value = serde_json::from_slice(&request).unwrap();
        assert_eq!(request["kind"], "CredentialProviderRequest");
        assert_eq!(request["apiVersion"], "credentialprovider.kubelet.k8s.io/v1");
        assert_eq!(request["image"], "eu.registry.example/team/app");
        let left = login.until.unwrap() - Instant::now();
        assert!(left > Duration::from_secs(11 * 3600) && left <= Duration::from_secs(12 * 3600), "{left:?}");
        assert!(login.whole_registry);
        // Images that are not the plugin's do not start it.
        assert_eq!(node.find("elsewhere.example", "team/app").await, Ok(None));
        // It is started for this one, and has nothing for it.
        assert_eq!(node.find("registry.example", "team/app").await, Ok(None));
    }

    #[tokio::test]
    async fn lives_and_keys() {
        let answer = |key: &str, life: &str, pattern: &str| {
            format!(
                r#"echo '{{"cacheKeyType":"{key}",{life}"auth":{{"{pattern}":{{"username":"u","password":"p"}}}}}}'"#
            )
        };
        for (key, life, pattern, seconds, whole_registry) in [
            ("Image", "", "registry.example", 12 * 3600, false),
            ("Registry", r#""cacheDuration":"90s","#, "registry.example", 90, true),
            ("Global", r#""cacheDuration":"0s","#, "*.example", LIFE_MIN.as_secs(), true),
            ("Registry", "", "registry.example/team", 12 * 3600, false),
        ] {
            let node = Node::new(&answer(key, life, pattern), CONFIG);
            let login = node.find("registry.example", "team/app").await.unwrap().unwrap();
            let expected = Credentials::Password { user: "u".into(), password: Secret::new("p") };
            assert_eq!((login.credentials, login.whole_registry), (expected, whole_registry), "{key} {life}");
            let left = login.until.unwrap() - Instant::now();
            assert!(left <= Duration::from_secs(seconds) && left > Duration::from_secs(seconds - 9), "{key} {life}");
        }
    }

    #[tokio::test]
    async fn what_goes_wrong_is_said_without_secrets() {
        for (script, config, expected) in [
            ("echo hunter2; exit 3", CONFIG, "exit status: 3"),
            ("echo hunter2", CONFIG, "agreed form"),
            (r#"echo '{"cacheKeyType":"Planet","hunter2":1}'"#, CONFIG, "agreed form"),
            ("yes hunter2 | head -c 2000000", CONFIG, "too long"),
            (ECHO, "a: b\nproviders: hunter2\n", "config.yaml:2"),
            (ECHO, &CONFIG.replace("name: plugin", "name: ../plugin"), "none of a program"),
            (ECHO, &CONFIG.replace("name: plugin", "name: missing"), "cannot be started"),
            (ECHO, &format!("{CONFIG}    tokenAttributes: {{serviceAccountTokenAudience: a}}\n"), "service account"),
        ] {
            let node = Node::new(script, config);
            let reason = node.find("registry.example", "team/app").await.unwrap_err();
            assert!(reason.contains(expected) && !reason.contains("hunter2"), "{reason}");
        }
    }
}
