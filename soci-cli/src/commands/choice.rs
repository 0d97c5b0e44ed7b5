//! How the commands say which index they take, where it is, and why the others were passed over.

use soci_index::find::choose::{Candidate, Choice, PassedOver};

/// An index that was taken, in words.
#[must_use]
pub fn describe(chosen: &Candidate) -> String {
    format!("index {} ({}, {})", chosen.digest, chosen.index.form(), chosen.whereabouts())
}

/// What was passed over, for programs.
#[must_use]
pub fn passed_over_json(passed_over: &[PassedOver]) -> serde_json::Value {
    let one = |other: &PassedOver| {
        serde_json::json!({
            "digest": other.digest,
            "place": other.place.to_string(),
            "reason": other.reason.to_string(),
        })
    };
    passed_over.iter().map(one).collect()
}

/// A choice for programs: `place`, `form` and `passedOver`, beside the digest that the document has already.
#[must_use]
pub fn json(choice: &Choice) -> serde_json::Map<String, serde_json::Value> {
    let mut fields = serde_json::Map::new();
    let chosen = choice.chosen.as_ref();
    fields.insert("place".to_owned(), chosen.map(Candidate::whereabouts).into());
    fields.insert("form".to_owned(), chosen.map(|chosen| chosen.index.form()).into());
    fields.insert("passedOver".to_owned(), passed_over_json(&choice.passed_over));
    fields
}

/// Logs what was passed over: trouble as a warning, the usual cases only at debug level.
pub fn log(passed_over: &[PassedOver]) {
    for other in passed_over {
        match (other.reason.is_trouble(), other.reason.is_usual()) {
            (true, _) => tracing::warn!("{other}"),
            (false, true) => tracing::debug!("{other}"),
            (false, false) => tracing::info!("{other}"),
        }
    }
}
