//! Containers in user namespaces: a real containerd, whose snapshotter shows layers with mapped owners instead of
//! copying them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use soci_tests::containerd::Containerd;
use soci_tests::image::{GZIP, Image, gzip, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::stage::Stage;
use soci_tests::stdout;

const HOST_ID: u32 = 100_000;
const FILE_BYTES: usize = 3 << 20;

/// Layers below this size are left to containerd where this says so.
const LEAVE_SMALL: &str = "[background_fetch]\ndisable = true\n[snapshotter]\nmin_layer_size = 10000\n\
                           [pull_modes]\nleave_unindexed = true\n";

/// A small layer with files of several owners.
fn owned_layer() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, uid: u64, gid: u64, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o640);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content).unwrap();
    };
    add("srv/root", 0, 0, b"of root\n");
    add("srv/user", 1000, 2000, b"of a user\n");
    add("srv/stranger", 70_000, 70_000, b"of nobody\n");
    builder.into_inner().unwrap()
}

/// Bytes of disk below a directory.
fn disk_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| {
        let metadata = entry.metadata().unwrap();
        if metadata.is_dir() { disk_bytes(&entry.path()) } else { metadata.blocks() * 512 }
    });
    bytes.sum()
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A container in a user namespace, with the mapping in the labels of its snapshot.
fn run_mapped(node: &Node, image: &str, name: &str, rest: &[&str], script: &str) -> String {
    let map = format!("0:{HOST_ID}:65536");
    let mut command = node.ctr();
    command.args(["run", "--snapshotter", "soci", "--uidmap", &map, "--gidmap", &map, "--remap-labels"]).args(rest);
    stdout(command.args([image, &node.container(name), "/bin/sh", "-c", script]))
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_in_user_namespaces_see_their_owners() {
    for with_unpacked in [false, true] {
        let Some(stage) = Stage::new().await else { return };
        let Some(mut node) = Node::start(Containerd::V2) else { return };
        if with_unpacked {
            node.configure(LEAVE_SMALL);
        }
        // The container's root is an unprivileged user out here and must get to its files all the same.
        for directory in ["", "state"] {
            fs::set_permissions(node.path(directory), fs::Permissions::from_mode(0o711)).unwrap();
        }
        let (data, top) = (tar(&[("srv/data", text(5, FILE_BYTES))]), tar(&[("etc/top", b"from above\n".to_vec())]));
        let layers = [shell_layer(("/etc/base", "from below\n")), data, owned_layer(), top];
        let image = Image::new(layers.into_iter().map(|tar| (GZIP, gzip(&tar, 6), tar)).collect());
        let name = stage.publish(&image, "v1", 1 << 20).await;
        let _ = stage.pull(&node, "soci", &name);
        let unpacked = node.entries("snapshotter/snapshots").len();
        assert_eq!(unpacked, 2 * usize::from(with_unpacked), "layers that containerd has unpacked");

        let snapshots = node.path("soci/snapshotter/snapshots");
        let before = disk_bytes(&snapshots);
        let script = "cd /srv && cat root user /etc/top; echo written > new; ls -ln . /etc/base /etc/top";
        let printed = run_mapped(&node, &name, "mapped", &["--rm"], script);
        assert!(printed.starts_with("of root\nof a user\nfrom above\n"), "{printed}");
        let owners = |printed: &str, name: &str| {
            let line = printed.lines().find(|line| line.starts_with('-') && line.ends_with(&format!(" {name}")))?;
            Some(line.split_whitespace().skip(2).take(2).collect::<Vec<_>>().join(":"))
        };
        let found = ["user", "stranger", "new", "/etc/base", "/etc/top"].map(|name| owners(&printed, name));
        let expected = ["1000:2000", "65534:65534", "0:0", "0:0", "0:0"].map(|owners| Some(owners.to_owned()));
        assert_eq!(found, expected, "with_unpacked {with_unpacked}: {printed}");

        // What it writes belongs to the host's ids, nothing of a layer was copied, and it outlives a worker.
        let script = "echo written > /srv/new; sh -c 'kill -STOP $$' & wait";
        run_mapped(&node, &name, "long", &["--detach"], script);
        let written =
            || names(&snapshots).into_iter().map(|id| snapshots.join(id).join("fs/srv/new")).find(|path| path.exists());
        node.wait("the container has written", || {
            written().and_then(|path| path.metadata().ok()).is_some_and(|metadata| metadata.uid() == HOST_ID)
        });
        assert_eq!(written().unwrap().metadata().unwrap().gid(), HOST_ID);
        let grown = disk_bytes(&snapshots) - before;
        assert!(grown < 100_000, "{grown} bytes were copied");
        node.kill_worker();
        let read = stdout(&mut node.exec("long", "ls -ln /srv/user; wc -c < /srv/data"));
        assert!(owners(&read, "/srv/user").is_some_and(|owners| owners == "1000:2000"), "{read}");
        assert!(read.ends_with(&format!("\n{FILE_BYTES}\n")), "{read}");
        let maps = || fs::read_to_string(node.path("soci/snapshotter/id-maps.json")).unwrap();
        assert!(maps().contains(&HOST_ID.to_string()), "{}", maps());
        assert_eq!(names(&node.path("soci/snapshotter/mapped")).len(), 2 * usize::from(with_unpacked));

        node.stop_container("long");
        node.remove_container("long");
        node.wait("the mapping is gone", || !maps().contains(&HOST_ID.to_string()));
        assert_eq!(names(&node.path("soci/snapshotter/mapped")), BTreeSet::new());
        // Others are not affected.
        let plain = node.run(&name, "plain", "ls -ln /srv/stranger");
        assert_eq!(owners(&plain, "/srv/stranger").as_deref(), Some("70000:70000"), "{plain}");
        node.remove_last_images(&[&name]);
    }
}
