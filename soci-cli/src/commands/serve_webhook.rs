//! `soci serve-webhook`: index each image announced by a registry webhook.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use soci_fs::layer::private::set_umask;
use soci_index::clock;
use soci_index::format::digest::Digest;
use soci_index::format::reference::{Reference, RegistryReference};
use soci_index::image::ImageError;
use soci_index::image::sink::SinkError;
use soci_index::publish::PublishError;
use soci_index::publish::build::BuildError;
use soci_index::publish::convert::Converted;
use soci_index::publish::v2::EntryNotes;
use soci_index::registry::{ClientOptions, RegistryError, Repository};
use soci_index::trust::Trust;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::args::config::Config;
use crate::args::{Global, Platforms, ServeWebhook};
use crate::commands::build::Build;
use crate::commands::convert::{self, Conversion};
use crate::commands::publish::Plan;
use crate::commands::{image, sign};
use crate::report::exit::{Exit, code, fail};
use crate::report::signals::Signals;
use crate::webhook::event::Push;
use crate::webhook::journal::Journal;
use crate::webhook::queue::{Bounds, End, Job, Outcome, Queue};
use crate::webhook::server::{Listeners, Manners};
use crate::webhook::{Work, clerk, server};

/// Bytes of a token file. A header is shorter.
const TOKEN_BYTES_MAX: u64 = 8 << 10;

/// Runs the command until a signal ends it.
///
/// # Errors
/// When the arguments make no sense, the journal cannot be obtained, or the address is taken.
pub fn run(arguments: &ServeWebhook, config: &Config, global: &Global) -> anyhow::Result<()> {
    let settings = Arc::new(Settings::new(arguments, global)?);
    let token = arguments.token_file.as_deref().map(read_token).transpose()?;
    if token.is_none() && !arguments.no_auth && !arguments.listen.ip().is_loopback() {
        let listen = arguments.listen;
        let hint = "name the secret by --token-file, or use --no-auth if no other client can reach it";
        return Err(fail(Exit::Usage, format!("{listen} is open to other machines: {hint}")));
    }
    let manners = Manners { token, patterns: arguments.patterns.clone() };
    // Of the root only one directory is used, which is closed by itself: a volume of a cluster may belong to its group.
    set_umask();
    let (journal, left) = Journal::open(&config.root).map_err(|error| fail(Exit::Local, error.to_string()))?;
    if !left.is_empty() {
        tracing::info!("{} images are left to do", left.len());
    }
    let queue = Queue::new(Bounds { jobs: arguments.jobs, waiting: arguments.queue }, left, clock::seconds());
    let work: Work = Arc::new(move |job| {
        let settings = Arc::clone(&settings);
        Box::pin(async move { settings.carry_out(job).await })
    });
    image::run_to_end(serve(arguments, manners, queue, journal, work))
}

/// Serves until a signal, and then until what runs has ended, or the time is up.
async fn serve(
    arguments: &ServeWebhook,
    manners: Manners,
    queue: Queue,
    journal: Journal,
    work: Work,
) -> anyhow::Result<()> {
    let mut signals = Signals::catch()?;
    let (events, address) = listen(arguments.listen).await?;
    let health = match arguments.health_listen {
        Some(wanted) => {
            let (listener, address) = listen(wanted).await?;
            tracing::info!("also answering probes at {address}");
            Some(listener)
        }
        None => None,
    };
    let mailbox = clerk::start(queue, journal, work);
    tracing::info!("listening at {address} for events of {}", arguments.registry);
    let (stop, stopped) = watch::channel(false);
    let serving = tokio::spawn(server::serve(Listeners { events, health }, manners, mailbox.clone(), stopped));
    signals.next().await;
    // The other end may have failed already.
    let _ = stop.send(true);
    tracing::info!("ending: what runs has {:?}", arguments.drain);
    tokio::select! {
        closed = mailbox.close() => closed.context("what runs was lost sight of")?,
        () = tokio::time::sleep(arguments.drain) => {
            tracing::warn!("not everything ended in time; it is done after the next start");
        }
        () = signals.next() => {}
    }
    serving.abort();
    Ok(())
}

