//! What `/metrics` and the log say under the names of AWS's snapshotter.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use soci_cli::demo::registry::DemoRegistry;
use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, tar, text};
use soci_tests::node::Node;
use soci_tests::registry::client;
use soci_tests::{on_each_containerd, run, soci, stdout};

on_each_containerd!(names_and_values);

/// Names of AWS's that docs/METRICS.md says are not there.
const ABSENT: [&str; 2] = ["blob_redirect", "synchronous_bytes_fetched"];

/// The document has every operation of AWS's: in the table of what is served, or in that of what is not.
#[test]
fn the_table_is_of_all_names() {
    let document = include_str!("../../docs/METRICS.md");
    let (served, absent) = document.split_once("are not there").unwrap();
    let (absent, _) = absent.split_once("## Log keys").unwrap();
    for name in AWS_NAMES {
        let cell = format!("`{name}`");
        assert_eq!(absent.contains(&format!("\n| {cell} |")), ABSENT.contains(&name), "{name}");
        assert_eq!(served.contains(&cell), !ABSENT.contains(&name), "{name}");
    }
}

/// Operation types of AWS's snapshotter 0.16.1 in milliseconds, microseconds, and of single counts and bytes.
const AWS_NAMES: [&str; 26] = [
    "mount",
    "remote_registry_get",
    "node_readdir",
    "init_metadata_store",
    "synchronous_read",
    "background_fetch",
    "ztoc_unmarshal",
    "fuse_mount",
    "blob_redirect",
    "get_layer_size",
    "soci_index_fetch",
    "ztoc_fetch",
    "synchronous_read_count",
    "synchronous_read_remote_registry_fetch_count",
    "synchronous_bytes_served",
    "synchronous_bytes_fetched",
    "fuse_failure_state",
    "fuse_unknown_operation_failure_count",
    "fuse_mount_failure_count",
    "local_mount_failure_count",
    "background_span_fetch_count",
    "background_span_fetch_failure_count",
    "background_fetch_work_queue_evicted",
    "resolve_cache_hit",
    "resolve_cache_miss",
    "preresolve_queue_drop",
];

/// Seconds until the operations of an image are added up.
const WAIT: u64 = 3;

