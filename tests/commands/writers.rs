//! Indexes that meet in a registry: many of one image at the same moment, and one that comes before its image.

use std::time::Duration;

use serde_json::json;
use soci_index::find::discover::{Discovery, SOCI_INDEX_V1, Which, on_registry};
use soci_index::format::model::{Descriptor, media_type};
use soci_index::registry::referrers::FoundBy;
use soci_index::registry::{Body, Repository};
use soci_tests::image::{Image, tar, text};
use soci_tests::profile::{Profile, ProfiledRegistry, Quirks};
use soci_tests::registry::{DockerRegistry, client};

fn image() -> Image {
    let base = tar(&[("bin/tool", text(1, 1_500_000)), ("etc/conf", text(2, 500))]);
    let top = tar(&[("app/data", text(3, 700_000)), ("app/main", text(4, 100))]);
    Image::gzip(vec![base, top])
}

/// How many publish at the same moment.
const WRITERS: usize = 16;

/// Many images of one repository never meet; many indexes of one image meet in its fallback tag.
async fn sixteen_writers(clients: Vec<Repository>, image: &Image) {
    let subject = Descriptor::of(media_type::MANIFEST, &image.manifest);
    let config = Descriptor { media_type: SOCI_INDEX_V1.to_owned(), ..Descriptor::of("", b"{}") };
    let pushed = clients.first().unwrap().push_blob(&config.digest, Body::Bytes("{}".into()), None).await;
    pushed.unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for (number, repository) in clients.iter().cloned().enumerate() {
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media_type::MANIFEST, "config": config, "layers": [], "subject": subject,
            "annotations": { "writer": number.to_string() },
        });
        let bytes = manifest.to_string();
        writers.spawn(async move { repository.push_referrer(media_type::MANIFEST, bytes.into()).await });
    }
    let (mut digests, mut writes) = (Vec::new(), Vec::new());
    for pushed in writers.join_all().await {
        let pushed = pushed.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(pushed.found_by, FoundBy::FallbackTag);
        digests.push(pushed.digest);
        writes.push(pushed.tag_writes);
    }
    println!("writes of the tag: {writes:?}");
    let listed = clients[0].fallback_entries(&image.digest()).await.unwrap().unwrap();
    assert_eq!(listed.len(), WRITERS, "none is listed twice");
    digests.retain(|digest| listed.iter().all(|entry| entry.digest != *digest));
    assert_eq!(digests, [], "none is lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_writers_on_docker_registry() {
    let Some(registry) = DockerRegistry::start() else { return };
    let clients: Vec<Repository> = (0..WRITERS).map(|_| client(&registry.address).repository("team/app")).collect();
    let image = image();
    image.push(&clients[0], "v1").await;
    sixteen_writers(clients, &image).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_writers_on_ghcr() {
    sixteen_writers_with(Profile::Ghcr.quirks()).await;
}

/// What takes long is between reading the tag and writing it: much more is lost, and found again.
#[tokio::test(flavor = "multi_thread")]
async fn sixteen_writers_far_away() {
    sixteen_writers_with(Quirks { latency: Duration::from_millis(150), ..Profile::GitLab.quirks() }).await;
}

async fn sixteen_writers_with(quirks: Quirks) {
    let registry = ProfiledRegistry::with(quirks).await;
    let login = tempfile::tempdir().unwrap();
    let clients: Vec<Repository> = (0..WRITERS).map(|_| registry.client(login.path()).repository("team/app")).collect();
    let image = image();
    image.push(&clients[0], "v1").await;
    sixteen_writers(clients, &image).await;
    assert!(registry.requests().iter().all(|line| !line.starts_with("DELETE ")), "nothing is deleted");
}

/// An index may come before its image: the order is the pusher's.
#[tokio::test(flavor = "multi_thread")]
async fn the_image_may_come_later() {
    let docker = DockerRegistry::start();
    let harbor = ProfiledRegistry::start(Profile::Harbor215).await;
    let login = tempfile::tempdir().unwrap();
    let harbor = (harbor.client(login.path()), FoundBy::Api, Some(harbor));
    let docker_client = docker.as_ref().map(|docker| (client(&docker.address), FoundBy::FallbackTag, None));
    for (registry, expected, _) in [Some(harbor), docker_client].into_iter().flatten() {
        let (repository, image) = (registry.repository("team/later"), image());
        let pushed = push_empty_index(&repository, &image).await;
        assert_eq!(pushed, expected);
        image.push(&repository, "v1").await;
        let found = on_registry(&repository, &image.digest(), Which::Newest).await.unwrap();
        assert!(matches!(found, Discovery::Found(_)), "{found:?}");
    }
}

async fn push_empty_index(repository: &Repository, image: &Image) -> FoundBy {
    let config = Descriptor { media_type: SOCI_INDEX_V1.to_owned(), ..Descriptor::of("", b"{}") };
    repository.push_blob(&config.digest, Body::Bytes("{}".into()), None).await.unwrap();
    let subject = Descriptor::of(media_type::MANIFEST, &image.manifest);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type::MANIFEST, "config": config, "layers": [], "subject": subject,
    });
    repository.push_referrer(media_type::MANIFEST, manifest.to_string().into()).await.unwrap().found_by
}
