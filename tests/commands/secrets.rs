//! What the binary shows when things go right and when they go wrong: never a secret.
//!
//! Everything is logged that can be logged, by us and by the libraries below us, and all of it is searched for every
//! secret that was in play.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use soci_tests::image::{Image, tar, text};
use soci_tests::profile::{Broken, Profile, ProfiledRegistry, Quirks};
use soci_tests::{run, soci};

/// What the binary printed on both channels, and its exit code.
fn shown(command: &mut Command) -> (Option<i32>, String) {
    let output = run(command);
    let shown = [&output.stdout[..], &output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&shown).into_owned())
}

/// The binary, as talkative as it gets.
fn talkative() -> Command {
    let mut command = soci();
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command.args(["--debug"]).env("SOCI_LOG", "trace");
    command
}

fn assert_hidden(shown: &str, secrets: &[&str]) {
    for secret in secrets {
        // As it is, and as it travels.
        for form in [(*secret).to_owned(), BASE64.encode(secret), secret.replace('$', "%24")] {
            let at = shown.find(&form);
            let around = at.map(|at| shown[..at].lines().last().unwrap_or_default());
            assert_eq!(around, None, "{secret:?} is shown after this");
        }
    }
}

/// A password, tokens, an identity token, signed URLs, and the state of an upload, on the good way and on bad ones.
#[tokio::test(flavor = "multi_thread")]
async fn of_logins_and_signed_addresses() {
    let broken = |method, path, status| Some(Broken { method, path, status });
    let hub = Profile::DockerHub.quirks();
    for (quirks, code) in [
        (hub, 0),
        (Profile::Acr.quirks(), 0),
        (Profile::Ecr.quirks(), 0),
        (Profile::Harbor28.quirks(), 0),
        (Profile::Quay.quirks(), 4),
        (Quirks { broken: broken("PUT", "/blobs/uploads/", 400), ..hub }, 8),
        // These two go on trying until the time is up.
        (Quirks { broken: broken("PUT", "/blobs/uploads/", 0), ..hub }, 1),
        (Quirks { broken: broken("PUT", "/manifests/", 403), ..hub }, 8),
        (Quirks { broken: broken("GET", "/blobs/", 500), ..hub }, 1),
        (Quirks { broken: broken("GET", "/manifests/", 401), ..hub }, 3),
    ] {
        let registry = ProfiledRegistry::with(quirks).await;
        let login = tempfile::tempdir().unwrap();
        let image = Image::gzip(vec![tar(&[("a", text(1, 200_000))])]);
        image.push(&registry.client(login.path()).repository("team/app"), "v1").await;
        registry.break_down();
        let name = format!("{}/team/app:v1", registry.address);
        let mut command = talkative();
        let timeout = if code == 1 { "4s" } else { "2m" };
        command.args(["--timeout", timeout, "publish", &name, "--min-layer-size", "0"]);
        command.env("DOCKER_CONFIG", login.path());
        let (found, shown) = shown(&mut command);
        assert_eq!(found, Some(code), "{quirks:?}: {shown}");
        assert!(shown.lines().count() > 20, "this is what the log looks like: {shown}");
        assert_hidden(&shown, &ProfiledRegistry::SECRETS);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_wrong_password() {
    for profile in [Profile::Harbor215, Profile::Zot] {
        let registry = ProfiledRegistry::start(profile).await;
        let name = format!("{}/team/app:v1", registry.address);
        let mut command = talkative();
        command.args(["publish", &name, "--user", "robot$team+ci:not-the-pa$$word"]);
        let (code, shown) = shown(&mut command);
        assert_eq!(code, Some(3), "{shown}");
        assert_hidden(&shown, &["not-the-pa$$word", "robot$team+ci:not-the-pa$$word"]);
    }
}

/// A proxy that writes down what it is asked, and refuses.
struct Proxy {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    fn start(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let shared = Arc::clone(&heads);
        // It ends with the process.
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (mut head, mut byte) = (Vec::new(), [0]);
                let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
                while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
                    head.push(byte[0]);
                }
                shared.lock().unwrap().push(String::from_utf8_lossy(&head).into_owned());
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Self { port, heads }
    }

    fn url(&self) -> String {
        format!("http://proxy-user:proxy-pa55word@127.0.0.1:{}", self.port)
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

const REFUSAL: &str = "HTTP/1.1 407 Log in\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
const ABSENT: &str = "HTTP/1.1 404 Not here\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// A registry elsewhere is reached by way of the proxy that the environment names, with the proxy's login, which is
/// not shown.
#[test]
fn of_a_proxy() {
    let image = "registry.invalid/team/app:v1";
    let login = format!("proxy-authorization: Basic {}", BASE64.encode("proxy-user:proxy-pa55word"));
    let secrets = ["proxy-pa55word", "proxy-user:proxy-pa55word"];

    let proxy = Proxy::start(REFUSAL);
    let mut command = talkative();
    command.args(["publish", image]).env("HTTPS_PROXY", proxy.url());
    let (code, shown_by_it) = shown(&mut command);
    assert_eq!(code, Some(4), "{shown_by_it}");
    assert!(shown_by_it.contains("the proxy wants a login"), "{shown_by_it}");
    assert_hidden(&shown_by_it, &secrets);
    let head = proxy.heads().remove(0);
    assert!(head.starts_with("CONNECT registry.invalid:443 HTTP/1.1\r\n"), "{head}");
    assert!(head.to_lowercase().contains(&login.to_lowercase()), "{head}");

    let proxy = Proxy::start(ABSENT);
    let mut command = talkative();
    command.args(["publish", image, "--plain-http"]).env("HTTP_PROXY", proxy.url()).env("http_proxy", proxy.url());
    let (code, shown_by_it) = shown(&mut command);
    assert_eq!(code, Some(1), "{shown_by_it}");
    assert_hidden(&shown_by_it, &secrets);
    let head = proxy.heads().remove(0);
    assert!(head.starts_with("GET http://registry.invalid/v2/team/app/manifests/v1 HTTP/1.1\r\n"), "{head}");

    // A host named in NO_PROXY is asked directly; this one cannot be.
    let proxy = Proxy::start(REFUSAL);
    let mut command = talkative();
    command.args(["--timeout", "2s", "publish", image]).env("HTTPS_PROXY", proxy.url()).env("NO_PROXY", "a,.invalid");
    let (code, shown_by_it) = shown(&mut command);
    assert_ne!(code, Some(0), "{shown_by_it}");
    assert_eq!(proxy.heads(), [""; 0]);
}

/// No proxy can reach a registry on this machine.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_here_needs_no_proxy() {
    let (proxy, registry) = (Proxy::start(REFUSAL), ProfiledRegistry::start(Profile::Harbor215).await);
    let login = tempfile::tempdir().unwrap();
    let image = Image::gzip(vec![tar(&[("a", text(1, 200_000))])]);
    image.push(&registry.client(login.path()).repository("team/app"), "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let mut command = talkative();
    command.args(["publish", &name, "--min-layer-size", "0"]).env("DOCKER_CONFIG", login.path());
    for variable in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"] {
        command.env(variable, proxy.url());
    }
    let (code, shown) = shown(&mut command);
    assert_eq!(code, Some(0), "{shown}");
    assert_eq!(proxy.heads(), [""; 0]);
}
