//! What this daemon says over gRPC: the only place that knows the protocol.
//!
//! containerd's snapshots service is here, the kubelet's image service in [`image_service`].
//!
//! Each call is translated, handed to [`Snapshots`] on a thread that may wait for the disk, and translated back. There
//! is no state here and no decision, so no reflection and no health service either: containerd asks for neither.
//!
//! A failure becomes a code by one exhaustive table, for containerd decides by codes: "exists already" is how it learns
//! that a layer need not be downloaded.

use soci_index::format::class::{Class, Classified};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, Stream, StreamExt as _};
use tokio::net::UnixStream;
use tonic::codegen::async_trait;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};

pub mod containerd;
mod generated;
pub mod image_service;
#[cfg(test)]
mod tests;

use crate::node::snapshots::provider::LayerRequest;
use crate::node::snapshots::{Info, Kind, Labels, Mount, Prepared, SnapshotError, Snapshots};
use generated::snapshots as proto;
use image_service::ImageService;
use proto::snapshots_server::{Snapshots as Service, SnapshotsServer};

/// Longest message, in bytes: containerd's own limit.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Snapshots in one message of a listing, as containerd's own service sends them.
const LIST_BATCH: usize = 100;
/// Pause after a connection could not be accepted, which is mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Metadata that names the client's namespace.
const NAMESPACE_HEADER: &str = "containerd-namespace";

/// Why the service cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listening socket cannot be used.
    #[error("cannot use the listening socket: {0}")]
    Socket(io::Error),
    /// The protocol's library gave up.
    #[error("the gRPC server failed: {0}")]
    Server(tonic::transport::Error),
}

impl Classified for ServeError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// Serves snapshots on a listening socket until `stop` ends, and the kubelet's image service beside it; calls in
/// progress are finished.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    listener: UnixListener,
    snapshots: Arc<Snapshots>,
    images: Option<ImageService>,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    listener.set_nonblocking(true).map_err(ServeError::Socket)?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(ServeError::Socket)?;
    let service = SnapshotsServer::new(SnapshotsService { snapshots })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let server = tonic::transport::Server::builder().add_service(service).add_optional_service(images);
    server.serve_with_incoming_shutdown(connections(listener), stop).await.map_err(ServeError::Server)
}

