//! From publishing to trusting: a command signs what was published, and `soci verify` says who did.

use soci_index::digest::Digest;
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::{DockerRegistry, client};
use soci_tests::signer::{Kind, Signer};
use soci_tests::{run, soci, stdout};

/// Signed once, not twice; by somebody who is trusted, or not; in version 1 and 2.
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

    // What is signed by a key that is meant is left alone; by whom is not known without one.
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
