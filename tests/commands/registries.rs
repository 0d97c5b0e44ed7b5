//! Publishing to every registry that we know of, or to what behaves like it.
//!
//! Each test publishes an image's index with the `soci` binary, twice, and looks for it as a node does. The names are
//! `HOW_on_REGISTRY`: the table of registries in the documentation cites them. Profiles stand for registries that cannot
//! run here (see `support/profile.rs`); the others are the real thing.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use soci_cli::demo::registry::DemoRegistry;
use soci_index::find::discover::{Discovery, Which, on_registry};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_index::registry::Repository;
use soci_tests::image::Image;
use soci_tests::profile::{Profile, ProfiledRegistry};
use soci_tests::publishing::{Outcome, image, publish, publish_again, publish_and_find};
use soci_tests::registry::{Distribution, DockerRegistry, Ferro, Peryx, client, client_with_password};
use soci_tests::{run, soci};

mod refusals;

/// What comes of publishing a version 1 index.
fn v1_outcome(profile: Profile) -> Outcome {
    match profile {
        Profile::Harbor28 | Profile::Harbor29 => Outcome::TagBut("application/json"),
        Profile::Harbor210 => Outcome::NativeBut("wrong size"),
        Profile::Harbor211 | Profile::Harbor215 => Outcome::Native,
        Profile::Ecr | Profile::DockerHub | Profile::Acr | Profile::Zot => Outcome::Native,
        Profile::GitLab | Profile::Ghcr | Profile::GoogleArtifactRegistry | Profile::Artifactory => Outcome::Tag,
        Profile::GitLabDash => Outcome::Refused("answers with the image itself"),
        Profile::Quay => Outcome::Refused("no place where an image's indexes are listed"),
    }
}

/// Makes a test of `how` for each profile, and one, called `all`, that there is one for each.
macro_rules! on_each_profile {
    ($how:ident, $all:ident: $($name:ident on $profile:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                $how(Profile::$profile).await;
            }
        )*

        /// No profile is forgotten.
        #[test]
        fn $all() {
            assert_eq!([$(Profile::$profile),*], Profile::ALL);
        }
    };
}

on_each_profile! { v1, v1_on_each_profile:
    v1_on_harbor_2_8 on Harbor28,
    v1_on_harbor_2_9 on Harbor29,
    v1_on_harbor_2_10 on Harbor210,
    v1_on_harbor_2_11 on Harbor211,
    v1_on_harbor_2_15 on Harbor215,
    v1_on_gitlab on GitLab,
    v1_on_gitlab_that_takes_the_dash_for_a_colon on GitLabDash,
    v1_on_ecr on Ecr,
    v1_on_ghcr on Ghcr,
    v1_on_docker_hub on DockerHub,
    v1_on_quay on Quay,
    v1_on_google_artifact_registry on GoogleArtifactRegistry,
    v1_on_artifactory on Artifactory,
    v1_on_acr on Acr,
    v1_on_zot on Zot,
}