fn connections(listener: tokio::net::UnixListener) -> impl Stream<Item = io::Result<UnixStream>> {
    stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => return Some((Ok(connection), listener)),
                Err(cause) => {
                    tracing::warn!(%cause, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

#[derive(Debug)]
struct SnapshotsService {
    snapshots: Arc<Snapshots>,
}

impl SnapshotsService {
    /// Runs one call on the store.
    async fn run<T: Send + 'static>(
        &self,
        key: &str,
        work: impl FnOnce(&Snapshots) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, Status> {
        self.snapshots.blocking(key, work).await.map_err(|error| status(&error))
    }
}

#[async_trait]
impl Service for SnapshotsService {
    type ListStream = BoxStream<'static, Result<proto::ListSnapshotsResponse, Status>>;

    async fn prepare(
        &self,
        request: Request<proto::PrepareSnapshotRequest>,
    ) -> Result<Response<proto::PrepareSnapshotResponse>, Status> {
        let namespace = namespace(request.metadata(), &request.get_ref().key);
        let proto::PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let request = LayerRequest { namespace, key, parent, labels };
        let prepared = Arc::clone(&self.snapshots).prepare_or_provide(request).await;
        match prepared.map_err(|error| status(&error))? {
            Prepared::Mounts(mounts) => {
                let mounts = mounts.into_iter().map(mount).collect();
                Ok(Response::new(proto::PrepareSnapshotResponse { mounts }))
            }
            Prepared::Remote { name } => Err(Status::already_exists(format!("target snapshot {name:?} is ready"))),
        }
    }

    async fn view(
        &self,
        request: Request<proto::ViewSnapshotRequest>,
    ) -> Result<Response<proto::ViewSnapshotResponse>, Status> {
        let proto::ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.run(&key.clone(), move |snapshots| snapshots.view(&key, &parent, labels)).await?;
        Ok(Response::new(proto::ViewSnapshotResponse { mounts: mounts.into_iter().map(mount).collect() }))
    }

    async fn mounts(&self, request: Request<proto::MountsRequest>) -> Result<Response<proto::MountsResponse>, Status> {
        let key = request.into_inner().key;
        let mounts = self.run(&key.clone(), move |snapshots| snapshots.mounts(&key)).await?;
        Ok(Response::new(proto::MountsResponse { mounts: mounts.into_iter().map(mount).collect() }))
    }

    async fn commit(&self, request: Request<proto::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let proto::CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        let commit = move |snapshots: &Snapshots| snapshots.commit(&name, &key, labels, &parent);
        self.run("to be committed", commit).await.map(Response::new)
    }

    async fn remove(&self, request: Request<proto::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        self.run(&key.clone(), move |snapshots| snapshots.remove(&key)).await.map(Response::new)
    }

    async fn stat(
        &self,
        request: Request<proto::StatSnapshotRequest>,
    ) -> Result<Response<proto::StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let found = self.run(&key.clone(), move |snapshots| snapshots.stat(&key)).await?;
        Ok(Response::new(proto::StatSnapshotResponse { info: Some(info(found)) }))
    }

    async fn update(
        &self,
        request: Request<proto::UpdateSnapshotRequest>,
    ) -> Result<Response<proto::UpdateSnapshotResponse>, Status> {
        let proto::UpdateSnapshotRequest { info: given, update_mask, .. } = request.into_inner();
        let proto::Info { name, labels, .. } = given.unwrap_or_default();
        let mask = update_mask.unwrap_or_default().paths;
        let updated = self.run(&name.clone(), move |snapshots| snapshots.update(&name, &labels, &mask)).await?;
        Ok(Response::new(proto::UpdateSnapshotResponse { info: Some(info(updated)) }))
    }

    async fn list(&self, request: Request<proto::ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        let infos = self.run("to be listed", move |snapshots| snapshots.list(&filters)).await?;
        let batches: Vec<_> = infos.chunks(LIST_BATCH).map(<[Info]>::to_vec).collect();
        let messages = batches
            .into_iter()
            .map(|batch| Ok(proto::ListSnapshotsResponse { info: batch.into_iter().map(info).collect() }));
        Ok(Response::new(stream::iter(messages).boxed()))
    }

    async fn usage(&self, request: Request<proto::UsageRequest>) -> Result<Response<proto::UsageResponse>, Status> {
        let key = request.into_inner().key;
        let usage = self.run(&key.clone(), move |snapshots| snapshots.usage(&key)).await?;
        let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(Response::new(proto::UsageResponse { size: count(usage.bytes), inodes: count(usage.inodes) }))
    }

    async fn cleanup(&self, _: Request<proto::CleanupRequest>) -> Result<Response<()>, Status> {
        self.run("to be cleaned up", Snapshots::cleanup).await.map(Response::new)
    }
}

/// The gRPC status that containerd gets when something fails: exhaustive, so that a new kind of failure gets its code.
fn status(error: &SnapshotError) -> Status {
    let code = match error {
        SnapshotError::Exists { .. } => Code::AlreadyExists,
        SnapshotError::NotFound { .. } => Code::NotFound,
        SnapshotError::NoKey
        | SnapshotError::ParentNotCommitted { .. }
        | SnapshotError::ParentChanged { .. }
        | SnapshotError::LabelTooLong { .. }
        | SnapshotError::Unchangeable { .. }
        | SnapshotError::Mapping { .. }
        | SnapshotError::Filter(_)
        | SnapshotError::Root { .. } => Code::InvalidArgument,
        SnapshotError::NotActive { .. } | SnapshotError::NotMountable { .. } | SnapshotError::HasChildren { .. } => {
            Code::FailedPrecondition
        }
        SnapshotError::Unavailable { .. }
        | SnapshotError::Unmappable { .. }
        | SnapshotError::Abandoned { .. }
        | SnapshotError::Lock(_)
        | SnapshotError::NoOverlay { .. } => Code::Unavailable,
        SnapshotError::Record { .. } => Code::DataLoss,
        SnapshotError::Io { .. } | SnapshotError::Database { .. } | SnapshotError::Format { .. } => Code::Internal,
    };
    // The others are answers; these are for the node's operator.
    if matches!(code, Code::Unavailable | Code::DataLoss | Code::Internal) {
        tracing::error!(%error, "a call failed");
    }
    Status::new(code, error.to_string())
}

/// The client's namespace: as the call says, else the first part of a key that containerd made (`NAMESPACE/NUMBER/..`).
fn namespace(metadata: &MetadataMap, key: &str) -> Option<String> {
    if let Some(namespace) = metadata.get(NAMESPACE_HEADER).and_then(|value| value.to_str().ok()) {
        return Some(namespace.to_owned());
    }
    let mut parts = key.splitn(3, '/');
    let (namespace, number, _) = (parts.next()?, parts.next()?, parts.next()?);
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && !namespace.is_empty()).then(|| namespace.to_owned())
}

fn mount(mount: Mount) -> generated::types::Mount {
    let Mount { kind, source, options } = mount;
    generated::types::Mount { r#type: kind.to_owned(), source, target: String::new(), options }
}

fn info(info: Info) -> proto::Info {
    let kind = match info.kind {
        Kind::View => proto::Kind::View,
        Kind::Active => proto::Kind::Active,
        Kind::Committed => proto::Kind::Committed,
    };
    let labels: Labels = info.labels;
    proto::Info {
        name: info.name,
        parent: info.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(timestamp(info.created)),
        updated_at: Some(timestamp(info.updated)),
        labels,
    }
}

fn timestamp(nanoseconds: u64) -> prost_types::Timestamp {
    const SECOND: u64 = 1_000_000_000;
    let seconds = i64::try_from(nanoseconds / SECOND).expect("the seconds of 64 bits of nanoseconds fit");
    let nanos = i32::try_from(nanoseconds % SECOND).expect("less than a second");
    prost_types::Timestamp { seconds, nanos }
}
