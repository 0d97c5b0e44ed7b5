//! Patterns with stars. Pure.

/// Whether `text` is what `pattern` says, where `*` is any text and `?` any one letter. Only the last star is ever
/// retried, so that patterns of many stars end, too.
#[must_use]
pub fn is_like(pattern: &[u8], text: &[u8]) -> bool {
    let (mut in_pattern, mut in_text) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while in_text < text.len() {
        match pattern.get(in_pattern) {
            Some(b'*') => {
                star = Some((in_pattern + 1, in_text));
                in_pattern += 1;
            }
            Some(expected) if *expected == b'?' || *expected == text[in_text] => {
                (in_pattern, in_text) = (in_pattern + 1, in_text + 1);
            }
            _ => {
                let Some((after, taken)) = star else { return false };
                star = Some((after, taken + 1));
                (in_pattern, in_text) = (after, taken + 1);
            }
        }
    }
    pattern[in_pattern..].iter().all(|rest| *rest == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_and_letters() {
        for (pattern, text, matches) in [
            ("", "", true),
            ("*", "", true),
            ("a*c", "ac", true),
            ("a*c", "abcbc", true),
            ("a*c", "abcb", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("**b**", "abc", true),
            ("a", "ab", false),
        ] {
            assert_eq!(is_like(pattern.as_bytes(), text.as_bytes()), matches, "{pattern} {text}");
        }
    }

    /// Patterns are untrusted input.
    #[test]
    fn many_stars_end() {
        let pattern = format!("{}b", "*a".repeat(200));
        assert!(!is_like(pattern.as_bytes(), "a".repeat(1000).as_bytes()));
        assert!(is_like(pattern.as_bytes(), format!("{}b", "a".repeat(1000)).as_bytes()));
    }
}
