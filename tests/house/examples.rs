//! The files that operators copy: they must say what the programs look for.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use soci_cli::daemon::config::Loaded;
use soci_cli::demo::registry::DemoRegistry;
use soci_fs::open::trust::Provisional;
use soci_tests::containerd::Containerd;
use soci_tests::daemon::daemon;
use soci_tests::image::{Image, tar, text};
use soci_tests::node::Node;
use soci_tests::registry::client;
use soci_tests::{run, soci, stdout};

fn node(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/node").join(name)
}

/// `soci doctor` finds in containerd's configuration what the snapshotter needs; only the socket is not there.
#[test]
fn containerd_is_configured_completely() {
    for name in ["containerd-1.toml", "containerd-2.toml"] {
        let output = run(soci().args(["doctor", "--json", "--containerd-config"]).arg(node(name)));
        let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
        let verdict = |what: &str| {
            let found = findings.as_array().unwrap().iter().find(|finding| finding["what"] == what);
            found.map(|finding| (finding["verdict"].clone(), finding["found"].as_str().unwrap().to_owned())).unwrap()
        };
        assert_eq!(verdict("annotations").0, "good", "{name}");
        let (plugin, text) = verdict("plugin");
        let is_there = Path::new("/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock").exists();
        assert_eq!(plugin, if is_there { "good" } else { "bad" }, "{name}: {text}");
        assert!(text.contains("/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"), "{name}: {text}");
    }
}

/// What the service manager can take from the daemon it does, and what would keep its mounts from containerd it does
/// not.
#[test]
fn the_service_is_shut_as_far_as_mounts_allow() {
    let unit = std::fs::read_to_string(node("soci-snapshotter-grpc.service")).unwrap();
    let set: Vec<(&str, &str)> =
        unit.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('=')).collect();
    for (key, value) in [
        ("UMask", "0077"),
        ("LimitCORE", "0"),
        ("MemoryMax", "2G"),
        ("OOMPolicy", "continue"),
        ("NoNewPrivileges", "yes"),
        ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK"),
    ] {
        assert!(set.contains(&(key, value)), "{key}={value} is missing");
    }
    let bounds: Vec<&str> =
        set.iter().filter(|(key, _)| *key == "CapabilityBoundingSet").map(|(_, set)| *set).collect();
    for capability in ["CAP_SYS_MODULE", "CAP_SYSLOG", "CAP_SYS_TIME", "CAP_NET_ADMIN"] {
        assert!(bounds.iter().any(|set| set.starts_with('~') && set.contains(capability)), "{capability}");
    }
    // Each of these gives the service a mount namespace of its own, which passes nothing on.
    for key in [
        "ProtectHome",
        "ProtectSystem",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "ProtectProc",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "MountFlags",
    ] {
        assert!(!set.iter().any(|(given, _)| *given == key), "{key}= hides the layers from containerd");
        let comments = unit.lines().filter(|line| line.starts_with('#')).collect::<String>();
        assert!(comments.contains(&format!("{key}=")), "{key}= is to be explained");
    }

    let set = yaml("examples/node/daemonset.yaml").swap_remove(0);
    let pod = &set["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(container["resources"]["limits"]["memory"], "2Gi");
    let root = container["volumeMounts"].as_array().unwrap().iter().find(|mount| mount["name"] == "root").unwrap();
    assert_eq!(root["mountPropagation"], "Bidirectional");
}

/// systemd knows all that the unit says.
#[test]
fn systemd_takes_the_units() {
    let Ok(version) = std::process::Command::new("systemd-analyze").arg("--version").output() else {
        eprintln!("SKIPPED: systemd-analyze is not installed");
        return;
    };
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let version: u32 = version.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect(&version);
    let place = tempfile::tempdir().unwrap();
    let program = soci_tests::daemon::daemon_path().display().to_string();
    for name in ["soci-snapshotter-grpc.service", "soci-snapshotter-grpc.socket"] {
        let text = std::fs::read_to_string(node(name)).unwrap();
        // The program is not where it will be.
        let mut text = text.replace("/usr/local/bin/soci-snapshotter-grpc", &program);
        if version < 254 {
            // These pass over a key that is newer.
            text = text.replace("FileDescriptorStorePreserve=yes\n", "");
        }
        std::fs::write(place.path().join(name), text).unwrap();
    }
    for name in ["soci-snapshotter-grpc.service", "soci-snapshotter-grpc.socket"] {
        let mut command = std::process::Command::new("systemd-analyze");
        let output = run(command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(place.path().join(name)));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // Older ones than 254 pass over this key, and over the mount's survival with it.
        let is_old = |line: &&str| line.contains("Unknown key 'FileDescriptorStorePreserve'");
        let ours: Vec<&str> = said.lines().filter(|line| line.contains("soci-snapshotter") && !is_old(line)).collect();
        assert!(output.status.success() && ours.is_empty(), "{name}: {said}");
    }
}

