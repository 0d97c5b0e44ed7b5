//! Reading: what an image's name means, and the content that containerd has of it.

use std::ops::Range;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use crate::node::grpc::containerd::{Containerd, ContainerdError, refused};
use crate::node::grpc::generated::client as wire;

/// What labels begin with that say where content was pulled from; behind it stands the registry, and the value has the
/// repositories.
pub const SOURCE_LABEL: &str = "containerd.io/distribution.source.";

impl Containerd {
    /// What an image's name means.
    ///
    /// # Errors
    /// [`ContainerdError::NoImage`] when there is no such name, else another [`ContainerdError`].
    pub async fn image(&self, name: &str) -> Result<Descriptor, ContainerdError> {
        let question = wire::GetImageRequest { name: name.to_owned() };
        let answer = self.try_ask("/containerd.services.images.v1.Images/Get", question).await;
        let answer: wire::GetImageResponse = answer.map_err(|status| match status.code() {
            Code::NotFound => ContainerdError::NoImage {
                name: name.to_owned(),
                namespace: self.namespace.to_str().unwrap_or_default().to_owned(),
                socket: self.socket.clone(),
            },
            _ => refused(&format!("find image {name}"), &status),
        })?;
        let target = answer.image.and_then(|image| image.target).unwrap_or_default();
        let wrong = |reason: String| ContainerdError::Answer { what: format!("image {name}"), reason };
        let digest =
            target.digest.parse().map_err(|error| wrong(format!("its digest is {:?}: {error}", target.digest)))?;
        let size = u64::try_from(target.size).map_err(|_| wrong(format!("its size is {}", target.size)))?;
        Ok(Descriptor::new(&target.media_type, digest, size))
    }

    /// How long content is; `None` if it is not there.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn content_size(&self, digest: &Digest) -> Result<Option<u64>, ContainerdError> {
        let question = wire::ContentInfoRequest { digest: digest.to_string() };
        match self.try_ask("/containerd.services.content.v1.Content/Info", question).await {
            Ok(wire::ContentInfoResponse { info }) => {
                let size = info.unwrap_or_default().size;
                let wrong = |_| ContainerdError::Answer {
                    what: digest.to_string(),
                    reason: format!("it is {size} bytes long"),
                };
                u64::try_from(size).map(Some).map_err(wrong)
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(refused(&format!("look at {digest}"), &status)),
        }
    }

    /// Deletes content; what is not there is fine.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn delete_content(&self, digest: &Digest) -> Result<(), ContainerdError> {
        let question = wire::ContentInfoRequest { digest: digest.to_string() };
        match self.try_ask("/containerd.services.content.v1.Content/Delete", question).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            answer => answer.map_err(|status| refused(&format!("delete {digest}"), &status)),
        }
    }

    /// The digests of content that has a label, whatever its value.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn content_with_label(&self, label: &str) -> Result<Vec<Digest>, ContainerdError> {
        let what = "list its content";
        let failed = |status: Status| refused(what, &status);
        let question = wire::ListContentRequest { filters: vec![format!("labels.{label:?}")] };
        let path = PathAndQuery::from_static("/containerd.services.content.v1.Content/List");
        let codec = ProstCodec::<wire::ListContentRequest, wire::ListContentResponse>::default();
        let mut client = self.client().await.map_err(failed)?;
        let answers = client.server_streaming(self.request(question), path, codec).await.map_err(failed)?;
        let mut found = Vec::new();
        let mut answers = answers.into_inner();
        while let Some(answer) = answers.message().await.map_err(failed)? {
            found.extend(answer.info.iter().filter_map(|info| info.digest.parse::<Digest>().ok()));
        }
        Ok(found)
    }

    /// Where content was pulled from, as containerd has noted it on every pull: registry and repository.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn content_sources(&self, digest: &Digest) -> Result<Vec<(String, String)>, ContainerdError> {
        let question = wire::ContentInfoRequest { digest: digest.to_string() };
        let answer = self.try_ask("/containerd.services.content.v1.Content/Info", question).await;
        let labels = match answer {
            Ok(wire::ContentInfoResponse { info }) => info.unwrap_or_default().labels,
            Err(status) if status.code() == Code::NotFound => return Ok(Vec::new()),
            Err(status) => return Err(refused(&format!("look at {digest}"), &status)),
        };
        let of_host = |(key, repositories): (&String, &String)| {
            let host = key.strip_prefix(SOURCE_LABEL)?.to_owned();
            let all = repositories.split(',').filter(|repository| !repository.is_empty());
            Some(all.map(|repository| (host.clone(), repository.to_owned())).collect::<Vec<_>>())
        };
        Ok(labels.iter().filter_map(of_host).flatten().collect())
    }

    /// The names of containerd's namespaces.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn namespaces(&self) -> Result<Vec<String>, ContainerdError> {
        let path = "/containerd.services.namespaces.v1.Namespaces/List";
        let question = wire::ListNamespacesRequest::default();
        let answer: wire::ListNamespacesResponse = self.ask(path, "list its namespaces", question).await?;
        Ok(answer.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// The same connection, for work in another namespace.
    ///
    /// # Errors
    /// [`ContainerdError::Name`].
    pub fn in_namespace(&self, namespace: &str) -> Result<Self, ContainerdError> {
        Ok(Self { namespace: crate::node::grpc::containerd::name(namespace)?, ..self.clone() })
    }

    /// Content from an offset to another, as containerd sends it. Nothing of it is checked.
    pub fn read_content(
        &self,
        digest: &Digest,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, ContainerdError>> + Send + use<> {
        let (containerd, digest) = (self.clone(), *digest);
        let failed = move |status: Status| refused(&format!("read {digest}"), &status);
        let open = async move {
            let offset = i64::try_from(range.start).unwrap_or(i64::MAX);
            let size = i64::try_from(range.end.saturating_sub(range.start)).unwrap_or(i64::MAX);
            let question = wire::ReadRequest { digest: digest.to_string(), offset, size };
            let path = PathAndQuery::from_static("/containerd.services.content.v1.Content/Read");
            let codec = ProstCodec::<wire::ReadRequest, wire::ReadResponse>::default();
            let mut client = containerd.client().await.map_err(failed)?;
            let answers = client.server_streaming(containerd.request(question), path, codec).await.map_err(failed)?;
            Ok(answers.into_inner().map_ok(|answer| answer.data).map_err(failed))
        };
        futures_util::stream::once(open).try_flatten()
    }
}
