//! Members and archives, byte by byte.

use std::ops::Range;

use super::{Expect, Media, Place, Row};

pub const NAME: Range<usize> = 0..100;
pub const MODE: Range<usize> = 100..108;
pub const UID: Range<usize> = 108..116;
pub const GID: Range<usize> = 116..124;
pub const SIZE: Range<usize> = 124..136;
pub const MTIME: Range<usize> = 136..148;
pub const SUM: Range<usize> = 148..156;
pub const TYPE: usize = 156;
pub const LINK: Range<usize> = 157..257;
pub const MAGIC: Range<usize> = 257..265;
pub const MAJOR: Range<usize> = 329..337;
pub const MINOR: Range<usize> = 337..345;
pub const PREFIX: Range<usize> = 345..500;

/// One member with what announces it.
#[derive(Debug, Clone)]
pub struct Member {
    head: [u8; 512],
    records: Vec<u8>,
    data: Vec<u8>,
}

/// A member with a USTAR header that says what is true.
pub fn member(typeflag: u8, name: impl AsRef<[u8]>, data: &[u8]) -> Member {
    let name = name.as_ref();
    let mut member = Member { head: [0; 512], records: Vec::new(), data: data.to_vec() }
        .put(MODE, if typeflag == b'5' { b"0000755\0" } else { b"0000644\0" })
        .put(UID, b"0000000\0")
        .put(GID, b"0000000\0")
        .put(SIZE, format!("{:011o}\0", data.len()).as_bytes())
        .put(MTIME, b"14371573620\0")
        .put(TYPE..TYPE + 1, &[typeflag])
        .put(MAGIC, b"ustar\x0000");
    member = member.put(NAME, &name[..name.len().min(100)]);
    if name.len() > 100 { member.pax("path", name) } else { member }
}

pub fn file(name: impl AsRef<[u8]>, data: &[u8]) -> Member {
    member(b'0', name, data)
}

pub fn dir(name: impl AsRef<[u8]>) -> Member {
    member(b'5', name, b"")
}

pub fn fifo(name: impl AsRef<[u8]>) -> Member {
    member(b'6', name, b"")
}

pub fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Member {
    member(b'2', name, b"").link(target)
}

pub fn hard(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Member {
    member(b'1', name, b"").link(target)
}

/// A character (`3`) or block (`4`) device.
pub fn device(typeflag: u8, name: &str, major: u32, minor: u32) -> Member {
    let octal = |number: u32| format!("{number:07o}\0").into_bytes();
    member(typeflag, name, b"").put(MAJOR, &octal(major)).put(MINOR, &octal(minor))
}

impl Member {
    /// Overwrites a field of the header, rest of the field with NUL.
    pub fn put(mut self, at: Range<usize>, bytes: &[u8]) -> Self {
        self.head[at.clone()].fill(0);
        self.head[at.start..at.start + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn link(self, target: impl AsRef<[u8]>) -> Self {
        let target = target.as_ref();
        let member = self.put(LINK, &target[..target.len().min(100)]);
        if target.len() > 100 { member.pax("linkpath", target) } else { member }
    }

    pub fn mode(self, mode: u32) -> Self {
        self.put(MODE, format!("{mode:07o}\0").as_bytes())
    }

    pub fn owner(self, uid: u32, gid: u32) -> Self {
        self.put(UID, format!("{uid:07o}\0").as_bytes()).put(GID, format!("{gid:07o}\0").as_bytes())
    }

    /// One more PAX record.
    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.records.extend(record(key.as_ref(), value.as_ref()));
        self
    }

    pub fn xattr(self, name: &str, value: &[u8]) -> Self {
        self.pax(format!("SCHILY.xattr.{name}"), value)
    }

    /// In the old GNU format.
    pub fn gnu(self) -> Self {
        self.put(MAGIC, b"ustar  \0")
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if !self.records.is_empty() {
            bytes.extend(extension(b'x', &self.records));
        }
        bytes.extend(sealed(self.head));
        bytes.extend(padded(&self.data));
        bytes
    }
}

/// `length key=value\n`, whose length counts itself.
pub fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = [b" ", key, b"=", value, b"\n"].concat();
    let mut len = body.len() + 1;
    while len != body.len() + len.to_string().len() {
        len = body.len() + len.to_string().len();
    }
    [len.to_string().into_bytes(), body].concat()
}

/// An extended header (`x`, `g`, `L`, `K`) with this content, well-formed or not.
pub fn extension(typeflag: u8, content: &[u8]) -> Vec<u8> {
    let name = if typeflag == b'g' { "pax_global_header" } else { "extension" };
    member(typeflag, name, content).bytes()
}

/// A header with its checksum.
pub fn sealed(mut head: [u8; 512]) -> Vec<u8> {
    head[SUM].fill(b' ');
    let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
    head[SUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    head.to_vec()
}

pub fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// An archive under construction.
#[derive(Debug, Clone, Default)]
pub struct Archive(Vec<u8>);

impl Archive {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn add(&mut self, member: Member) {
        self.0.extend(member.bytes());
    }

    pub fn with(mut self, member: Member) -> Self {
        self.add(member);
        self
    }

    pub fn raw(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    /// With the two blocks that end an archive.
    pub fn end(self) -> Vec<u8> {
        self.raw([0; 1024]).0
    }

    /// Without them.
    pub fn cut(self) -> Vec<u8> {
        self.0
    }
}

/// A row of these members.
pub fn row(name: &str, expect: Expect, members: &[Member]) -> Row {
    let archive = members.iter().cloned().fold(Archive::new(), Archive::with);
    raw_row(name, expect, archive.end())
}

/// A row of this archive, uncompressed.
pub fn raw_row(name: &str, expect: Expect, tar: Vec<u8>) -> Row {
    Row {
        name: name.to_owned(),
        expect,
        over_base: None,
        place: Place::OverBase,
        media: Media::Plain,
        blob: tar.clone(),
        tar,
    }
}

/// A row of this blob, which should be gzip of `tar`.
pub fn gzip_row(name: &str, expect: Expect, blob: Vec<u8>, tar: Vec<u8>) -> Row {
    Row { media: Media::Gzip, blob, ..raw_row(name, expect, tar) }
}