/// Listens, and says where: the port may be any.
async fn listen(wanted: SocketAddr) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let busy = |error: std::io::Error| fail(Exit::Local, format!("cannot listen at {wanted}: {error}"));
    let listener = TcpListener::bind(wanted).await.map_err(busy)?;
    let address = listener.local_addr().map_err(busy)?;
    Ok((listener, address))
}

/// The secret's digest: more is not kept.
fn read_token(path: &Path) -> anyhow::Result<Digest> {
    let failed = |reason: String| fail(Exit::Usage, format!("cannot use the token in {}: {reason}", path.display()));
    let file = std::fs::File::open(path).map_err(|error| failed(error.to_string()))?;
    let mut text = Vec::new();
    file.take(TOKEN_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| failed(error.to_string()))?;
    if text.len() as u64 > TOKEN_BYTES_MAX {
        return Err(failed(format!("it has more than {TOKEN_BYTES_MAX} bytes")));
    }
    let token = text.trim_ascii();
    if token.is_empty() {
        return Err(failed("the file is empty".to_owned()));
    }
    Ok(Digest::of(token))
}

/// What is the same for all jobs.
struct Settings {
    registry: String,
    to: Option<String>,
    v2: bool,
    sign_with: Option<String>,
    replaces_signed: bool,
    /// Whose signatures count.
    trust: Arc<Trust>,
    client: ClientOptions,
    build: Build,
    platforms: Platforms,
    global: Global,
}

impl Settings {
    fn new(arguments: &ServeWebhook, global: &Global) -> anyhow::Result<Self> {
        let registry = arguments.registry.clone();
        let parsed: Option<RegistryReference> = format!("{registry}/team/app:tag").parse().ok();
        if parsed.is_none_or(|parsed| parsed.registry() != registry || parsed.repository() != "team/app") {
            return Err(fail(Exit::Usage, format!("--registry {registry} is no registry: expected HOST or HOST:PORT")));
        }
        let client = ClientOptions { is_interactive: false, ..image::client_options(&arguments.indexing.access)? };
        if let Some(to) = &arguments.to {
            image::repository(to, &client)?;
        }
        arguments.sign_with.as_deref().map(sign::check).transpose()?;
        let is_strict = arguments.v2 || arguments.sign_with.is_some();
        let signed_by = image::signers(&arguments.signers, is_strict)?;
        let trust = signed_by.clone().unwrap_or_default();
        let read = if arguments.v2 { Build::within } else { Build::beside };
        let build = read(&arguments.indexing, signed_by)?;
        let mut platforms = arguments.indexing.platforms.clone();
        platforms.all_platforms |= platforms.platforms.is_empty();
        image::selection(&platforms)?;
        Ok(Self {
            registry,
            to: arguments.to.clone(),
            v2: arguments.v2,
            sign_with: arguments.sign_with.clone(),
            replaces_signed: arguments.replace_signed || arguments.sign_with.is_some(),
            trust,
            client,
            build,
            platforms,
            // Images are in the registry; a containerd that the environment names is no place to look for them.
            global: Global { address: None, namespace: None, ..global.clone() },
        })
    }

    /// Does a job, in the time that `--timeout` allows.
    async fn carry_out(&self, job: Job) -> End {
        let Push { repository, tag, digest } = &job.push;
        tracing::info!("{repository}:{tag}: indexing {digest}");
        let work = async { if self.v2 { self.convert(&job).await } else { self.publish(&job).await } };
        let result = match self.global.timeout {
            limit if limit.is_zero() => work.await,
            limit => tokio::time::timeout(limit, work)
                .await
                .unwrap_or_else(|_| Err(fail(Exit::Registry, format!("it did not end within --timeout {limit:?}")))),
        };
        result.map_or_else(|error| end_of(&error), |(outcome, message)| End::Done { outcome, message })
    }

