//! Registries as they are elsewhere: one that runs here, with the manners of those that cannot.
//!
//! What a registry does differently from the specification is a field of [`Quirks`], with the place of our notes on
//! registries that it was taken from; a [`Profile`] is a set of them under the registry's name. The content is kept by
//! the demonstration's registry, and [`ProfiledRegistry`] stands in front of it: it asks for logins, answers in its
//! place, and changes its answers. None of this has been seen on the real thing by us: a profile says what is
//! documented.

use std::time::Duration;

mod login;
mod server;

pub use self::server::ProfiledRegistry;

/// A registry that is known for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Harbor 2.8.
    Harbor28,
    /// Harbor 2.9.
    Harbor29,
    /// Harbor 2.10.
    Harbor210,
    /// Harbor 2.11.
    Harbor211,
    /// Harbor 2.15.
    Harbor215,
    GitLab,
    /// GitLab where it takes the dash in a tag for a colon.
    GitLabDash,
    /// Amazon ECR.
    Ecr,
    /// GitHub's container registry.
    Ghcr,
    DockerHub,
    /// Quay, as AWS's documents describe quay.io.
    Quay,
    GoogleArtifactRegistry,
    /// Artifactory, before it had the API.
    Artifactory,
    /// Azure's container registry.
    Acr,
    Zot,
}

/// What becomes of a question for referrers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// It is answered.
    Native,
    /// It is answered under the content type `application/json` (section 5.1).
    Json,
    /// There is nothing (section 4).
    Absent,
    /// The client is sent to log in elsewhere (section 4).
    LoginPage,
}

/// How a registry authenticates clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Login {
    /// For a password with every request.
    Basic,
    /// For a token of its token service.
    Token,
    /// The same; but a token that lacks rights is answered with a Basic challenge, and `access_token` is empty
    /// (section 5.3).
    HarborToken,
}

/// What a registry does differently.
#[derive(Debug, Clone, Copy)]
pub struct Quirks {
    /// What becomes of a question for referrers (sections 4 and 5.1).
    pub api: Api,
    /// Whether it says `OCI-Subject` when it takes a referrer (section 5.1).
    pub says_subject: bool,
    /// Whether it lists the size of all that belongs to an artifact as the size of its manifest (section 5.1).
    pub wrong_sizes: bool,
    /// The status with which it refuses tags like `sha256-...` (section 4).
    pub refuses_tag: Option<u16>,
    /// The status with which it refuses manifests whose configuration is not an image's, as registries did before there
    /// were artifacts, and as some proxies still do (section 7).
    pub refuses_artifacts: Option<u16>,
    /// Whether it takes `sha256-...` for a digest when it is asked for (section 3).
    pub dash_is_colon: bool,
    /// Whether it leaves out the `Location` of a manifest that it took (section 4).
    pub no_location: bool,
    /// Whether it refuses one good login as expired, with 403 and without a challenge (section 4).
    pub expires_once: bool,
    /// Whether it sends readers of blobs to storage at another address, by a signed URL (section 7).
    pub storage: bool,
    /// Whether it refuses Docker's media types (section 4).
    pub refuses_docker_types: bool,
    /// How it authenticates clients (sections 5.3 and 6).
    pub login: Login,
    /// The status with which its token service refuses the form; clients come with an identity token then (section 4).
    pub form: Option<u16>,
    /// How long it takes to every answer: it is far away.
    pub latency: Duration,
    /// What stops working on request ([`ProfiledRegistry::break_down`]).
    pub broken: Option<Broken>,
}

/// Requests that fail.
#[derive(Debug, Clone, Copy)]
pub struct Broken {
    /// Their method.
    pub method: &'static str,
    /// What their path contains.
    pub path: &'static str,
    /// How they are answered; 0 is not at all.
    pub status: u16,
}

impl Broken {
    fn meets(&self, method: &str, path: &str) -> bool {
        method == self.method && path.contains(self.path)
    }
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Harbor28,
        Self::Harbor29,
        Self::Harbor210,
        Self::Harbor211,
        Self::Harbor215,
        Self::GitLab,
        Self::GitLabDash,
        Self::Ecr,
        Self::Ghcr,
        Self::DockerHub,
        Self::Quay,
        Self::GoogleArtifactRegistry,
        Self::Artifactory,
        Self::Acr,
        Self::Zot,
    ];

    /// What it does differently.
    #[must_use]
    pub fn quirks(self) -> Quirks {
        let plain = Quirks {
            api: Api::Native,
            says_subject: true,
            wrong_sizes: false,
            refuses_tag: None,
            refuses_artifacts: None,
            dash_is_colon: false,
            no_location: false,
            expires_once: false,
            storage: false,
            refuses_docker_types: false,
            login: Login::Token,
            form: None,
            latency: Duration::ZERO,
            broken: None,
        };
        let harbor = Quirks { login: Login::HarborToken, form: None, ..plain };
        let without = Quirks { api: Api::Absent, says_subject: false, ..plain };
        match self {
            Self::Harbor28 => Quirks { api: Api::Json, says_subject: false, wrong_sizes: true, ..harbor },
            Self::Harbor29 => Quirks { api: Api::Json, wrong_sizes: true, ..harbor },
            Self::Harbor210 => Quirks { wrong_sizes: true, ..harbor },
            Self::Harbor211 | Self::Harbor215 => harbor,
            Self::GitLab => without,
            Self::GitLabDash => Quirks { dash_is_colon: true, ..without },
            Self::Ecr => Quirks { login: Login::Basic, no_location: true, expires_once: true, storage: true, ..plain },
            Self::Ghcr => Quirks { storage: true, ..without },
            Self::DockerHub => Quirks { storage: true, ..plain },
            Self::Quay => Quirks { refuses_tag: Some(400), storage: true, ..without },
            Self::GoogleArtifactRegistry => Quirks { api: Api::LoginPage, ..without },
            Self::Artifactory => Quirks { form: Some(401), ..without },
            Self::Acr => Quirks { form: Some(400), storage: true, ..plain },
            Self::Zot => Quirks { refuses_docker_types: true, login: Login::Basic, ..plain },
        }
    }
}
