//! What modules of an image may be called, as a filter: most short words of a file of Python are names of something
//! else, and to look each up in all places where a module may lie is most of what following costs.
//!
//! One bit per name and hash, so false positives are possible; their lookup then finds nothing. A name that is there
//! always passes. Eight bits for each name: of ten words that are none, nine are found out.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;

const BITS_PER_NAME: usize = 8;

/// First parts of names of modules and packages.
#[derive(Debug)]
pub(super) struct Stems {
    bits: Box<[u64]>,
    hasher: RandomState,
}

impl Stems {
    /// Those of `names`, which are the names of files and directories; the ones that are no module's are left out.
    pub(super) fn of<'names>(names: impl Iterator<Item = (&'names [u8], bool)> + Clone) -> Self {
        let stems = names.filter_map(|(name, is_directory)| stem(name, is_directory));
        let words = (stems.clone().count() * BITS_PER_NAME).div_ceil(64).next_power_of_two();
        let mut new = Self { bits: vec![0; words].into(), hasher: RandomState::new() };
        for stem in stems {
            let (word, bit) = new.place(stem);
            new.bits[word] |= bit;
        }
        new
    }

    /// Whether a module of this name, with dots between its parts, may be there; if not, it is not.
    pub(super) fn may_have(&self, module: &[u8]) -> bool {
        let first = module.split(|byte| *byte == b'.').next().unwrap_or_default();
        let (word, bit) = self.place(first);
        self.bits[word] & bit != 0
    }

    fn place(&self, stem: &[u8]) -> (usize, u64) {
        let hash = self.hasher.hash_one(stem);
        // The number of words is a power of two.
        let word = (hash >> 6) & (self.bits.len() as u64 - 1);
        (usize::try_from(word).unwrap_or(0), 1 << (hash % 64))
    }
}

/// The name of the module or package that a file or a directory would be.
fn stem(name: &[u8], is_directory: bool) -> Option<&[u8]> {
    if is_directory {
        return Some(name);
    }
    let is_module = [b"py".as_slice(), b"pyc", b"so"].iter().any(|ending| name.ends_with(ending));
    name.iter().position(|byte| *byte == b'.').filter(|_| is_module).map(|dot| &name[..dot])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn modules_and_packages_pass() {
        let names: [(&[u8], bool); 6] = [
            (b"os.py", false),
            (b"json.cpython-311.pyc", false),
            (b"_ssl.abi3.so", false),
            (b"package", true),
            (b"README.md", false),
            (b"libm.so.6", false),
        ];
        let stems = Stems::of(names.into_iter());
        for name in [b"os".as_slice(), b"os.path", b"json", b"_ssl", b"package.module"] {
            assert!(stems.may_have(name), "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn most_words_that_are_no_module_do_not() {
        let names: Vec<Vec<u8>> = (0..1000).map(|number| format!("m{number}.py").into_bytes()).collect();
        let stems = Stems::of(names.iter().map(|name| (name.as_slice(), false)));
        let passed = (0..10_000).filter(|number| stems.may_have(format!("w{number}").as_bytes())).count();
        assert!(passed < 2_000, "{passed}");
        assert!(!Stems::of(std::iter::empty()).may_have(b"os"));
    }

    proptest! {
        #[test]
        fn what_is_there_passes(names in prop::collection::vec("[a-z_]{1,8}", 1..200)) {
            let stems = Stems::of(names.iter().map(|name| (name.as_bytes(), true)));
            for name in &names {
                prop_assert!(stems.may_have(name.as_bytes()));
            }
        }
    }
}
