//! containerd as its clients see it: as much of its services as a pull needs, and reading and writing an image.
//!
//! The services are those that every containerd since 1.6 has; the transfer service is not used, because it came later
//! and passes the image to a snapshotter only where containerd's configuration says so. Everything is translated here,
//! and the meaning of an answer is a value: that something exists already is no error.
//!
//! Invariants: every call names the namespace, and the lease that keeps what is made from being collected; no message
//! is longer than containerd takes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use prost::Message;
use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

mod container;
mod content;
mod lease;

use crate::node::grpc::generated::{client as wire, snapshots as proto};
pub use container::Container;
pub use content::SOURCE_LABEL;
pub use lease::Lease;
use wire::WriteAction;

/// Bytes of content in one message.
const CHUNK_BYTES_MAX: usize = 1 << 20;
/// What the names of uploads begin with that the next run goes on with.
const UPLOADS: &str = "soci-rpull";

/// Why containerd did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// No answer.
    #[error("containerd cannot be reached at {}: {reason}", socket.display())]
    Unreachable { socket: PathBuf, reason: String },
    /// A name that cannot be sent.
    #[error("{text:?} cannot be the name of a namespace or a lease")]
    Name { text: String },
    /// It refused, or failed.
    #[error("containerd, asked to {what}: {message} ({code})")]
    Refused { what: String, code: &'static str, message: String },
    /// It does not have an image.
    #[error(
        "containerd at {} has no image {name} in the namespace {namespace}; `soci publish` indexes an image in its registry",
        socket.display()
    )]
    NoImage { name: String, namespace: String, socket: PathBuf },
    /// It does not have a container.
    #[error(
        "containerd at {} has no container {id} in the namespace {namespace}; `ctr --namespace {namespace} containers ls` \
         lists them",
        socket.display()
    )]
    NoContainer { id: String, namespace: String, socket: PathBuf },
    /// What it says of an image or its content makes no sense.
    #[error("containerd says of {what}: {reason}")]
    Answer { what: String, reason: String },
    /// Content could not be read where it should come from.
    #[error("{0}")]
    Content(String),
}

impl Classified for ContainerdError {
    fn class(&self) -> Class {
        match self {
            Self::Unreachable { .. } | Self::Refused { .. } | Self::Answer { .. } => Class::Local,
            Self::Name { .. } | Self::NoContainer { .. } => Class::Usage,
            Self::NoImage { .. } => Class::Other,
            Self::Content(_) => Class::Registry,
        }
    }
}

/// What became of a request to prepare a snapshot.
#[derive(Debug)]
pub enum Prepared {
    /// It is to be filled, by these mounts.
    Mounts(Mounts),
    /// There is one already: the one that was wanted, if one was.
    Exists,
}

/// Mounts, to be given back to containerd.
#[derive(Debug, Clone)]
pub struct Mounts(Vec<crate::node::grpc::generated::types::Mount>);

/// A connection to containerd.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    socket: PathBuf,
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
    /// What the names of uploads begin with: uploads of one name are gone on with.
    uploads: String,
}

impl Containerd {
    /// Connects to a socket, to work in a namespace.
    ///
    /// # Errors
    /// [`ContainerdError::Unreachable`], [`ContainerdError::Name`].
    pub async fn connect(socket: &Path, namespace: &str) -> Result<Self, ContainerdError> {
        let unreachable = |reason: String| ContainerdError::Unreachable { socket: socket.to_owned(), reason };
        // The library's own words do not say what the system said.
        if let Err(error) = tokio::net::UnixStream::connect(socket).await {
            return Err(unreachable(error.to_string()));
        }
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
        let endpoint = endpoint.map_err(|error| unreachable(error.to_string()))?;
        let channel = endpoint.connect().await.map_err(|error| unreachable(error.to_string()))?;
        Ok(Self {
            channel,
            socket: socket.to_owned(),
            namespace: name(namespace)?,
            lease: None,
            uploads: UPLOADS.to_owned(),
        })
    }

