//! The queue of the webhook: full, over a crash, over a shutdown, and after a refusal.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use soci_index::format::digest::Digest;
use soci_tests::image::{Image, tar, text};
use soci_tests::profile::{Broken, Profile, ProfiledRegistry, Quirks};
use soci_tests::run;

use super::{PATIENCE, Server, harbor, image, index_of, serve};

/// A registry that takes its time.
async fn slow() -> ProfiledRegistry {
    ProfiledRegistry::with(Quirks { latency: Duration::from_millis(400), ..Profile::Harbor215.quirks() }).await
}

/// More than may wait is refused, to be sent again; a second push of what waits is not more.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue() {
    let registry = slow().await;
    let root = tempfile::tempdir().unwrap();
    registry.write_login(root.path());
    let server = Server::start(&registry.address, root.path(), &["--jobs", "1", "--queue", "1"]);
    let digest = Digest::of(b"x");
    assert_eq!(server.send(&harbor("team/app", "v1", &digest)).0, 202);
    assert_eq!(server.send(&harbor("team/app", "v2", &digest)).0, 202);
    let (status, answer) = server.send(&harbor("team/app", "v3", &digest));
    assert!(status == 503 && answer.to_lowercase().contains("retry-after: 60"), "{answer}");
    assert_eq!(server.send(&harbor("team/app", "v2", &digest)).0, 202);
    let jobs = server.jobs();
    let tags = |what: &str| jobs[what].as_array().unwrap().iter().map(|job| job["tag"].clone()).collect::<Vec<_>>();
    assert_eq!((tags("running"), tags("waiting")), (vec![json!("v1")], vec![json!("v2")]), "{jobs}");
}

/// What was accepted survives the server's death, whether it waited or ran.
#[tokio::test(flavor = "multi_thread")]
async fn killed_with_work_to_do() {
    let registry = slow().await;
    let root = tempfile::tempdir().unwrap();
    let repository = registry.client(root.path()).repository("team/app");
    let images = [image(1), image(2), image(3)];
    for (image, tag) in images.iter().zip(["v1", "v2", "v3"]) {
        image.push(&repository, tag).await;
    }
    let mut server = Server::start(&registry.address, root.path(), &["--jobs", "1"]);
    for (image, tag) in images.iter().zip(["v1", "v2", "v3"]) {
        assert_eq!(server.send(&harbor("team/app", tag, &image.digest())).0, 202);
    }
    server.signal(Signal::KILL);
    server.child.wait().unwrap();
    let left: Value = serde_json::from_slice(&std::fs::read(root.path().join("webhook/queue.json")).unwrap()).unwrap();
    assert_eq!(left["jobs"].as_array().unwrap().len(), 3, "{left}");

    let mut server = Server::start(&registry.address, root.path(), &["--jobs", "3"]);
    // No other process may have the queue meanwhile.
    let output = run(&mut serve(&registry.address, root.path(), &[]));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(7), "{message}");
    assert!(message.contains(&format!("process {}", server.child.id())), "{message}");
    assert_eq!(server.outcomes(3), ["published"; 3]);
    for image in &images {
        index_of(&repository, image).await;
    }
    assert_eq!(server.end(), Some(0));
    let left = std::fs::read_to_string(root.path().join("webhook/queue.json")).unwrap();
    assert!(left.contains(r#""jobs": []"#), "{left}");
}

/// On SIGTERM it finishes what runs and keeps what waits; what does not end in time is kept, too.
#[tokio::test(flavor = "multi_thread")]
async fn graceful_shutdown() {
    let registry = slow().await;
    for (drain, jobs_left) in [("60s", 1), ("0s", 2)] {
        let root = tempfile::tempdir().unwrap();
        let repository = registry.client(root.path()).repository(&format!("team/app-{drain}"));
        let images = [image(1), image(2)];
        for (image, tag) in images.iter().zip(["v1", "v2"]) {
            image.push(&repository, tag).await;
        }
        let mut server = Server::start(&registry.address, root.path(), &["--jobs", "1", "--drain", drain]);
        for (image, tag) in images.iter().zip(["v1", "v2"]) {
            assert_eq!(server.send(&harbor(repository.name(), tag, &image.digest())).0, 202);
        }
        assert_eq!(server.end(), Some(0));
        let left = std::fs::read(root.path().join("webhook/queue.json")).unwrap();
        let left: Value = serde_json::from_slice(&left).unwrap();
        assert_eq!(left["jobs"].as_array().unwrap().len(), jobs_left, "{drain}: {left}");
    }
}

/// A project that admits nothing for now: the job rests, and an event of the repository that is no push of an image, a
/// signature for example, has it tried again.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_policy_forbids_is_tried_again_after_the_next_event() {
    let broken = Some(Broken { method: "GET", path: "/manifests/", status: 412 });
    let registry = ProfiledRegistry::with(Quirks { broken, ..Profile::Harbor215.quirks() }).await;
    let root = tempfile::tempdir().unwrap();
    let repository = registry.client(root.path()).repository("team/app");
    let image = Image::gzip(vec![tar(&[("a", text(1, 300_000))])]);
    image.push(&repository, "v1").await;
    registry.break_down();
    let server = Server::start(&registry.address, root.path(), &["--no-auth"]);
    assert_eq!(server.send(&harbor("team/app", "v1", &image.digest())).0, 202);
    let start = Instant::now();
    while server.metric("jobs_retried_total") == 0 {
        assert!(start.elapsed() < PATIENCE, "{}", server.jobs());
        std::thread::sleep(Duration::from_millis(50));
    }
    let waiting = &server.jobs()["waiting"][0];
    assert_eq!((&waiting["rests"], &waiting["attempts"]), (&true.into(), &1.into()), "{waiting}");
    registry.heal();
    let signature = format!("sha256-{}.sig", image.digest().hex());
    assert_eq!(server.send(&harbor("team/app", &signature, &image.digest())).0, 202);
    assert_eq!(server.outcomes(1), ["published"]);
}
