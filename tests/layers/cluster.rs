//! Pull secrets from a cluster's API, played by a server of this process: listed, watched, lost and found again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use serde_json::{Value, json};
use soci_fs::node::keychain::cluster::Cluster;
use soci_index::registry::{Credentials, Keychain as _, Login};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::broadcast;

/// A secret that lets `user` into `registry.example/NAME`.
fn secret(name: &str, user: &str, version: u32) -> Value {
    let document =
        json!({"auths": {format!("registry.example/{name}"): {"username": user, "password": "p"}}}).to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": "team", "resourceVersion": version.to_string()},
        "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": base64::engine::general_purpose::STANDARD.encode(document)},
    })
}

/// An API server with one kind of thing.
struct Api {
    address: String,
    secrets: Arc<Mutex<Vec<Value>>>,
    events: broadcast::Sender<String>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Api {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (secrets, requests) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let events = broadcast::channel(16).0;
        let api = Self { address, secrets, events, requests };
        let (secrets, events, requests) = (Arc::clone(&api.secrets), api.events.clone(), Arc::clone(&api.requests));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (secrets, events, requests) = (Arc::clone(&secrets), events.subscribe(), Arc::clone(&requests));
                tokio::spawn(answer(stream, secrets, events, requests));
            }
        });
        api
    }

    fn kubeconfig(&self, path: &Path, token: &str) {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: here\n\
             contexts: [{{name: here, context: {{cluster: here, user: me}}}}]\n\
             clusters: [{{name: here, cluster: {{server: \"http://{}\"}}}}]\n\
             users: [{{name: me, user: {{token: {token}}}}}]\n",
            self.address
        );
        std::fs::write(path, text).unwrap();
    }

    fn announce(&self, kind: &str, object: &Value) {
        let event = json!({"type": kind, "object": object}).to_string() + "\n";
        let _ = self.events.send(event);
    }
}

/// One connection: lists at once, watches until it is closed.
async fn answer(
    stream: TcpStream,
    secrets: Arc<Mutex<Vec<Value>>>,
    mut events: broadcast::Receiver<String>,
    requests: Arc<Mutex<Vec<String>>>,
) {
    let (input, mut output) = stream.into_split();
    let mut lines = BufReader::new(input).lines();
    let mut head = Vec::new();
    while let Ok(Some(line)) = lines.next_line().await {
        if !line.is_empty() {
            head.push(line);
            continue;
        }
        let first = head[0].clone();
        requests.lock().unwrap().push(head.join("\n"));
        head.clear();
        let reply = |status: &str, body: &str| {
            format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
        };
        if first.contains("watch=true") {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
            output.write_all(head.as_bytes()).await.unwrap();
            while let Ok(event) = events.recv().await {
                if event == "hang up"
                    || output.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await.is_err()
                {
                    return;
                }
            }
            return;
        }
        let list = json!({
            "apiVersion": "v1", "kind": "SecretList", "metadata": {"resourceVersion": "10"}, "items": *secrets.lock().unwrap(),
        });
        output.write_all(reply("200 OK", &list.to_string()).as_bytes()).await.unwrap();
    }
}

fn user(logins: Vec<Login>) -> Option<String> {
    logins.into_iter().next().map(|login| match login.credentials {
        Credentials::Password { user, .. } => user,
        other => panic!("{other:?}"),
    })
}

/// Looks until `expected` is found.
async fn await_user(cluster: &Cluster, repository: &str, expected: Option<&str>) {
    for _ in 0..200 {
        let found = cluster.find("registry.example", repository).await;
        if found.is_ok_and(|login| user(login).as_deref() == expected) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{repository}: {expected:?} was not found in time");
}

#[tokio::test]
async fn secrets_are_listed_and_watched() {
    let api = Api::start().await;
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("config");
    api.kubeconfig(&kubeconfig, "hunter2");
    api.secrets.lock().unwrap().push(secret("app", "one", 1));
    let cluster = Cluster::watch(Some(kubeconfig), &Handle::current());
    // A look that comes before the list waits for it.
    let login = cluster.find("registry.example", "app").await.unwrap();
    assert_eq!(user(login).as_deref(), Some("one"));
    assert_eq!(cluster.find("registry.example", "other").await, Ok(Vec::new()));
    assert_eq!(cluster.find("elsewhere.example", "app").await, Ok(Vec::new()));

    // The watch begins a moment after the list.
    for _ in 0..200 {
        if api.events.receiver_count() > 0
            && api.requests.lock().unwrap().iter().any(|head| head.contains("watch=true"))
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    api.announce("MODIFIED", &secret("app", "two", 11));
    await_user(&cluster, "app", Some("two")).await;
    api.announce("ADDED", &secret("other", "three", 12));
    await_user(&cluster, "other", Some("three")).await;
    api.announce("DELETED", &secret("app", "two", 13));
    await_user(&cluster, "app", None).await;

    let requests = api.requests.lock().unwrap().clone();
    assert!(requests.iter().all(|head| head.to_ascii_lowercase().contains("authorization: bearer hunter2")));
    assert!(
        requests.iter().all(|head| head.contains("fieldSelector=type%3Dkubernetes.io%2Fdockerconfigjson")),
        "{requests:?}"
    );
}

/// While the cluster does not answer, what was known stays known; before it ever did, the reason is reported.
#[tokio::test]
async fn a_cluster_that_is_away() {
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("config");
    let cluster = Cluster::watch(Some(kubeconfig.clone()), &Handle::current());
    let reason = cluster.find("registry.example", "app").await.unwrap_err();
    assert!(reason.contains(&kubeconfig.display().to_string()), "{reason}");
    // A file that is none is not quoted.
    std::fs::write(&kubeconfig, "users: hunter2\n").unwrap();
    let other = Cluster::watch(Some(kubeconfig), &Handle::current());
    let reason = other.find("registry.example", "app").await.unwrap_err();
    assert!(!reason.contains("hunter2"), "{reason}");
}
