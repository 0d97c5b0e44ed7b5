//! Reading the other response headers that registries use: `Content-Range`, `Link`, `Warning` and error bodies.
//!
//! Pure functions from text to values. Each is total; what is not understood is `None`, and the caller decides whether
//! that is an error.

use serde_json::Value;

/// `Content-Range: bytes first-last/total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// First byte.
    pub(crate) first: u64,
    /// Last byte, inclusive.
    pub(crate) last: u64,
    /// Length of the whole, unless the server wrote `*`.
    pub(crate) total: Option<u64>,
}

/// Reads a satisfied `Content-Range`.
pub(crate) fn content_range(text: &str) -> Option<ContentRange> {
    let (range, total) = bytes_unit(text)?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let range = ContentRange {
        first: number(first)?,
        last: number(last)?,
        total: match total.trim() {
            "*" => None,
            digits => Some(number(digits)?),
        },
    };
    let ordered = range.first <= range.last && range.total.is_none_or(|total| range.last < total);
    ordered.then_some(range)
}

/// Reads the total out of the `bytes */N` of a 416.
pub(crate) fn unsatisfied_total(text: &str) -> Option<u64> {
    number(bytes_unit(text)?.trim_start().strip_prefix('*')?.trim_start().strip_prefix('/')?)
}

fn bytes_unit(text: &str) -> Option<&str> {
    let text = text.trim();
    let unit = text.get(..5)?;
    let rest = text.get(5..)?;
    (unit.eq_ignore_ascii_case("bytes") && rest.starts_with([' ', '='])).then(|| &rest[1..])
}

/// Reads how much of an upload a registry has out of its `Range: 0-LAST`. `0-0` is what registries say of nothing at
/// all; uploads of a single byte do not come in parts.
pub(crate) fn upload_offset(text: &str) -> Option<u64> {
    let range = bytes_unit(text).unwrap_or(text);
    let (first, last) = range.split_once('-')?;
    let last = number(last)?;
    (number(first)? == 0).then_some(if last == 0 { 0 } else { last.checked_add(1)? })
}

/// Digits only: `str::parse` would also take a plus sign.
fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// The target of the first link with relation `next`.
pub(crate) fn next_link<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<String> {
    headers.into_iter().find_map(next_in_header)
}

fn next_in_header(header: &str) -> Option<String> {
    let mut rest = header;
    while let Some(start) = rest.find('<') {
        let after = &rest[start + 1..];
        let end = after.find('>')?;
        let target = &after[..end];
        let parameters = &after[end + 1..];
        let stop = parameters.find('<').unwrap_or(parameters.len());
        if parameters[..stop].split([';', ',']).any(is_next) {
            return Some(target.trim().to_owned());
        }
        rest = &parameters[stop..];
    }
    None
}

fn is_next(parameter: &str) -> bool {
    let Some((name, value)) = parameter.split_once('=') else { return false };
    let value = value.trim().trim_matches('"');
    name.trim().eq_ignore_ascii_case("rel") && value.split(' ').any(|relation| relation.eq_ignore_ascii_case("next"))
}

/// The text of a `Warning: 299 - "text"`; other codes are for caches and mean nothing here.
pub(crate) fn warning_text(header: &str) -> Option<String> {
    let rest = header.trim().strip_prefix("299 ")?;
    let (_, quoted) = rest.split_once('"')?;
    let text = quoted.rsplit_once('"').map_or(quoted, |(text, _)| text);
    Some(one_line(&text.replace("\\\"", "\"")))
}

/// The error of a registry's answer: its code and its message, each cut to one short line. JSON, in the form of the
/// specification or another, XML of object storage and plain text are understood; an HTML page gives nothing.
pub(crate) fn error_body(body: &[u8]) -> (Option<String>, String) {
    if let Ok(document) = serde_json::from_slice::<Value>(body) {
        return json_error(&document);
    }
    let text = String::from_utf8_lossy(body);
    if !text.trim_start().starts_with('<') {
        let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        return (None, once(&one_line(line)));
    }
    // Of XML the code is all that is wanted, the rest may hold parts of a signed URL.
    let code =
        text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>")).map(|(code, _)| one_line(code));
    (code, String::new())
}

/// Where programs put the message of an error, the most usual name first.
const MESSAGES: [&str; 8] = ["message", "error_description", "detail", "details", "error", "title", "msg", "reason"];

fn json_error(document: &Value) -> (Option<String>, String) {
    let first = document.get("errors").and_then(|errors| errors.as_array()?.first());
    let error = first.or_else(|| document.get("error").filter(|error| error.is_object())).unwrap_or(document);
    let code = error.get("code").and_then(|code| match code {
        Value::String(code) => Some(one_line(code)),
        Value::Number(code) => Some(code.to_string()),
        _ => None,
    });
    let text = match error {
        Value::String(text) => Some(text.clone()),
        error => MESSAGES.iter().find_map(|name| Some(error.get(name)?.as_str()?.to_owned())),
    };
    let is_empty = document.as_object().is_some_and(serde_json::Map::is_empty)
        || document.get("errors").is_some_and(|errors| errors.as_array().is_some_and(Vec::is_empty));
    let text = text.unwrap_or_else(|| {
        let is_told = code.is_some() || is_empty || document.is_null();
        if is_told { String::new() } else { document.to_string() }
    });
    (code.filter(|code| !code.is_empty()), once(&one_line(&text)))
}

