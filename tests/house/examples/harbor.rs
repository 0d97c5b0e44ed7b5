//! The script that sets Harbor up, against a server that answers as Harbor does.

use std::path::Path;

use serde_json::Value;
use soci_tests::run;

use super::root;

const ROBOT: &str = r#"{"id":1,"name":"robot$team+soci","secret":"pa$$ \"word"}"#;

const NEW: Answers = &[("POST", "robots ", 201, ROBOT), ("POST", "projects/team/webhook/policies ", 201, "")];

/// One that has the robot, and fails at the policy.
const HALF: Answers = &[
    ("POST", "robots ", 409, r#"{"errors":[{"code":"CONFLICT","message":"it is there"}]}"#),
    ("GET", "projects/team ", 200, r#"{"project_id":7}"#),
    (
        "GET",
        "robots?q=Level%3Dproject%2CProjectID%3D7&",
        200,
        r#"[{"id":8,"name":"robot$team+other"},{"id":9,"name":"robot$team+soci"}]"#,
    ),
    ("PATCH", "robots/9 ", 200, r#"{"secret":"a new word"}"#),
    ("POST", "projects/team/webhook/policies ", 500, r#"{"errors":[{"code":"UNKNOWN","message":"away"}]}"#),
];

/// One that has all of it.
const WHOLE: Answers = &[
    ("POST", "robots ", 409, "{}"),
    ("GET", "projects/team ", 200, r#"{"project_id":7}"#),
    ("GET", "robots?", 200, r#"[{"id":9,"name":"robot$team+soci"}]"#),
    ("POST", "projects/team/webhook/policies ", 409, "{}"),
    ("GET", "projects/team/webhook/policies?", 200, r#"[{"id":3,"name":"x"},{"id":4,"name":"soci"}]"#),
    ("PUT", "projects/team/webhook/policies/4 ", 200, ""),
];

/// What a Harbor answers: the method, the begin of the path, status and body.
type Answers = &'static [(&'static str, &'static str, u16, &'static str)];

/// Answers these requests in their order, and keeps what was asked.
fn harbor(listener: std::net::TcpListener, answers: Answers) -> std::thread::JoinHandle<Vec<(String, Value)>> {
    use std::io::{Read as _, Write as _};
    std::thread::spawn(move || {
        let mut asked = Vec::new();
        for (method, path, status, answer) in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
            let (head, body) = loop {
                let length = stream.read(&mut piece).unwrap();
                bytes.extend_from_slice(&piece[..length]);
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap_or("0");
                if body.len() >= length.parse::<usize>().unwrap() {
                    break (head.to_owned(), body.to_owned());
                }
            };
            assert!(head.starts_with(&format!("{method} /api/v2.0/{path}")), "{method} {path}: {head}");
            let head_text =
                format!("HTTP/1.1 {status} As told\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", answer.len());
            stream.write_all(&[head_text.as_bytes(), answer.as_bytes()].concat()).unwrap();
            asked.push((head, serde_json::from_str(&body).unwrap_or_default()));
        }
        asked
    })
}

/// Runs what sets Harbor up, in a directory.
fn set_up(
    place: &Path,
    listener: &std::net::TcpListener,
    answers: Answers,
) -> (std::process::Output, Vec<(String, Value)>) {
    let host = listener.local_addr().unwrap().to_string();
    let asked = harbor(listener.try_clone().unwrap(), answers);
    let netrc = place.join("netrc");
    std::fs::write(&netrc, "machine 127.0.0.1 login admin password Harb0r-s3cret\n").unwrap();
    let mut setup = std::process::Command::new(root().canonicalize().unwrap().join("examples/ci/harbor/setup.sh"));
    setup.arg("team").current_dir(place).env("HARBOR", format!("http://{host}")).env("HARBOR_NETRC", &netrc);
    setup.env("NO_PROXY", "*").env("no_proxy", "*");
    let output = run(&mut setup);
    (output, asked.join().unwrap())
}

fn login(place: &Path, host: &str) -> String {
    use base64::Engine as _;
    let login: Value = serde_json::from_slice(&std::fs::read(place.join("config.json")).unwrap()).unwrap();
    let auth = login["auths"][host]["auth"].as_str().unwrap();
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(auth).unwrap()).unwrap()
}

fn lacks_curl_or_jq() -> bool {
    let lacks = ["curl", "jq"].iter().any(|tool| std::process::Command::new(tool).arg("--version").output().is_err());
    if lacks {
        eprintln!("SKIPPED: curl and jq are needed");
    }
    lacks
}

/// A run that failed half-way is made good by the next one, and one more changes nothing that is in use.
#[test]
fn harbor_is_set_up_again() {
    if lacks_curl_or_jq() {
        return;
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let place = tempfile::tempdir().unwrap();
    let (output, _) = set_up(place.path(), &listener, HALF);
    assert!(!output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("away"), "{output:?}");
    assert_eq!(login(place.path(), &host), "robot$team+soci:a new word");
    let token = std::fs::read(place.path().join("token")).unwrap();
    let (output, asked) = set_up(place.path(), &listener, WHOLE);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(login(place.path(), &host), "robot$team+soci:a new word", "what is in use stays");
    assert_eq!(std::fs::read(place.path().join("token")).unwrap(), token);
    assert_eq!(asked[5].1["targets"][0]["auth_header"], String::from_utf8(token).unwrap().trim_end());
    let mut left: Vec<_> = std::fs::read_dir(place.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["config.json", "netrc", "token"]);
}

/// What sets Harbor up makes the account and the policy that the server needs, and shows no secret.
#[test]
fn harbor_is_set_up() {
    if lacks_curl_or_jq() {
        return;
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let place = tempfile::tempdir().unwrap();
    let (output, asked) = set_up(place.path(), &listener, NEW);
    assert!(output.status.success(), "{output:?}");

    let (head, robot) = &asked[0];
    assert!(head.starts_with("POST /api/v2.0/robots ") && head.contains("Authorization: Basic "), "{head}");
    let rights = &robot["permissions"][0];
    assert_eq!((&robot["level"], &rights["namespace"]), (&"project".into(), &"team".into()), "{robot}");
    let actions: Vec<&Value> = rights["access"].as_array().unwrap().iter().map(|access| &access["action"]).collect();
    assert_eq!(actions, ["pull", "push"]);

    let token = std::fs::read_to_string(place.path().join("token")).unwrap();
    let (head, policy) = &asked[1];
    assert!(head.starts_with("POST /api/v2.0/projects/team/webhook/policies "), "{head}");
    assert_eq!(policy["event_types"], serde_json::json!(["PUSH_ARTIFACT"]));
    let target = &policy["targets"][0];
    assert_eq!((target["auth_header"].as_str(), &target["type"]), (Some(token.trim_end()), &"http".into()));
    assert!(token.starts_with("Bearer ") && token.trim_end().len() > 40, "{}", token.len());

    assert_eq!(login(place.path(), &host), r#"robot$team+soci:pa$$ "word"#);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(!said.contains("word") && !said.contains(token.trim_end()) && !said.contains("s3cret"), "{said}");
    use std::os::unix::fs::PermissionsExt as _;
    for file in ["token", "config.json"] {
        let mode = std::fs::metadata(place.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{file} is for its owner");
    }
}