/// containerd itself understands its file, each version its own.
#[test]
fn containerd_reads_its_configuration() {
    for (version, file, words) in [
        (Containerd::Installed, "containerd-1.toml", ["disable_snapshot_annotations = false", "[proxy_plugins.soci]"]),
        (Containerd::V2, "containerd-2.toml", ["enable_remote_snapshot_annotations = 'true'", "[proxy_plugins.soci]"]),
    ] {
        let Some(programs) = version.programs() else { continue };
        let output = run(programs.command("containerd").arg("--config").arg(node(file)).args(["config", "dump"]));
        // The second writes strings in single quotes.
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.replace('\'', "\"").contains("snapshotter = \"soci\""), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}

/// A node that is set up by the examples pulls images by either snapshotter, and lists nothing that `soci doctor`
/// minds.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_by_the_examples_pull() {
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let image = Image::gzip(vec![tar(&[("etc/data", text(1, 200_000))])]);
    image.push(&client(&registry.host()).repository("team/app"), "v1").await;
    let name = format!("{}/team/app:v1", registry.host());
    for (version, file) in [(Containerd::Installed, "containerd-1.toml"), (Containerd::V2, "containerd-2.toml")] {
        let example = |name: &str| std::fs::read_to_string(node(name)).unwrap();
        let configurations = |directory: &Path| {
            let at = |name: &str| directory.join(name).display().to_string();
            let places = |text: String| {
                let text = text.replace("/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock", &at("soci.sock"));
                text.replace("/var/lib/soci-snapshotter-grpc", &at("soci"))
            };
            let (first, rest) =
                example(file).split_once("[proxy_plugins.soci]").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
            let containerd = format!(
                "{first}root = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n\
                 [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n[proxy_plugins.soci]{rest}",
                at("root"),
                at("state"),
                at("containerd.sock"),
                at("opt")
            );
            // A port of its own would be one of other tests, too.
            let snapshotter = example("config.toml").replace("metrics_address = \"127.0.0.1:1338\"", "");
            [places(containerd), places(snapshotter)]
        };
        let Some(node) = Node::start_as(version, None, configurations) else { continue };
        for snapshotter in ["overlayfs", "soci"] {
            let pull = ["images", "pull", "--plain-http", "--snapshotter", snapshotter, &name];
            let output = run(node.ctr().args(pull));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{file}, {snapshotter}: {said}");
        }
        let mut doctor = soci();
        doctor.args(["doctor", "--json", "--containerd-config"]).arg(node.path("config.toml"));
        let findings: Value = serde_json::from_slice(&run(&mut doctor).stdout).unwrap();
        let about =
            |finding: &&Value| ["plugin", "annotations", "unpacking"].iter().any(|what| finding["what"] == *what);
        let findings: Vec<&Value> = findings.as_array().unwrap().iter().filter(about).collect();
        assert_eq!(findings.len(), if file == "containerd-2.toml" { 3 } else { 2 });
        assert!(findings.iter().all(|finding| finding["verdict"] == "good"), "{file}: {findings:?}");

        // Questions to which the answer is that there is nothing: none of them is worth a line of the log.
        let slots = std::fs::read_dir(node.path("soci/fs")).unwrap();
        for file in slots.map(|slot| slot.unwrap().path().join("etc/data")).filter(|file| file.exists()) {
            let script = format!("read -t 0 < {0}; sync {0}; cp --sparse=always {0} /dev/null", file.display());
            drop(run(Command::new("bash").args(["-c", &script])));
        }
        assert!(!node.log().contains("Not Implemented"), "{}", node.log());
    }
}

/// systemd hands the descriptors to the next process only if the unit says so, and before 254 only on a restart.
#[test]
fn descriptors_outlive_the_service() {
    let unit = std::fs::read_to_string(node("soci-snapshotter-grpc.service")).unwrap();
    assert!(unit.lines().any(|line| line == "FileDescriptorStorePreserve=yes"));
    let page = std::fs::read_to_string(node("../../docs/node.md")).unwrap();
    assert!(page.contains("systemctl restart soci-snapshotter-grpc"));
    assert!(!page.contains("systemctl stop soci-snapshotter-grpc"));
}

