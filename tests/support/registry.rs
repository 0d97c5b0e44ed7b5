//! Registries that tests start on this machine.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use soci_index::registry::credentials::Secret;
use soci_index::registry::{ClientOptions, CredentialSource, Registry};

use crate::answers::{self, Answer};
use crate::go;

/// Debian's docker-registry: no referrers API, so indexes are found by the fallback tag. Ends when dropped.
#[derive(Debug)]
pub struct DockerRegistry {
    /// `127.0.0.1:PORT`.
    pub address: String,
    server: Server,
}

/// peryx: tokens for everything, and the referrers API. Ends when dropped.
#[derive(Debug)]
pub struct Peryx {
    /// `127.0.0.1:PORT`.
    pub address: String,
    _server: Server,
}

impl Peryx {
    /// The password of every user.
    pub const PASSWORD: &str = "correct horse";

    /// Starts one; `None`, with a word on standard error, where it is not installed.
    ///
    /// # Panics
    /// When it is installed and does not start.
    #[must_use]
    pub fn start() -> Option<Self> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peryx/bin/peryx");
        if !program.exists() {
            eprintln!("SKIPPED: peryx is not installed (tests/run installs it)");
            return None;
        }
        let data = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| std::fs::write(data.path().join(name), text).expect("a file");
        write("key.hex", &"5a".repeat(32));
        write("secret.txt", Self::PASSWORD);
        write(
            "peryx.toml",
            r#"
[auth]
signing_key_file = "key.hex"
default_anonymous_read = false
[[index]]
name = "team"
route = "team"
ecosystem = "oci"
hosted = true
anonymous_read = false
[[index.access_token]]
name = "ci"
secret_file = "secret.txt"
resources = ["*"]
actions = ["read", "write", "delete"]
"#,
        );
        let port = free_port();
        let mut command = Command::new(program);
        command.args([
            "serve",
            "--config",
            "peryx.toml",
            "--host",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--data-dir",
            "data",
        ]);
        command.current_dir(data.path());
        let address = format!("127.0.0.1:{port}");
        let server = Server::start(command, data, &address);
        Some(Self { address, _server: server })
    }
}

impl DockerRegistry {
    /// Starts one; `None`, with a word on standard error, where it is not installed.
    ///
    /// # Panics
    /// When it is installed and does not start.
    #[must_use]
    pub fn start() -> Option<Self> {
        Self::start_with(&free_address(), "")
    }

    /// Starts one that notifies `url` of everything, with this `Authorization`.
    ///
    /// # Panics
    /// When it is installed and does not start.
    #[must_use]
    pub fn start_telling(address: &str, url: &str, authorization: &str) -> Option<Self> {
        let endpoint = json!({
            "name": "told", "url": url, "headers": { "Authorization": [authorization] }, "timeout": "2s",
            "threshold": 3, "backoff": "1s",
        });
        Self::start_with(address, &format!("notifications: {{endpoints: [{endpoint}]}}\n"))
    }

    /// Starts one that keeps what it has in `directory`, for the next one.
    ///
    /// # Panics
    /// When it is installed and does not start.
    #[must_use]
    pub fn start_keeping(directory: &Path) -> Option<Self> {
        let data = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink(directory, data.path().join("data")).expect("a link");
        Self::start_in(data, &free_address(), "")
    }

    fn start_with(address: &str, more: &str) -> Option<Self> {
        Self::start_in(tempfile::tempdir().expect("a directory"), address, more)
    }

    fn start_in(data: tempfile::TempDir, address: &str, more: &str) -> Option<Self> {
        let places = ["/usr/bin/docker-registry", "/usr/local/bin/docker-registry"];
        let Some(program) = places.iter().find(|path| Path::new(path).exists()) else {
            eprintln!("SKIPPED: docker-registry is not installed (apt-get install docker-registry)");
            return None;
        };
        let mut command = Command::new(program);
        command.arg("serve").arg(distribution_config(data.path(), address, more));
        let server = Server::start(command, data, address);
        Some(Self { address: address.to_owned(), server })
    }

    /// What it has answered so far, in the order in which the answers ended.
    ///
    /// # Panics
    /// When its log cannot be read.
    #[must_use]
    pub fn answers(&self) -> Vec<Answer> {
        let log = std::fs::read(self.server.data.path().join(LOG)).expect("the registry's log");
        answers::parse(&String::from_utf8_lossy(&log))
    }
}

