//! The kubelet's image service, passed on to containerd: for the credentials of its `PullImage` calls.
//!
//! The kubelet is configured to use this daemon's socket as its `--image-service-endpoint`. Every call of `runtime.v1.
//! ImageService` goes to containerd as it came and is answered as containerd answers; of `PullImage` and `RemoveImage`
//! the few fields that matter are read in passing (their numbers are the contract of the CRI), so nothing here depends
//! on the version of that protocol.
//!
//! Invariants: a call is passed on also if it cannot be understood; credentials are stored before containerd gets the
//! pull request, because it asks for the layers' snapshots during the pull, and become permanent only when it has
//! acknowledged the pull; nothing of a message is logged.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt as _, Full, Limited};
use prost::Message;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint};

use crate::node::grpc::MESSAGE_BYTES_MAX;
use crate::node::keychain::pulls::{PullAuth, Pulling, Pulls};

/// Bytes before a message: whether it is compressed, and how long it is.
const FRAME: usize = 5;

/// Where an answer has its outcome: in trailers, or where there is nothing else in the headers.
const STATUS: &str = "grpc-status";

/// Passes calls on.
#[derive(Debug, Clone)]
pub struct ImageService {
    containerd: Channel,
    socket: Arc<Path>,
    pulls: Arc<Pulls>,
}

impl ImageService {
    /// Passes calls on to the socket of containerd, which need not be there yet, and notes credentials in `pulls`.
    ///
    /// # Errors
    /// When the path cannot be that of a socket.
    pub fn new(containerd: &Path, pulls: Arc<Pulls>) -> Result<Self, String> {
        let address = format!("unix://{}", containerd.display());
        let endpoint = Endpoint::from_shared(address).map_err(|error| format!("{}: {error}", containerd.display()))?;
        Ok(Self { containerd: endpoint.connect_lazy(), socket: containerd.into(), pulls })
    }

    async fn pass_on(mut self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let limited = Limited::new(body, MESSAGE_BYTES_MAX + FRAME).collect().await;
        let message = limited.map_err(|error| Status::resource_exhausted(format!("the message: {error}")))?.to_bytes();
        let meant = self.read(head.uri.path(), &message);
        let request = http::Request::from_parts(head, Body::new(Full::new(message)));
        let socket = Arc::clone(&self.socket);
        let unavailable = |error: tonic::transport::Error| {
            tracing::warn!(socket = %socket.display(), %error, "containerd's image service cannot be reached");
            Status::unavailable("containerd's image service cannot be reached through soci-snapshotter-grpc")
        };
        std::future::poll_fn(|context| self.containerd.poll_ready(context)).await.map_err(unavailable)?;
        let answer = self.containerd.call(request).await.map_err(unavailable)?;
        let Some(meant) = meant else { return Ok(answer) };
        let (answer, is_good) = outcome(answer).await?;
        match meant {
            TrackedCall::Pull(pulling) if is_good => pulling.good(),
            TrackedCall::Removal(image) if is_good => self.pulls.forget(&image),
            // What is not good is forgotten with this.
            TrackedCall::Pull(_) | TrackedCall::Removal(_) => {}
        }
        Ok(answer)
    }

    fn read(&self, path: &str, framed: &[u8]) -> Option<TrackedCall> {
        match path.rsplit('/').next() {
            Some("PullImage") => match decode::<PullImageRequest>(framed) {
                Some(PullImageRequest { image: Some(spec), auth: Some(auth) }) => {
                    self.pulls.begin(&spec.image, &auth.into()).map(TrackedCall::Pull)
                }
                Some(_) => None,
                None => {
                    tracing::warn!("a request to pull cannot be read; its credentials are not known here");
                    None
                }
            },
            Some("RemoveImage") => {
                let RemoveImageRequest { image } = decode(framed)?;
                image.map(|spec| TrackedCall::Removal(spec.image))
            }
            _ => None,
        }
    }
}

/// A call whose outcome matters.
enum TrackedCall {
    Pull(Pulling),
    Removal(String),
}

