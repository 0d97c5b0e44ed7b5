//! Requests to the webhook: which are accepted, which are logged, and that hostile ones block no other.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_tests::profile::{Profile, ProfiledRegistry};
use soci_tests::{run, soci};

use super::{PATIENCE, Server, TOKEN, harbor};

/// Without the right header nothing is taken and nothing shown; open addresses need a token.
#[test]
fn only_authorized_events_are_accepted() {
    let root = tempfile::tempdir().unwrap();
    let token = root.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let server = Server::start("registry.invalid", root.path(), &["--token-file", token.to_str().unwrap()]);
    let event = harbor("team/app", "v1", &Digest::of(b"x")).to_string();
    for wrong in [None, Some(""), Some("Bearer"), Some("of-the-webhook-s3cret"), Some("Basic of-the-webhook-s3cret")] {
        assert_eq!(server.request("POST", "/webhook", wrong, &event).0, 401, "{wrong:?}");
        assert_eq!(server.request("GET", "/jobs", wrong, "").0, 401, "{wrong:?}");
    }
    assert_eq!(server.request("GET", "/healthz", None, "").0, 200);
    assert_eq!(server.metric("events_refused_total"), 10);
    assert_eq!(server.jobs()["waiting"], json!([]));
    assert!(!server.said.lock().unwrap().contains("s3cret"));

    let place = tempfile::tempdir().unwrap();
    let mut open = soci();
    open.args(["serve-webhook", "--registry", "registry.invalid", "--listen", "0.0.0.0:0", "--root"]).arg(place.path());
    let output = run(&mut open);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("--token-file") && message.contains("--no-auth"), "{message}");
}

