//! What registries send when something was pushed, read into what was pushed where.
//!
//! Three forms: Harbor's default payload, the same data as a CloudEvent, and the notifications of the distribution
//! project's registry. Pure. A body that has one of these forms is understood as a whole or refused as malformed; what
//! it announces may still be ignored, each for a [`Reason`]. Harbor fires for every manifest, also for the indexes that
//! we push; it then gives the digest in the place of the tag. So whatever has no tag of its own is left alone: that is
//! what keeps this server from answering itself.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::RegistryReference;

/// A place in a reference where only the rest of it is looked at.
const ANY_HOST: &str = "registry.invalid";
/// Letters of untrusted text that are repeated in responses and logs.
const SHOWN_MAX: usize = 200;
/// Hexadecimal digits of a digest in the tag of what belongs to an image.
const DIGEST_DIGITS: usize = 64;

/// A tagged manifest that was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PushFields")]
pub struct Push {
    /// The repository, without a host.
    pub repository: String,
    pub tag: String,
    /// What the tag named then.
    pub digest: Digest,
}

/// A [`Push`] as it is deserialised.
#[derive(Debug, Deserialize)]
struct PushFields {
    repository: String,
    tag: String,
    digest: String,
}

impl TryFrom<PushFields> for Push {
    type Error = Reason;

    fn try_from(fields: PushFields) -> Result<Self, Reason> {
        Self::new(&fields.repository, &fields.tag, &fields.digest)
    }
}

impl Push {
    /// Takes names that are names.
    ///
    /// # Errors
    /// [`Reason::Name`].
    pub fn new(repository: &str, tag: &str, digest: &str) -> Result<Self, Reason> {
        let text = format!("{repository}:{tag}@{digest}");
        let name = |text: &str| Reason::Name { text: shown(text) };
        let parsed: RegistryReference = format!("{ANY_HOST}/{text}").parse().map_err(|_| name(&text))?;
        let digest = parsed.digest().filter(|parsed| parsed.to_string() == digest).ok_or_else(|| name(&text))?;
        if parsed.registry() != ANY_HOST || parsed.repository() != repository || parsed.tag() != Some(tag) {
            return Err(name(&text));
        }
        Ok(Self { repository: repository.to_owned(), tag: tag.to_owned(), digest })
    }
}

/// Why a push that a body announces is ignored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Something else than a push.
    #[error("{kind:?} is no push")]
    Kind { kind: String },
    /// It has no tag: a child of an image index, or an artifact such as our own index.
    #[error("{repository}@{digest} has no tag")]
    NoTag { repository: String, digest: String },
    /// A list of referrers, a signature, an attestation, a bill of materials.
    #[error("{repository}:{tag} belongs to an image and is none")]
    Companion { repository: String, tag: String },
    /// The media type is not that of an image.
    #[error("{repository}: {media_type:?} is no image")]
    MediaType { repository: String, media_type: String },
    /// What is announced is no valid reference.
    #[error("{text:?} is no reference to an image")]
    Name { text: String },
    /// None of the patterns is for this repository.
    #[error("{repository} is not wanted: no --match is for it")]
    Unwanted { repository: String },
}

/// Why a body was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    #[error("the body is no JSON: {reason}")]
    Json { reason: String },
    /// It is JSON of another form.
    #[error("the body is no event of Harbor's, no CloudEvent of Harbor's and no list of a registry's notifications")]
    Unknown,
    /// It has the form and lacks a part.
    #[error("the event {kind} is malformed: {reason}")]
    Malformed { kind: &'static str, reason: String },
}

/// What a body announces.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Events {
    pub pushes: Vec<Push>,
    /// What is left alone.
    pub ignored: Vec<Reason>,
    /// The repositories of what is left alone: a signature that was pushed may change what is admitted there.
    pub stirred: Vec<String>,
}

