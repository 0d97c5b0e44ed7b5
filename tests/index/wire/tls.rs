//! Certificates: the system's, those of a file, those of a host, and our own.
//!
//! The server's certificate is signed by an authority whose key was thrown away, and so is the client's, by another
//! one; all end in the year 2126.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use soci_index::format::digest::Digest;
use soci_index::registry::hosts::Host;
use soci_index::registry::{
    ClientCertificate, ClientOptions, HostSource, Registry, RegistryError, Repository, TransportKind,
};

use crate::wire::server::{Server, options, reply};

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("index/wire/tls").join(name)
}

/// Whether each connection that was made showed a client certificate.
type Shown = Arc<Mutex<Vec<bool>>>;

/// Answers `answer` to every client that trusts it; returns its address.
fn encrypted(answer: &'static str, must_show: bool) -> (String, Shown) {
    encrypted_by(["server.pem", "server.key"], answer, must_show)
}

/// The same with this certificate and its key.
fn encrypted_by([certificate, key]: [&str; 2], answer: &'static str, must_show: bool) -> (String, Shown) {
    let certificate = CertificateDer::from_pem_file(file(certificate)).unwrap();
    let key = PrivateKeyDer::from_pem_file(file(key)).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut clients = RootCertStore::empty();
    clients.add(CertificateDer::from_pem_file(file("client-authority.pem")).unwrap()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(clients), Arc::clone(&provider));
    let verifier = if must_show { verifier } else { verifier.allow_unauthenticated() };
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let shown = Shown::default();
    let seen = Arc::clone(&shown);
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, stream);
            // A client that refuses the certificate, or is refused, ends the connection here.
            if stream.read(&mut [0; 4096]).is_ok() {
                seen.lock().unwrap().push(stream.conn.peer_certificates().is_some());
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    (address, shown)
}

const HELLO: &str = "HTTP/1.1 200 -\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello";

async fn read(repository: &Repository) -> Result<bytes::Bytes, RegistryError> {
    repository.blob(Digest::of(b"hello"), 5).read_bytes(0..5).await
}

