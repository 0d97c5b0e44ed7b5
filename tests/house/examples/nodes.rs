//! The examples for nodes: containerd's configuration, the service, and the daemon's own configuration.

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

use super::yaml;

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
