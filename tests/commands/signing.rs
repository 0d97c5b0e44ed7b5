//! From publishing to trusting: a command signs what was published, and `soci verify` names the signer.

use std::time::Duration;

use soci_cli::demo::registry::DemoRegistry;
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::reference::ManifestName;
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::{DockerRegistry, client};
use soci_tests::signer::{Kind, Signer, push_referrer};
use soci_tests::{run, soci, stdout};

/// Signed once, not twice; by a trusted signer, or not; in version 1 and 2.
#[tokio::test(flavor = "multi_thread")]
async fn signed_and_verified() {
    let (Some(registry), Some(signer), Some(other)) =
        (DockerRegistry::start(), Signer::new(Kind::P256), Signer::new(Kind::P256))
    else {
        return;
    };
    let repository = client(&registry.address).repository("team/app");
    let image = Image::gzip(vec![tar(&[("a", text(1, 300_000))])]);
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let work = tempfile::tempdir().unwrap();
    let list = work.path().join("signed");
    // Stands for cosign: notes what it is asked to sign.
    let script = work.path().join("sign.sh");
    std::fs::write(&script, "echo \"$1 $2\" >> \"$LIST\"\n[ -z \"$FAIL\" ]\n").unwrap();
    let command = format!("sh {} --key {{}}", script.display());
    let publish = |more: &[&str]| {
        let mut publish = soci();
        publish.args(["publish", &name, "--min-layer-size", "0", "--json", "--sign-with", &command]).args(more);
        publish.env("LIST", &list);
        publish
    };
    let signed = || -> Vec<String> {
        let text = std::fs::read_to_string(&list).unwrap_or_default();
        let place = format!("--key {}/team/app@", registry.address);
        text.lines().map(|line| line.strip_prefix(&place).unwrap().to_owned()).collect()
    };
    assert_eq!(run(soci().args(["publish", &name, "--sign-with", "'"])).status.code(), Some(2), "before any work");

    // What was not signed is signed by the next run.
    let failed = run(publish(&[]).env("FAIL", "1"));
    assert_eq!(failed.status.code(), Some(9), "{failed:?}");
    let published: serde_json::Value = serde_json::from_str(&stdout(&mut publish(&[]))).unwrap();
    assert_eq!(published["images"][0]["status"], "up to date", "{published}");
    let index = published["images"][0]["index"]["digest"].as_str().unwrap().to_owned();
    let spans = published["images"][0]["spanIndex"]["digest"].as_str().unwrap().to_owned();
    assert_eq!(signed(), [index.clone(), index.clone(), spans.clone()]);

    let verify = |signer: &Signer, name: &str| {
        let key = signer.path("verify.pub");
        std::fs::write(&key, signer.public_pem()).unwrap();
        run(soci().args(["verify", name, "--key"]).arg(key))
    };
    let unsigned = verify(&signer, &name);
    assert_eq!(unsigned.status.code(), Some(5), "{unsigned:?}");
    assert!(String::from_utf8_lossy(&unsigned.stdout).contains("it has no signature"), "{unsigned:?}");
    signer.push_simple(&repository, &index.parse::<Digest>().unwrap()).await;
    assert_eq!(verify(&signer, &name).status.code(), Some(5), "the span index is not signed yet");
    signer.push_simple(&repository, &spans.parse::<Digest>().unwrap()).await;
    let good = verify(&signer, &name);
    assert!(good.status.success(), "{good:?}");
    assert!(String::from_utf8_lossy(&good.stdout).contains(&format!("index {index} signed by the key")), "{good:?}");
    assert_eq!(verify(&other, &name).status.code(), Some(5));

    // What is signed by a key that is meant is left alone; by which key is not known without one.
    let key = signer.path("pub.pem").display().to_string();
    let _ = stdout(&mut publish(&["--key", &key]));
    assert_eq!(signed().len(), 3);
    let _ = stdout(&mut publish(&[]));
    assert_eq!(signed()[3..], [index, spans]);

    let copy = format!("{}/team/app:v2", registry.address);
    let converted: serde_json::Value = serde_json::from_str(&stdout(&mut publish(&["--v2", "--as", &copy]))).unwrap();
    let index = converted["images"][0]["index"]["digest"].as_str().unwrap().to_owned();
    // Children first, the image's manifest between them.
    assert_eq!(
        (signed().len(), &signed()[5], &signed()[7]),
        (8, &index, &converted["digest"].as_str().unwrap().into())
    );
    assert_eq!(verify(&signer, &copy).status.code(), Some(5));
    signer.push_simple(&repository, &index.parse::<Digest>().unwrap()).await;
    assert!(verify(&signer, &copy).status.success());
}