/// The distribution project's registry, version 3: no referrers API either. Ends when dropped.
#[derive(Debug)]
pub struct Distribution {
    /// `127.0.0.1:PORT`.
    pub address: String,
    _server: Server,
}

impl Distribution {
    /// Starts one; `None`, with a word on standard error, where there is no Go to build it.
    ///
    /// # Panics
    /// When it cannot be built or does not start.
    #[must_use]
    pub fn start() -> Option<Self> {
        let program = go::distribution()?.join("registry");
        let data = tempfile::tempdir().expect("a directory");
        let address = format!("127.0.0.1:{}", free_port());
        let mut command = Command::new(program);
        command.arg("serve").arg(distribution_config(data.path(), &address, "")).env("OTEL_TRACES_EXPORTER", "none");
        let server = Server::start(command, data, &address);
        Some(Self { address, _server: server })
    }
}

/// ferro: the referrers API, no logins, and no ranges: it sends every blob whole. Ends when dropped.
#[derive(Debug)]
pub struct Ferro {
    /// `127.0.0.1:PORT`.
    pub address: String,
    _server: Server,
}

/// Those of Debian's docker-registry, without the referrers API, and of ferro, with it, that are installed.
#[derive(Debug)]
pub struct BothKinds(Option<DockerRegistry>, Option<Ferro>);

impl BothKinds {
    /// Starts them.
    #[must_use]
    pub fn start() -> Self {
        Self(DockerRegistry::start(), Ferro::start())
    }

    /// `127.0.0.1:PORT` of each.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        let (docker, ferro) = (self.0.as_ref(), self.1.as_ref());
        docker.map(|registry| &*registry.address).into_iter().chain(ferro.map(|registry| &*registry.address))
    }
}

impl Ferro {
    /// Starts one; `None`, with a word on standard error, where it is not installed.
    ///
    /// # Panics
    /// When it is installed and does not start.
    #[must_use]
    pub fn start() -> Option<Self> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ferro/bin/ferro-oci-server");
        if !program.exists() {
            eprintln!("SKIPPED: ferro-oci-server is not installed (tests/run installs it)");
            return None;
        }
        let data = tempfile::tempdir().expect("a directory");
        let address = format!("127.0.0.1:{}", free_port());
        let mut command = Command::new(program);
        command.env("FERRO_OCI_LISTEN", &address).env("FERRO_OCI_STORAGE_DIR", data.path().join("data"));
        let server = Server::start(command, data, &address);
        Some(Self { address, _server: server })
    }
}

/// Writes the configuration for both versions of the distribution project's registry.
fn distribution_config(directory: &Path, address: &str, more: &str) -> PathBuf {
    let root = directory.display();
    let config = format!(
        "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {root}/data}}\n  delete: {{enabled: false}}\nhttp: {{addr: \"{address}\", secret: test}}\n{more}"
    );
    let file = directory.join("config.yml");
    std::fs::write(&file, config).expect("a file");
    file
}

/// What a server prints, in its directory.
const LOG: &str = "stdout.log";

/// A process that listens, and its files.
#[derive(Debug)]
struct Server {
    child: Child,
    data: tempfile::TempDir,
}

impl Server {
    fn start(mut command: Command, data: tempfile::TempDir, address: &str) -> Self {
        let log = File::create(data.path().join(LOG)).expect("a file");
        let child = command.stdout(log).stderr(Stdio::null()).spawn().expect("a process");
        let server = Self { child, data };
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "{command:?} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address of this machine with a closed port.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn free_address() -> String {
    format!("127.0.0.1:{}", free_port())
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// A client without credentials.
///
/// # Panics
/// When the address is none.
#[must_use]
pub fn client(address: &str) -> Registry {
    let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
    Registry::new(address, options).expect("an address")
}

/// A client with a user name and a password.
///
/// # Panics
/// When the address is none.
#[must_use]
pub fn client_with_password(address: &str, password: &str) -> Registry {
    let credentials = CredentialSource::Password { user: "robot$team+ci".to_owned(), password: Secret::new(password) };
    Registry::new(address, ClientOptions { credentials, ..ClientOptions::default() }).expect("an address")
}
