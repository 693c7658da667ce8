//! Names that climb, that are too long, that are not text, that are there twice.

use super::Expect::{Declined, Lazy, Refused};
use super::make::{NAME, device, dir, fifo, file, hard, member, row, symlink};
use super::{Canary, Row};

pub fn rows(canary: &Canary<'_>) -> Vec<Row> {
    let up = "../".repeat(20);
    let (dir_of_canary, path) = (canary.dir, format!("{}/{}", canary.dir, canary.name));
    let mut rows = vec![
        row("climbing at the start", Lazy, &[file("../a", b"1"), file("../../../b/c", b"2")]),
        row("climbing in the middle", Lazy, &[dir("d"), file("d/../g", b"1"), file("d/../../../i", b"2")]),
        row("climbing at the end", Lazy, &[dir("d"), dir("d/.."), file("q/r/../..", b"1"), dir("d/sub/../.")]),
        row("climbing to the canary", Lazy, &[file(format!("{up}{path}"), b"evil")]),
        row("absolute names", Lazy, &[file("/a", b"1"), file("//b", b"2"), file("/../c", b"3"), dir("/d/")]),
        row("absolute name of the canary", Lazy, &[file(&path, b"evil")]),
        row("removing the canary", Lazy, &[file(format!("{up}{dir_of_canary}/.wh.{}", canary.name), b"")]),
        row("dots and empty components", Lazy, &[dir("./"), dir("."), file("./a", b"1"), file(".//k//./b", b"2")]),
        row("names of the root", Lazy, &[dir("/"), dir(".."), file("/..", b"1"), symlink("./", "x"), file("", b"2")]),
        row(
            "slashes at the end",
            Lazy,
            &[file("a/", b"1"), member(0, "v7-directory/", b""), symlink("l/", "a"), dir("e//")],
        ),
        row("dots that are names", Lazy, &[file("...", b"1"), file("..a/b..", b"2"), dir(".d")]),
        row("link to the canary's directory as parent", Lazy, &[symlink("l", dir_of_canary), file("l/evil", b"1")]),
        row(
            "relative link outward as parent",
            Lazy,
            &[dir("d"), symlink("d/up", format!("{up}{dir_of_canary}")), file("d/up/evil", b"1")],
        ),
        row("link replaced by a file", Lazy, &[symlink("a", &path), file("a", b"evil")]),
        row("link replaced by a directory", Lazy, &[symlink("l", dir_of_canary), dir("l").mode(0o777)]),
        row("link inside as parent", Lazy, &[dir("d"), symlink("l", "d"), file("l/n", b"1"), dir("l/m")]),
        row("absolute link inside as parent", Lazy, &[dir("d"), symlink("l", "/d"), file("l/n", b"1")]),
        row("link to the root as parent", Lazy, &[symlink("l", "/"), file("l/n", b"1"), file("l/l/o", b"2")]),
        row(
            "dot-dot after a link is lexical",
            Lazy,
            &[dir("q"), dir("q/r"), symlink("l", "q/r"), file("l/../n", b"1"), symlink("k", "l/.."), file("k/o", b"2")],
        ),
        row("dangling link as parent", Lazy, &[symlink("l", "no/where"), file("l/n", b"1")]),
        row("parent that is a link below", Lazy, &[file("ld/n", b"1"), file("labs/n", b"2"), file("lup/n", b"3")]),
        row("parent that is a file below", Lazy, &[file("f/n", b"1")]),
        row("parent of a parent that is a file below", Lazy, &[file("f/q/n", b"1")])
            .over_base(Refused("not a directory")),
        row("parent that is a link to a file below", Lazy, &[file("lf/n", b"1")]),
        row(
            "parents in a loop",
            Refused("too many symbolic links"),
            &[symlink("l", "k"), symlink("k", "l"), file("l/n", b"1")],
        ),
        row("parent that is a link to itself", Refused("symbolic links"), &[symlink("l", "l"), file("l/n", b"1")]),
        row("parent that is a file", Refused("not a directory"), &[file("a", b"1"), file("a/b", b"2")]),
        row("parent that is a fifo", Refused("not a directory"), &[fifo("q"), file("q/b", b"2")]),
        row(
            "parent that is a link to a file",
            Refused("not a directory"),
            &[file("a", b"1"), symlink("l", "a"), file("l/b", b"2")],
        ),
        row("name of 255 bytes", Lazy, &[file("n".repeat(255), b"1"), dir("m".repeat(255))]),
        row("name of 256 bytes", Refused("name"), &[file("n".repeat(256), b"1")]),
        row("parent of 256 bytes", Refused("name"), &[file(format!("{}/n", "n".repeat(256)), b"1")]),
        row("path of 4080 bytes", Declined("bytes of a path"), &[file(path_of(4080), b"1")]),
        row("path of 5000 bytes", Declined("too long"), &[file(path_of(5000), b"1")]),
        row("path of 3000 bytes", Lazy, &[file(path_of(3000), b"1")]),
        row(
            "path that gets long through links",
            Declined("bytes of a path"),
            &[dir(path_of(1000)), symlink("l", path_of(1000)), file(format!("l/{}", path_of(2800)), b"1")],
        ),
        row("symbolic link of 1023 bytes", Lazy, &[symlink("l", path_of(1023))]),
        row("symbolic link of 1024 bytes", Declined("bytes of a symbolic link"), &[symlink("l", path_of(1024))]),
        row("symbolic link of 4096 bytes", Refused("impossible target"), &[symlink("l", path_of(4096))]),
        row("symbolic link to nowhere", Refused("impossible target"), &[symlink("l", "")]),
        row("1100 directories deep", Declined("directories above a file"), &[file("e/".repeat(1100) + "n", b"1")]),
        row("names that are not text", Lazy, &[file(b"\xff\xfe", b"1"), dir(b"\x80"), file(b"a\nb\tc\x01\x7f", b"2")]),
        row(
            "names that look alike",
            Lazy,
            &[file("A", b"1"), file("a", b"2"), file("\u{e9}", b"3"), file("e\u{301}", b"4"), file(" ", b"5")],
        ),
        row("name that fills its field", Lazy, &[file("n".repeat(100), b"1")]),
        row("junk after the name's end", Lazy, &[file("", b"1").put(NAME, b"n\0junk")]),
        row("a directory over a file of the layer below", Lazy, &[dir("f"), file("f/n", b"1"), file("d", b"2")]),
    ];
    rows.extend(replaced());
    rows
}