/// The commented configuration is one that the daemon takes, as it is and with all that is commented out, and there is
/// no key in it that has no effect.
#[test]
fn the_commented_configuration_is_true() {
    let directory = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(node("config.toml")).unwrap();
    let as_it_is = Loaded::read(&node("config.toml"), false).unwrap();
    assert!(as_it_is.without_effect.is_empty(), "{:?}", as_it_is.without_effect);
    as_it_is.config.trust.policy().unwrap();
    assert_eq!(as_it_is.config.layer_store.quota.limit(), Some(50 << 30));
    let dump = stdout(daemon().arg("--config").arg(node("config.toml")).args(["config", "dump"]));
    assert_eq!(dump.trim_end(), as_it_is.config.to_string().trim_end());

    let is_key = |rest: &&str| rest.starts_with(|letter: char| letter.is_ascii_lowercase() || letter == '[');
    let line = |line: &str| line.strip_prefix('#').filter(is_key).unwrap_or(line).to_owned() + "\n";
    let whole: String = text.lines().map(line).collect();
    let file = directory.path().join("config.toml");
    std::fs::write(&file, &whole).unwrap();
    let loaded = Loaded::read(&file, false).unwrap();
    assert!(loaded.without_effect.is_empty(), "{:?}", loaded.without_effect);
    let config = &loaded.config;
    assert!(config.cri_keychain.enable_keychain && config.kubeconfig_keychain.enable_keychain);
    assert!(!config.kubelet_keychain.bin_dir.is_empty());
    assert_eq!(config.resolver.host["docker.io"].mirrors[0].host, "mirror.example.com");
    assert_eq!(config.index_rules().unwrap().len(), 1);
    assert_eq!((config.trust.provisional, config.trust.keys.len()), (Provisional::RequireSignature, 1));
    assert_eq!(config.trust.certificates.len(), 1);
}

/// The default configuration of the daemon is one that it accepts, without a word about keys that have no effect.
#[test]
fn the_daemon_s_own_configuration_is_good() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.toml");
    let default = stdout(daemon().args(["config", "default"]));
    std::fs::write(&file, &default).unwrap();
    assert_eq!(stdout(daemon().arg("--config").arg(&file).args(["config", "dump"])), default);
    std::fs::write(&file, "[snapshotter]\nmin_layer_size = 7\n").unwrap();
    let dump = stdout(daemon().arg("--config").arg(&file).args(["config", "dump"]));
    assert!(dump.contains("min_layer_size = 7") && dump.contains("resolve_result_entry"), "{dump}");
    std::fs::write(&file, "[snapshotter]\nmin_layer_sise = 7\n").unwrap();
    let output = run(daemon().arg("--config").arg(&file).args(["config", "dump"]));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("config.toml:2") && said.contains("min_layer_sise"), "{said}");
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The files below `examples/` with this ending.
fn with_ending(ending: &str) -> Vec<String> {
    let (mut open, mut found) = (vec![root().join("examples")], Vec::new());
    while let Some(directory) = open.pop() {
        for path in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                open.push(path);
            } else if path.to_str().unwrap().ends_with(ending) {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "{ending}");
    found
}

/// The documents of a YAML file.
fn yaml(path: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn yaml_files() -> Vec<String> {
    [with_ending(".yml"), with_ending(".yaml")].concat()
}

/// Calls `visit` with every key of a document and what it holds.
fn walk(value: &Value, visit: &mut impl FnMut(&str, &Value)) {
    match value {
        Value::Object(object) => object.iter().for_each(|(key, value)| {
            visit(key, value);
            walk(value, visit);
        }),
        Value::Array(items) => items.iter().for_each(|item| walk(item, visit)),
        _ => {}
    }
}

/// A text, or a list of them.
fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => vec![text.clone()],
        Value::Array(items) => items.iter().filter_map(|item| Some(item.as_str()?.to_owned())).collect(),
        _ => Vec::new(),
    }
}

/// Every piece of shell in the examples and documents, with its place.
fn scripts() -> Vec<(String, String)> {
    let mut scripts = Vec::new();
    for path in yaml_files() {
        for document in yaml(&path) {
            walk(&document, &mut |key, value| {
                if matches!(key, "run" | "script" | "before_script" | "after_script") {
                    scripts.push((path.clone(), texts(value).join("\n")));
                }
            });
        }
    }
    for path in with_ending(".sh") {
        scripts.push((path.clone(), read(&path)));
    }
    let pipeline = read("examples/ci/Jenkinsfile");
    for script in pipeline.split("sh '''").skip(1) {
        scripts.push(("examples/ci/Jenkinsfile".to_owned(), script.split("'''").next().unwrap().to_owned()));
    }
    for path in crate::documents::documents() {
        for block in read(&path).split("```sh\n").skip(1) {
            scripts.push((path.clone(), block.split("```").next().unwrap().to_owned()));
        }
    }
    scripts
}

