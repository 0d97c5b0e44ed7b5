//! The kubelet's pulls, through the daemon to a real containerd, from a registry that demands credentials.

use std::process::{Command, Output};

use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::registry::{Peryx, client_with_password};
use soci_tests::{go, run, soci, stdout};

const FILE_BYTES: usize = 3 << 20;
const USER: &str = "robot$team+ci";

/// Asks for an image as the kubelet does.
fn pull(node: &Node, image: &str, user: &str, password: &str) -> Output {
    let program = go::programs().expect("the node runs programs of Go").join("cri");
    run(Command::new(program).arg(node.path("soci.sock")).args(["pull", image, user, password]))
}

/// What a container of the kubelet's namespace prints.
fn run_in_cluster(node: &Node, image: &str, name: &str, script: &str) -> Output {
    let mut command = node.ctr();
    command.args(["--namespace", "k8s.io", "run", "--rm", "--snapshotter", "soci", image, &node.container(name)]);
    run(command.args(["/bin/sh", "-c", script]))
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_secrets_of_pods_are_used_for_lazy_layers() {
    let Some(registry) = Peryx::start() else { return };
    let Some(mut node) = Node::start(Containerd::Kubelets) else { return };
    let socket = node.path("containerd.sock");
    node.configure(&format!(
        "debug = true\n[background_fetch]\ndisable = true\n\
         [cri_keychain]\nenable_keychain = true\nimage_service_path = {socket:?}\n"
    ));
    let files: Vec<Vec<u8>> = (0..3).map(|seed| text(seed, FILE_BYTES)).collect();
    let data = |file: usize| tar(&[(&format!("srv/{file}"), files[file].clone())]);
    let image = Image::gzip(vec![shell_layer(("/etc/base", "from below\n")), data(0), data(1), data(2)]);
    image.push(&client_with_password(&registry.address, Peryx::PASSWORD).repository("team/app"), "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let account = format!("{USER}:{}", Peryx::PASSWORD);
    drop(stdout(soci().args([
        "publish",
        &name,
        "--user",
        &account,
        "--min-layer-size",
        "0",
        "--span-size",
        "1048576",
    ])));

    for (user, password) in [("", ""), (USER, "wrong")] {
        let refused = pull(&node, &name, user, password);
        assert!(!refused.status.success(), "{user:?} is let in");
    }
    let pulled = pull(&node, &name, USER, Peryx::PASSWORD);
    assert!(pulled.status.success(), "{}", String::from_utf8_lossy(&pulled.stderr));
    let provided = node.log().lines().filter(|line| line.contains(r#""remote-snapshot-prepared":"true""#)).count();
    assert_eq!(provided, 4, "{}", node.log());

    // The layers are read later, without the kubelet; also by a worker that never saw the pull.
    let sizes = |file: usize| (format!("wc -c < /srv/{file}"), format!("{FILE_BYTES}\n"));
    let check = |name_of_container: &str, file: usize| {
        let (script, expected) = sizes(file);
        let output = run_in_cluster(&node, &name, name_of_container, &script);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{said}\n{}", node.log());
    };
    check("one", 0);
    node.kill_worker();
    check("two", 1);
    let program = go::programs().expect("the node runs programs of Go").join("cri");
    node.kill_worker();
    check("three", 2);
    drop(stdout(Command::new(program).arg(node.path("soci.sock")).args(["remove", &name])));
    node.wait("the image is gone", || node.entries("snapshotter/layers").is_empty());

    let log = node.log();
    let basic = "cm9ib3QkdGVhbStjaTpjb3JyZWN0IGhvcnNl";
    for secret in [Peryx::PASSWORD, basic, "\"wrong\""] {
        assert!(!log.contains(secret), "{secret:?} is in the log");
    }
    // The log does say what was done with them.
    assert!(log.contains("\"level\":\"debug\""), "{log}");
}
