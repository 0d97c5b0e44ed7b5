//! Headers that a client wants to be sent with the requests for one image, such as an identifier for tracing.
//!
//! They come from outside (labels that any client may set), so a name must be one, a value must not end the line, and
//! what the requests themselves need cannot be replaced. They go to the hosts of the image's registry only, never to the
//! target of a redirect. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::format::class::{Class, Classified};

/// Headers that requests have anyway, in lower case.
const RESERVED: [&str; 8] =
    ["accept", "accept-encoding", "authorization", "content-length", "content-type", "range", "referer", "user-agent"];

/// Why a header is not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The name is not a token of RFC 9110, section 5.6.2.
    #[error("{name:?} is not the name of an HTTP header")]
    Name { name: String },
    /// Requests have this header anyway.
    #[error("the header {name} is set by every request and cannot be replaced")]
    Reserved { name: String },
    /// The value is empty, or has a control character.
    #[error("the header {name} has a value that cannot be sent")]
    Value { name: String },
}

impl Classified for HeaderError {
    fn class(&self) -> Class {
        Class::Usage
    }
}

/// Headers for the requests about an image. `Debug` shows their names only: a value may be meant for the registry alone.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct RequestHeaders(Arc<BTreeMap<String, String>>);

impl RequestHeaders {
    /// Checks headers by name.
    ///
    /// # Errors
    /// [`HeaderError`] for the first one that cannot be sent.
    pub fn new(given: BTreeMap<String, String>) -> Result<Self, HeaderError> {
        for (name, value) in &given {
            check_name(name)?;
            let is_text = value.bytes().all(|byte| byte == b'\t' || (byte >= b' ' && byte != 0x7f));
            if !is_text || value.trim().is_empty() {
                return Err(HeaderError::Value { name: name.clone() });
            }
        }
        Ok(Self(Arc::new(given)))
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

impl fmt::Debug for RequestHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Checks a name that headers may be given for.
///
/// # Errors
/// [`HeaderError::Name`], [`HeaderError::Reserved`].
pub fn check_name(name: &str) -> Result<(), HeaderError> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(is_token) {
        return Err(HeaderError::Name { name: name.to_owned() });
    }
    if RESERVED.iter().any(|reserved| name.eq_ignore_ascii_case(reserved)) {
        return Err(HeaderError::Reserved { name: name.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &str, value: &str) -> Result<RequestHeaders, HeaderError> {
        RequestHeaders::new([(name.to_owned(), value.to_owned())].into())
    }

    #[test]
    fn what_may_be_sent() {
        let shown = headers("X-Request-Id", "secret").unwrap();
        assert_eq!(shown.iter().collect::<Vec<_>>(), [("X-Request-Id", "secret")]);
        assert_eq!(format!("{shown:?}"), r#"{"X-Request-Id"}"#);
        for name in ["", "x with space", "x:y", "x\r\nInjected", "naïve", "(x)"] {
            assert_eq!(headers(name, "1"), Err(HeaderError::Name { name: name.to_owned() }));
        }
        for name in ["Authorization", "RANGE", "accept", "Accept-Encoding", "content-Length", "User-Agent", "referer"] {
            assert_eq!(headers(name, "1"), Err(HeaderError::Reserved { name: name.to_owned() }));
        }
        for value in ["", " ", "a\r\nInjected: b", "a\0", "\x7f"] {
            assert_eq!(headers("x", value), Err(HeaderError::Value { name: "x".to_owned() }));
        }
    }
}