/// `length` bytes of components of 100.
fn path_of(length: usize) -> String {
    let mut path = String::new();
    while path.len() < length {
        path.push_str(&"n".repeat(100.min(length - path.len())));
        path.push('/');
    }
    path.truncate(length - 1);
    path.push('n');
    path
}

/// Every kind after every kind, under one name each.
fn replaced() -> Vec<Row> {
    let kinds = |name: &str| {
        [
            ("file", file(name, b"content")),
            ("directory", dir(name)),
            ("link", symlink(name, "f")),
            ("dangling", symlink(name, "no/where")),
            ("hard", hard(name, "other")),
            ("fifo", fifo(name)),
            ("device", device(b'3', name, 1, 3)),
        ]
    };
    let mut members = vec![file("other", b"other").mode(0o600)];
    for (first, _) in kinds("") {
        for (second, _) in kinds("") {
            // What its time is set on at the end must be there.
            if (first, second) == ("directory", "dangling") {
                continue;
            }
            let name = format!("{first}-{second}");
            let pick = |kind: &str| kinds(&name).into_iter().find(|(known, _)| *known == kind).unwrap().1;
            members.extend([pick(first), pick(second)]);
        }
    }
    members.push(file("f", b"what the links lead to"));
    vec![
        row("every kind replaced by every kind", Lazy, &members),
        row("full directory replaced by a file", Lazy, &[dir("q"), file("q/r", b"1"), file("q", b"2")]),
        row("full directory replaced by a link", Lazy, &[dir("q"), file("q/r", b"1"), dir("o"), symlink("q", "o")]),
        row(
            "directory replaced by a dangling link",
            Refused("removed by a later member"),
            &[dir("q"), symlink("q", "no")],
        ),
        row("directory within what is removed", Refused("not a directory"), &[dir("q"), dir("q/r"), file("q", b"")]),
        row(
            "directory named again and again",
            Lazy,
            &[dir("q").mode(0o700), file("q/r", b""), dir("q").mode(0o1777).owner(5, 6)],
        ),
    ]
}