impl Events {
    /// Reads a body.
    ///
    /// # Errors
    /// [`EventError`].
    pub fn parse(body: &[u8]) -> Result<Self, EventError> {
        let value: Value =
            serde_json::from_slice(body).map_err(|error| EventError::Json { reason: error.to_string() })?;
        if value.get("events").is_some() {
            return Ok(Self::of_distribution(&part("notification", &value)?));
        }
        match value.get("type").and_then(Value::as_str) {
            Some("PUSH_ARTIFACT") => Ok(Self::of_harbor(&part::<HarborDefault>("PUSH_ARTIFACT", &value)?.event_data)),
            Some("harbor.artifact.pushed") => {
                Ok(Self::of_harbor(&part::<HarborCloud>("harbor.artifact.pushed", &value)?.data))
            }
            Some(kind) => {
                let repository = ["event_data", "data"]
                    .iter()
                    .find_map(|data| value.get(data)?.get("repository")?.get("repo_full_name")?.as_str());
                // Reading changes nothing, and is what we do ourselves.
                let is_pull = kind.to_ascii_lowercase().contains("pull");
                let stirred = repository.filter(|_| !is_pull).map(shown).into_iter().collect();
                Ok(Self { ignored: vec![Reason::Kind { kind: shown(kind) }], stirred, ..Self::default() })
            }
            None => Err(EventError::Unknown),
        }
    }

    /// Leaves alone what is not wanted.
    #[must_use]
    pub fn only(mut self, is_wanted: impl Fn(&Push) -> bool) -> Self {
        let (wanted, others) = std::mem::take(&mut self.pushes).into_iter().partition(|push| is_wanted(push));
        self.pushes = wanted;
        let others: Vec<Push> = others;
        self.ignored.extend(others.into_iter().map(|push| Reason::Unwanted { repository: push.repository }));
        self
    }

    fn of_harbor(data: &HarborData) -> Self {
        let mut events = Self::default();
        for resource in &data.resources {
            events.add(&data.repository.repo_full_name, resource.tag.as_deref(), &resource.digest);
        }
        events
    }

    fn of_distribution(notification: &Notification) -> Self {
        let mut events = Self::default();
        for event in &notification.events {
            if event.action != "push" {
                events.ignored.push(Reason::Kind { kind: shown(&event.action) });
                // Reading changes nothing.
                if event.action == "delete" {
                    events.stirred.push(shown(&event.target.repository));
                }
                continue;
            }
            let target = &event.target;
            let is_image = |kind: &str| media_type::is_manifest(kind) || media_type::is_index(kind);
            match target.media_type.as_deref() {
                Some(kind) if !is_image(kind) => events
                    .ignored
                    .push(Reason::MediaType { repository: shown(&target.repository), media_type: shown(kind) }),
                _ => events.add(&target.repository, target.tag.as_deref(), &target.digest),
            }
        }
        events
    }

    fn add(&mut self, repository: &str, tag: Option<&str>, digest: &str) {
        let read = match tag {
            // Harbor gives the digest where there is no tag.
            None | Some("") => Err(Reason::NoTag { repository: shown(repository), digest: shown(digest) }),
            Some(tag) if tag == digest => Err(Reason::NoTag { repository: shown(repository), digest: shown(digest) }),
            Some(tag) if is_companion(tag) => Err(Reason::Companion { repository: shown(repository), tag: shown(tag) }),
            Some(tag) => Push::new(repository, tag, digest),
        };
        match read {
            Ok(push) => self.pushes.push(push),
            Err(reason) => {
                self.ignored.push(reason);
                self.stirred.push(shown(repository));
            }
        }
    }
}

/// Whether a tag is one of those that tools make from an image's digest: `sha256-...`, with or without an ending.
fn is_companion(tag: &str) -> bool {
    let rest = ["sha256-", "sha512-"].iter().find_map(|start| tag.strip_prefix(start));
    rest.is_some_and(|rest| {
        let digits = rest.bytes().take_while(u8::is_ascii_hexdigit).count();
        digits >= DIGEST_DIGITS && rest[digits..].chars().next().is_none_or(|next| next == '.')
    })
}

fn part<T: for<'d> Deserialize<'d>>(kind: &'static str, value: &Value) -> Result<T, EventError> {
    T::deserialize(value).map_err(|error| EventError::Malformed { kind, reason: shown(&error.to_string()) })
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_MAX).collect()
}