fn metrics(node: &Node) -> String {
    let mut stream = UnixStream::connect(node.path("metrics.sock")).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The sum over all series of an operation; `None` if there is none.
fn sum(text: &str, name: &str, operation: &str) -> Option<f64> {
    let of_it = |line: &&str| {
        line.starts_with(&format!("{name}{{")) && line.contains(&format!("operation_type=\"{operation}\""))
    };
    let values: Vec<f64> =
        text.lines().filter(of_it).map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

async fn names_and_values(version: Containerd) {
    let configurations = |directory: &std::path::Path| {
        let soci = format!(
            "metrics_network = 'unix'\nmetrics_address = {:?}\nfuse_metrics_emit_wait_duration_sec = {WAIT}\n\
             [background_fetch]\ndisable = true\n",
            directory.join("metrics.sock")
        );
        [version.configuration(directory), soci]
    };
    let Some(node) = Node::start_as(version, None, configurations) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    let image = Image::gzip(vec![tar(&[("srv/data", text(1, 2_000_000))]), tar(&[("etc/small", text(2, 100))])]);
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.host());
    let other = Image::gzip(vec![tar(&[("etc/other", text(3, 100))])]);
    other.push(&repository, "none").await;
    drop(stdout(soci().args(["publish", &name, "--min-layer-size", "10000", "--span-size", "262144"])));
    let rpull = |name: &str| {
        let mut command = soci();
        command.arg("--address").arg(node.path("containerd.sock")).args(["rpull", name]);
        stdout(&mut command)
    };
    drop(rpull(&name));
    // A digest that nothing has: the layer is containerd's.
    let absent = soci_index::format::digest::Digest::of(b"absent").to_string();
    let mut left = soci();
    left.arg("--address").arg(node.path("containerd.sock")).args(["rpull", "--soci-index-digest", &absent]);
    drop(run(left.arg(name.replace(":v1", ":none"))));
    let before = metrics(&node);
    assert!(!before.contains("=\"node."), "the time has not come: {before}");

    let mut read = 0;
    for slot in std::fs::read_dir(node.path("soci/fs")).unwrap().map(|slot| slot.unwrap().path()) {
        assert!(std::fs::read_dir(&slot).unwrap().count() > 0);
        read += std::fs::read(slot.join("srv/data")).map_or(0, |data| data.len());
    }
    assert_eq!(read, 2_000_000);
    let text = metrics(&node);
    let value = |family: &str, operation: &str| {
        sum(&text, &format!("soci_fs_{family}"), operation).unwrap_or_else(|| panic!("{operation} is missing: {text}"))
    };
    for operation in [
        "fuse_node_getattr_failure_count",
        "fuse_node_listxattr_failure_count",
        "fuse_node_lookup_failure_count",
        "fuse_node_open_failure_count",
        "fuse_node_readdir_failure_count",
        "fuse_file_read_failure_count",
        "fuse_file_getattr_failure_count",
        "fuse_whiteout_getattr_failure_count",
        "fuse_unknown_operation_failure_count",
        "fuse_failure_state",
        "fuse_mount_failure_count",
        "local_mount_failure_count",
        "background_span_fetch_count",
        "background_span_fetch_failure_count",
        "background_fetch_work_queue_evicted",
        "preresolve_queue_drop",
    ] {
        assert!(value("operation_count", operation).abs() < 0.5, "{operation}: {text}");
    }
    assert!(value("operation_count", "synchronous_read_count") > 1.0);
    assert!(value("operation_count", "resolve_cache_hit") + value("operation_count", "resolve_cache_miss") > 1.0);
    assert!((value("bytes_served", "synchronous_bytes_served") - 2e6).abs() < 0.5, "{text}");
    assert!(value("operation_duration_microseconds_count", "synchronous_read") > 1.0);
    assert!(value("operation_duration_microseconds_count", "node_readdir") > 1.0);
    assert!(value("operation_duration_milliseconds_count", "background_fetch").abs() < 0.5);
    for operation in ["soci_index_fetch", "ztoc_fetch", "ztoc_unmarshal", "init_metadata_store", "fuse_mount"] {
        assert!(value("operation_duration_milliseconds_count", operation) > 0.5, "{operation}: {text}");
    }
    let requests = value("operation_count", "synchronous_read_remote_registry_fetch_count");
    assert!(
        (1.0..=requests).contains(&value("operation_duration_milliseconds_count", "remote_registry_get")),
        "{text}"
    );
    assert!(value("operation_duration_milliseconds_count", "get_layer_size").abs() < 0.5);
    value("image_operation_count_key", "background_fetch_work_queue_size");

    node.wait("operations are added up", || metrics(&node).contains("operation_type=\"file.Read\""));
    let text = metrics(&node);
    for operation in ["Getattr", "Getxattr", "Listxattr", "Lookup", "Open", "Readdir", "Readlink"] {
        assert!(sum(&text, "soci_fs_image_operation_count_key", &format!("node.{operation}")).is_some(), "{text}");
    }
    let image = image.digest();
    assert!(text.contains(&format!("image=\"{image}\",operation_type=\"whiteout.Getattr\"")), "{text}");
    assert!(sum(&text, "soci_fs_image_operation_count_key", "file.Read").unwrap() > 1.0, "{text}");
    let log = node.log();
    assert!(log.contains(&format!("fuse operation count for image {image}: node.Lookup = ")), "{log}");
    let lines = |key: &str| log.lines().filter(|line| line.contains(&format!("\"{key}\":\"true\""))).count();
    assert_eq!((lines("remote-snapshot-prepared"), lines("local-snapshot-prepared")), (1, 1), "{log}");
    let whole = log.lines().find(|line| line.contains(r#""local-snapshot-prepared":"true""#)).unwrap();
    assert!(whole.contains(r#""remote-snapshot-prepared":"false""#), "{whole}");
    assert_eq!(lines("defer-snapshot-runtime"), 1, "{log}");
}
