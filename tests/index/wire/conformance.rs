//! What a client must do, point by point, and which test holds it to that.
//!
//! There is no suite for clients of registries. This list stands in for one: its points are those that real registries
//! and published mistakes of other clients have taught. What has no place elsewhere is tested here.

use std::path::Path;

use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_index::registry::referrers::{ApiAnswer, FoundBy};
use soci_index::registry::upload::PushedBlob;
use soci_index::registry::{Body, RegistryError};

use crate::wire::server::{Server, reply, with_password};

/// Each point with its tests, as `file::function`.
const POINTS: [(&str, &[&str]); 31] = [
    ("absolute and relative Location, with its query", &["push::locations", "chunks::chunk_by_chunk"]),
    ("201 and 202 to a mount", &["push::mounts"]),
    ("a mount that may not be read is an upload", &["push::a_source_that_may_not_be_read_is_no_obstacle"]),
    ("two scopes for a mount", &["push::a_mount_asks_for_two_scopes"]),
    ("accepted is not stored", &["push::accepted_is_not_yet_stored"]),
    (
        "chunks: order, smallest size, offsets, resuming",
        &[
            "chunks::chunk_by_chunk",
            "chunks::a_registry_names_the_smallest_chunk",
            "chunks::a_broken_chunk_is_continued",
            "chunks::what_was_lost_is_read_again",
            "chunks::too_large_for_one_request",
            "chunks::one_chunk_is_held_at_a_time",
        ],
    ),
    ("the digest of all that is read", &["manifests::wrong_manifests", "ranges::whole_blobs_are_checked"]),
    ("Accept names four kinds of manifests", &["manifests::bytes_are_kept_as_they_are"]),
    ("no login for a redirect's target", &["redirects::the_target_is_kept_and_gets_no_credentials"]),
    ("nor on the way back from it", &["redirects::back_home_is_not_home"]),
    (
        "nor for an upload elsewhere",
        &["push::an_upload_elsewhere_gets_no_credentials", "chunks::chunks_elsewhere_get_no_credentials"],
    ),
    ("nor for a next page elsewhere", &["referrers::pages_elsewhere_are_not_asked"]),
    ("nor for a realm that a registry may not name", &["auth::realms_elsewhere_get_nothing"]),
    ("nor for another host of the registry", &["mirrors/secrets::every_host_gets_its_own_credentials"]),
    ("a list under another content type is no list", &["referrers::not_the_api", "fallback::who_will_see_it"]),
    ("an unknown name is no missing API", &["referrers::an_unknown_name_is_empty"]),
    ("no access is no missing API", &["referrers::no_access_is_not_no_api"]),
    ("filtering, also here", &["referrers::filtered_here_as_well"]),
    ("all pages", &["referrers::pages", "referrers::pages_without_end"]),
    ("the tag: a new one, with type and annotations, once", &["fallback::a_new_tag"]),
    ("the tag: others' entries stay", &["fallback::a_concurrent_writer_drops_our_entry_once"]),
    ("the tag: what is no list is left alone", &["fallback::foreign_tags_are_left_alone"]),
    (
        "the tag: a lost race is repaired",
        &["fallback::sixteen_writers_at_once", "fallback::a_writer_that_never_gives_way"],
    ),
    ("neither API nor tag", &["fallback::a_registry_that_takes_neither"]),
    ("works where nothing can be read back", &["push::a_policy_on_reading_does_not_stop_a_push"]),
    (
        "429 and Retry-After",
        &["ranges::busy_servers", "ranges::a_pause_that_was_asked_for_is_kept", "conformance::busy_uploads_and_lists"],
    ),
    ("errors in HTML, or without a word", &["manifests::absence_is_a_value", "conformance::errors_of_any_form"]),
    ("a Warning is shown once", &["warnings::once_per_text"]),
    (
        "ranges: ignored, short, wrong, beyond the end, cut",
        &[
            "ranges::the_range_is_ignored",
            "ranges::a_shorter_part_is_continued",
            "ranges::a_wrong_part_is_refused",
            "ranges::beyond_the_end",
            "ranges::a_cut_body_is_resumed",
        ],
    ),
    (
        "an empty access_token is none",
        &["auth::anonymous_bearer_token_is_fetched_once", "auth::token_services_in_trouble"],
    ),
    (
        "Basic after Bearer, several challenges in one header",
        &["auth::harbors_basic_challenge_widens_the_scope", "conformance::several_challenges_in_one_header"],
    ),
];