/// What is YAML is YAML, and what is shell is shell.
#[test]
fn examples_are_well_formed() {
    for path in yaml_files() {
        assert!(yaml(&path).iter().all(Value::is_object), "{path}");
    }
    for (path, script) in scripts() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("script");
        std::fs::write(&file, &script).unwrap();
        let output = run(std::process::Command::new("sh").arg("-n").arg(&file));
        assert!(output.status.success(), "{path}: {}\n{script}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The `soci` command lines of a piece of shell, variables filled in.
fn command_lines(script: &str) -> Vec<String> {
    let joined = script.replace("\\\n", " ").replace("|\n", "| ");
    let mut found = Vec::new();
    for line in joined.lines().map(str::trim_start).filter(|line| !line.starts_with('#')) {
        let starts = ["soci ", "| soci ", "&& soci ", "; soci "];
        let at = starts.iter().filter_map(|start| {
            let at = if start.starts_with("soci") { line.starts_with(start).then_some(0) } else { line.find(start) };
            at.map(|at| at + start.len() - "soci ".len())
        });
        let Some(at) = at.min() else { continue };
        let spaced = line[at..].split(" #").next().unwrap();
        let end = ["||", "&&", " | ", " > ", ";"].iter().filter_map(|end| spaced.find(end)).min();
        found.push(filled_in(&spaced[..end.unwrap_or(spaced.len())]));
    }
    found
}

/// Puts images in the place of variables that are named so, and a word in that of others.
fn filled_in(line: &str) -> String {
    let (mut out, mut rest) = (String::new(), line);
    while let Some((before, after)) = rest.split_once('$') {
        let after = after.strip_prefix('{').unwrap_or(after);
        let end = after.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').unwrap_or(after.len());
        let value = if after[..end].to_lowercase().contains("image") { "registry.example/team/app:v1" } else { "word" };
        out.push_str(before);
        out.push_str(value);
        rest = &after[end..];
        rest = rest.strip_prefix('}').unwrap_or(rest);
    }
    out + rest
}

fn assert_parses(place: &str, words: &[String]) {
    use clap::Parser as _;
    let parsed = soci_cli::args::Arguments::try_parse_from(words);
    parsed.unwrap_or_else(|error| panic!("{place}: {words:?}: {error}"));
}

/// Every command line that one may copy is one that the program understands.
#[test]
fn command_lines_parse() {
    let mut count = 0;
    for (path, script) in scripts() {
        for line in command_lines(&script) {
            // Single quotes keep a `$` that is meant.
            let words = shlex::split(&line).unwrap_or_else(|| panic!("{path}: {line}"));
            assert_parses(&path, &words);
            count += 1;
        }
    }
    for path in yaml_files() {
        for document in yaml(&path) {
            walk(&document, &mut |key, value| {
                let words = texts(value);
                if matches!(key, "args" | "command") && words.first().is_some_and(|word| word == "serve-webhook") {
                    assert_parses(&path, &[vec!["soci".to_owned()], words].concat());
                    count += 1;
                }
            });
        }
    }
    assert!(count > 15, "{count}");
}

/// No example puts a secret into an argument, where every user of a machine can read it.
#[test]
fn no_secret_in_arguments() {
    for (path, script) in scripts() {
        for line in command_lines(&script) {
            let words = shlex::split(&line).unwrap();
            let user = words.iter().position(|word| word == "--user" || word == "-u");
            let given = user.and_then(|at| words.get(at + 1));
            let bare = given.is_none_or(|user| !user.contains(':'));
            assert!(bare && (given.is_none() || words.iter().any(|word| word == "--password-stdin")), "{path}: {line}");
        }
        let told = script.lines().filter(|line| line.contains("PASSWORD") && !line.trim_start().starts_with('#'));
        for line in told {
            let start = line.trim_start().trim_start_matches("- ");
            assert!(start.starts_with("printf '%s' ") || start.starts_with("read "), "{path}: {line}");
        }
    }
}

/// Each says what it needs, what it makes of exit codes, and which version it is for.
#[test]
fn pipelines_say_what_they_need() {
    for path in ["github.yml", "gitlab.yml", "Jenkinsfile", "tekton.yaml", "harbor/compose.yaml"] {
        let text = read(&format!("examples/ci/{path}"));
        let head: String = text.lines().take_while(|line| line.starts_with('#') || line.starts_with("//")).collect();
        for word in ["Needs:", "Exit codes:", "Version:", "--v2"] {
            assert!(head.contains(word), "{path} does not say {word}");
        }
    }
}

/// What a Harbor answers: the method, the begin of the path, status and body.
type Answers = &'static [(&'static str, &'static str, u16, &'static str)];

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
