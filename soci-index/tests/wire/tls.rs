//! Certificates: the system's, and those of a file.
//!
//! A registry on this machine is spoken to in plain HTTP, so the encrypted server here plays the storage behind it. Its
//! certificate is signed by an authority whose key was thrown away; both end in the year 2126.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use soci_index::digest::Digest;
use soci_index::registry::{ClientOptions, RegistryError, TransportKind};

use crate::server::{Server, options, reply};

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/wire/tls").join(name)
}

/// Serves `hello` to everybody who trusts it.
fn storage() -> String {
    let certificate = CertificateDer::from_pem_file(file("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(file("server.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, stream);
            // A client that refuses the certificate ends the connection here.
            if stream.read(&mut [0; 4096]).is_ok() {
                let _ = stream.write_all(b"HTTP/1.1 200 -\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello");
            }
        }
    });
    format!("https://{address}/blob")
}

#[tokio::test]
async fn the_file_is_trusted_and_nobody_else() {
    let target = storage();
    let server = Server::start(move |_| reply(307).header("location", target.clone())).await;
    let digest = Digest::of(b"hello");
    let ca_file = Some(file("authority.pem"));
    let trusting = server.repository_with(ClientOptions { ca_file, ..options() });
    assert_eq!(trusting.blob(digest, 5).read_bytes(0..5).await.unwrap(), "hello");
    let before = server.requests().len();
    let error = server.repository().blob(digest, 5).read_bytes(0..5).await.unwrap_err();
    let RegistryError::Transport { error, attempts, .. } = error else { panic!("{error:?}") };
    assert_eq!((error.kind, attempts), (TransportKind::Tls, 1));
    // Trying again would not help.
    assert_eq!(server.requests().len(), before + 1);
}
