//! Hard links: to outside, to nothing, to themselves, to what is no file.

use super::Expect::{Declined, Lazy, Refused};
use super::make::{Archive, device, dir, fifo, file, hard, padded, raw_row, row, symlink};
use super::{Canary, Row};

pub fn rows(canary: &Canary<'_>) -> Vec<Row> {
    let path = format!("{}/{}", canary.dir, canary.name);
    let missing = Declined("which is not in the layer");
    let to_directory = Refused("hard link to a directory");
    let content_after_link = Archive::new()
        .with(file("a", b"1"))
        .with(hard("g", "a").put(super::make::SIZE, b"00000000005\0"))
        .raw(padded(b"hello"))
        .end();
    vec![
        row("hard link to outside", missing, &[hard("g", "../../../../../../etc/passwd")]),
        row("hard link to the canary", missing, &[hard("g", &path)]),
        row("hard link to the canary, relative", missing, &[hard("g", format!("{}{path}", "../".repeat(30)))]),
        row(
            "hard link through a link to outside",
            missing,
            &[symlink("l", canary.dir), hard("g", format!("l/{}", canary.name))],
        ),
        row("hard link to nothing", missing, &[hard("g", "no/where")]),
        row("hard link to what comes later", missing, &[hard("g", "later"), file("later", b"1")]),
        row("hard link to itself", missing, &[hard("g", "g")]),
        row("hard links in a loop", missing, &[hard("g", "i"), hard("i", "g")]),
        row("hard link to the layer below", missing, &[hard("g", "f")]),
        row("hard link that replaces its target", missing, &[file("g", b"1"), hard("g", "g")]),
        row("hard link to a removed file", missing, &[dir("q"), file("q/r", b"1"), file("q", b""), hard("g", "q/r")])
            .expecting(Refused("not a directory")),
        row("hard link to a directory", to_directory, &[dir("q"), hard("g", "q")]),
        row("hard link to the root", to_directory, &[hard("g", "/")]),
        row("hard link to no name", to_directory, &[hard("g", "")]),
        row("hard link to what is above the root", to_directory, &[hard("g", "..")]),
        row("hard link to what is above a directory", to_directory, &[dir("q"), hard("g", "q/..")]),
        row("hard link to a link", Lazy, &[symlink("l", &path), hard("g", "l").mode(0o777).owner(7, 7)]),
        row("hard link through a link", Lazy, &[dir("q"), file("q/r", b"1"), symlink("l", "/q"), hard("g", "l/r")]),
        row(
            "hard link with dots and slashes",
            Lazy,
            &[file("a", b"1"), hard("g", "./q/../a"), hard("i", "/a"), hard("j", "a/")],
        ),
        row(
            "hard link to fifo and devices",
            Lazy,
            &[fifo("q"), hard("g", "q"), device(b'4', "r", 7, 0), hard("i", "r").mode(0o600)],
        ),
        row(
            "hard link to a whiteout",
            Declined("hard link to a whiteout"),
            &[file(".wh.a", b""), hard("g", "a"), hard("b", "a").xattr("user.x", b"1")],
        ),
        row(
            "hard link to a device that is a whiteout",
            Declined("hard link to a whiteout"),
            &[device(b'3', "a", 0, 0), hard("b", "a")],
        ),
        row(
            "the last of several hard links decides",
            Lazy,
            &[file("g", b"1").mode(0o600), hard("i", "g").mode(0o4711).owner(5, 6), hard("j", "i").mode(0o640)],
        ),
        row(
            "hard link outlives its target",
            Lazy,
            &[file("g", b"1"), hard("i", "g"), file("g", b"22"), hard("j", "g")],
        ),
        row("hard link to a link replaced by another", Lazy, &[symlink("l", "a"), hard("g", "l"), symlink("l", "b")]),
        raw_row("hard link with content", Refused("checksum"), content_after_link),
    ]
}

impl Row {
    /// The same with another verdict than its neighbours.
    fn expecting(self, expect: super::Expect) -> Self {
        Self { expect, ..self }
    }
}
