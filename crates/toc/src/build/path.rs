//! Lexical operations on slash-separated names, with the results of Go's `path/filepath` on Unix, which containerd uses.

/// The shortest equal name: no empty components, no `.`, no `..` but at the start of a relative name. Never empty.
pub(super) fn clean(name: &[u8]) -> Vec<u8> {
    let absolute = name.first() == Some(&b'/');
    let mut kept: Vec<&[u8]> = Vec::new();
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => match kept.last() {
                Some(&last) if last != b".." => {
                    kept.pop();
                }
                _ if absolute => {}
                _ => kept.push(component),
            },
            _ => kept.push(component),
        }
    }
    let mut cleaned = if absolute { vec![b'/'] } else { Vec::new() };
    cleaned.extend_from_slice(&kept.join(&b'/'));
    if cleaned.is_empty() {
        cleaned.push(b'.');
    }
    cleaned
}

/// `a` and `b` with a slash between them, cleaned.
pub(super) fn join(a: &[u8], b: &[u8]) -> Vec<u8> {
    clean(&[a, b].join(&b'/'))
}

/// What is before and after the last slash; the slash stays with the first part.
pub(super) fn split(name: &[u8]) -> (&[u8], &[u8]) {
    let at = name.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    name.split_at(at)
}

/// The components of a name, without empty ones.
pub(super) fn components(name: &[u8]) -> impl Iterator<Item = &[u8]> {
    name.split(|byte| *byte == b'/').filter(|component| !component.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_agrees_with_go() {
        for (name, cleaned) in [
            ("", "."),
            (".", "."),
            ("./", "."),
            ("/", "/"),
            ("//a//b/", "/a/b"),
            ("a/./b/../c", "a/c"),
            ("../../a", "../../a"),
            ("a/../..", ".."),
            ("/../a", "/a"),
            ("a/..", "."),
        ] {
            assert_eq!(clean(name.as_bytes()), cleaned.as_bytes(), "{name}");
        }
    }

    #[test]
    fn split_keeps_the_slash() {
        assert_eq!(split(b"a/b"), (&b"a/"[..], &b"b"[..]));
        assert_eq!(split(b"b"), (&b""[..], &b"b"[..]));
        assert_eq!(split(b"a/"), (&b"a/"[..], &b""[..]));
    }
}