/// No point has lost its test.
#[test]
fn every_point_has_its_tests() {
    for (point, tests) in POINTS {
        for test in tests {
            let (file, function) = test.split_once("::").unwrap();
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("index/wire/{file}.rs"));
            let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(text.contains(&format!("fn {function}()")), "{point}: {test}");
        }
    }
}

#[tokio::test]
async fn several_challenges_in_one_header() {
    let server = Server::start(|request| {
        if request.target.starts_with("/token") {
            return reply(200).body(r#"{"token":"abc"}"#);
        }
        if request.header("authorization") == Some("Bearer abc") {
            return reply(404);
        }
        let realm = format!("http://{}/token", request.header("host").unwrap());
        let challenges =
            format!("Basic realm=\"a, b\", Negotiate abc==, Bearer scope=\"x\",realm=\"{realm}\", Digest nonce=1");
        reply(401).header("www-authenticate", challenges)
    })
    .await;
    let name = ManifestName::Tag("t".into());
    assert_eq!(server.repository_with(with_password()).manifest(&name).await, Ok(None));
    assert!(server.lines()[1].starts_with("GET /token?scope="), "{:?}", server.lines());
}

#[tokio::test]
async fn busy_uploads_and_lists() {
    let busy = || reply(429).header("retry-after", "0").body("<html>slow down</html>");
    let opened = || reply(202).header("location", "/up");
    let server =
        Server::queue([busy(), reply(404), reply(503), reply(404), opened(), busy(), reply(404), opened(), reply(201)])
            .await;
    let pushed = server.repository().push_blob(&Digest::of(b"x"), Body::Bytes("x".into()), None).await;
    assert_eq!(pushed, Ok(PushedBlob::Uploaded));

    let list = reply(200).header("content-type", media_type::INDEX).body(r#"{"manifests":[]}"#);
    let server = Server::queue([busy(), reply(502).body("<html>"), list]).await;
    let answer = server.repository().referrers_api(&Digest::of(b"x"), None).await;
    assert_eq!(answer, Ok(ApiAnswer::Listed(Vec::new())));
    // One that is busy for ever has an API that is not there for the moment, which is not the same as none.
    let server = Server::start(move |_| reply(503)).await;
    let error = server.repository().referrers(&Digest::of(b"x"), None).await.unwrap_err();
    let is_busy = |answer: &str| answer == "HTTP 503";
    assert!(matches!(&error, RegistryError::NoReferrers { answer, .. } if is_busy(answer)), "{error:?}");
}

#[tokio::test]
async fn errors_of_any_form() {
    for (status, body, expected) in [
        (403, "", "HTTP 403"),
        (403, "<!DOCTYPE html><html><body>Forbidden</body></html>", "HTTP 403"),
        (400, r#"{"errors":[]}"#, "HTTP 400"),
        (400, r#"{"errors":[{"code":"TAG_INVALID","message":"bad\ntag","detail":{"x":1}}]}"#, "TAG_INVALID: bad tag"),
        (400, r#"{"message":"of another form"}"#, "HTTP 400"),
        (418, "\u{0}\u{1}binary", "HTTP 418"),
    ] {
        let server = Server::start(move |_| reply(status).body(body)).await;
        let error = server.repository().manifest(&ManifestName::Tag("t".into())).await.unwrap_err();
        let shown = error.to_string();
        assert!(matches!(error, RegistryError::Status { .. }), "{shown}");
        assert!(shown.contains(expected) && !shown.contains('<') && !shown.contains('\n'), "{shown}");
    }
    // An empty list is an answer, also where a list of nothing is null.
    let list = reply(200).header("content-type", media_type::INDEX).body(r#"{"schemaVersion":2,"manifests":null}"#);
    let server = Server::queue([list]).await;
    let found = server.repository().referrers(&Digest::of(b"x"), None).await.unwrap();
    assert_eq!((found.entries.len(), found.found_by), (0, FoundBy::Api));
}
