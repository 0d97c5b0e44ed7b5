//! What `soci doctor` has found out, one line for each check.

use serde::Serialize;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Good,
    /// It works, but not as well as it might.
    Note,
    Bad,
}

/// A check.
#[derive(Debug, Serialize)]
pub struct Finding {
    pub(super) verdict: Verdict,
    pub(super) what: &'static str,
    pub(super) found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fix: Option<String>,
    /// Lines for a configuration file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) paste: Option<&'static str>,
}

pub(super) fn good(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Good, what, found: found.into(), fix: None, paste: None }
}

pub(super) fn note(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Note, what, found: found.into(), fix: Some(fix.into()), paste: None }
}

pub(super) fn bad(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Bad, ..note(what, found, fix) }
}