/// Waits for the end of an answer, which says whether the call was good.
async fn outcome(answer: http::Response<Body>) -> Result<(http::Response<Body>, bool), Status> {
    let (head, body) = answer.into_parts();
    let limited = Limited::new(body, MESSAGE_BYTES_MAX + FRAME).collect().await;
    let collected = limited.map_err(|error| Status::unavailable(format!("containerd's answer: {error}")))?;
    let trailers = collected.trailers().cloned();
    let status = trailers.as_ref().and_then(|trailers| trailers.get(STATUS)).or_else(|| head.headers.get(STATUS));
    let is_good = head.status.is_success() && status.is_some_and(|status| status.as_bytes() == b"0");
    let body = Full::new(collected.to_bytes()).with_trailers(std::future::ready(trailers.map(Ok)));
    Ok((http::Response::from_parts(head, Body::new(body)), is_good))
}

fn decode<M: Message + Default>(framed: &[u8]) -> Option<M> {
    let (frame, message) = framed.split_at_checked(FRAME)?;
    (frame[0] == 0).then(|| M::decode(Bytes::copy_from_slice(message)).ok()).flatten()
}

impl Service<http::Request<Body>> for ImageService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.clone().pass_on(request).map(|answer| Ok(answer.unwrap_or_else(Status::into_http))).boxed()
    }
}

impl NamedService for ImageService {
    const NAME: &'static str = "runtime.v1.ImageService";
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "4")]
    server_address: String,
    #[prost(string, tag = "5")]
    identity_token: String,
}

#[derive(Clone, PartialEq, Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct RemoveImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

impl From<AuthConfig> for PullAuth {
    fn from(auth: AuthConfig) -> Self {
        let AuthConfig { username, password, auth: basic, server_address: server, identity_token } = auth;
        Self { user: username, password, basic, server, identity_token }
    }
}

#[cfg(test)]
mod tests {

    use parking_lot::Mutex;
    use soci_index::registry::{Credentials, Keychain as _};
    use tonic::client::Grpc;
    use tonic::codegen::http::uri::PathAndQuery;
    use tonic::transport::Server;
    use tonic_prost::ProstCodec;

    use super::*;

    /// What containerd would be: notes what it is asked, and answers every call with the name of the method. It refuses
    /// what a user called `bad` wants, when all of it is said, as containerd does.
    #[derive(Clone, Default)]
    struct Backend(Arc<Mutex<Vec<(String, Bytes)>>>);

    impl NamedService for Backend {
        const NAME: &'static str = "runtime.v1.ImageService";
    }

