//! The files that operators copy: they must say what the programs look for.

use std::path::{Path, PathBuf};

use serde_json::Value;
use soci_cli::daemon::config::{Loaded, Provisional};
use soci_tests::containerd::Containerd;
use soci_tests::daemon::daemon;
use soci_tests::{run, soci, stdout};

fn node(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/node").join(name)
}

/// `soci doctor` finds in containerd's configuration what the snapshotter needs; only the socket is not there.
#[test]
fn containerd_is_told_enough() {
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