/// A tag that names a signed image is not given to an unsigned one, whatever kind of signature it is; nothing is sent,
/// no layer is read. What was converted and signed is left as it is by another run.
#[tokio::test(flavor = "multi_thread")]
async fn a_signed_image_is_not_replaced_by_an_unsigned_one() {
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let host = registry.host();
    let bundle = "application/vnd.dev.sigstore.bundle.v0.3+json";
    for (name, kind) in [
        ("tag", ""),
        ("cosign", "application/vnd.dev.cosign.artifact.sig.v1+json"),
        ("bundle", bundle),
        ("notation", "application/vnd.cncf.notary.signature"),
    ] {
        let repository = client(&host).repository(&format!("team/{name}"));
        let image = Image::gzip(vec![tar(&[(name, text(1, 300_000))])]);
        image.push(&repository, "v1").await;
        let tag = ManifestName::Tag("v1".to_owned());
        let there = async || repository.manifest(&tag).await.unwrap().unwrap();
        let sign = async |subject: &Descriptor| match kind {
            "" => signer.push_simple(&repository, &subject.digest).await,
            kind => push_referrer(&repository, subject, kind, kind, b"{}").await,
        };
        let before = there().await;
        sign(&before.descriptor()).await;

        let image = format!("{host}/team/{name}:v1");
        let publish = |more: &[&str]| {
            let mut publish = soci();
            publish.args(["publish", &image, "--v2", "--min-layer-size", "0"]).args(more);
            run(&mut publish)
        };
        let sent = registry.traffic().bytes_received;
        let convert = run(soci().args(["convert", &image, &image, "--min-layer-size", "0"]));
        for refused in [publish(&[]), convert] {
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert_eq!(refused.status.code(), Some(2), "{name}: {said}");
            for word in ["is signed", "--sign-with", "--replace-signed", kind] {
                assert!(said.contains(word), "{name}: {word}: {said}");
            }
        }
        assert!(String::from_utf8_lossy(&publish(&[]).stderr).contains("--as"), "{name}");
        assert_eq!((there().await.digest, registry.traffic().bytes_received), (before.digest, sent), "{name}");

        // Elsewhere nothing is lost.
        let elsewhere = format!("{host}/team/{name}:v1-soci");
        let copied = publish(&["--as", &elsewhere]);
        assert!(copied.status.success(), "{copied:?}");
        let forced = publish(&["--replace-signed"]);
        assert!(forced.status.success(), "{forced:?}");
        let converted = there().await;
        assert_eq!(converted.media_type, media_type::INDEX);
        sign(&converted.descriptor()).await;
        for same in [&[][..], &["--format", "both"]] {
            let again = publish(same);
            assert!(again.status.success(), "{again:?}");
        }
        let other = publish(&["--span-size", "65536"]);
        assert_eq!(other.status.code(), Some(2), "{other:?}");
        assert_eq!(there().await.digest, converted.digest);
        let signed = publish(&["--span-size", "65536", "--sign-with", "true"]);
        assert!(signed.status.success(), "{signed:?}");
        assert_ne!(there().await.digest, converted.digest);
    }
}

/// A signature of one platform's manifest is lost as well when that gets another digest, so it stops a conversion as
/// one of the image index does: by cosign's tag, and as a referrer.
#[tokio::test(flavor = "multi_thread")]
async fn a_signed_platform_is_not_replaced_by_an_unsigned_one() {
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let host = registry.host();
    for (name, kind) in [("tag", ""), ("referrer", "application/vnd.cncf.notary.signature")] {
        let repository = client(&host).repository(&format!("team/{name}"));
        let image = Image::gzip(vec![tar(&[(name, text(1, 300_000))])]);
        image.push(&repository, "one").await;
        let there = async |tag: &str| {
            repository.manifest(&ManifestName::Tag(tag.to_owned())).await.unwrap().unwrap().descriptor()
        };
        let child = there("one").await;
        let index = serde_json::json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": [child] });
        let tag = ManifestName::Tag("v1".to_owned());
        repository.push_manifest(&tag, media_type::INDEX, index.to_string().into()).await.unwrap();
        match kind {
            "" => signer.push_simple(&repository, &child.digest).await,
            kind => push_referrer(&repository, &child, kind, kind, b"{}").await,
        }
        let before = there("v1").await.digest;
        let image = format!("{host}/team/{name}:v1");
        let publish = |more: &[&str]| run(soci().args(["publish", &image, "--v2", "--min-layer-size", "0"]).args(more));
        let sent = registry.traffic().bytes_received;
        let refused = publish(&[]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{name}: {said}");
        for word in ["is signed", &format!("of its manifest {}", child.digest), "--sign-with", kind] {
            assert!(said.contains(word), "{name}: {word}: {said}");
        }
        assert_eq!((there("v1").await.digest, registry.traffic().bytes_received), (before, sent), "{name}");
        assert!(publish(&["--as", &format!("{host}/team/{name}:v1-soci")]).status.success());
        assert!(publish(&["--replace-signed"]).status.success());
        assert_ne!(there("v1").await.digest, before);
    }
}
