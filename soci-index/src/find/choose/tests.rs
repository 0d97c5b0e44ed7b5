//! The rules one by one, and for any set of candidates.

use proptest::prelude::*;

use super::*;
use crate::format::index_manifest::IndexManifest;
use crate::format::manifest::{SociIndex, ZtocReference};
use crate::format::model::{Descriptor, media_type};
use crate::format::span_index::{SpanIndex, SpanReference};

#[test]
fn timestamps() {
    for (text, expected) in [
        ("1970-01-01T00:00:00Z", Some((0, 0))),
        ("2000-02-29T12:34:56Z", Some((951_827_696, 0))),
        ("2026-08-01T00:00:00.5Z", Some((1_785_542_400, 500_000_000))),
        ("2026-08-01T02:00:00.123456789+02:00", Some((1_785_542_400, 123_456_789))),
        ("2026-07-31T19:00:00-05:00", Some((1_785_542_400, 0))),
        ("2026-08-01", None),
        ("2026-13-01T00:00:00Z", None),
        ("2026-08-01T00:00:00", None),
        ("2026-08-01T00:00:00+2", None),
        ("2026-08-01T00:00:0éZ", None),
        ("", None),
    ] {
        assert_eq!(timestamp(text), expected, "{text}");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Spans,
    V2,
    V1,
}

/// A manifest of so many layers.
fn manifest(form: Form, layers: u8) -> IndexManifest {
    let spans = |number| SpanReference {
        layer: Digest::of(&[number]),
        toc: (Digest::of(b"toc"), 3),
        windows: (Digest::of(b"windows"), 7),
        span_bytes: 1,
    };
    let ztoc = |number| ZtocReference {
        digest: Digest::of(b"ztoc"),
        size: 4,
        layer: Digest::of(&[number]),
        layer_media_type: String::new(),
        span_bytes: 1,
        disable_xattrs: true,
    };
    let ztocs: Vec<ZtocReference> = (0..layers).map(ztoc).collect();
    let subject = Descriptor::of(media_type::MANIFEST, b"image");
    match form {
        Form::Spans => IndexManifest::Spans(SpanIndex::new(&(0..layers).map(spans).collect::<Vec<_>>(), &subject)),
        Form::V2 => IndexManifest::Soci(SociIndex::v2(&ztocs, &[])),
        Form::V1 => IndexManifest::Soci(SociIndex::v1(&ztocs, &[], &subject)),
    }
}

fn named(position: usize) -> IndexPlace {
    IndexPlace::Named { position, repository: format!("h/named-{position}") }
}

fn candidate(number: u8, form: Form, created: Option<&str>, place: IndexPlace) -> Candidate {
    let created = created.and_then(Created::parse);
    // Digests that are ordered as their numbers are.
    let digest = format!("sha256:{}", format!("{number:02x}").repeat(32)).parse().unwrap();
    Candidate { digest, raw: Bytes::new(), index: manifest(form, 1), created, place, cached: false }
}

/// The same with tables of two layers.
fn larger(number: u8, form: Form, created: Option<&str>, place: IndexPlace) -> Candidate {
    Candidate { index: manifest(form, 2), ..candidate(number, form, created, place) }
}

const JANUARY: Option<&str> = Some("2026-01-01T00:00:00Z");
const JANUARY_IN_PARIS: Option<&str> = Some("2026-01-01T01:00:00.000+01:00");
const FEBRUARY: Option<&str> = Some("2026-02-01T00:00:00Z");
const NONSENSE: Option<&str> = Some("soon");

/// Each row: the one that is taken, and one that it beats, with the reason.
#[test]
fn rules() {
    use Form::{Spans, V1, V2};
    let form = |taken| Reason::Form { taken };
    for (taken, beaten, reason) in [
        (candidate(9, V1, None, named(0)), candidate(1, Spans, FEBRUARY, IndexPlace::Beside), Reason::Place),
        (candidate(9, V1, None, named(0)), candidate(1, V2, None, IndexPlace::Image), Reason::Place),
        (candidate(9, V1, None, named(0)), candidate(1, Spans, FEBRUARY, named(1)), Reason::Place),
        (candidate(9, V1, None, named(1)), candidate(1, Spans, FEBRUARY, IndexPlace::Local), Reason::Place),
        (candidate(9, Spans, None, IndexPlace::Beside), candidate(1, V2, None, IndexPlace::Image), form("spans")),
        (
            candidate(9, Spans, JANUARY, IndexPlace::Beside),
            candidate(1, V1, FEBRUARY, IndexPlace::Local),
            form("spans"),
        ),
        (candidate(9, V2, None, IndexPlace::Image), candidate(1, V1, FEBRUARY, IndexPlace::Beside), form("v2")),
        (candidate(9, Spans, None, IndexPlace::Beside), larger(1, V1, FEBRUARY, IndexPlace::Beside), form("spans")),
        (candidate(9, V1, None, named(0)), larger(1, V1, FEBRUARY, IndexPlace::Beside), Reason::Place),
        (larger(9, Spans, None, IndexPlace::Beside), candidate(1, Spans, None, IndexPlace::Beside), Reason::Fewer),
        (larger(9, V1, None, IndexPlace::Beside), candidate(1, V1, FEBRUARY, IndexPlace::Local), Reason::Fewer),
        (larger(9, V1, FEBRUARY, IndexPlace::Beside), larger(1, V1, JANUARY, IndexPlace::Beside), Reason::Older),
        (candidate(9, V1, FEBRUARY, IndexPlace::Beside), candidate(1, V1, JANUARY, IndexPlace::Local), Reason::Older),
        (candidate(9, V1, FEBRUARY, IndexPlace::Local), candidate(1, V1, JANUARY, IndexPlace::Beside), Reason::Older),
        (candidate(9, V1, JANUARY, IndexPlace::Beside), candidate(1, V1, None, IndexPlace::Local), Reason::Older),
        (candidate(9, V1, JANUARY, IndexPlace::Beside), candidate(1, V1, NONSENSE, IndexPlace::Local), Reason::Older),
        (
            candidate(1, V1, JANUARY_IN_PARIS, IndexPlace::Local),
            candidate(9, V1, JANUARY, IndexPlace::Beside),
            Reason::Digest,
        ),
        (candidate(1, V1, NONSENSE, IndexPlace::Local), candidate(9, V1, None, IndexPlace::Beside), Reason::Digest),
        (candidate(1, V1, None, IndexPlace::Beside), candidate(1, V1, None, IndexPlace::Local), Reason::Same),
        (candidate(1, V1, None, named(0)), candidate(1, V1, FEBRUARY, IndexPlace::Local), Reason::Same),
    ] {
        for both in [[taken.clone(), beaten.clone()], [beaten.clone(), taken.clone()]] {
            let choice = choose(both.to_vec(), None);
            let chosen = choice.chosen.unwrap();
            assert_eq!((chosen.digest, &chosen.place), (taken.digest, &taken.place), "{both:?}");
            let over = PassedOver { digest: Some(beaten.digest), place: beaten.place.clone(), reason: reason.clone() };
            assert_eq!(choice.passed_over, [over], "{both:?}");
        }
    }
}

#[test]
fn named_by_digest() {
    let all = || vec![candidate(1, Form::Spans, FEBRUARY, named(0)), candidate(2, Form::V1, None, IndexPlace::Beside)];
    let second = all()[1].digest;
    let choice = choose(all(), Some(&second));
    assert_eq!(choice.chosen.unwrap().digest, second);
    assert_eq!(choice.passed_over[0].reason, Reason::NotNamed);
    assert!(choose(all(), Some(&Digest::of(b"none"))).chosen.is_none());
    assert!(choose(Vec::new(), None).chosen.is_none());
}

/// A policy passes over what it doubts, and says so of these only.
#[test]
fn doubted() {
    let all = [
        candidate(1, Form::Spans, None, IndexPlace::Beside),
        candidate(2, Form::V1, FEBRUARY, IndexPlace::Beside),
        candidate(3, Form::V1, None, IndexPlace::Local),
    ];
    let choice = order(all.to_vec(), None).take(1, &["not signed".to_owned()]);
    assert_eq!(choice.chosen.unwrap().digest, all[1].digest);
    let reasons: Vec<&Reason> = choice.passed_over.iter().map(|other| &other.reason).collect();
    assert_eq!(reasons, [&Reason::Doubt("not signed".to_owned()), &Reason::Older]);
    // None of the reasons is empty, and none begins as a sentence does.
    for over in &choice.passed_over {
        assert!(over.to_string().contains(" passed over: "), "{over}");
    }
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let form = prop_oneof![Just(Form::Spans), Just(Form::V2), Just(Form::V1)];
    let time = prop_oneof![
        Just(None),
        Just(NONSENSE),
        Just(JANUARY),
        Just(JANUARY_IN_PARIS),
        Just(Some("2026-01-01T00:00:00.000000001Z")),
        Just(Some("2025-12-31T23:30:00-00:30")),
        Just(FEBRUARY),
    ];
    let place = prop_oneof![
        Just(named(0)),
        Just(named(1)),
        Just(IndexPlace::Image),
        Just(IndexPlace::Beside),
        Just(IndexPlace::Local),
    ];
    // Few digests, so that one index is in several places; a digest has one form.
    let one = (0_u8..9, form, time, place, any::<bool>()).prop_map(|(number, form, time, place, cached)| {
        // A digest has one form, and covers what it covers.
        let (number, index) = (number * 3 + form as u8, manifest(form, number % 3));
        Candidate { cached, index, ..candidate(number, form, time, place) }
    });
    proptest::collection::vec(one, 1..12)
}

/// Whether `one` goes before `other` by the rules as they are written down, one after the other.
fn goes_before(one: &Candidate, other: &Candidate) -> bool {
    let position = |candidate: &Candidate| match candidate.place {
        IndexPlace::Named { position, .. } => position,
        _ => 1000,
    };
    let form = |candidate: &Candidate| ["spans", "v2", "v1"].iter().position(|form| *form == candidate.index.form());
    if position(one) != position(other) {
        return position(one) < position(other);
    }
    if form(one) != form(other) {
        return form(one) < form(other);
    }
    if one.index.coverage() != other.index.coverage() {
        return one.index.coverage() > other.index.coverage();
    }
    match (one.created, other.created) {
        (one, other) if one == other => {}
        (Some(_), None) => return true,
        (None, _) => return false,
        (Some(one), Some(other)) => return one > other,
    }
    one.digest < other.digest
}

proptest! {
    /// Whatever there is and in whatever order it comes: one of them is taken, always the same, and none goes before
    /// it.
    #[test]
    fn any_set_has_one_choice((all, shuffled) in candidates().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))) {
        let (choice, again) = (choose(all.clone(), None), choose(shuffled, None));
        let (chosen, same) = (choice.chosen.unwrap(), again.chosen.unwrap());
        prop_assert_eq!((chosen.digest, &chosen.place, chosen.created), (same.digest, &same.place, same.created));
        prop_assert!(all.iter().any(|one| one.digest == chosen.digest && one.place == chosen.place));
        prop_assert!(!all.iter().any(|one| goes_before(one, &chosen)));
        prop_assert_eq!(choice.passed_over.len(), all.len() - 1, "each of the others has a reason");
    }
}
