//! The handshake, and the release of layers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::super::provider::{LayerProvider, LayerRequest, Provided};
use super::super::tests::{Node, committed, labels, none};
use super::super::{Kind, Prepared, SnapshotError, Usage};
use crate::tree::id_map::IdMap;

/// Shows layers as its script says; records what is released.
#[derive(Debug)]
struct FakeProvider {
    directory: PathBuf,
    /// Slot by layer, as the label `layer` names it; others are left to containerd.
    slots: BTreeMap<&'static str, u16>,
    asked: Mutex<Vec<LayerRequest>>,
    released: Mutex<Vec<u16>>,
    /// What the next release waits for.
    held: Mutex<Option<mpsc::Receiver<()>>>,
    maps: Mutex<BTreeMap<u8, IdMap>>,
    /// A permit per answer.
    gate: Semaphore,
}

impl FakeProvider {
    fn new(node: &Node, slots: &[(&'static str, u16)]) -> Arc<Self> {
        let directory = node.root.path().join("layers");
        for (_, slot) in slots {
            fs::create_dir_all(directory.join(slot.to_string())).unwrap();
        }
        Arc::new(Self {
            directory,
            slots: slots.iter().copied().collect(),
            asked: Mutex::default(),
            released: Mutex::default(),
            held: Mutex::default(),
            maps: Mutex::default(),
            gate: Semaphore::new(100),
        })
    }

    fn released(&self) -> Vec<u16> {
        self.released.lock().clone()
    }
}

impl LayerProvider for FakeProvider {
    fn provide<'a>(&'a self, request: &'a LayerRequest) -> BoxFuture<'a, Provided> {
        Box::pin(async {
            self.asked.lock().push(request.clone());
            self.gate.acquire().await.unwrap().forget();
            match request.labels.get("layer").and_then(|layer| self.slots.get(layer.as_str())) {
                Some(&slot) => Provided::Layer { slot, is_whole: false },
                None => Provided::Leave { reason: "not provided".to_owned() },
            }
        })
    }

    fn lower_directory(&self, slot: u16, id_map: Option<u8>) -> PathBuf {
        self.directory.join(id_map.map_or_else(|| slot.to_string(), |map| format!("{slot}-{map}")))
    }

    fn assign_id_map(&self, map: &IdMap) -> Result<u8, String> {
        let mut maps = self.maps.lock();
        let number = u8::try_from(maps.len() + 1).unwrap();
        for slot in self.slots.values() {
            let view = self.lower_directory(*slot, Some(number));
            fs::create_dir_all(&view).unwrap();
            chown(&view, Some(map.uid(0)), Some(map.gid(0))).unwrap();
        }
        maps.insert(number, map.clone());
        Ok(number)
    }

    fn id_map(&self, number: u8) -> Option<IdMap> {
        self.maps.lock().get(&number).cloned()
    }

    fn keep_id_maps(&self, used: &BTreeSet<u8>) {
        self.maps.lock().retain(|number, _| used.contains(number));
    }

    fn release(&self, slot: u16) {
        self.released.lock().push(slot);
        let held = self.held.lock().take();
        if let Some(held) = held {
            held.recv().unwrap();
        }
    }
}

fn request(key: &str, parent: &str, target: &str, layer: &str) -> LayerRequest {
    let labels = labels(&[("containerd.io/snapshot.ref", target), ("layer", layer)]);
    LayerRequest { namespace: None, key: key.to_owned(), parent: parent.to_owned(), labels }
}

fn remote(name: &str) -> Prepared {
    Prepared::Remote { name: name.to_owned() }
}

#[tokio::test]
async fn the_handshake() {
    let node = Node::new();
    let provider = FakeProvider::new(&node, &[("base", 3), ("top", 4)]);
    let snapshots = Arc::new(node.open_with(provider.clone()));
    let prepare = |request| Arc::clone(&snapshots).prepare_or_provide(request);

    assert_eq!(prepare(request("k1", "", "sha256:base", "base")).await.unwrap(), remote("sha256:base"));
    assert_eq!(prepare(request("k2", "sha256:base", "sha256:top", "top")).await.unwrap(), remote("sha256:top"));
    let info = snapshots.stat("sha256:top").unwrap();
    let expected = [
        ("containerd.io/snapshot.ref", "sha256:top"),
        ("containerd.io/snapshot/remote", "remote snapshot"),
        ("layer", "top"),
    ];
    assert_eq!(
        (info.kind, info.parent.as_deref(), info.labels),
        (Kind::Committed, Some("sha256:base"), labels(&expected))
    );
    assert_eq!(snapshots.usage("sha256:top").unwrap(), Usage::default());
    assert!(matches!(snapshots.stat("k2"), Err(SnapshotError::NotFound { .. })));
    assert_eq!(snapshots.layers_in_use().unwrap(), BTreeSet::from([3, 4]));

    // What containerd asks next finds it.
    let filter = "labels.\"containerd.io/snapshot.ref\"==sha256:top,parent==\"sha256:base\"".to_owned();
    assert_eq!(snapshots.list(&[filter]).unwrap().len(), 1);
    let layer = |slot: u16| provider.lower_directory(slot, None).display().to_string();
    let mounts = snapshots.prepare("container", "sha256:top", none()).unwrap();
    assert_eq!(mounts[0].options.last().unwrap(), &format!("lowerdir={}:{}", layer(4), layer(3)));
    let view = snapshots.view("view", "sha256:base", none()).unwrap();
    assert_eq!((view[0].kind, &view[0].source), ("bind", &layer(3)));

    // There already: the provider is not asked again.
    assert_eq!(provider.asked.lock().len(), 2);
    assert_eq!(prepare(request("k3", "", "sha256:base", "base")).await.unwrap(), remote("sha256:base"));
    assert_eq!(provider.asked.lock().len(), 2);

    let left = prepare(request("k4", "sha256:top", "sha256:left", "unknown")).await.unwrap();
    assert!(matches!(left, Prepared::Mounts(_)));
    assert_eq!(snapshots.stat("k4").unwrap().kind, Kind::Active);
    assert!(matches!(snapshots.stat("sha256:left"), Err(SnapshotError::NotFound { .. })));
}

#[tokio::test]
async fn errors_come_before_the_provider_is_asked() {
    let node = Node::new();
    let provider = FakeProvider::new(&node, &[("base", 3)]);
    let snapshots = Arc::new(node.open_with(provider.clone()));
    snapshots.prepare("taken", "", none()).unwrap();
    for (request, expected) in [
        (request("new", "absent", "sha256:x", "base"), "NotFound"),
        (request("new", "taken", "sha256:x", "base"), "ParentNotCommitted"),
        (request("taken", "", "sha256:x", "base"), "Exists"),
        (request("", "", "sha256:x", "base"), "NoKey"),
        (request("new", "", "sha256:x", &"x".repeat(5000)), "LabelTooLong"),
    ] {
        let error = Arc::clone(&snapshots).prepare_or_provide(request).await.unwrap_err();
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
    }
    assert!(provider.asked.lock().is_empty());
}

/// Two namespaces may have the same layer on parents with different names, one unpacked and one not.
#[tokio::test]
async fn a_name_on_another_parent_does_not_stand_in_the_way() {
    let node = Node::new();
    let provider = FakeProvider::new(&node, &[("top", 4)]);
    let snapshots = Arc::new(node.open_with(provider.clone()));
    committed(&snapshots, "one", "");
    committed(&snapshots, "two", "");
    let prepare = |request| Arc::clone(&snapshots).prepare_or_provide(request);
    assert_eq!(prepare(request("k1", "one", "sha256:top", "top")).await.unwrap(), remote("sha256:top"));
    assert_eq!(prepare(request("k2", "two", "sha256:top", "top")).await.unwrap(), remote("sha256:top on two"));
    assert_eq!(prepare(request("k3", "two", "sha256:top", "top")).await.unwrap(), remote("sha256:top on two"));
    let filter = "labels.\"containerd.io/snapshot.ref\"==sha256:top,parent==\"two\"".to_owned();
    assert_eq!(snapshots.list(&[filter]).unwrap()[0].name, "sha256:top on two");

    snapshots.remove("sha256:top").unwrap();
    assert_eq!(provider.released(), [0_u16; 0], "another snapshot stands on the layer");
    snapshots.remove("sha256:top on two").unwrap();
    assert_eq!(provider.released(), [4]);
}

/// The last snapshot on a layer goes while another call has just been promised the layer.
#[tokio::test]
async fn a_promised_layer_is_not_given_back() {
    let node = Node::new();
    let provider = FakeProvider::new(&node, &[("base", 3), ("other", 5)]);
    let snapshots = Arc::new(node.open_with(provider.clone()));
    let prepare = |request| tokio::spawn(Arc::clone(&snapshots).prepare_or_provide(request));
    for (key, target, layer) in [("k1", "sha256:a", "base"), ("k2", "sha256:c", "other")] {
        prepare(request(key, "", target, layer)).await.unwrap().unwrap();
    }
    provider.gate.forget_permits(100);
    let waiting = prepare(request("k3", "", "sha256:b", "base"));
    while provider.asked.lock().len() < 3 {
        tokio::task::yield_now().await;
    }
    snapshots.remove("sha256:a").unwrap();
    snapshots.remove("sha256:c").unwrap();
    assert_eq!(provider.released(), [0_u16; 0]);
    provider.gate.add_permits(1);
    assert_eq!(waiting.await.unwrap().unwrap(), remote("sha256:b"));
    assert_eq!(provider.released(), [5], "the unused one, and only that");

    // A client that gives up while the provider works leaves nothing behind.
    let waiting = prepare(request("k4", "", "sha256:d", "other"));
    while provider.asked.lock().len() < 4 {
        tokio::task::yield_now().await;
    }
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    snapshots.remove("sha256:b").unwrap();
    // The call ends on a thread that may block.
    while provider.released().len() < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(provider.released(), [5, 3]);
}

/// While a layer is released no call goes to the provider; it waits without stopping the runtime, whose only thread
/// this is, and what becomes unused meanwhile is released, too.
#[tokio::test]
async fn calls_wait_while_layers_are_given_back() {
    let node = Node::new();
    let provider = FakeProvider::new(&node, &[("base", 3), ("other", 5), ("third", 7)]);
    let snapshots = Arc::new(node.open_with(provider.clone()));
    let prepare = |request| tokio::spawn(Arc::clone(&snapshots).prepare_or_provide(request));
    for (key, target, layer) in [("k1", "sha256:a", "base"), ("k2", "sha256:c", "other")] {
        prepare(request(key, "", target, layer)).await.unwrap().unwrap();
    }
    let (go_on, held) = mpsc::channel();
    *provider.held.lock() = Some(held);
    let remove = |name: &'static str| {
        let snapshots = Arc::clone(&snapshots);
        tokio::task::spawn_blocking(move || snapshots.remove(name).unwrap())
    };
    let removing = remove("sha256:a");
    while provider.released().is_empty() {
        tokio::task::yield_now().await;
    }
    let waiting = prepare(request("k3", "", "sha256:e", "third"));
    remove("sha256:c").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((provider.asked.lock().len(), provider.released()), (2, vec![3]));
    go_on.send(()).unwrap();
    removing.await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), remote("sha256:e"));
    assert_eq!(provider.released(), [3, 5]);
}