    /// The namespace that calls are about.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.namespace.to_str().unwrap_or_default()
    }

    /// The names of the snapshotters that containerd knows.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn snapshotters(&self) -> Result<Vec<String>, ContainerdError> {
        let question = wire::PluginsRequest { filters: vec!["type==io.containerd.snapshotter.v1".to_owned()] };
        let path = "/containerd.services.introspection.v1.Introspection/Plugins";
        let answer: wire::PluginsResponse = self.ask(path, "list its plugins", question).await?;
        Ok(answer.plugins.into_iter().map(|plugin| plugin.id).collect())
    }

    /// Adds labels to content; `false` if there is no such content.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn label_content(&self, digest: &Digest, labels: &Labels) -> Result<bool, ContainerdError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let question = wire::UpdateContentRequest {
            info: Some(wire::ContentInfo { digest: digest.to_string(), labels: labels.clone(), ..Default::default() }),
            update_mask: Some(prost_types::FieldMask { paths }),
        };
        let path = "/containerd.services.content.v1.Content/Update";
        let answer = self.try_ask::<_, ()>(path, question).await;
        match answer {
            Ok(()) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused(&format!("label {digest}"), &status)),
        }
    }

    /// Adds labels to an image.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn label_image(&self, name: &str, labels: &Labels) -> Result<(), ContainerdError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        // containerd 2 cannot take an image without a target, though the mask leaves that alone.
        let target = Some(descriptor(&self.image(name).await?));
        let image = Some(wire::Image { name: name.to_owned(), labels: labels.clone(), target });
        let question = wire::ImageRequest { image, update_mask: Some(prost_types::FieldMask { paths }) };
        self.ask("/containerd.services.images.v1.Images/Update", &format!("label image {name}"), question).await
    }

    /// How many bytes of an upload are there; `None` if the content is there already.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn upload_offset(&self, blob: &Descriptor) -> Result<Option<u64>, ContainerdError> {
        let question = write_request(&self.uploads, WriteAction::Stat, blob, 0);
        match self.write(futures_util::stream::iter([question])).await {
            Ok(response) => Ok(Some(u64::try_from(response.offset).unwrap_or_default())),
            Err(status) if status.code() == Code::AlreadyExists => Ok(None),
            Err(status) => Err(refused(&format!("receive {}", blob.digest), &status)),
        }
    }

    /// Uploads the rest of a blob from `offset` on. containerd checks the digest of the whole.
    ///
    /// # Errors
    /// [`ContainerdError`]; what was uploaded until then can be gone on with.
    pub async fn upload<E: std::fmt::Display + Send + 'static>(
        &self,
        blob: &Descriptor,
        offset: u64,
        chunks: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
        labels: &Labels,
    ) -> Result<(), ContainerdError> {
        // What could not be read ends the messages, after saying why.
        let (failure, mut failed) = tokio::sync::oneshot::channel();
        let labels = labels.clone();
        let upload = Upload { name: self.uploads.clone(), blob: blob.clone(), labels, offset };
        let messages = upload_messages(upload, chunks, failure);
        let answer = self.write(messages).await;
        match (answer, failed.try_recv()) {
            (_, Ok(reason)) => Err(ContainerdError::Content(reason)),
            (Ok(_), Err(_)) => Ok(()),
            (Err(status), Err(_)) if status.code() == Code::AlreadyExists => Ok(()),
            (Err(status), Err(_)) => Err(refused(&format!("receive {}", blob.digest), &status)),
        }
    }

    /// Sends messages and gives the last answer.
    async fn write(
        &self,
        messages: impl Stream<Item = wire::WriteRequest> + Send + 'static,
    ) -> Result<wire::WriteResponse, Status> {
        let mut client = self.client().await?;
        let path = PathAndQuery::from_static("/containerd.services.content.v1.Content/Write");
        let codec = ProstCodec::<wire::WriteRequest, wire::WriteResponse>::default();
        let mut answers = client.streaming(self.request(messages), path, codec).await?.into_inner();
        let mut last = wire::WriteResponse::default();
        while let Some(answer) = answers.message().await? {
            last = answer;
        }
        Ok(last)
    }

    /// Makes an image, or points one that is there to `target`.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn put_image(&self, name: &str, target: &Descriptor) -> Result<(), ContainerdError> {
        let target = Some(descriptor(target));
        let image = Some(wire::Image { name: name.to_owned(), labels: Labels::new(), target });
        let question = wire::CreateImageRequest { image: image.clone() };
        match self.try_ask("/containerd.services.images.v1.Images/Create", question).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let update_mask = Some(prost_types::FieldMask { paths: vec!["target".to_owned()] });
                let question = wire::ImageRequest { image, update_mask };
                self.ask("/containerd.services.images.v1.Images/Update", &format!("update image {name}"), question)
                    .await
            }
            answer => answer.map_err(|status| refused(&format!("make image {name}"), &status)),
        }
    }

    /// Whether a snapshotter has the committed snapshot `name`.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn has_snapshot(&self, snapshotter: &str, name: &str) -> Result<bool, ContainerdError> {
        let (snapshotter, key) = (snapshotter.to_owned(), name.to_owned());
        let question = proto::StatSnapshotRequest { snapshotter, key };
        match self.try_ask::<_, proto::StatSnapshotResponse>(&snapshots("Stat"), question).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused(&format!("look at snapshot {name}"), &status)),
        }
    }

    /// Prepares a snapshot.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn prepare(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> Result<Prepared, ContainerdError> {
        let (snapshotter, own, parent) = (snapshotter.to_owned(), key.to_owned(), parent.to_owned());
        let question = proto::PrepareSnapshotRequest { snapshotter, key: own, parent, labels };
        match self.try_ask::<_, proto::PrepareSnapshotResponse>(&snapshots("Prepare"), question).await {
            Ok(answer) => Ok(Prepared::Mounts(Mounts(answer.mounts))),
            Err(status) if status.code() == Code::AlreadyExists => Ok(Prepared::Exists),
            Err(status) => Err(refused(&format!("prepare snapshot {key}"), &status)),
        }
    }

    /// Unpacks a layer that containerd has the content of; gives the digest of its tar.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn apply(&self, layer: &Descriptor, mounts: Mounts) -> Result<String, ContainerdError> {
        let question = wire::ApplyRequest { diff: Some(descriptor(layer)), mounts: mounts.0 };
        let what = format!("unpack layer {}", layer.digest);
        let answer: wire::ApplyResponse = self.ask("/containerd.services.diff.v1.Diff/Apply", &what, question).await?;
        Ok(answer.applied.unwrap_or_default().digest)
    }

    /// Commits a snapshot that was filled; one of that name that is there already is as good.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn commit(&self, snapshotter: &str, name: &str, key: &str) -> Result<(), ContainerdError> {
        let (snapshotter, own) = (snapshotter.to_owned(), name.to_owned());
        let question =
            proto::CommitSnapshotRequest { snapshotter, name: own, key: key.to_owned(), ..Default::default() };
        match self.try_ask(&snapshots("Commit"), question).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            answer => answer.map_err(|status| refused(&format!("commit snapshot {name}"), &status)),
        }
    }

    /// Removes a snapshot; one that is not there is fine.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<(), ContainerdError> {
        let (snapshotter, own) = (snapshotter.to_owned(), key.to_owned());
        match self.try_ask(&snapshots("Remove"), proto::RemoveSnapshotRequest { snapshotter, key: own }).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            answer => answer.map_err(|status| refused(&format!("remove snapshot {key}"), &status)),
        }
    }

    async fn ask<Q, A>(&self, path: &str, what: &str, question: Q) -> Result<A, ContainerdError>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        self.try_ask(path, question).await.map_err(|status| refused(what, &status))
    }

    async fn try_ask<Q, A>(&self, path: &str, question: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut client = self.client().await?;
        let path = PathAndQuery::try_from(path).map_err(|error| Status::internal(error.to_string()))?;
        let answer = client.unary(self.request(question), path, ProstCodec::<Q, A>::default()).await?;
        Ok(answer.into_inner())
    }

    async fn client(&self) -> Result<Grpc<Channel>, Status> {
        let mut client = Grpc::new(self.channel.clone());
        let socket = self.socket.display();
        client.ready().await.map_err(|error| Status::unavailable(format!("{socket}: {error}")))?;
        Ok(client)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(crate::node::grpc::NAMESPACE_HEADER, self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        request
    }
}

