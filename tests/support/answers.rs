//! What a registry answered, from the log that docker-registry writes: the sender's log is the ground truth for the
//! bytes that were sent, independent of caches and of a client's own counts.
//!
//! A line is in the form that web servers share: the request's first line in quotes, then the status and the bytes of
//! the body. What a client did not wait for is not counted.

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The request's method.
    pub method: String,
    /// Its path, without what follows a question mark.
    pub path: String,
    pub status: u16,
    /// Bytes of the body that were sent.
    pub bytes: u64,
}

impl Answer {
    /// Whether content was sent, all or part of it, and not a word about its absence.
    #[must_use]
    pub fn is_content(&self) -> bool {
        self.method == "GET" && matches!(self.status, 200 | 206)
    }
}

/// The answers of a log, in its order. A last line that is not whole is yet to come.
///
/// # Panics
/// If a line reports no response.
#[must_use]
pub fn parse(log: &str) -> Vec<Answer> {
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    let lines = whole.lines().filter(|line| !line.is_empty());
    lines.map(|line| answer(line).unwrap_or_else(|| panic!("no answer in the registry's log: {line:?}"))).collect()
}

fn answer(line: &str) -> Option<Answer> {
    let (_, rest) = line.split_once('"')?;
    let (request, rest) = rest.split_once('"')?;
    let mut request = request.split(' ');
    let (method, target) = (request.next()?.to_owned(), request.next()?);
    let path = target.split_once('?').map_or(target, |(path, _)| path).to_owned();
    let mut numbers = rest.split_whitespace();
    Some(Answer { method, path, status: numbers.next()?.parse().ok()?, bytes: numbers.next()?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_answers() {
        let log = concat!(
            "127.0.0.1 - - [26/Nov/2026:12:00:46 +0000] \"GET /v2/a/blobs/sha256:12?ns=x HTTP/1.1\" 206 4096 \"\" \"a \\\"client\\\"\"\n\n",
            "127.0.0.1 - - [26/Nov/2026:12:00:46 +0000] \"GET /v2/a/manifests/y HTTP/1.1\" 404 91 \"\" \"curl\"\n",
            "127.0.0.1 - - [26/Nov/2026:12:00:47 +0000] \"HEAD /v2/a/manifests/z HTTP/1.1\" 200 12 \"\" \"curl\"\n",
            "127.0.0.1 - - [26/Nov"
        );
        let answers = parse(log);
        let seen: Vec<_> =
            answers.iter().map(|one| (one.path.as_str(), one.status, one.bytes, one.is_content())).collect();
        let blob = ("/v2/a/blobs/sha256:12", 206, 4096, true);
        assert_eq!(seen, [blob, ("/v2/a/manifests/y", 404, 91, false), ("/v2/a/manifests/z", 200, 12, false)]);
        assert_eq!(parse(""), []);
    }

    #[test]
    #[should_panic(expected = "no answer in the registry's log")]
    fn what_is_no_answer_is_not_passed_over() {
        let _ = parse("panic: out of memory\n");
    }
}