    async fn publish(&self, job: &Job) -> anyhow::Result<(Outcome, String)> {
        let Push { repository, tag, digest } = &job.push;
        let plan = Plan {
            image: self.reference(&format!("{repository}:{tag}@{digest}"))?,
            to: self.to.as_deref(),
            client: &self.client,
            build: &self.build,
            platforms: &self.platforms,
            dry_run: false,
            will_sign: self.sign_with.is_some(),
        };
        let published = plan.carry_out(&self.global).await?;
        let up_to_date = published.up_to_date();
        let made: Vec<Digest> = published.reports.iter().flat_map(|(_, report)| report.indexes()).collect();
        self.sign_all(&published.target, &made).await?;
        sign::look_back(&published.target, &made).await;
        let indexes: Vec<String> = made.iter().map(|index| format!("{}@{index}", published.target)).collect();
        Ok((if up_to_date { Outcome::UpToDate } else { Outcome::Published }, indexes.join(", ")))
    }

    async fn convert(&self, job: &Job) -> anyhow::Result<(Outcome, String)> {
        let Push { repository, tag, digest } = &job.push;
        let conversion = Conversion {
            source: self.reference(&format!("{repository}:{tag}@{digest}"))?,
            target: convert::target(&format!("{}/{repository}:{tag}", self.registry), &self.client)?,
            client: self.client.clone(),
            notes: EntryNotes::Kept,
            build: self.build.clone(),
            selection: image::selection(&self.platforms)?,
            replaces: Some(*digest),
            local: None,
            replaces_signed: self.replaces_signed,
            signed_hint: "the image is signed: have new ones signed by --sign-with COMMAND, or say --replace-signed",
        };
        let converted: Converted = conversion.carry_out(&self.global).await?;
        let spans = converted.images.iter().filter_map(|(_, report)| Some(report.spans.as_ref()?.index));
        let name = |digest: Digest| format!("{}/{repository}@{digest}", self.registry);
        let made: Vec<String> = std::iter::once(converted.digest).chain(spans).map(name).collect();
        if let Some(repository) = conversion.target.repository() {
            self.sign_all(repository, &converted.signable).await?;
            sign::look_back(repository, &converted.signable).await;
        }
        Ok((if converted.up_to_date { Outcome::UpToDate } else { Outcome::Published }, made.join(", ")))
    }

    /// Has manifests signed that do not bear a good signature of one that counts.
    async fn sign_all(&self, repository: &Repository, manifests: &[Digest]) -> anyhow::Result<()> {
        let Some(command) = &self.sign_with else { return Ok(()) };
        sign::sign_all(command, repository, manifests, &self.trust).await
    }

    /// A name in the one registry.
    fn reference(&self, name: &str) -> anyhow::Result<Reference> {
        let text = format!("{}/{name}", self.registry);
        let parsed = image::reference(&text)?;
        match &parsed {
            Reference::Registry(image) if image.registry() == self.registry => Ok(parsed),
            _ => Err(fail(Exit::Usage, format!("{text} is not in {}", self.registry))),
        }
    }
}

/// Whether a failure may pass.
fn end_of(error: &anyhow::Error) -> End {
    let message = crate::report::exit::message(error);
    let done = |outcome| End::Done { outcome, message: message.clone() };
    let is_moved =
        |cause: &(dyn std::error::Error + 'static)| matches!(cause.downcast_ref(), Some(PublishError::Moved { .. }));
    if error.chain().any(is_moved) {
        return done(Outcome::Superseded);
    }
    if error.chain().any(is_no_image) {
        return done(Outcome::Nothing);
    }
    if error.chain().filter_map(registry_error).any(is_forbidden_for_now) {
        return End::Rest { message };
    }
    match code(error) {
        Exit::NothingToIndex => done(Outcome::Nothing),
        Exit::BadContent | Exit::Refused | Exit::Usage => done(Outcome::Failed),
        Exit::UpToDate | Exit::Success => done(Outcome::UpToDate),
        // The disk is emptied, the registry comes back, credentials are renewed, the image is replicated.
        Exit::Failure | Exit::Credentials | Exit::Registry | Exit::Local | Exit::Signing | Exit::Interrupted => {
            End::Again { message }
        }
    }
}

/// What the registry said, by whichever error passes it on.
fn registry_error<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a RegistryError> {
    let of_image = |error: &'a ImageError| match error {
        ImageError::Registry(error) => Some(error),
        _ => None,
    };
    match cause.downcast_ref::<PublishError>() {
        Some(PublishError::Registry(error) | PublishError::Beside { source: error }) => Some(error),
        Some(PublishError::Sink(SinkError::Registry(error))) => Some(error),
        Some(
            PublishError::Image(error)
            | PublishError::Build(BuildError::Image(error))
            | PublishError::Sink(SinkError::Image(error)),
        ) => of_image(error),
        Some(_) => None,
        None => cause.downcast_ref().or_else(|| of_image(cause.downcast_ref()?)),
    }
}

