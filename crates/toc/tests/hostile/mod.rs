//! The hostile-tar table: archives that no honest program writes, each with what Millstream does about it.
//!
//! Two tests run it. `crates/toc/tests/hostile.rs` holds what is written here; `tests/e2e/tests/hostile.rs` has the same
//! archives unpacked by real containerds and holds that nothing is shown that they would not show. Everything is made byte by
//! byte: a library would refuse, or put right, what matters here.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

mod headers;
mod links;
pub mod make;
mod names;
mod packing;
mod whiteouts;
mod xattrs;

/// What becomes of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// It is lazy, and shows the tree that containerd unpacks.
    Lazy,
    /// It is not lazy, for a reason with this text in it; containerd does what it always does.
    Declined(&'static str),
    /// It is not a layer, for a reason with this text in it; containerd refuses it too.
    Refused(&'static str),
}

/// What the manifest says of the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Media {
    Plain,
    Gzip,
}

/// Which images are made of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// One of this layer only.
    Alone,
    /// One of [`base`] and this layer.
    OverBase,
    /// Both of them.
    Both,
}

/// One archive.
#[derive(Debug, Clone)]
pub struct Row {
    pub name: String,
    pub expect: Expect,
    /// What becomes of it over [`base`], where that is something else.
    pub over_base: Option<Expect>,
    /// Where it is worth looking at.
    pub place: Place,
    pub media: Media,
    pub blob: Vec<u8>,
    /// What the blob decompresses to, as far as it does: the diff ID is its digest.
    pub tar: Vec<u8>,
}

/// A file outside of every root that the archives try to reach.
pub struct Canary<'a> {
    /// Absolute path of its directory, without a slash at the end.
    pub dir: &'a str,
    /// Its name there.
    pub name: &'a str,
}

impl Row {
    fn over_base(self, expect: Expect) -> Self {
        Self { over_base: Some(expect), ..self }
    }

    /// What has nothing to do with layers below is looked at in one place only.
    fn only(self, place: Place) -> Self {
        Self { place, ..self }
    }
}

/// All rows.
pub fn rows(canary: &Canary<'_>) -> Vec<Row> {
    let of_trees = [names::rows(canary), links::rows(canary), whiteouts::rows()].into_iter().flatten();
    let of_bytes = [
        xattrs::rows(),
        headers::numbers(),
        headers::extended(),
        headers::types_and_sparse(),
        headers::ends(),
        packing::rows(),
    ];
    of_trees.map(|row| row.only(Place::Both)).chain(of_bytes.into_iter().flatten()).collect()
}

/// A layer of names of all sorts for the rows to hide, replace and lead through.
pub fn base() -> Vec<u8> {
    use make::{Archive, dir, fifo, file, hard, symlink};
    let mut archive = Archive::new();
    archive.add(dir("d").mode(0o750).owner(1, 2).xattr("user.old", b"1"));
    archive.add(file("d/f", b"d/f of the base"));
    archive.add(dir("d/sub").mode(0o2711).owner(3, 4));
    archive.add(file("d/sub/f", b"d/sub/f of the base"));
    archive.add(dir("set").mode(0o2775).owner(0, 50));
    archive.add(file("f", b"f of the base").mode(0o4755));
    for name in ["a", "b", "c", "e", "h", "x", "y", "z"] {
        archive.add(file(name, name.as_bytes()));
    }
    archive.add(hard("f2", "f").mode(0o4755));
    archive.add(symlink("ld", "d"));
    archive.add(symlink("labs", "/d/sub"));
    archive.add(symlink("lup", "../../../../d"));
    archive.add(symlink("lf", "f"));
    archive.add(fifo("p"));
    archive.add(dir("full"));
    archive.add(file("full/1", b"1"));
    archive.add(dir("full/2"));
    archive.add(file("full/2/3", b"3"));
    archive.end()
}