    impl Service<http::Request<Body>> for Backend {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let calls = Arc::clone(&self.0);
            async move {
                let method = request.uri().path().rsplit('/').next().unwrap().to_owned();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                calls.lock().push((method.clone(), body.clone()));
                if method == "ImageStatus" {
                    return Ok(Status::not_found("no such image").into_http());
                }
                let is_bad = body.windows(3).any(|word| word == b"bad");
                let message = ImageSpec { image: method }.encode_to_vec();
                let frame = [&[0, 0, 0, 0, u8::try_from(message.len()).unwrap()][..], &message].concat();
                let mut trailers = http::HeaderMap::new();
                trailers.insert(STATUS, http::HeaderValue::from_static(if is_bad { "7" } else { "0" }));
                let body = Full::new(Bytes::from(frame)).with_trailers(std::future::ready(Some(Ok(trailers))));
                let mut response = http::Response::new(Body::new(body));
                let headers = response.headers_mut();
                headers.insert("content-type", http::HeaderValue::from_static("application/grpc"));
                Ok(response)
            }
            .boxed()
        }
    }

    /// A kubelet, this service and a containerd, each on a socket of its own.
    struct Wire {
        kubelet: Grpc<Channel>,
        pulls: Arc<Pulls>,
        backend: Backend,
        directory: tempfile::TempDir,
    }

    async fn serve(path: &Path, server: tonic::transport::server::Router) {
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        tokio::spawn(server.serve_with_incoming(super::super::connections(listener)));
    }

    impl Wire {
        async fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let (pulls, backend) = (Arc::new(Pulls::new(None)), Backend::default());
            let service = ImageService::new(&directory.path().join("containerd.sock"), Arc::clone(&pulls)).unwrap();
            let ours = directory.path().join("ours.sock");
            serve(&ours, Server::builder().add_service(service)).await;
            let endpoint = Endpoint::from_shared(format!("unix://{}", ours.display())).unwrap();
            Self { kubelet: Grpc::new(endpoint.connect().await.unwrap()), pulls, backend, directory }
        }

        async fn start_containerd(&self) {
            let server = Server::builder().add_service(self.backend.clone());
            serve(&self.directory.path().join("containerd.sock"), server).await;
        }

        /// Whose credentials are known, in order.
        async fn users(&self) -> Vec<String> {
            let logins = self.pulls.find("h.example", "team/app").await.unwrap();
            let user = |login: soci_index::registry::Login| match login.credentials {
                Credentials::Password { user, .. } => user,
                other => panic!("{other:?}"),
            };
            logins.into_iter().map(user).collect()
        }

        async fn call<Q: Message + 'static>(&mut self, method: &str, question: Q) -> Result<String, Status> {
            self.kubelet.ready().await.unwrap();
            let path = PathAndQuery::try_from(format!("/runtime.v1.ImageService/{method}")).unwrap();
            let codec = ProstCodec::<Q, ImageSpec>::default();
            let answer = self.kubelet.unary(tonic::Request::new(question), path, codec).await?;
            Ok(answer.into_inner().image)
        }
    }

    fn pull(image: &str, user: &str) -> PullImageRequest {
        let auth = AuthConfig { username: user.into(), password: "hunter2".into(), ..AuthConfig::default() };
        PullImageRequest { image: Some(ImageSpec { image: image.into() }), auth: Some(auth) }
    }

    #[tokio::test]
    async fn calls_are_passed_on_and_credentials_kept() {
        let mut wire = Wire::new().await;
        // containerd need not be there yet. What came with a call that failed is not known.
        let error = wire.call("PullImage", pull("h.example/team/app:1", "early")).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::Unavailable);
        assert_eq!(wire.users().await, [""; 0]);
        wire.start_containerd().await;
        let question = pull("h.example/team/app:1", "me");
        assert_eq!(wire.call("PullImage", question.clone()).await.unwrap(), "PullImage");
        assert_eq!(wire.call("ListImages", ImageSpec::default()).await.unwrap(), "ListImages");
        let status = wire.call("ImageStatus", ImageSpec::default()).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (tonic::Code::NotFound, "no such image"));
        let (method, body) = wire.backend.0.lock()[0].clone();
        assert_eq!((method.as_str(), &body[FRAME..]), ("PullImage", &question.encode_to_vec()[..]));

        assert_eq!(wire.users().await, ["me"]);
        let removal = RemoveImageRequest { image: Some(ImageSpec { image: "h.example/team/app:1".into() }) };
        assert_eq!(wire.call("RemoveImage", removal).await.unwrap(), "RemoveImage");
        assert_eq!(wire.users().await, [""; 0]);
    }

    /// Every user who may create a pod can have the kubelet ask for any image with any password.
    #[tokio::test]
    async fn a_refused_pull_replaces_nobodys_password() {
        let mut wire = Wire::new().await;
        wire.start_containerd().await;
        wire.call("PullImage", pull("h.example/team/app:1", "owner")).await.unwrap();
        for image in ["h.example/team/app:1", "h.example/team/app:other"] {
            let error = wire.call("PullImage", pull(image, "bad")).await.unwrap_err();
            assert_eq!(error.code(), tonic::Code::PermissionDenied);
            assert_eq!(wire.users().await, ["owner"]);
        }
        wire.call("PullImage", pull("h.example/team/app:1", "another")).await.unwrap();
        assert_eq!(wire.users().await, ["another", "owner"]);
        // A removal that was refused removes nothing.
        let removal = RemoveImageRequest { image: Some(ImageSpec { image: "h.example/team/app:bad".into() }) };
        wire.call("PullImage", pull("h.example/team/app:2", "third")).await.unwrap();
        assert!(wire.call("RemoveImage", removal).await.is_err());
        assert_eq!(wire.users().await, ["third", "another", "owner"]);
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_passed_on() {
        let mut wire = Wire::new().await;
        wire.start_containerd().await;
        // The image is a number here.
        #[derive(Clone, PartialEq, Message)]
        struct Other {
            #[prost(uint64, tag = "1")]
            number: u64,
        }
        assert_eq!(wire.call("PullImage", Other { number: 7 }).await.unwrap(), "PullImage");
        assert_eq!(wire.backend.0.lock().len(), 1);
    }
}
