//! Which modules a file of Python names, or may name.
//!
//! A compiled file (`.pyc`) is a tree of constants in the format of the `marshal` module: names, those of imported
//! modules among them, are short ASCII strings, each a byte `z` or `Z` (with the top bit set if it may be referred to
//! again), a byte of length, and the characters. That has not changed from version 3.4 to 3.14, as the code around them
//! did in each. So all such strings that look like names are taken; most lead to no module. Words of a documentation
//! string are inside of a longer string, and are not taken. In a source file only import statements count.

use std::collections::HashSet;

use crate::foresight::mentions::Mention;

/// Most names of one file: a module with more is a table.
const NAMES_MAX: usize = 4000;
/// Longest name.
const NAME_BYTES_MAX: usize = 120;

/// The names in a compiled file, in its order, each once.
#[must_use]
pub fn compiled(bytes: &[u8]) -> Vec<Mention> {
    let mut names = Collected::default();
    let mut rest = bytes;
    while let [kind, length, behind @ ..] = rest {
        let is_short = matches!(kind & 0x7f, b'z' | b'Z');
        let name = behind.get(..usize::from(*length)).filter(|name| is_short && is_name(name));
        rest = match name {
            Some(name) => {
                names.add(name);
                &behind[name.len()..]
            }
            None => &rest[1..],
        };
    }
    names.mentions
}

/// The modules that a source file imports, in its order, each once.
#[must_use]
pub fn source(bytes: &[u8]) -> Vec<Mention> {
    let mut names = Collected::default();
    let mut lines = bytes.split(|byte| *byte == b'\n');
    while let Some(line) = lines.next() {
        let words: Vec<&[u8]> = words(line).collect();
        match words.as_slice() {
            [b"import", modules @ ..] => modules.iter().for_each(|module| names.add(module)),
            [b"from", module, b"import", imported @ ..] => {
                names.add(module);
                let mut imported = imported.to_vec();
                if line.contains(&b'(') {
                    // The list goes on until its end, of whatever that is.
                    let mut is_open = !line.contains(&b')');
                    while is_open {
                        let Some(line) = lines.next() else { break };
                        imported.extend(self::words(line));
                        is_open = !line.contains(&b')');
                    }
                }
                for name in imported {
                    names.add(&[module, b".".as_slice(), name].concat());
                    names.add(name);
                }
            }
            _ => {}
        }
    }
    names.mentions
}

#[derive(Default)]
struct Collected {
    mentions: Vec<Mention>,
    seen: HashSet<Box<[u8]>>,
}

impl Collected {
    fn add(&mut self, name: &[u8]) {
        let start = name.iter().position(|byte| *byte != b'.').unwrap_or(name.len());
        let name = &name[start..];
        if is_name(name) && self.seen.len() < NAMES_MAX && self.seen.insert(name.into()) {
            self.mentions.push(Mention::Module(name.into()));
        }
    }
}

/// The words of a line until a remark, `as` and the name behind it left out.
fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let code = line.split(|byte| *byte == b'#').next().unwrap_or_default();
    let is_between = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b',' | b'(' | b')' | b';' | b'\\');
    let mut words = code.split(is_between).filter(|word| !word.is_empty());
    std::iter::from_fn(move || {
        let word = words.next()?;
        if word == b"as" {
            words.next();
            return words.next();
        }
        Some(word)
    })
}

/// Whether these are names with dots between them.
fn is_name(bytes: &[u8]) -> bool {
    let is_letter = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let is_part = |part: &[u8]| part.first().is_some_and(|byte| !byte.is_ascii_digit()) && part.iter().all(is_letter);
    bytes.len() <= NAME_BYTES_MAX && bytes.split(|byte| *byte == b'.').all(is_part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(mentions: &[Mention]) -> Vec<String> {
        let name = |mention: &Mention| match mention {
            Mention::Module(name) => String::from_utf8(name.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        };
        mentions.iter().map(name).collect()
    }

    #[test]
    fn short_strings_of_a_compiled_file() {
        let mut file = b"\xa7\r\r\n0123456789ab\xe3".to_vec();
        for (kind, text) in [
            (b'z', "os.path"),
            (b'Z' | 0x80, "_core"),
            (b'z', "two words"),
            (b'z', "9lives"),
            (b'z', "a..b"),
            (b'z', "os.path"),
            (b'z', ""),
            (b'Z', "z\u{4}json"),
            (b's', "no_string"),
        ] {
            file.extend([kind, u8::try_from(text.len()).unwrap()]);
            file.extend(text.as_bytes());
        }
        file.extend(b"z\x09cut");
        // What is within a string is found only where the string is none itself.
        assert_eq!(names(&compiled(&file)), ["os.path", "_core", "json"]);
    }

    #[test]
    fn imports_of_a_source_file() {
        let text = "
\"\"\"import nothing here\"\"\"
import os, sys as system  # import more
    from . import _a, _b as b
from .._c.d import (e,
    f as g,  # h
)
from x import *
value = 'import y'
";
        // A line of a documentation string that looks like an import would be taken for one.
        assert_eq!(
            names(&source(text.as_bytes())),
            ["os", "sys", "_a", "_b", "_c.d", "_c.d.e", "e", "_c.d.f", "f", "x"]
        );
        assert!(source(b"from x import (a,\n").len() == 3);
        assert!(source(b"from\nimport\nimport 9 as\n").is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(bytes in prop::collection::vec(prop::sample::select(b"zZ\x04ab.(\n# import from as".to_vec()), 0..300)) {
            for mention in compiled(&bytes).into_iter().chain(source(&bytes)) {
                let Mention::Module(name) = mention else { panic!("{mention:?}") };
                prop_assert!(is_name(&name));
            }
        }
    }
}