/// A text that says the same twice, as "X: X", said once.
fn once(text: &str) -> String {
    let halves = text.match_indices(": ").map(|(at, separator)| (&text[..at], &text[at + separator.len()..]));
    halves.into_iter().find(|(first, second)| first == second).map_or(text, |(first, _)| first).to_owned()
}

/// Sanitises untrusted text for display: one line, nothing that steers a terminal or turns the direction of a text, at
/// most 300 characters.
pub(crate) fn one_line(text: &str) -> String {
    let steers = |c: char| {
        let turns =
            matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        c.is_control() || turns
    };
    let clean: String = text.chars().map(|c| if steers(c) { ' ' } else { c }).take(300).collect();
    clean.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        let range = |first, last, total| Some(ContentRange { first, last, total });
        for (text, expected) in [
            ("bytes 0-9/100", range(0, 9, Some(100))),
            ("Bytes 5-5/6", range(5, 5, Some(6))),
            ("bytes 0-9/*", range(0, 9, None)),
            (" bytes 1-2 / 3", range(1, 2, Some(3))),
            ("bytes 9-0/100", None),
            ("bytes 0-100/100", None),
            ("bytes */100", None),
            ("bytes 0-9", None),
            ("bytes +1-9/10", None),
            ("bytes -1-9/10", None),
            ("bytes 0-99999999999999999999/*", None),
            ("items 0-9/100", None),
            ("", None),
            ("é", None),
        ] {
            assert_eq!(content_range(text), expected, "{text}");
        }
        assert_eq!(unsatisfied_total("bytes */100"), Some(100));
        assert_eq!(unsatisfied_total("bytes 0-1/100"), None);
        assert_eq!(unsatisfied_total("bytes */*"), None);
    }

    #[test]
    fn uploads() {
        for (text, expected) in [
            ("0-99", Some(100)),
            ("bytes=0-99", Some(100)),
            (" 0-0 ", Some(0)),
            ("0--1", None),
            ("1-99", None),
            ("0-18446744073709551615", None),
            ("", None),
        ] {
            assert_eq!(upload_offset(text), expected, "{text}");
        }
    }

    #[test]
    fn links() {
        for (header, expected) in [
            ("</v2/a/referrers/x?n=1>; rel=\"next\"", Some("/v2/a/referrers/x?n=1")),
            ("<https://h/x>; rel=next", Some("https://h/x")),
            ("</a>; rel=\"prev\", </b?x=1,2>; title=\"t\"; rel=\"last next\"", Some("/b?x=1,2")),
            ("</a>; rel=\"prev\"", None),
            ("</a; rel=next", None),
            ("", None),
        ] {
            assert_eq!(next_link([header]).as_deref(), expected, "{header}");
        }
    }

    #[test]
    fn warnings_and_errors() {
        assert_eq!(warning_text("299 - \"the disk is \\\"full\\\"\"").as_deref(), Some("the disk is \"full\""));
        assert_eq!(warning_text("110 - \"stale\""), None);
        for (body, code, message) in [
            (r#"{"errors":[{"code":"DENIED","message":"quota\nexceeded"}]}"#, Some("DENIED"), "quota exceeded"),
            (r#"{"errors":[{"code":"X","message":null}]}"#, Some("X"), ""),
            ("{}", None, ""),
            (r#"{"errors":[]}"#, None, ""),
            (
                r#"{"errors":[{"code":"UNAUTHORIZED","message":"no: x, y: no: x, y"}]}"#,
                Some("UNAUTHORIZED"),
                "no: x, y",
            ),
            (r#"{"errors":[{"code":412,"message":"a: b"}]}"#, Some("412"), "a: b"),
            (r#"{"message":"not here"}"#, None, "not here"),
            (r#"{"error":"denied","error_description":"no such user"}"#, None, "no such user"),
            (r#"{"error":"denied"}"#, None, "denied"),
            (r#"{"error":{"code":"QUOTA","message":"full"}}"#, Some("QUOTA"), "full"),
            (r#"{"title":"Forbidden","status":403}"#, None, "Forbidden"),
            (r#""read only""#, None, "read only"),
            (r#"{"why":"because"}"#, None, r#"{"why":"because"}"#),
            (r#"["a"]"#, None, r#"["a"]"#),
            ("null", None, ""),
            ("404 page not found\n", None, "404 page not found"),
            ("\n  read\u{1b}[31monly\nand more", None, "read [31monly"),
            ("read\u{202e}only", None, "read only"),
            ("", None, ""),
            ("<html>no</html>", None, ""),
            ("\n<!DOCTYPE html><p>no</p>", None, ""),
            ("<Error><Code>ExpiredToken</Code><Message>secret</Message></Error>", Some("ExpiredToken"), ""),
        ] {
            assert_eq!(error_body(body.as_bytes()), (code.map(str::to_owned), message.to_owned()), "{body}");
        }
    }
}
