//! Small tar archives with everything in them that the reader knows.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;

const BLOCK: usize = 512;
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// A tar under construction.
#[derive(Debug, Default)]
pub struct Archive(Vec<u8>);

impl Archive {
    /// A member of type `kind` with the given link target and stored bytes.
    #[must_use]
    pub fn member(mut self, name: &str, kind: u8, link: &str, data: &[u8]) -> Self {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, b"0004755\0");
        put(108, b"0000001\0");
        put(116, b"0000002\0");
        put(124, format!("{:011o}\0", data.len()).as_bytes());
        put(136, b"14000000000\0");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, b"0000001\0");
        put(337, b"0000003\0");
        sign(&mut header);
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.member(name, b'0', "", data)
    }

    /// Records of an extended header for the member that follows.
    #[must_use]
    pub fn pax(self, records: &[(&str, &str)]) -> Self {
        let text: String = records.iter().map(|(key, value)| record(key, value)).collect();
        self.member("pax", b'x', "", text.as_bytes())
    }

    /// The archive with its end.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

fn record(key: &str, value: &str) -> String {
    let body = format!(" {key}={value}\n");
    let mut length = body.len() + 1;
    while length != body.len() + length.to_string().len() {
        length = body.len() + length.to_string().len();
    }
    format!("{length}{body}")
}

fn sign(header: &mut [u8]) {
    header[CHECKSUM].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Gives every block that looks like a header the checksum it needs: else nearly every mutation would end there.
pub fn repair(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(BLOCK).filter(|block| block[257..262] == *b"ustar") {
        sign(block);
    }
}

/// A gzip member.
///
/// # Panics
///
/// Never: it is written to memory.
#[must_use]
pub fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

/// Archives that between them have every kind of member, extended headers, sparse files, long names and whiteouts.
#[must_use]
pub fn samples() -> Vec<Vec<u8>> {
    let tree = Archive::default()
        .member("etc/", b'5', "", b"")
        .file("etc/motd", b"welcome")
        .file("etc/empty", b"")
        .member("etc/link", b'2', "motd", b"")
        .member("hard", b'1', "etc/motd", b"")
        .member("dev/null", b'3', "", b"")
        .member("dev/disk", b'4', "", b"")
        .member("pipe", b'6', "", b"")
        .file("etc/.wh.gone", b"")
        .file("opt/.wh..wh..opq", b"")
        .file("etc/motd", b"replaced");
    let attributes = Archive::default()
        .pax(&[
            ("path", "a/name/that/is/not/in/the/header"),
            ("mtime", "1700000000.123456789"),
            ("uid", "4000000000"),
            ("SCHILY.xattr.user.one", "1"),
            ("SCHILY.xattr.security.capability", "\u{1}\u{0}\u{0}\u{2}"),
        ])
        .file("short", &[7; 700])
        .member("././@LongLink", b'L', "", &[b'n'; 150])
        .file("cut", b"long name")
        .member("././@LongLink", b'K', "", b"a/long/target\0")
        .member("link", b'2', "cut", b"");
    let map = b"2\n0\n3\n4096\n5\n";
    let mut stored = map.to_vec();
    stored.resize(BLOCK, 0);
    stored.extend_from_slice(b"abcdefgh");
    let sparse = Archive::default()
        .pax(&[
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", "sparse"),
            ("GNU.sparse.realsize", "9000"),
        ])
        .file("GNUSparseFile.0/sparse", &stored)
        .pax(&[("GNU.sparse.map", "0,3,100,2"), ("GNU.sparse.size", "200"), ("GNU.sparse.name", "old")])
        .file("old", b"abcde");
    let content: Vec<u8> = (0..40_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let large = Archive::default().file("a", &content).file("b", &content[..100]).file("zeros", &[0; 33_000]);
    [tree, attributes, sparse, large].map(Archive::finish).into()
}