#[derive(Debug, Deserialize)]
struct HarborDefault {
    event_data: HarborData,
}

#[derive(Debug, Deserialize)]
struct HarborCloud {
    data: HarborData,
}

#[derive(Debug, Deserialize)]
struct HarborData {
    resources: Vec<HarborResource>,
    repository: HarborRepository,
}

#[derive(Debug, Deserialize)]
struct HarborResource {
    digest: String,
    tag: Option<String>,
}

#[derive(Debug, Deserialize)]
struct HarborRepository {
    repo_full_name: String,
}

#[derive(Debug, Deserialize)]
struct Notification {
    events: Vec<Notified>,
}

#[derive(Debug, Deserialize)]
struct Notified {
    action: String,
    target: NotifiedTarget,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NotifiedTarget {
    media_type: Option<String>,
    digest: String,
    repository: String,
    tag: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn harbor(tag: &str) -> Value {
        json!({
            "type": "PUSH_ARTIFACT", "occur_at": 1_680_501_893, "operator": "robot$team+ci",
            "event_data": {
                "resources": [{ "digest": D, "tag": tag, "resource_url": format!("elsewhere.example/team/app:{tag}") }],
                "repository": {
                    "date_created": 1_680_501_893, "name": "app", "namespace": "team", "repo_full_name": "team/app",
                    "repo_type": "private",
                },
            },
        })
    }

    fn cloud(tag: &str) -> Value {
        let mut event = json!({
            "specversion": "1.0", "id": "66e1", "source": "/projects/2/webhook/policies/15",
            "type": "harbor.artifact.pushed", "datacontenttype": "application/json", "time": "2026-04-03T06:04:46Z",
            "operator": "admin",
        });
        event["data"] = harbor(tag)["event_data"].clone();
        event
    }

    fn distribution(action: &str, kind: &str, tag: Option<&str>) -> Value {
        let mut target = json!({ "mediaType": kind, "size": 7, "digest": D, "length": 7, "repository": "team/app",
            "url": "http://elsewhere.example/v2/team/app/manifests/x" });
        if let Some(tag) = tag {
            target["tag"] = tag.into();
        }
        json!({ "events": [{ "id": "1", "timestamp": "2026-01-01T00:00:00Z", "action": action, "target": target }] })
    }

    fn parsed(event: &Value) -> Events {
        Events::parse(event.to_string().as_bytes()).unwrap_or_else(|error| panic!("{event}: {error}"))
    }

    #[test]
    fn pushes_of_every_form() {
        let push = Push::new("team/app", "v1", D).unwrap();
        for event in [
            harbor("v1"),
            cloud("v1"),
            distribution("push", media_type::MANIFEST, Some("v1")),
            distribution("push", media_type::INDEX, Some("v1")),
            distribution("push", media_type::DOCKER_LIST, Some("v1")),
        ] {
            assert_eq!(parsed(&event), Events { pushes: vec![push.clone()], ..Events::default() }, "{event}");
        }
    }

    #[test]
    fn what_is_left_alone() {
        let list = format!("sha256-{}", &D[7..]);
        let mut other = harbor("v1");
        other["type"] = "SCANNING_COMPLETED".into();
        for (event, reason) in [
            // As Harbor announces our own index, and the children of an image index.
            (harbor(D), "has no tag"),
            (harbor(""), "has no tag"),
            (cloud(D), "has no tag"),
            (harbor(&list), "belongs to an image"),
            (harbor(&format!("{list}.sig")), "belongs to an image"),
            (harbor(&format!("{list}.att")), "belongs to an image"),
            (harbor(&format!("{list}.sbom")), "belongs to an image"),
            (other, "\"SCANNING_COMPLETED\" is no push"),
            (json!({ "type": "harbor.artifact.deleted" }), "is no push"),
            (distribution("pull", media_type::MANIFEST, Some("v1")), "\"pull\" is no push"),
            (distribution("push", media_type::MANIFEST, None), "has no tag"),
            (distribution("push", "application/octet-stream", None), "is no image"),
            (harbor("not a tag"), "is no reference"),
        ] {
            let events = parsed(&event);
            assert_eq!((events.pushes.len(), events.ignored.len()), (0, 1), "{event}");
            assert!(events.ignored[0].to_string().contains(reason), "{event}: {}", events.ignored[0]);
        }
    }

    #[test]
    fn what_stirs_a_repository() {
        let of_kind = |kind: &str, mut event: Value| {
            event["type"] = kind.into();
            event
        };
        for (event, stirs) in [
            (harbor(D), true),
            (harbor(&format!("sha256-{}.sig", &D[7..])), true),
            (of_kind("DELETE_ARTIFACT", harbor("v1")), true),
            (of_kind("harbor.artifact.deleted", cloud("v1")), true),
            (distribution("delete", media_type::MANIFEST, None), true),
            (of_kind("PULL_ARTIFACT", harbor("v1")), false),
            (of_kind("harbor.artifact.pulled", cloud("v1")), false),
            (distribution("pull", media_type::MANIFEST, Some("v1")), false),
            (distribution("push", "application/octet-stream", None), false),
        ] {
            let expected: &[&str] = if stirs { &["team/app"] } else { &[] };
            assert_eq!(parsed(&event).stirred, expected, "{event}");
        }
    }

    #[test]
    fn tags_of_people_are_no_companions() {
        for tag in ["v1", "sha-0123456789012345678901234567890123456789", "sha256-0123", "sha256", &"a".repeat(64)] {
            assert!(!is_companion(tag), "{tag}");
        }
        assert!(!is_companion(&format!("sha256-{}-debug", "0".repeat(64))));
        assert!(is_companion(&format!("sha512-{}", "0".repeat(64))));
    }

    /// No name leads out of the repository's place in a reference.
    #[test]
    fn names_are_names() {
        let long = "a/".repeat(200);
        for (repository, tag, digest) in [
            ("team/app@sha256:00", "v1", D),
            ("team/app:v2", "v1", D),
            ("Team/App", "v1", D),
            ("../app", "v1", D),
            ("", "v1", D),
            ("team//app", "v1", D),
            ("team/app?x=1", "v1", D),
            ("team/app", "v1@sha256:00", D),
            ("team/app", "v1", "sha256:00"),
            ("team/app", "v1", "md5:00"),
            ("team/app", "v1", ""),
            (long.as_str(), "v1", D),
        ] {
            let read = Push::new(repository, tag, digest);
            assert!(matches!(read, Err(Reason::Name { .. })), "{repository} {tag} {digest}: {read:?}");
        }
        let json = serde_json::to_string(&Push::new("team/app", "v1", D).unwrap()).unwrap();
        assert!(serde_json::from_str::<Push>(&json).is_ok());
        assert!(serde_json::from_str::<Push>(&json.replace("team/app", "team/app:x")).is_err());
    }

    #[test]
    fn malformed_bodies() {
        let mut without = harbor("v1");
        without["event_data"]["repository"] = json!({});
        for (body, text) in [
            (String::new(), "no JSON"),
            ("{".to_owned(), "no JSON"),
            ("[]".to_owned(), "no event of Harbor's"),
            ("{}".to_owned(), "no event of Harbor's"),
            (r#"{"type":7}"#.to_owned(), "no event of Harbor's"),
            (r#"{"type":"PUSH_ARTIFACT"}"#.to_owned(), "event_data"),
            (without.to_string(), "repo_full_name"),
            (r#"{"events":{}}"#.to_owned(), "notification is malformed"),
            (r#"{"events":[{"action":"push"}]}"#.to_owned(), "target"),
        ] {
            let error = Events::parse(body.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(text), "{body}: {error}");
        }
    }

    #[test]
    fn only_what_is_wanted() {
        let events = parsed(&harbor("v1")).only(|push| push.repository != "team/app");
        assert_eq!(events.ignored, [Reason::Unwanted { repository: "team/app".to_owned() }]);
        assert_eq!(events.pushes, []);
    }
}
