//! The filters of a listing: text as containerd writes it, to a test of a snapshot.
//!
//! ```text
//! filter   := selector ("," selector)*
//! selector := path [("==" | "!=" | "~=") value]
//! path     := field ("." field)*          field := word | quoted
//! value    := quoted | anything up to a comma or a space
//! ```
//!
//! Without an operator a selector asks whether the field is there. `~=` takes a regular expression, whose quotes may
//! also be `/` or `|`. A field that snapshots do not have is absent, not an error: containerd asks all its stores in
//! one language. An expression that cannot be compiled is an error here, not a test that silently fails.

use std::str::Chars;

use regex::Regex;

use crate::node::snapshots::record::Info;

/// Why a filter cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter {text:?}, byte {at}: {problem}")]
pub struct FilterError {
    /// The filter.
    pub text: String,
    /// Where it stopped making sense.
    pub at: usize,
    /// What is wrong there.
    pub problem: FilterProblem,
}

/// What can be wrong with a filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterProblem {
    /// A path must begin here.
    #[error("expected the name of a field, or a quoted one")]
    Field,
    /// Something that is no operator.
    #[error("expected one of == != ~=")]
    Operator,
    /// Nothing follows the operator.
    #[error("expected a value, or a quoted one")]
    Value,
    /// More text after a complete selector.
    #[error("expected a comma or the end")]
    Trailing,
    /// The closing quote is missing.
    #[error("the quote is not closed")]
    Unclosed,
    /// A backslash before something that needs none.
    #[error("unknown escape sequence")]
    Escape,
    /// The regular expression has a fault.
    #[error("the regular expression is not valid: {0}")]
    Expression(String),
}

/// A test of snapshots: all its selectors must agree.
#[derive(Debug)]
pub struct Filter {
    selectors: Vec<Selector>,
}

#[derive(Debug)]
struct Selector {
    field: Field,
    test: Test,
}

#[derive(Debug, PartialEq, Eq)]
enum Field {
    Kind,
    Name,
    Parent,
    Label(String),
    /// Nothing that a snapshot has.
    Foreign,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    /// Understands one filter. The empty one accepts everything.
    ///
    /// # Errors
    /// [`FilterError`] says where the text stops making sense.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        let mut scanner = Scanner { text, at: 0 };
        let mut selectors = Vec::new();
        if text.is_empty() {
            return Ok(Self { selectors });
        }
        loop {
            selectors.push(scanner.selector()?);
            match scanner.peek() {
                None => return Ok(Self { selectors }),
                Some(',') => scanner.advance(1),
                Some(_) => return Err(scanner.error(FilterProblem::Trailing)),
            }
        }
    }

    /// Whether the filter accepts a snapshot.
    #[must_use]
    pub fn accepts(&self, info: &Info) -> bool {
        self.selectors.iter().all(|selector| selector.accepts(info))
    }
}

impl Selector {
    fn accepts(&self, info: &Info) -> bool {
        let value = self.field.value_in(info);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(expression) => expression.is_match(value.unwrap_or_default()),
        }
    }
}

impl Field {
    fn new(path: &[String]) -> Self {
        match path {
            [only] if only == "kind" => Self::Kind,
            [only] if only == "name" => Self::Name,
            [only] if only == "parent" => Self::Parent,
            [first, key @ ..] if first == "labels" && !key.is_empty() => Self::Label(key.join(".")),
            _ => Self::Foreign,
        }
    }

    fn value_in<'i>(&self, info: &'i Info) -> Option<&'i str> {
        match self {
            Self::Kind => Some(info.kind.name()),
            Self::Name => Some(&info.name),
            // There, and empty, where there is none: containerd looks for lowest layers by `parent==""`.
            Self::Parent => Some(info.parent.as_deref().unwrap_or_default()),
            Self::Label(key) => info.labels.get(key).map(String::as_str),
            Self::Foreign => None,
        }
    }
}

struct Scanner<'t> {
    text: &'t str,
    at: usize,
}