/// For a container in a user namespace all that is below shows mapped owners: layers by a view of the provider, what
/// containerd unpacked by a mount.
#[tokio::test]
async fn owners_are_mapped_for_a_user_namespace() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: mounts with an id mapping need root");
        return;
    }
    let node = Node::new();
    let provider = FakeProvider::new(&node, &[("base", 4)]);
    let snapshots = Arc::new(node.open_with(Arc::clone(&provider) as Arc<dyn LayerProvider>));
    let request = request("a", "", "base", "base");
    assert_eq!(Arc::clone(&snapshots).prepare_or_provide(request).await.unwrap(), remote("base"));
    committed(&snapshots, "unpacked", "base");
    let map = |range: &str| {
        labels(&[("containerd.io/snapshot/uidmapping", range), ("containerd.io/snapshot/gidmapping", range)])
    };

    let mounts = snapshots.prepare("container", "unpacked", map("0:100000:65536")).unwrap();
    let option = |name: &str| {
        let found = mounts[0].options.iter().find_map(|option| option.strip_prefix(name));
        found.unwrap_or_else(|| panic!("{name}: {mounts:?}")).to_owned()
    };
    let lower = option("lowerdir=");
    let (unpacked, layer) = lower.split_once(':').unwrap();
    assert!(unpacked.ends_with("snapshotter/mapped/2-1") && layer.ends_with("layers/4-1"), "{lower}");
    let owner = |path: &str| fs::metadata(path).map(|metadata| (metadata.uid(), metadata.gid())).unwrap();
    let mapped = (100_000, 100_000);
    let file = format!("{unpacked}/unpacked");
    assert_eq!([owner(unpacked), owner(layer), owner(&file), owner(&option("upperdir="))], [mapped; 4]);
    // Others on the same parent see the owners as they are, or by their own mapping.
    assert!(!format!("{:?}", snapshots.prepare("plain", "unpacked", none()).unwrap()).contains("mapped"));
    let other = format!("{:?}", snapshots.view("other", "unpacked", map("0:200000:10")).unwrap());
    assert!(other.contains("mapped/2-2") && other.contains("4-2"), "{other}");
    let without = snapshots.prepare("empty", "", map("0:100000:65536")).unwrap();
    assert_eq!(owner(&without[0].source), mapped);
    for labels in [map("0:1"), labels(&[("containerd.io/snapshot/uidmapping", "0:1:1")])] {
        assert!(matches!(snapshots.prepare("bad", "unpacked", labels), Err(SnapshotError::Mapping { .. })));
    }

    // After a reboot the mount is made again.
    rustix::mount::unmount(unpacked, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(snapshots.mounts("container").unwrap(), mounts);
    assert_eq!(owner(&file), mapped);

    for key in ["container", "empty", "other"] {
        snapshots.remove(key).unwrap();
    }
    assert!(provider.maps.lock().is_empty());
    assert_eq!(fs::read_dir(node.root.path().join("snapshotter/mapped")).unwrap().count(), 0);
    assert_eq!(fs::read(node.root.path().join("snapshotter/snapshots/2/fs/unpacked")).unwrap(), b"unpacked");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(node.root.path().to_str().unwrap()), "{mounts}");
}