/// Whatever a body names, only the registry of the command line is spoken to.
#[tokio::test(flavor = "multi_thread")]
async fn no_other_registry_is_contacted() {
    let trap = TcpListener::bind("127.0.0.1:0").unwrap();
    trap.set_nonblocking(true).unwrap();
    let elsewhere = trap.local_addr().unwrap().to_string();
    let registry = ProfiledRegistry::start(Profile::Harbor215).await;
    let root = tempfile::tempdir().unwrap();
    registry.write_login(root.path());
    let server = Server::start(&registry.address, root.path(), &["--match", "team/*"]);
    let digest = Digest::of(b"x");
    let mut event = harbor("team/app", "v1", &digest);
    event["event_data"]["resources"][0]["resource_url"] = format!("{elsewhere}/team/app:v1").into();
    event["event_data"]["repository"]["namespace"] = elsewhere.clone().into();
    let notification = json!({ "events": [{
        "action": "push", "request": { "host": elsewhere },
        "target": { "mediaType": media_type::MANIFEST, "digest": digest, "repository": "team/app", "tag": "v2",
            "url": format!("http://{elsewhere}/v2/team/app/manifests/{digest}") },
    }] });
    for event in [event, notification] {
        assert_eq!(server.send(&event).0, 202, "{event}");
    }
    for repository in [format!("{elsewhere}/team/app"), format!("team/app@{elsewhere}"), "../team/app".to_owned()] {
        let (status, answer) = server.send(&harbor(&repository, "v1", &digest));
        assert!(status == 202 && answer.contains(r#""queued":0"#), "{answer}");
    }
    let (_, answer) = server.send(&harbor("others/app", "v1", &digest));
    assert!(answer.contains(r#""queued":0"#) && answer.contains("--match"), "{answer}");
    // The images are not there, which may change: they are tried again later.
    let start = Instant::now();
    while server.metric("jobs_retried_total") < 2 {
        assert!(start.elapsed() < PATIENCE, "{}", server.jobs());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(registry.requests().iter().any(|line| line.contains("/team/app/manifests/")));
    assert!(trap.accept().is_err(), "a host that a body names was contacted");
}

#[test]
fn what_is_no_event() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start("registry.invalid", root.path(), &[]);
    for (body, status, said) in [
        ("{", 400, "no JSON"),
        ("{}", 400, "no event of Harbor's"),
        (r#"{"type":"PUSH_ARTIFACT"}"#, 400, "malformed"),
        (r#"{"type":"SCANNING_COMPLETED"}"#, 202, "is no push"),
        (&" ".repeat(2 << 20), 413, "bytes"),
    ] {
        let (got, answer) = server.request("POST", "/webhook", None, body);
        assert!(got == status && answer.contains(said), "{status} {said}: {answer}");
    }
    assert_eq!(server.request("GET", "/webhook", None, "").0, 405);
    assert_eq!(server.request("GET", "/", None, "").0, 404);
}

/// Connections that send nothing, or half a head, keep no client out: neither events, nor probes, there or beside.
#[test]
fn silent_connections_shut_nothing() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start("registry.invalid", root.path(), &["--health-listen", "127.0.0.1:0"]);
    let probes = {
        let said = server.said.lock().unwrap();
        let rest = said.split_once("probes at ").expect("a second address").1;
        rest.split_whitespace().next().unwrap().to_owned()
    };
    let mut silent = Vec::new();
    for number in 0..300 {
        for address in [&server.address, &probes] {
            let mut stream = TcpStream::connect(address).unwrap();
            if number % 2 == 0 {
                // It may be turned away already.
                let _ = stream.write_all(b"POST /webhook HTTP/1.1\r\nHost: h\r\n");
            }
            silent.push(stream);
        }
    }
    let start = Instant::now();
    for address in [&server.address, &probes] {
        let (status, answer) = Server::request_at(address, "GET", "/healthz", None, "");
        assert!(status == 200 && answer.ends_with("ok\n"), "{answer}");
    }
    assert_eq!(server.send(&harbor("team/app", "v1", &Digest::of(b"x"))).0, 202);
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    // No connection is kept for longer than a head may take.
    let mut last = silent.pop().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
    assert!(matches!(last.read(&mut [0; 1]), Ok(0) | Err(_)));
    assert!(start.elapsed() < Duration::from_secs(7), "{:?}", start.elapsed());
    // Probes get no further than they need to.
    assert_eq!(Server::request_at(&probes, "GET", "/jobs", Some(TOKEN), "").0, 404);
    assert_eq!(Server::request_at(&probes, "GET", "/metrics", None, "").0, 200);
}

/// Heads and bodies that go on and on are cut off.
#[test]
fn endless_requests_end() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start("registry.invalid", root.path(), &[]);
    let endless = |begin: &str, piece: &[u8]| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.write_all(begin.as_bytes()).unwrap();
        let mut sent = 0_usize;
        while sent < 64 << 20 && stream.write_all(piece).is_ok() {
            sent += piece.len();
        }
        sent
    };
    let header = format!("X-More: {}\r\n", "x".repeat(1000));
    let sent = endless("POST /webhook HTTP/1.1\r\nHost: h\r\n", header.as_bytes());
    // What is sent may be ahead of what is read by the buffers between.
    assert!(sent < 16 << 20, "{sent} bytes of a head are taken");
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 16, " ".repeat(1 << 16));
    let begin = "POST /webhook HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    let sent = endless(begin, chunk.as_bytes());
    assert!(sent < 16 << 20, "{sent} bytes of a body are taken");
    assert_eq!(server.request("GET", "/healthz", None, "").0, 200);
}

/// A webhook whose address lacks its path loses every event: the log says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_to_another_path_is_logged() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start("127.0.0.1:1", root.path(), &["--no-auth"]);
    for (method, path, expected) in
        [("POST", "/", 404), ("POST", "/webhooks?token=s3cret", 404), ("GET", "/webhook", 405)]
    {
        let (status, answer) = server.request(method, path, None, "{}");
        assert_eq!(status, expected, "{answer}");
        assert!(answer.contains("POST /webhook"), "{answer}");
    }
    let start = Instant::now();
    loop {
        let said = server.said.lock().unwrap().clone();
        if ["POST / is answered", "POST /webhooks is answered", "GET /webhook is answered"]
            .iter()
            .all(|line| said.contains(line))
        {
            assert!(!said.contains("s3cret"), "{said}");
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{said}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