/// Labels of anything.
pub type Labels = BTreeMap<String, String>;

fn snapshots(method: &str) -> String {
    format!("/containerd.services.snapshots.v1.Snapshots/{method}")
}

fn name(text: &str) -> Result<MetadataValue<Ascii>, ContainerdError> {
    let wrong = |_| ContainerdError::Name { text: text.to_owned() };
    MetadataValue::try_from(text).map_err(wrong)
}

fn descriptor(descriptor: &Descriptor) -> wire::Descriptor {
    wire::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
    }
}

fn refused(what: &str, status: &Status) -> ContainerdError {
    let message = status.message().to_owned();
    ContainerdError::Refused { what: what.to_owned(), code: status.code().description(), message }
}

fn write_request(uploads: &str, action: WriteAction, blob: &Descriptor, offset: u64) -> wire::WriteRequest {
    wire::WriteRequest {
        action: action as i32,
        reference: format!("{uploads}-{}", blob.digest),
        total: i64::try_from(blob.size).unwrap_or(i64::MAX),
        expected: blob.digest.to_string(),
        offset: i64::try_from(offset).unwrap_or(i64::MAX),
        ..wire::WriteRequest::default()
    }
}

/// What is uploaded, and from where on.
struct Upload {
    name: String,
    blob: Descriptor,
    labels: Labels,
    offset: u64,
}

