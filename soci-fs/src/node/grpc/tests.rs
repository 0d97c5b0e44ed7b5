//! The service as a client sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use tempfile::TempDir;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use super::*;
use crate::node::snapshots::SnapshotOptions;
use crate::node::snapshots::provider::none::NoLayers;

/// A service on a socket of its own, and a connection to it.
struct Wire {
    client: Grpc<Channel>,
    stop: tokio::sync::oneshot::Sender<()>,
    server: tokio::task::JoinHandle<Result<(), ServeError>>,
    _root: TempDir,
}

impl Wire {
    async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let provider = Arc::new(NoLayers::new(root.path().join("fs")));
        let snapshots = Arc::new(Snapshots::open(root.path(), SnapshotOptions::default(), provider).unwrap());
        let socket = root.path().join("grpc.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn(serve(listener, snapshots, None, async {
            let _ = stopped.await;
        }));
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let client = Grpc::new(endpoint.connect().await.unwrap());
        Self { client, stop, server, _root: root }
    }

    async fn call<Q, A>(&mut self, method: &str, question: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.client.ready().await.unwrap();
        let codec = ProstCodec::<Q, A>::default();
        self.client.unary(Request::new(question), path(method), codec).await.map(Response::into_inner)
    }

    async fn prepare(&mut self, key: &str, parent: &str) -> Result<proto::PrepareSnapshotResponse, Status> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let labels = BTreeMap::from([("label".to_owned(), "value".to_owned())]);
        self.call("Prepare", proto::PrepareSnapshotRequest { key, parent, labels, ..Default::default() }).await
    }

    async fn list(&mut self, filters: &[&str]) -> Result<Vec<proto::ListSnapshotsResponse>, Status> {
        self.client.ready().await.unwrap();
        let filters = filters.iter().map(|text| (*text).to_owned()).collect();
        let question = proto::ListSnapshotsRequest { filters, ..Default::default() };
        let codec = ProstCodec::default();
        let mut stream = self.client.server_streaming(Request::new(question), path("List"), codec).await?.into_inner();
        let mut messages = Vec::new();
        while let Some(message) = stream.message().await? {
            messages.push(message);
        }
        Ok(messages)
    }
}