impl Scanner<'_> {
    fn selector(&mut self) -> Result<Selector, FilterError> {
        let field = Field::new(&self.path()?);
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { field, test: Test::Present });
        }
        let operator = self.text.get(self.at..self.at + 2).unwrap_or_default().to_owned();
        let quotes: &[char] = match operator.as_str() {
            "==" | "!=" => &['"'],
            "~=" => &['"', '/', '|'],
            _ => return Err(self.error(FilterProblem::Operator)),
        };
        self.advance(2);
        self.peek();
        let begin = self.at;
        let value = self.value(quotes)?;
        let test = match operator.as_str() {
            "==" => Test::Equal(value),
            "!=" => Test::NotEqual(value),
            _ => Test::Matches(Regex::new(&value).map_err(|fault| {
                self.at = begin;
                self.error(FilterProblem::Expression(fault.to_string()))
            })?),
        };
        Ok(Selector { field, test })
    }

    fn path(&mut self) -> Result<Vec<String>, FilterError> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.advance(1);
            path.push(self.field()?);
        }
        Ok(path)
    }

    fn field(&mut self) -> Result<String, FilterError> {
        if self.peek() == Some('"') {
            return self.quoted('"');
        }
        let field = self.take_while(|letter| letter == '_' || letter.is_ascii_alphanumeric());
        if field.is_empty() { Err(self.error(FilterProblem::Field)) } else { Ok(field) }
    }

    fn value(&mut self, quotes: &[char]) -> Result<String, FilterError> {
        if let Some(quote) = self.peek().filter(|letter| quotes.contains(letter)) {
            return self.quoted(quote);
        }
        let value = self.take_while(|letter| letter != ',' && !letter.is_whitespace() && !letter.is_control());
        if value.is_empty() { Err(self.error(FilterProblem::Value)) } else { Ok(value) }
    }

    /// A string in quotes, with the escapes of Go's string literals.
    fn quoted(&mut self, quote: char) -> Result<String, FilterError> {
        let mut bytes = Vec::new();
        let mut letters = self.text[self.at + 1..].chars();
        loop {
            match letters.next() {
                None | Some('\n') => return Err(self.error(FilterProblem::Unclosed)),
                Some(letter) if letter == quote => break,
                Some('\\') => {
                    let escape = unescape(&mut letters, quote);
                    bytes.extend(escape.ok_or_else(|| self.error(FilterProblem::Escape))?);
                }
                Some(letter) => bytes.extend(letter.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        let value = String::from_utf8(bytes).map_err(|_| self.error(FilterProblem::Escape))?;
        self.at = self.text.len() - letters.as_str().len();
        Ok(value)
    }

    fn take_while(&mut self, belongs: impl Fn(char) -> bool) -> String {
        let rest = &self.text[self.at..];
        let taken = &rest[..rest.find(|letter| !belongs(letter)).unwrap_or(rest.len())];
        self.at += taken.len();
        taken.to_owned()
    }

    /// The next letter that is no space.
    fn peek(&mut self) -> Option<char> {
        self.at = self.text.len() - self.text[self.at..].trim_start().len();
        self.text[self.at..].chars().next()
    }

    /// Steps over so many ASCII letters.
    const fn advance(&mut self, letters: usize) {
        self.at += letters;
    }

    fn error(&self, problem: FilterProblem) -> FilterError {
        FilterError { text: self.text.to_owned(), at: self.at, problem }
    }
}

/// The bytes that an escape sequence stands for; the backslash was read already.
fn unescape(letters: &mut Chars<'_>, quote: char) -> Option<Vec<u8>> {
    let simple = |byte: u8| Some(vec![byte]);
    match letters.next()? {
        'a' => simple(7),
        'b' => simple(8),
        'f' => simple(12),
        'n' => simple(b'\n'),
        'r' => simple(b'\r'),
        't' => simple(b'\t'),
        'v' => simple(11),
        '\\' => simple(b'\\'),
        letter if letter == quote => Some(letter.to_string().into_bytes()),
        'x' => simple(u8::try_from(number(letters, 2, 16)?).ok()?),
        'u' => Some(char::from_u32(number(letters, 4, 16)?)?.to_string().into_bytes()),
        'U' => Some(char::from_u32(number(letters, 8, 16)?)?.to_string().into_bytes()),
        first @ '0'..='7' => simple(u8::try_from(first.to_digit(8)? * 64 + number(letters, 2, 8)?).ok()?),
        _ => None,
    }
}

fn number(letters: &mut Chars<'_>, digits: u32, radix: u32) -> Option<u32> {
    (0..digits).try_fold(0_u32, |value, _| value.checked_mul(radix)?.checked_add(letters.next()?.to_digit(radix)?))
}

#[cfg(test)]
mod tests {
    use super::super::record::{Info, Kind};
    use super::*;

    fn info() -> Info {
        let labels = [("containerd.io/snapshot.ref", "sha256:aa"), ("plain", "va,lue"), ("a.b", "x\"y")];
        Info {
            name: "default/3/sha256:aa".into(),
            parent: Some("/path/with space".into()),
            kind: Kind::Committed,
            created: 1,
            updated: 2,
            labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        }
    }

    #[test]
    fn filters_accept_what_they_say() {
        for (text, accepted) in [
            ("", true),
            ("kind==committed", true),
            ("kind==active", false),
            ("kind!=active", true),
            ("kind", true),
            ("name==default/3/sha256:aa", true),
            ("name~=^default/", true),
            ("name~=/^default\\/3/", true),
            ("name~=|/sha256:[a-f]+$|", true),
            ("name~=\"^k8s\"", false),
            ("parent==\"/path/with space\"", true),
            ("parent==\"\\x2fpath\\u002fwith\\040space\"", true),
            ("parent!=other", true),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:aa,parent==\"/path/with space\"", true),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:aa,parent==\"\"", false),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:bb", false),
            ("labels.plain==\"va,lue\"", true),
            ("labels.plain==va", false),
            ("labels.plain", true),
            ("labels.absent", false),
            ("labels.absent!=x", true),
            ("labels.absent==\"\"", false),
            ("labels.absent~=.+", false),
            ("labels.absent~=^$", true),
            ("labels.a.b==\"x\\\"y\"", true),
            ("labels", false),
            ("size==3", false),
            (" kind == committed , labels.plain ", true),
        ] {
            let filter = Filter::parse(text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(filter.accepts(&info()), accepted, "{text}");
        }
    }

    #[test]
    fn no_parent_is_an_empty_one() {
        let base = Info { parent: None, ..info() };
        for (text, accepted) in [("parent", true), ("parent==\"\"", true), ("parent!=\"\"", false), ("parent!=x", true)]
        {
            assert_eq!(Filter::parse(text).unwrap().accepts(&base), accepted, "{text}");
        }
    }

    #[test]
    fn faults_have_a_place() {
        for (text, at, problem) in [
            (",", 0, FilterProblem::Field),
            ("kind==active,", 13, FilterProblem::Field),
            ("kind=active", 4, FilterProblem::Operator),
            ("kind=", 4, FilterProblem::Operator),
            ("kindé", 4, FilterProblem::Operator),
            ("kind==", 6, FilterProblem::Value),
            ("kind==,", 6, FilterProblem::Value),
            ("kind==active x", 13, FilterProblem::Trailing),
            ("name==\"open", 6, FilterProblem::Unclosed),
            ("name==\"\\q\"", 6, FilterProblem::Escape),
            ("name==\"\\xff\"", 6, FilterProblem::Escape),
            ("labels.==x", 7, FilterProblem::Field),
        ] {
            let error = Filter::parse(text).unwrap_err();
            assert_eq!((error.at, error.problem), (at, problem), "{text}");
        }
        let error = Filter::parse("name~=(").unwrap_err();
        assert!(matches!(error.problem, FilterProblem::Expression(_)) && error.at == 6, "{error}");
    }
}