impl Upload {
    fn message(&self, action: WriteAction) -> wire::WriteRequest {
        write_request(&self.name, action, &self.blob, self.offset)
    }
}

/// The messages of an upload: pieces, each with its offset, then the commit. When the content cannot be read there is
/// none, and `failure` learns why.
fn upload_messages<E: std::fmt::Display + Send + 'static>(
    upload: Upload,
    chunks: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    failure: tokio::sync::oneshot::Sender<String>,
) -> impl Stream<Item = wire::WriteRequest> + Send + 'static {
    struct Sending<S> {
        upload: Upload,
        chunks: std::pin::Pin<Box<S>>,
        rest: Bytes,
        failure: Option<tokio::sync::oneshot::Sender<String>>,
        is_over: bool,
    }
    let sending =
        Sending { upload, chunks: Box::pin(chunks), rest: Bytes::new(), failure: Some(failure), is_over: false };
    futures_util::stream::unfold(sending, |mut sending| async move {
        while sending.rest.is_empty() && !sending.is_over {
            match sending.chunks.next().await {
                Some(Ok(chunk)) => sending.rest = chunk,
                Some(Err(error)) => {
                    let failure = sending.failure.take()?;
                    let _ = failure.send(error.to_string());
                    return None;
                }
                None => {
                    sending.is_over = true;
                    let request = sending.upload.message(WriteAction::Commit);
                    let labels = sending.upload.labels.clone();
                    return Some((wire::WriteRequest { labels, ..request }, sending));
                }
            }
        }
        if sending.is_over {
            return None;
        }
        let data = sending.rest.split_to(sending.rest.len().min(CHUNK_BYTES_MAX));
        let request = sending.upload.message(WriteAction::Write);
        sending.upload.offset += data.len() as u64;
        Some((wire::WriteRequest { data, ..request }, sending))
    })
}
