//! What a name in an archive means: its components, and whether it is a white-out mark.

/// Longest file name that the kernel can look up.
const NAME_BYTES_MAX: usize = 255;

/// The components of `path` after lexical cleaning: no empty one, no `.`, and `..` takes the one before it away but
/// never climbs over the root. This is Go's `path.Clean("/" + path)`, which the container engines apply.
pub(super) fn components(path: &[u8]) -> Vec<&[u8]> {
    let mut clean = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                clean.pop();
            }
            name => clean.push(name),
        }
    }
    clean
}

/// Splits a path into its directory part and its last component, when that can be done without cleaning the directory
/// part: the last component is an ordinary name. Trailing slashes do not count.
pub(super) fn split_simple(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = path.iter().rposition(|byte| *byte != b'/')? + 1;
    let path = &path[..length];
    let (directory, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&path[..0], path),
    };
    (!matches!(name, b"." | b"..")).then_some((directory, name))
}

/// Whether `name` can be a file name.
pub(super) fn is_valid(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.contains(&0)
}

/// What a last component says about lower layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark<'name> {
    /// Nothing: it is an ordinary name.
    None,
    /// `.wh.NAME`: lower layers' NAME is deleted.
    Whiteout(&'name [u8]),
    /// `.wh..wh..opq`: the directory hides all that lower layers have in it.
    Opaque,
    /// Any other `.wh.` name: left over from aufs, or meaningless.
    Void,
}

/// Sorts a last component by the rules of the OCI image specification.
pub(super) fn mark(name: &[u8]) -> Mark<'_> {
    match name.strip_prefix(b".wh.") {
        None => Mark::None,
        Some(b".wh..opq") => Mark::Opaque,
        Some(b"" | b"." | b"..") => Mark::Void,
        Some(rest) if rest.starts_with(b".wh.") => Mark::Void,
        Some(rest) => Mark::Whiteout(rest),
    }
}

/// Whether a component that is not the last one is a mark, so that the whole path lies inside something hidden.
pub(super) fn is_mark(name: &[u8]) -> bool {
    name.starts_with(b".wh.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleaning() {
        let joined = |path: &str| components(path.as_bytes()).join(&b"/"[..]);
        for (path, clean) in [
            ("", ""),
            ("a", "a"),
            ("./a/", "a"),
            ("//a//b/./c", "a/b/c"),
            ("../x", "x"),
            ("a/../../up", "up"),
            ("a/b/../c", "a/c"),
            ("a/..", ""),
            ("..y", "..y"),
            ("...", "..."),
        ] {
            assert_eq!(joined(path), clean.as_bytes(), "{path}");
        }
    }

    #[test]
    fn simple_split() {
        assert_eq!(split_simple(b"a/b/c/"), Some((&b"a/b"[..], &b"c"[..])));
        assert_eq!(split_simple(b"c"), Some((&b""[..], &b"c"[..])));
        assert_eq!(split_simple(b"a/../c"), Some((&b"a/.."[..], &b"c"[..])));
        for path in [&b""[..], b"/", b"//", b".", b"a/..", b"a/./"] {
            assert_eq!(split_simple(path), None);
        }
    }

    #[test]
    fn marks() {
        for (name, expected) in [
            (&b"x"[..], Mark::None),
            (b".whx", Mark::None),
            (b"a.wh.b", Mark::None),
            (b".wh.x", Mark::Whiteout(b"x")),
            (b".wh..opq", Mark::Whiteout(b".opq")),
            (b".wh..wh..opq", Mark::Opaque),
            (b".wh.", Mark::Void),
            (b".wh..", Mark::Void),
            (b".wh...", Mark::Void),
            (b".wh....", Mark::Whiteout(b"...")),
            (b".wh..wh.", Mark::Void),
            (b".wh..wh.plnk", Mark::Void),
            (b".wh..wh..opq.x", Mark::Void),
        ] {
            assert_eq!(mark(name), expected, "{}", name.escape_ascii());
        }
    }
}
