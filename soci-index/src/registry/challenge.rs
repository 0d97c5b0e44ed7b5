//! Reading `WWW-Authenticate`: which schemes a server offers, with their parameters.
//!
//! RFC 9110 lets one header hold several challenges, separated by the same comma that separates the parameters of one,
//! and lets a server send several headers; registries do both. Reading is total: what cannot be understood is skipped,
//! because an unknown scheme beside a known one is no reason to fail. Invariant: scheme and parameter names are
//! lower-case.

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// The scheme, lower-case: `bearer`, `basic`, ...
    pub scheme: String,
    /// The parameters in order; the names are lower-case.
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The value of the first parameter called `name` (lower-case).
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Reads all challenges of all `headers`.
pub fn parse<'a>(headers: impl IntoIterator<Item = &'a str>) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    for header in headers {
        one_header(header, &mut challenges);
    }
    challenges
}

fn one_header(header: &str, challenges: &mut Vec<Challenge>) {
    let mut rest = header;
    // Parameters that follow an unparsable text are ignored.
    let mut open = false;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return;
        }
        let (word, after) = token(rest);
        if word.is_empty() {
            // Not a token: skip to the next comma.
            rest = rest.find(',').map_or("", |comma| &rest[comma..]);
            open = false;
            continue;
        }
        let value_at = after.trim_start_matches([' ', '\t']);
        if let Some(value) = value_at.strip_prefix('=').filter(|_| open) {
            let (value, after) = parameter_value(value.trim_start_matches([' ', '\t']));
            if let Some(challenge) = challenges.last_mut() {
                challenge.parameters.push((word.to_ascii_lowercase(), value));
            }
            rest = after;
            continue;
        }
        challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
        open = true;
        rest = skip_token68(value_at);
    }
}

/// Skips the bare base64 value that some schemes (Negotiate) put where others have parameters.
fn skip_token68(text: &str) -> &str {
    let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    let bare = word.trim_end_matches('=');
    let plain = !bare.is_empty() && !bare.contains(['=', '"']);
    let ends = rest.trim_start_matches([' ', '\t']).starts_with(',') || rest.trim().is_empty();
    if plain && ends { rest } else { text }
}

fn token(text: &str) -> (&str, &str) {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let end = text.bytes().position(|byte| !is_token(byte)).unwrap_or(text.len());
    text.split_at(end)
}

/// A quoted string, or whatever stands before the next comma.
fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = text.split_at(text.find(',').unwrap_or(text.len()));
        return (value.trim_end().to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((place, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[place + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(headers: &[&str], expected: &[(&str, &[(&str, &str)])]) {
        let found = parse(headers.iter().copied());
        let expected: Vec<Challenge> = expected
            .iter()
            .map(|(scheme, parameters)| Challenge {
                scheme: (*scheme).to_owned(),
                parameters: parameters.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            })
            .collect();
        assert_eq!(found, expected, "{headers:?}");
    }

    #[test]
    fn table() {
        check(&[], &[]);
        check(&[""], &[]);
        check(&[" , ,"], &[]);
        check(&["Basic"], &[("basic", &[])]);
        check(&["Basic realm=\"harbor\""], &[("basic", &[("realm", "harbor")])]);
        check(&["basic realm=simple"], &[("basic", &[("realm", "simple")])]);
        check(
            &["Bearer realm=\"https://a/token\",service=\"s\",scope=\"repository:p/r:pull,push\""],
            &[("bearer", &[("realm", "https://a/token"), ("service", "s"), ("scope", "repository:p/r:pull,push")])],
        );
        check(
            &["Negotiate abc==, Bearer  realm = \"r\" , error=\"insufficient_scope\" , Basic realm=\"x\""],
            &[
                ("negotiate", &[]),
                ("bearer", &[("realm", "r"), ("error", "insufficient_scope")]),
                ("basic", &[("realm", "x")]),
            ],
        );
        check(&["Negotiate", "Basic realm=\"a\""], &[("negotiate", &[]), ("basic", &[("realm", "a")])]);
        check(&["Bearer REALM=\"a \\\"b\\\", c\",x=1"], &[("bearer", &[("realm", "a \"b\", c"), ("x", "1")])]);
        check(&["Bearer realm=\"never closed"], &[("bearer", &[("realm", "never closed")])]);
        check(&["=\"x\", Basic realm=\"a\""], &[("basic", &[("realm", "a")])]);
        check(&["Bearer realm=\"a\\"], &[("bearer", &[("realm", "a")])]);
    }

    #[test]
    fn total_on_noise() {
        let mut random = fastrand::Rng::with_seed(1);
        let alphabet = ['a', '=', '"', '\\', ',', ' ', 'é', '/', 'B', '\t'];
        for _ in 0..20_000 {
            let length = random.usize(0..24);
            let text: String = (0..length).map(|_| alphabet[random.usize(0..alphabet.len())]).collect();
            let _ = parse([text.as_str()]);
        }
    }
}