fn assert_refused(found: Result<bytes::Bytes, RegistryError>) {
    match found {
        Err(RegistryError::Transport { error, attempts, .. }) => {
            // Trying again would not help.
            assert_eq!((error.kind, attempts), (TransportKind::Tls, 1));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn only_the_file_is_trusted() {
    let (address, _) = encrypted(HELLO, false);
    let server = Server::start(move |_| reply(307).header("location", format!("https://{address}/blob"))).await;
    let ca_file = Some(file("authority.pem"));
    let trusting = server.repository_with(ClientOptions { ca_file, plain_http: true, ..options() });
    assert_eq!(read(&trusting).await.unwrap(), "hello");
    let before = server.requests().len();
    assert_refused(read(&server.repository()).await);
    assert_eq!(server.requests().len(), before + 1);
}

/// What `openssl req -x509` makes is an authority and a server at once. Trusted as it is, it is believed, with the
/// right name and on the right days only.
#[tokio::test]
async fn a_certificate_that_is_trusted_itself() {
    for (shown, trusted, is_believed) in [
        ("self.pem", Some("self.pem"), true),
        ("self.pem", None, false),
        ("self.pem", Some("authority.pem"), false),
        ("self-other-name.pem", Some("self-other-name.pem"), false),
        ("self-expired.pem", Some("self-expired.pem"), false),
        // Of the same key and name, and not the same.
        ("self.pem", Some("self-other-name.pem"), false),
        ("self-expired.pem", Some("self.pem"), false),
    ] {
        let (address, _) = encrypted_by([shown, "self.key"], HELLO, false);
        let trust = trusted.map(|trusted| format!("ca = '{}'\n", file(trusted).display())).unwrap_or_default();
        let by_file = read(&described(&format!("server = 'https://{address}'\n{trust}"), options())).await;
        let ca_file = trusted.map(file);
        let options = ClientOptions { ca_file, ..options() };
        let by_option = read(&described(&format!("server = 'https://{address}'\n"), options)).await;
        for found in [by_file, by_option] {
            match is_believed {
                true => assert_eq!(found.unwrap(), "hello", "{shown} {trusted:?}"),
                false => assert_refused(found),
            }
        }
    }
}

/// A registry on this machine that something is said about of TLS is never asked in the clear.
#[tokio::test]
async fn a_registry_on_this_machine_may_speak_tls() {
    let (address, _) = encrypted_by(["self.pem", "self.key"], HELLO, false);
    let options = || ClientOptions { plain_http: false, ..options() };
    for options in [
        ClientOptions { ca_file: Some(file("self.pem")), ..options() },
        ClientOptions { skip_verify: true, ..options() },
    ] {
        let repository = Registry::new(&address, options).unwrap().repository("p/r");
        assert_eq!(read(&repository).await.unwrap(), "hello");
    }
    let plain = Server::start(|_| panic!("asked in the clear")).await;
    let options = ClientOptions { ca_file: Some(file("self.pem")), deadline: Duration::from_secs(1), ..options() };
    let repository = Registry::new(&plain.address, options).unwrap().repository("p/r");
    read(&repository).await.unwrap_err();
    assert!(plain.requests().is_empty());
}

/// Without a word about TLS, a registry on this machine is asked for it first.
#[tokio::test]
async fn a_registry_on_this_machine_says_itself_what_it_speaks() {
    let options = || ClientOptions { plain_http: false, ..options() };
    let (encrypted, _) = encrypted_by(["self.pem", "self.key"], HELLO, false);
    let plain = Server::start(|_| reply(200).body("hello")).await;
    let at = |address: &str| Registry::new(address, options()).unwrap().repository("p/r");
    assert_eq!(read(&at(&plain.address)).await.unwrap(), "hello");
    assert_eq!(plain.requests().len(), 1);
    let error = read(&at(&encrypted)).await.unwrap_err().to_string();
    assert!(error.contains("--tls-ca-cert") && error.contains("https://"), "{error}");
    // Mirrors likewise, one of them in the clear before one that is not to be believed.
    let mirrors = [&encrypted, &plain.address].map(|address| Host::mirror(address, false).unwrap());
    let hosts = HostSource { mirrors: [("r.example".to_owned(), mirrors.to_vec())].into(), ..HostSource::default() };
    let mirrored = Registry::new("r.example", ClientOptions { hosts: hosts.clone(), ..options() }).unwrap();
    assert_eq!(read(&mirrored.repository("p/r")).await.unwrap(), "hello");
    // What the command line says of TLS is said of mirrors as well.
    let before = plain.requests().len();
    let trusting = ClientOptions { hosts, ca_file: Some(file("self.pem")), ..options() };
    let trusting = Registry::new("r.example", trusting).unwrap().repository("p/r");
    assert_eq!(read(&trusting).await.unwrap(), "hello");
    assert_eq!(plain.requests().len(), before);
}

#[tokio::test]
async fn errors_say_what_helps() {
    let (address, _) = encrypted(HELLO, false);
    let untrusted =
        read(&described(&format!("server = 'https://{address}'\n"), options())).await.unwrap_err().to_string();
    assert!(untrusted.contains("--tls-ca-cert") && untrusted.contains("hosts.toml"), "{untrusted}");
    let in_the_clear = Registry::new(&address, ClientOptions { plain_http: true, ..options() }).unwrap();
    let found = read(&in_the_clear.repository("p/r")).await;
    let speaks = found.as_ref().unwrap_err().to_string();
    assert!(speaks.contains("it speaks TLS") && speaks.contains("leave out --plain-http"), "{speaks}");
    assert_refused(found);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = format!("server = 'https://{}'\n", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n");
        }
    });
    let plain = read(&described(&server, options())).await.unwrap_err().to_string();
    assert!(plain.contains("--plain-http") && plain.matches("https://").count() == 1, "{plain}");
}

/// The registry `r.example`, whose hosts are described by `text`.
fn described(text: &str, options: ClientOptions) -> Repository {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("r.example");
    std::fs::create_dir(&directory).unwrap();
    for name in ["authority.pem", "client.pem", "client.key"] {
        std::fs::copy(file(name), directory.join(name)).unwrap();
    }
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    let hosts = HostSource { directories: vec![root.path().to_owned()], ..HostSource::default() };
    Registry::new("r.example", ClientOptions { hosts, ..options }).unwrap().repository("p/r")
}

#[tokio::test]
async fn a_host_has_its_own_trust() {
    let (address, shown) = encrypted(HELLO, false);
    let server = format!("server = 'https://{address}'\n");
    assert_refused(read(&described(&server, options())).await);
    for keys in ["ca = 'authority.pem'\n", "skip_verify = true\n"] {
        assert_eq!(read(&described(&format!("{server}{keys}"), options())).await.unwrap(), "hello", "{keys}");
    }
    assert_eq!(*shown.lock().unwrap(), [false, false]);
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_its_host() {
    let (address, shown) = encrypted(HELLO, true);
    let text = format!("server = 'https://{address}'\nca = 'authority.pem'\n");
    for keys in ["client = [['client.pem', 'client.key']]\n", "client = [['client.pem', 'client.key'], 'client.pem']\n"]
    {
        // A second one that is not used may be anything.
        assert_eq!(read(&described(&format!("{text}{keys}"), options())).await.unwrap(), "hello", "{keys}");
    }
    assert_eq!(*shown.lock().unwrap(), [true, true]);
    read(&described(&text, options())).await.unwrap_err();
    // One that the user names belongs to the registry itself, which this host is not.
    let client_certificate = Some(ClientCertificate { certificate: file("client.pem"), key: Some(file("client.key")) });
    let options = ClientOptions { client_certificate, ..options() };
    read(&described(&text, options)).await.unwrap_err();
    assert_eq!(shown.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn no_other_host_sees_it_or_is_trusted_without_one() {
    let (storage, shown) = encrypted(HELLO, false);
    // A header that depends on the address needs a text that lives for ever, like the thread that sends it.
    let answer =
        format!("HTTP/1.1 307 -\r\nlocation: https://{storage}/blob\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let (address, shown_at_home) = encrypted(Box::leak(answer.into_boxed_str()), false);
    let server = format!("server = 'https://{address}'\nclient = [['client.pem', 'client.key']]\n");
    let trusting = described(&format!("{server}ca = 'authority.pem'\n"), options());
    assert_eq!(read(&trusting).await.unwrap(), "hello");
    assert_eq!((shown_at_home.lock().unwrap().clone(), shown.lock().unwrap().clone()), (vec![true], vec![false]));
    // Leave to skip verification is for the host, not for where it sends us.
    assert_refused(read(&described(&format!("{server}skip_verify = true\n"), options())).await);
    assert_eq!((shown_at_home.lock().unwrap().len(), shown.lock().unwrap().len()), (2, 1));
}
