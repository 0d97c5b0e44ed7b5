//! Registries that do not say what refers to an image, or take nothing, while every client may pull the image.

use std::process::Output;
use std::time::{Duration, Instant};

use soci_cli::demo::registry::DemoRegistry;
use soci_tests::forge::{Lie, SPAN_BYTES, push_spans};
use soci_tests::front::{Fault, Front};
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::client;
use soci_tests::{run, soci};

/// How the question is answered, and the code with which a command ends that cannot do without it.
const ANSWERS: [(Fault, i32); 4] = [
    (Fault::Referrers(401, "www-authenticate: Basic realm=\"x\"\r\n"), 3),
    (Fault::Referrers(401, ""), 3),
    (Fault::Referrers(403, ""), 3),
    (Fault::Referrers(500, ""), 4),
];

struct Stage {
    registry: DemoRegistry,
    front: Front,
    image: Image,
    root: tempfile::TempDir,
}

impl Stage {
    async fn new() -> Self {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let image = Image::gzip(vec![tar(&[("file", text(1, 300_000))])]);
        image.push(&client(&registry.host()).repository("team/app"), "v1").await;
        let front = Front::start(&registry.host()).await.unwrap();
        Self { registry, front, image, root: tempfile::tempdir().unwrap() }
    }

    fn name(&self) -> String {
        format!("{}/team/app:v1", self.front.host())
    }

    fn run(&self, command: &str, more: &[&str]) -> Output {
        let mut soci = soci();
        soci.arg("--root").arg(self.root.path()).args([command, &self.name()]).args(more);
        run(soci.args(["--min-layer-size", "0"]))
    }
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_used_without_its_index() {
    for (answer, _) in ANSWERS {
        let stage = Stage::new().await;
        push_spans(&client(&stage.registry.host()).repository("team/app"), &stage.image, SPAN_BYTES, Lie::None).await;
        stage.front.set(answer);
        let start = Instant::now();
        let output = stage.run("pull", &[]);
        let said = message(&output);
        assert!(output.status.success(), "{answer:?}: {said}");
        assert!(start.elapsed() < Duration::from_secs(15), "{answer:?}: {:?}", start.elapsed());
        // An answer of 500 is asked for again as long as there is patience.
        let is_about = |line: &&str| {
            ["the question what refers to", "did not answer within"].iter().any(|words| line.contains(words))
        };
        let lines: Vec<_> = said.lines().filter(is_about).collect();
        assert_eq!(lines.len(), 1, "{answer:?}: {said}");
        assert!(lines[0].contains("WARN") && !lines[0].contains("access denied"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_names_the_question_and_the_ways_around_it() {
    for (answer, code) in ANSWERS {
        let stage = Stage::new().await;
        stage.front.set(answer);
        let refused = stage.run("publish", &[]);
        let said = message(&refused);
        assert_eq!(refused.status.code(), Some(code), "{answer:?}: {said}");
        assert!(said.contains("the question what refers to") && said.contains("is not answered"), "{said}");
        assert!(said.contains("--v2") && said.contains("--to"), "{said}");
        assert!(!said.contains("access denied") && !said.contains("log in"), "{said}");
    }
}

/// A registry that refuses the path of an API that it does not have may list by the fallback tag.
#[tokio::test(flavor = "multi_thread")]
async fn the_fallback_tag_is_read_where_the_api_is_refused() {
    let stage = Stage::new().await;
    let without_api = Front::start(&stage.registry.host()).await.unwrap();
    without_api.set(Fault::Referrers(404, ""));
    let there = client(&without_api.host()).repository("team/app");
    let refused = there.referrers(&stage.image.digest(), None).await.unwrap();
    assert!(refused.entries.is_empty());
    let tag = format!("sha256-{}", stage.image.digest().hex());
    let list = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#;
    let here = client(&stage.registry.host()).repository("team/app");
    let name = soci_index::format::reference::ManifestName::Tag(tag);
    here.push_manifest(&name, soci_index::format::model::media_type::INDEX, list.into()).await.unwrap();
    for (answer, _) in ANSWERS {
        stage.front.set(answer);
        let found = client(&stage.front.host()).repository("team/app").referrers(&stage.image.digest(), None).await;
        assert!(matches!(found.unwrap().found_by, soci_index::registry::referrers::FoundBy::FallbackTag), "{answer:?}");
    }
}

/// That nothing may be pushed is found out before the first layer is read; a missing right is one code on every
/// registry.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_push_costs_no_layer() {
    let denied = r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#;
    let read_only = r#"{"errors":[{"code":"DENIED","message":"the system is in read only mode"}]}"#;
    let quota = r#"{"errors":[{"code":"DENIED","message":"adding 1 MiB will exceed the quota"}]}"#;
    for (answer, code, words) in [
        (Fault::Push(403, denied), 3, "access to the resource is denied"),
        (Fault::Push(403, "denied\n"), 3, "denied"),
        (Fault::Push(401, denied), 3, "no credentials"),
        (Fault::Push(403, read_only), 8, "read only"),
        (Fault::Push(403, quota), 8, "quota"),
        (Fault::Push(405, ""), 8, "405"),
    ] {
        let stage = Stage::new().await;
        stage.front.set(answer);
        for more in [&[][..], &["--v2"]] {
            let refused = stage.run("publish", more);
            let said = message(&refused);
            assert_eq!(refused.status.code(), Some(code), "{answer:?} {more:?}: {said}");
            assert!(said.contains(words), "{answer:?} {more:?}: {said}");
            let layer = soci_index::format::digest::Digest::of(&stage.image.blobs[0]);
            assert_eq!(stage.front.requests(&format!("/blobs/{layer}")), 0, "{answer:?} {more:?}");
        }
    }
}

/// An interactive command soon reports that no registry answers.
#[test]
fn an_unreachable_registry_is_reported_soon() {
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for name in [format!("{dead}/team/app:v1"), "no-such-host.invalid/team/app:v1".to_owned()] {
        let (root, start) = (tempfile::tempdir().unwrap(), Instant::now());
        let failed = run(soci().arg("--root").arg(root.path()).args(["pull", &name]));
        let said = message(&failed);
        assert_eq!(failed.status.code(), Some(4), "{said}");
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}: {said}", start.elapsed());
        assert_eq!(said.matches("tried 2 times").count(), 1, "{said}");
    }
}
