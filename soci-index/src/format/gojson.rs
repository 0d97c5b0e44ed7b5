//! JSON as Go's `encoding/json` writes it, where bytes are compared with documents that Go wrote.
//!
//! Two things differ from what serde writes: `<`, `>`, `&` and two line separators are escaped, and a byte that is no
//! UTF-8 becomes `\ufffd`, one for each such byte.

use serde::Serialize;

/// Compact JSON of a value.
///
/// # Panics
/// For values that JSON cannot say (maps with other keys than texts): our own mistake, not the data's.
#[must_use]
pub(crate) fn encode(value: &impl Serialize) -> Vec<u8> {
    let json = serde_json::to_string(value).expect("documents are structs of texts and numbers");
    // Outside of texts none of these characters occurs.
    escape(&json).into_bytes()
}

/// A text in quotes.
#[must_use]
pub fn quote(text: &[u8]) -> String {
    let mut quoted = String::from("\"");
    for chunk in text.utf8_chunks() {
        let valid = serde_json::Value::from(chunk.valid()).to_string();
        quoted.push_str(&escape(&valid[1..valid.len() - 1]));
        quoted.extend(chunk.invalid().iter().map(|_| "\\ufffd"));
    }
    quoted.push('"');
    quoted
}

fn escape(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        match character {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => escaped.push_str(&format!("\\u{:04x}", u32::from(character))),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for (text, quoted) in [
            (&b"plain"[..], r#""plain""#),
            (b"a<b>&\"\\\n\x01\x7f", "\"a\\u003cb\\u003e\\u0026\\\"\\\\\\n\\u0001\x7f\""),
            (b"\xe2\x80\xa8", r#""\u2028""#),
            (b"caf\xe9\xff!", r#""caf\ufffd\ufffd!""#),
            ("café \u{fffd}".as_bytes(), "\"café \u{fffd}\""),
        ] {
            assert_eq!(quote(text), quoted);
        }
    }
}