async fn v1(profile: Profile) {
    let registry = ProfiledRegistry::start(profile).await;
    let login = tempfile::tempdir().unwrap();
    let repository = registry.client(login.path()).repository("team/app");
    let name = format!("{}/team/app:v1", registry.address);
    let outcome = v1_outcome(profile);
    let image = image();
    image.push(&repository, "v1").await;
    if publish_and_find(&name, &image, &repository, login.path(), outcome).await {
        let before = registry.requests().len();
        // What is sent is the question for a token, where that is a form.
        let form = if profile.quirks().form.is_some() { 200 } else { 0 };
        publish_again(&name, login.path(), form);
        assert_nothing_is_sent(&registry, before);
    }
    let requests = registry.requests();
    assert!(requests.iter().all(|line| !line.starts_with("DELETE ")), "{profile:?}: {requests:?}");
    assert_eq!(registry.leaks(), [""; 0], "{profile:?}: no login leaves the registry");
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_on_docker_registry() {
    let Some(registry) = DockerRegistry::start() else { return };
    v1_without_login(&registry.address, Outcome::Tag).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_on_distribution_v3() {
    let Some(registry) = Distribution::start() else { return };
    v1_without_login(&registry.address, Outcome::Tag).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_on_ferro() {
    let Some(registry) = Ferro::start() else { return };
    v1_without_login(&registry.address, Outcome::Native).await;
    // It ignores ranges: a part of a layer is right all the same.
    let image = image();
    let repository = client(&registry.address).repository("team/app");
    let reader = repository.blob(Digest::of(&image.blobs[0]), image.blobs[0].len() as u64);
    let part = reader.read_bytes(50_000..150_000).await.unwrap();
    assert_eq!(part, image.blobs[0][50_000..150_000]);
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_on_peryx() {
    let Some(registry) = Peryx::start() else { return };
    let login = peryx_login(&registry.address);
    let repository = client_with_password(&registry.address, Peryx::PASSWORD).repository("team/app");
    v1_on_server(&registry.address, &repository, login.path(), Outcome::Native).await;
}

fn peryx_login(address: &str) -> tempfile::TempDir {
    use base64::Engine as _;
    let login = tempfile::tempdir().unwrap();
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("robot$team+ci:{}", Peryx::PASSWORD));
    let config = json!({ "auths": { address: { "auth": auth } } });
    std::fs::write(login.path().join("config.json"), config.to_string()).unwrap();
    login
}

async fn v1_without_login(address: &str, outcome: Outcome) {
    let login = tempfile::tempdir().unwrap();
    v1_on_server(address, &client(address).repository("team/app"), login.path(), outcome).await;
}

async fn v1_on_server(address: &str, repository: &Repository, login: &Path, outcome: Outcome) {
    let image = image();
    image.push(repository, "v1").await;
    let name = format!("{address}/team/app:v1");
    publish_and_find(&name, &image, repository, login, outcome).await;
    publish_again(&name, login, 0);
}

on_each_profile! { v2, v2_on_each_profile:
    v2_on_harbor_2_8 on Harbor28,
    v2_on_harbor_2_9 on Harbor29,
    v2_on_harbor_2_10 on Harbor210,
    v2_on_harbor_2_11 on Harbor211,
    v2_on_harbor_2_15 on Harbor215,
    v2_on_gitlab on GitLab,
    v2_on_gitlab_that_takes_the_dash_for_a_colon on GitLabDash,
    v2_on_ecr on Ecr,
    v2_on_ghcr on Ghcr,
    v2_on_docker_hub on DockerHub,
    v2_on_quay on Quay,
    v2_on_google_artifact_registry on GoogleArtifactRegistry,
    v2_on_artifactory on Artifactory,
    v2_on_acr on Acr,
    v2_on_zot on Zot,
}

/// Publishes version 2 under another tag of the same repository, twice, and looks for the index as a consumer does.
async fn v2(profile: Profile) {
    let registry = ProfiledRegistry::start(profile).await;
    let login = tempfile::tempdir().unwrap();
    let repository = registry.client(login.path()).repository("team/app");
    image().push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let copy = v2_and_find(&name, &repository, login.path()).await;
    let before = registry.requests().len();
    v2_again(&name, &copy, login.path());
    assert_nothing_is_sent(&registry, before);
    v2_and_spans(profile, &name, &repository, login.path()).await;
    assert_eq!(registry.leaks(), [""; 0], "{profile:?}: no login leaves the registry");
}

/// The same with a span index beside the image: where version 1 is refused this is, and nothing gets a name.
async fn v2_and_spans(profile: Profile, name: &str, repository: &Repository, login: &Path) {
    let copy = format!("{name}-both");
    let output = run(publish(name, login).args(["--v2", "--as", &copy, "--format", "both"]));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let there = repository.manifest(&ManifestName::Tag("v1-both".to_owned())).await.unwrap();
    if let Outcome::Refused(reason) = v1_outcome(profile) {
        assert_eq!((output.status.code(), there), (Some(4), None), "{message}");
        assert!(message.contains(reason) && message.contains("--format aws"), "{message}");
        return;
    }
    assert!(output.status.success(), "{profile:?}: {message}");
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(there.unwrap().digest.to_string(), text_of(&said["digest"]));
    assert_eq!(said["images"][0]["spanIndex"]["status"], "published", "{said}");
    let again = run(publish(name, login).args(["--v2", "--as", &copy, "--format", "both"]));
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(again["status"], "up to date", "{profile:?}: {again}");
}

fn publish_v2(name: &str, copy: &str, login: &Path) -> Value {
    let output = run(publish(name, login).args(["--v2", "--as", copy]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Answers the name of what was made.
async fn v2_and_find(name: &str, repository: &Repository, login: &Path) -> String {
    let copy = format!("{name}-soci");
    let said = publish_v2(name, &copy, login);
    assert_eq!(said["status"], "written", "{said}");
    finds_by_annotation(&copy, login);
    let there = repository.manifest(&ManifestName::Tag("v1-soci".to_owned())).await.unwrap().unwrap();
    assert_eq!((there.digest.to_string(), there.media_type.as_str()), (text_of(&said["digest"]), media_type::INDEX));
    let unchanged = repository.manifest(&ManifestName::Tag("v1".to_owned())).await.unwrap().unwrap();
    assert_eq!(unchanged.digest.to_string(), text_of(&said["previousDigest"]), "the image is as it was");
    copy
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// The index that the image itself names is the right one.
fn finds_by_annotation(name: &str, login: &Path) {
    let output = run(soci().args(["verify", name, "--json"]).env("DOCKER_CONFIG", login));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("the image itself"), "{output:?}");
}

fn v2_again(name: &str, copy: &str, login: &Path) {
    let said = publish_v2(name, copy, login);
    assert_eq!(said["status"], "up to date", "{said}");
    let layers = said["images"][0]["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["reused"] == false), "what is there is not signed: {said}");
}

/// Apart from what a token service is asked, all requests since are reads.
fn assert_nothing_is_sent(registry: &ProfiledRegistry, before: usize) {
    let requests = registry.requests().split_off(before);
    let reads = |line: &String| ["GET ", "HEAD ", "POST /service/token"].iter().any(|start| line.starts_with(start));
    assert!(!requests.is_empty() && requests.iter().all(reads), "nothing is sent: {requests:?}");
}

async fn v2_on_server(address: &str, repository: &Repository, login: &Path) {
    image().push(repository, "v1").await;
    let name = format!("{address}/team/app:v1");
    let copy = v2_and_find(&name, repository, login).await;
    v2_again(&name, &copy, login);
}

async fn v2_without_login(address: &str) {
    let login = tempfile::tempdir().unwrap();
    v2_on_server(address, &client(address).repository("team/app"), login.path()).await;
}

on_each_server! { v2_without_login:
    v2_on_docker_registry on DockerRegistry,
    v2_on_distribution_v3 on Distribution,
    v2_on_ferro on Ferro,
}

#[tokio::test(flavor = "multi_thread")]
async fn v2_on_peryx() {
    let Some(registry) = Peryx::start() else { return };
    let login = peryx_login(&registry.address);
    let repository = client_with_password(&registry.address, Peryx::PASSWORD).repository("team/app");
    v2_on_server(&registry.address, &repository, login.path()).await;
}

/// An image of Docker's media types becomes one that zot takes: that is how it gets there.
#[tokio::test(flavor = "multi_thread")]
async fn v2_makes_dockers_media_types_fit_for_zot() {
    let (from, zot) = (DemoRegistry::start(Duration::ZERO).await.unwrap(), ProfiledRegistry::start(Profile::Zot).await);
    let login = tempfile::tempdir().unwrap();
    let docker = dockers(&image());
    docker.push_as(&client(&from.host()).repository("team/app"), "v1", media_type::DOCKER_MANIFEST).await;
    let there = zot.client(login.path()).repository("team/app");
    let name = ManifestName::Tag("v1".to_owned());
    let refused = there.push_manifest(&name, media_type::DOCKER_MANIFEST, docker.manifest.clone()).await;
    assert!(refused.is_err(), "as it is, it is not taken");
    let copy = format!("{}/team/app:v1", zot.address);
    let said = publish_v2(&format!("{}/team/app:v1", from.host()), &copy, login.path());
    assert_eq!(said["status"], "written", "{said}");
    finds_by_annotation(&copy, login.path());
}

/// The same image as `docker push` would send it.
fn dockers(image: &Image) -> Image {
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["mediaType"] = media_type::DOCKER_MANIFEST.into();
    manifest["config"]["mediaType"] = media_type::DOCKER_CONFIG.into();
    for layer in manifest["layers"].as_array_mut().unwrap() {
        layer["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar.gzip".into();
    }
    Image { manifest: manifest.to_string().into(), ..image.clone() }
}

on_each_profile! { to, to_on_each_profile:
    to_on_harbor_2_8 on Harbor28,
    to_on_harbor_2_9 on Harbor29,
    to_on_harbor_2_10 on Harbor210,
    to_on_harbor_2_11 on Harbor211,
    to_on_harbor_2_15 on Harbor215,
    to_on_gitlab on GitLab,
    to_on_gitlab_that_takes_the_dash_for_a_colon on GitLabDash,
    to_on_ecr on Ecr,
    to_on_ghcr on Ghcr,
    to_on_docker_hub on DockerHub,
    to_on_quay on Quay,
    to_on_google_artifact_registry on GoogleArtifactRegistry,
    to_on_artifactory on Artifactory,
    to_on_acr on Acr,
    to_on_zot on Zot,
}

/// The image is in the registry, its index in another one; nothing is sent to the image's.
async fn to(profile: Profile) {
    let registry = ProfiledRegistry::start(profile).await;
    let login = tempfile::tempdir().unwrap();
    let image = image();
    image.push(&registry.client(login.path()).repository("team/app"), "v1").await;
    let before = registry.requests().len();
    to_another(&format!("{}/team/app:v1", registry.address), &image, login.path()).await;
    assert_nothing_is_sent(&registry, before);
    assert_eq!(registry.leaks(), [""; 0], "{profile:?}: no login leaves the registry");
}

/// Publishes to a registry of its own, twice, and finds the index there as nodes and `soci mount` do.
async fn to_another(name: &str, image: &Image, login: &Path) {
    let indexes = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let place = format!("{}/soci/index", indexes.host());
    for status in ["published", "up to date"] {
        let output = run(publish(name, login).args(["--to", &place]));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&said["images"][0]["status"], &said["repository"]), (&json!(status), &json!(place)), "{said}");
    }
    let repository = client(&indexes.host()).repository("soci/index");
    let found = on_registry(&repository, &image.digest(), Which::Newest).await.unwrap();
    assert!(matches!(&found, Discovery::Found(found) if found.others == 0), "{found:?}");
    let output = run(soci().args(["verify", name, "--index-from", &place]).env("DOCKER_CONFIG", login));
    assert!(output.status.success(), "{output:?}");
}

async fn to_without_login(address: &str) {
    let (login, image) = (tempfile::tempdir().unwrap(), image());
    image.push(&client(address).repository("team/app"), "v1").await;
    to_another(&format!("{address}/team/app:v1"), &image, login.path()).await;
}

on_each_server! { to_without_login:
    to_on_docker_registry on DockerRegistry,
    to_on_distribution_v3 on Distribution,
    to_on_ferro on Ferro,
}

#[tokio::test(flavor = "multi_thread")]
async fn to_on_peryx() {
    let Some(registry) = Peryx::start() else { return };
    let (login, image) = (peryx_login(&registry.address), image());
    let repository = client_with_password(&registry.address, Peryx::PASSWORD).repository("team/app");
    image.push(&repository, "v1").await;
    to_another(&format!("{}/team/app:v1", registry.address), &image, login.path()).await;
}
