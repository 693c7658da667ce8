//! Whiteouts, opaque marks, and what poses as one.

use super::Expect::{Declined, Lazy, Refused};
use super::Row;
use super::make::{device, dir, file, hard, member, row, symlink};

pub fn rows() -> Vec<Row> {
    let taken = Declined("whiteout of a name that the layer has");
    let in_whiteout = Declined("a parent is a whiteout");
    let nameless = Refused("whiteout of no name");
    vec![
        row(
            "whiteouts",
            Lazy,
            &[file(".wh.a", b""), file("d/.wh.f", b""), file(".wh.never", b""), file(".wh.full", b"")],
        ),
        row("whiteout of no name", nameless, &[file(".wh.", b"")]),
        row("whiteout of a dot", nameless, &[file("d/.wh..", b"")]),
        row("whiteout of two dots", nameless, &[file("d/.wh...", b"")]),
        row("whiteout of three dots", Lazy, &[file("d/.wh....", b"")]),
        row("whiteout with content", Lazy, &[file(".wh.a", &[b'x'; 700]), file("d/.wh..wh..opq", b"content")]),
        row("whiteout with attributes", Lazy, &[file(".wh.a", b"").mode(0o4777).owner(5, 6).xattr("user.x", b"1")]),
        row(
            "whiteouts of other types",
            Lazy,
            &[dir(".wh.a"), symlink(".wh.b", "x"), hard(".wh.c", "no"), device(b'3', ".wh.e", 1, 3)],
        ),
        row("whiteout of a type that is none", Lazy, &[member(b'7', ".wh.a", b"")]),
        row(
            "whiteout of a whiteout's name",
            Lazy,
            &[file(".wh..wh.a", b""), file(".wh..wh.", b""), file(".wh..wh..opq.x", b"")],
        ),
        row(
            "names that only look like whiteouts",
            Lazy,
            &[file("a.wh.b", b"1"), file(".wha", b"2"), file(".WH.c", b"3"), file("wh.", b"")],
        ),
        row("files in what would be a whiteout", Lazy, &[file(".wh.a/n", b"1"), file(".wh..wh.plnk/1.2", b"2")]),
        row(
            "whiteout, then the name",
            Lazy,
            &[file(".wh.a", b""), file("a", b"new"), file(".wh.d", b""), dir("d"), file("d/n", b"1")],
        ),
        row("whiteout of a full directory, then the name", Lazy, &[file(".wh.full", b""), dir("full").mode(0o700)]),
        row("the name, then a whiteout", taken, &[file("a", b"new"), file(".wh.a", b"")]),
        row("whiteout twice", taken, &[file(".wh.a", b""), file(".wh.a", b"")]),
        row("whiteout of a parent that the layer has", taken, &[file("d/n", b"1"), file(".wh.d", b"")]),
        row("whiteout of a parent first", in_whiteout, &[file(".wh.d", b""), file("d/n", b"1")]),
        row("whiteout in a whiteout", in_whiteout, &[file(".wh.d", b""), file("d/.wh.f", b"")]),
        row("whiteout in what is not there", Lazy, &[file("q/r/.wh.n", b"")]),
        row("whiteout of 255 bytes", Lazy, &[file(format!(".wh.{}", "n".repeat(255)), b"")]),
        row("whiteout of 256 bytes", Refused("name"), &[file(format!(".wh.{}", "n".repeat(256)), b"")]),
        row("whiteout through a link", Lazy, &[dir("d"), symlink("l", "d"), file("l/.wh.f", b"")]),
        row("whiteout in a link below", Lazy, &[file("ld/.wh.f", b"")]),
        row("opaque before", Lazy, &[dir("full"), file("full/.wh..wh..opq", b""), file("full/n", b"1")]),
        row("opaque after", Lazy, &[dir("full"), file("full/n", b"1"), file("full/.wh..wh..opq", b"")]),
        row(
            "opaque among",
            Lazy,
            &[file("full/n", b"1"), file("full/.wh..wh..opq", b""), file("full/m", b"2"), dir("full")],
        ),
        row(
            "opaque twice, and a whiteout",
            Lazy,
            &[file("full/.wh..wh..opq", b""), file("full/.wh.1", b""), file("full/.wh..wh..opq", b"")],
        ),
        row("opaque root", Lazy, &[file(".wh..wh..opq", b""), file("n", b"1")]),
        row("opaque of other types", Lazy, &[dir("full/.wh..wh..opq"), symlink("d/.wh..wh..opq", "x")]),
        row("opaque through a link", Lazy, &[dir("d"), symlink("l", "d"), file("l/.wh..wh..opq", b"")]),
        row("opaque directory replaced", Lazy, &[file("full/.wh..wh..opq", b""), file("full", b"1"), dir("full")]),
        row("opaque in nested directories", Lazy, &[file("d/.wh..wh..opq", b""), file("d/sub/n", b"1")]),
        row("opaque where a file is below", Lazy, &[file("f/.wh..wh..opq", b""), file("f/n", b"1")]),
        row("files in an opaque mark", Lazy, &[file("d/.wh..wh..opq/n", b"1")]),
        row(
            "device 0:0 is a whiteout",
            Lazy,
            &[device(b'3', "a", 0, 0), device(b'3', "d/f", 0, 0), device(b'3', "full", 0, 0)],
        ),
        row(
            "device 0:0 and what replaces it",
            Lazy,
            &[device(b'3', "a", 0, 0), file("a", b"new"), device(b'3', "full", 0, 0), dir("full")],
        ),
        row("whiteout of a device 0:0", taken, &[device(b'3', "a", 0, 0), file(".wh.a", b"")]),
        row("file in a device 0:0", in_whiteout, &[device(b'3', "d", 0, 0), file("d/n", b"1")]),
        row("block device 0:0 is none", Lazy, &[device(b'4', "a", 0, 0)]),
        row(
            "device 0:0 with attributes",
            Lazy,
            &[device(b'3', "a", 0, 0).mode(0o777).owner(5, 6).xattr("security.x", b"1")],
        ),
        row("implied directory under set-group-ID", Lazy, &[dir("q").mode(0o2775).owner(0, 50), file("q/r/s/n", b"1")]),
        row("implied directory under set-group-ID below", Lazy, &[file("set/r/s/n", b"1"), file("d/sub/r/n", b"1")]),
        row(
            "implied directory, then another group",
            Declined("has no description"),
            &[dir("q").mode(0o2775).owner(0, 50), file("q/r/n", b"1"), dir("q").mode(0o2775).owner(0, 60)],
        ),
        row(
            "implied directory, then its parent",
            Declined("has no description"),
            &[file("set/r/n", b"1"), dir("set").mode(0o755)],
        ),
        row(
            "opaque over implied directories",
            Declined("opaque mark over directories"),
            &[file("q/r/n", b"1"), file("q/.wh..wh..opq", b"")],
        ),
        row("described after what is in it", Lazy, &[file("d/n", b"1"), dir("d").mode(0o700).xattr("user.new", b"2")]),
    ]
}
