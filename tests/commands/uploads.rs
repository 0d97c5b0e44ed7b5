//! Large blobs go to registries in chunks, and go on where a connection broke.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use soci_cli::demo::registry::DemoRegistry;
use soci_index::format::model::Descriptor;
use soci_index::registry::upload::PushedBlob;
use soci_index::registry::{Body, ClientOptions, Registry, UploadSizes};
use soci_tests::image::text;
use soci_tests::profile::{Profile, ProfiledRegistry};
use soci_tests::registry::{Distribution, DockerRegistry, Ferro, Peryx, client, client_with_password};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Sends a blob in chunks and reads it back. Answers how many requests it took.
async fn chunks(registry: &Registry) -> u64 {
    let upload = UploadSizes { whole_bytes_max: 100_000, chunk_bytes: 100_000 };
    let options = ClientOptions { upload, ..registry.options().clone() };
    let repository = Registry::new(registry.name(), options).unwrap().repository("team/app");
    let content = text(9, 1_234_567);
    let descriptor = Descriptor::of("application/octet-stream", &content);
    let pushed = repository.push_blob(&descriptor.digest, Body::Bytes(content.clone().into()), None).await;
    assert_eq!(pushed, Ok(PushedBlob::Uploaded));
    let requests = repository.registry().traffic().requests;
    assert_eq!(repository.blob_bytes(&descriptor, 2_000_000).await.unwrap(), content);
    requests
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_on_docker_registry() {
    let Some(registry) = DockerRegistry::start() else { return };
    assert_eq!(chunks(&client(&registry.address)).await, 16, "HEAD, POST, 13 chunks, PUT");
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_on_distribution_v3() {
    let Some(registry) = Distribution::start() else { return };
    assert_eq!(chunks(&client(&registry.address)).await, 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_on_ferro() {
    let Some(registry) = Ferro::start() else { return };
    assert_eq!(chunks(&client(&registry.address)).await, 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_on_peryx() {
    let Some(registry) = Peryx::start() else { return };
    assert!(chunks(&client_with_password(&registry.address, Peryx::PASSWORD)).await >= 16);
}

/// The state in the upload's place comes back as it was given; every chunk carries a good login.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_on_harbor() {
    let registry = ProfiledRegistry::start(Profile::Harbor215).await;
    let login = tempfile::tempdir().unwrap();
    assert!(chunks(&registry.client(login.path())).await >= 16);
}

/// Passes everything on, but cuts the connection on which clients send byte number `cut_at`. Says whether it has.
async fn cutting_front(registry: &str, cut_at: usize) -> (String, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, registry) = (listener.local_addr().unwrap().to_string(), registry.to_owned());
    let (sent, has_cut) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let shared = Arc::clone(&has_cut);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (sent, has_cut, registry) = (Arc::clone(&sent), Arc::clone(&shared), registry.clone());
            tokio::spawn(async move {
                let server = TcpStream::connect(registry).await.unwrap();
                let (mut client_reads, mut client_writes) = client.into_split();
                let (mut server_reads, mut server_writes) = server.into_split();
                let there = async {
                    let mut piece = vec![0; 10_000];
                    while let Ok(length @ 1..) = client_reads.read(&mut piece).await {
                        let before = sent.fetch_add(length, Ordering::Relaxed);
                        let cut = (before..before + length).contains(&cut_at);
                        let passed = if cut { cut_at - before } else { length };
                        if server_writes.write_all(&piece[..passed]).await.is_err() || cut {
                            has_cut.fetch_or(cut, Ordering::Relaxed);
                            return;
                        }
                    }
                };
                tokio::select! {
                    () = there => {}
                    _ = tokio::io::copy(&mut server_reads, &mut client_writes) => {}
                }
            });
        }
    });
    (address, has_cut)
}

/// In the middle of a chunk the connection breaks: whatever the registry makes of what it has, the blob arrives.
async fn a_cut_chunk(address: &str) {
    let (address, has_cut) = cutting_front(address, 777_777).await;
    let requests = chunks(&client(&address)).await;
    println!("{requests} requests");
    assert!(has_cut.load(Ordering::Relaxed) && requests > 16, "{requests} requests");
}

on_each_server! { a_cut_chunk:
    a_cut_chunk_on_docker_registry on DockerRegistry,
    a_cut_chunk_on_distribution_v3 on Distribution,
    a_cut_chunk_on_ferro on Ferro,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_chunk_on_the_demonstrations_registry() {
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    a_cut_chunk(&registry.host()).await;
}
