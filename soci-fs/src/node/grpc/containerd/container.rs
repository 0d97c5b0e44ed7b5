//! Containers: of which image one is, and on which snapshotter.

use tonic::Code;

use crate::node::grpc::containerd::{Containerd, ContainerdError, refused};
use crate::node::grpc::generated::client as wire;

/// What containerd knows of a container, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Its image's name; empty if it was made without one.
    pub image: String,
    /// The snapshotter of its root file system.
    pub snapshotter: String,
}

impl Containerd {
    /// Finds a container.
    ///
    /// # Errors
    /// [`ContainerdError::NoContainer`] when there is none of that id in the namespace, else another
    /// [`ContainerdError`].
    pub async fn container(&self, id: &str) -> Result<Container, ContainerdError> {
        let question = wire::GetContainerRequest { id: id.to_owned() };
        let path = "/containerd.services.containers.v1.Containers/Get";
        match self.try_ask::<_, wire::GetContainerResponse>(path, question).await {
            Ok(answer) => {
                let wire::Container { image, snapshotter } = answer.container.unwrap_or_default();
                Ok(Container { image, snapshotter })
            }
            Err(status) if status.code() == Code::NotFound => Err(ContainerdError::NoContainer {
                id: id.to_owned(),
                namespace: self.namespace.to_str().unwrap_or_default().to_owned(),
                socket: self.socket.clone(),
            }),
            Err(status) => Err(refused(&format!("show container {id}"), &status)),
        }
    }
}