/// Whether a policy or a state of the registry forbids what an administrator may admit later: content that is not
/// signed, an immutable tag, a full quota, read-only mode.
fn is_forbidden_for_now(error: &RegistryError) -> bool {
    match error {
        RegistryError::Status { status: 403 | 405 | 412, .. } => true,
        RegistryError::Unauthorized { message, .. } => {
            let message = message.to_lowercase();
            ["quota", "upper limit", "read only", "read-only", "readonly"].iter().any(|word| message.contains(word))
        }
        _ => false,
    }
}

/// A chart, a policy, a module: registries hold many things under tags.
fn is_no_image(cause: &(dyn std::error::Error + 'static)) -> bool {
    let image = match cause.downcast_ref() {
        Some(PublishError::Image(error)) => Some(error),
        _ => cause.downcast_ref::<ImageError>(),
    };
    matches!(image, Some(ImageError::NotAnImage { .. } | ImageError::NoImage { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_tried_again() {
        let digest = Box::new(Digest::of(b""));
        let not_an_image = ImageError::NotAnImage { image: "a".into(), digest: digest.clone(), kind: "chart".into() };
        let moved = PublishError::Moved { image: "a".into(), expected: digest, there: None };
        for (error, expected) in [
            (fail(Exit::Credentials, "x"), None),
            (fail(Exit::Registry, "x"), None),
            (fail(Exit::Signing, "x"), None),
            (fail(Exit::Refused, "x"), Some(Outcome::Failed)),
            (fail(Exit::BadContent, "x"), Some(Outcome::Failed)),
            (fail(Exit::NothingToIndex, "x"), Some(Outcome::Nothing)),
            (anyhow::Error::from(not_an_image).context("for linux/amd64"), Some(Outcome::Nothing)),
            (anyhow::Error::from(moved).context("converting"), Some(Outcome::Superseded)),
        ] {
            let outcome = match end_of(&error) {
                End::Done { outcome, .. } => Some(outcome),
                End::Again { .. } | End::Rest { .. } => None,
            };
            assert_eq!(outcome, expected, "{error:#}");
        }
    }

    #[test]
    fn what_rests() {
        let status = |status, message: &str| RegistryError::Status {
            registry: "h".into(),
            repository: "team/app".into(),
            what: "pushing".into(),
            status,
            code: None,
            message: message.into(),
        };
        let denied = |message: &str| RegistryError::Unauthorized {
            registry: "h".into(),
            repository: "team/app".into(),
            scope: "push".into(),
            credentials: "no credentials",
            message: message.into(),
            challenged: false,
            login: soci_index::registry::LoginVerdict::None,
        };
        for (error, expected) in [
            (status(412, "PROJECTPOLICYVIOLATION"), true),
            (status(403, "The system is in read only mode"), true),
            (
                denied("adding 1 MiB of storage resource, which when updated will exceed the configured upper limit"),
                true,
            ),
            (denied("The system is in read only mode. Any modification is prohibited."), true),
            (denied("not yours"), false),
            (status(415, "media type"), false),
            (status(503, "busy"), false),
        ] {
            let shown = error.to_string();
            let rests = |error: &anyhow::Error| matches!(end_of(error), End::Rest { .. });
            assert_eq!(rests(&anyhow::Error::from(error.clone()).context("for linux/amd64")), expected, "{shown}");
            assert_eq!(rests(&PublishError::Registry(error.clone()).into()), expected, "{shown}");
            assert_eq!(rests(&PublishError::Sink(SinkError::Registry(error)).into()), expected, "{shown}");
        }
    }

    #[test]
    fn tokens() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        std::fs::write(&file, "Bearer s3cret\n").unwrap();
        assert_eq!(read_token(&file).unwrap(), Digest::of(b"Bearer s3cret"));
        for text in [String::new(), "\n".to_owned(), "x".repeat(9000)] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(code(&read_token(&file).unwrap_err()), Exit::Usage);
        }
    }
}