fn path(method: &str) -> PathAndQuery {
    format!("/containerd.services.snapshots.v1.Snapshots/{method}").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_go_through_the_socket() {
    let mut wire = Wire::start().await;
    let mounts = wire.prepare("key", "").await.unwrap().mounts;
    assert_eq!((mounts[0].r#type.as_str(), mounts[0].target.as_str()), ("bind", ""));
    assert_eq!(mounts[0].options, ["rw", "rbind"]);
    let (name, key) = ("name".to_owned(), "key".to_owned());
    let labels = BTreeMap::from([("a".to_owned(), "1".to_owned())]);
    let commit = proto::CommitSnapshotRequest { name, key, labels, ..Default::default() };
    wire.call::<_, ()>("Commit", commit).await.unwrap();

    let stat = |key: &str| proto::StatSnapshotRequest { key: key.to_owned(), ..Default::default() };
    let found: proto::StatSnapshotResponse = wire.call("Stat", stat("name")).await.unwrap();
    let found = found.info.unwrap();
    assert_eq!((found.kind(), found.parent.as_str(), found.labels["a"].as_str()), (proto::Kind::Committed, "", "1"));
    assert!(found.created_at == found.updated_at && found.created_at.unwrap().seconds > 1_600_000_000);

    let labels = BTreeMap::from([("b".to_owned(), "2".to_owned())]);
    let changed = proto::Info { name: "name".into(), parent: "ignored".into(), labels, ..Default::default() };
    let mask = prost_types::FieldMask { paths: vec!["labels.b".to_owned()] };
    let update = proto::UpdateSnapshotRequest { info: Some(changed), update_mask: Some(mask), ..Default::default() };
    let updated: proto::UpdateSnapshotResponse = wire.call("Update", update).await.unwrap();
    let updated = updated.info.unwrap();
    assert_eq!((updated.labels.len(), updated.parent.as_str()), (2, ""));

    let usage = proto::UsageRequest { key: "name".to_owned(), ..Default::default() };
    assert_eq!(wire.call::<_, proto::UsageResponse>("Usage", usage).await.unwrap().inodes, 1);
    let view = proto::ViewSnapshotRequest { key: "view".into(), parent: "name".into(), ..Default::default() };
    let viewed: proto::ViewSnapshotResponse = wire.call("View", view).await.unwrap();
    let mounts = proto::MountsRequest { key: "view".into(), ..Default::default() };
    assert_eq!(wire.call::<_, proto::MountsResponse>("Mounts", mounts).await.unwrap().mounts, viewed.mounts);
    for key in ["view", "name"] {
        let remove = proto::RemoveSnapshotRequest { key: key.to_owned(), ..Default::default() };
        wire.call::<_, ()>("Remove", remove).await.unwrap();
    }
    wire.call::<_, ()>("Cleanup", proto::CleanupRequest::default()).await.unwrap();
    let gone: Result<proto::StatSnapshotResponse, _> = wire.call("Stat", stat("name")).await;
    assert_eq!(gone.unwrap_err().code(), Code::NotFound);

    wire.stop.send(()).unwrap();
    drop(wire.client);
    wire.server.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listings_come_in_batches() {
    let mut wire = Wire::start().await;
    assert!(wire.list(&[]).await.unwrap().is_empty());
    for number in 0..LIST_BATCH + 1 {
        wire.prepare(&format!("/key/{number}"), "").await.unwrap();
    }
    let sizes: Vec<usize> = wire.list(&[]).await.unwrap().iter().map(|message| message.info.len()).collect();
    assert_eq!(sizes, [LIST_BATCH, 1]);
    let found = wire.list(&["name==\"/key/7\"", "name~=^/key/10.$"]).await.unwrap();
    assert_eq!(found[0].info.iter().map(|info| info.name.as_str()).collect::<Vec<_>>(), ["/key/100", "/key/7"]);
    assert_eq!(wire.list(&["name=="]).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_methods_are_not_there() {
    let mut wire = Wire::start().await;
    let answer: Result<(), Status> = wire.call("Teleport", ()).await;
    assert_eq!(answer.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(wire.prepare("key", "absent").await.unwrap_err().code(), Code::NotFound);
}

#[test]
fn failures_have_the_codes_that_containerd_knows() {
    let (key, path) = ("k".to_owned(), PathBuf::from("/p"));
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let (kind, (parent, given)) = (Kind::View, ("p".to_owned(), "g".to_owned()));
    let mut seen = BTreeSet::new();
    for (error, code) in [
        (SnapshotError::Exists { key: key.clone() }, Code::AlreadyExists),
        (SnapshotError::NotFound { key: key.clone() }, Code::NotFound),
        (SnapshotError::ParentNotCommitted { key: key.clone(), parent: parent.clone() }, Code::InvalidArgument),
        (SnapshotError::ParentChanged { key: key.clone(), parent, given }, Code::InvalidArgument),
        (SnapshotError::NotActive { key: key.clone(), kind }, Code::FailedPrecondition),
        (SnapshotError::HasChildren { key: key.clone(), child: "c".into() }, Code::FailedPrecondition),
        (SnapshotError::Unchangeable { path: "parent".into() }, Code::InvalidArgument),
        (SnapshotError::Unavailable { key, path: path.clone(), cause: missing() }, Code::Unavailable),
        (SnapshotError::Io { operation: "create", path, cause: missing() }, Code::Internal),
    ] {
        let status = status(&error);
        assert_eq!((status.code(), status.message()), (code, error.to_string().as_str()));
        seen.insert(status.message().to_owned());
    }
    assert_eq!(seen.len(), 9);
}

#[test]
fn namespaces() {
    let mut named = MetadataMap::new();
    named.insert("containerd-namespace", "k8s.io".parse().unwrap());
    for (metadata, key, expected) in [
        (&named, "default/1/x", Some("k8s.io")),
        (&MetadataMap::new(), "default/1/extract-1 sha256:aa", Some("default")),
        (&MetadataMap::new(), "a/22/b/c", Some("a")),
        (&MetadataMap::new(), "plain", None),
        (&MetadataMap::new(), "/absolute/path/key", None),
        (&MetadataMap::new(), "a/b/c", None),
        (&MetadataMap::new(), "/1/c", None),
    ] {
        assert_eq!(namespace(metadata, key).as_deref(), expected, "{key}");
    }
}
