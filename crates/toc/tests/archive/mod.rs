//! Writes archives for the tests, also such as no honest program would write.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::format_push_string, reason = "tests")]

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use millstream_toc::{BuildError, BuildOptions, Toc, build};

/// A value of `security.capability` that the kernel takes.
pub const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// One member that a test describes.
#[derive(Debug, Clone)]
pub struct Entry {
    pub name: String,
    pub typeflag: u8,
    pub link: String,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u64,
    pub device: (u32, u32),
    pub pax: Vec<(String, Vec<u8>)>,
    pub data: Vec<u8>,
}

pub fn entry(typeflag: u8, name: &str) -> Entry {
    Entry {
        name: name.into(),
        typeflag,
        link: String::new(),
        mode: if typeflag == b'5' { 0o755 } else { 0o644 },
        uid: 0,
        gid: 0,
        mtime: 1_700_000_000,
        device: (0, 0),
        pax: Vec::new(),
        data: Vec::new(),
    }
}

pub fn file(name: &str, data: &[u8]) -> Entry {
    Entry { data: data.to_vec(), ..entry(b'0', name) }
}

pub fn dir(name: &str) -> Entry {
    entry(b'5', name)
}

pub fn symlink(name: &str, target: &str) -> Entry {
    Entry { link: target.into(), ..entry(b'2', name) }
}

pub fn hard_link(name: &str, target: &str) -> Entry {
    Entry { link: target.into(), ..entry(b'1', name) }
}

pub fn device(name: &str, typeflag: u8, device: (u32, u32)) -> Entry {
    Entry { device, ..entry(typeflag, name) }
}

impl Entry {
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    pub fn owner(self, uid: u32, gid: u32) -> Self {
        Self { uid, gid, ..self }
    }

    pub fn mtime(self, mtime: u64) -> Self {
        Self { mtime, ..self }
    }

    pub fn pax(mut self, key: &str, value: &[u8]) -> Self {
        self.pax.push((key.into(), value.to_vec()));
        self
    }

    pub fn xattr(self, name: &str, value: &[u8]) -> Self {
        self.pax(&format!("SCHILY.xattr.{name}"), value)
    }
}

/// A sparse file in the PAX 1.0 form: `parts` are offset and bytes.
pub fn sparse(name: &str, size: u64, parts: &[(u64, &[u8])]) -> Entry {
    let mut map = format!("{}\n", parts.len());
    for (offset, bytes) in parts {
        map.push_str(&format!("{offset}\n{}\n", bytes.len()));
    }
    let mut data = map.into_bytes();
    data.resize(data.len().next_multiple_of(512), 0);
    for (_, bytes) in parts {
        data.extend_from_slice(bytes);
    }
    file("GNUSparseFile.0/x", &data)
        .pax("GNU.sparse.major", b"1")
        .pax("GNU.sparse.minor", b"0")
        .pax("GNU.sparse.name", name.as_bytes())
        .pax("GNU.sparse.realsize", size.to_string().as_bytes())
}

fn header(entry: &Entry, typeflag: u8, name: &[u8], size: usize) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    let octal = |value: u64, digits: usize| format!("{value:0digits$o}\0").into_bytes();
    put(0, &name[..name.len().min(100)]);
    put(100, &octal(entry.mode.into(), 7));
    put(108, &octal(u64::from(entry.uid).min(0o7_777_777), 7));
    put(116, &octal(u64::from(entry.gid).min(0o7_777_777), 7));
    put(124, &octal(size as u64, 11));
    put(136, &octal(entry.mtime, 11));
    put(148, b"        ");
    put(156, &[typeflag]);
    put(157, &entry.link.as_bytes()[..entry.link.len().min(100)]);
    put(257, b"ustar\x0000");
    put(329, &octal(entry.device.0.into(), 7));
    put(337, &octal(entry.device.1.into(), 7));
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// The archive without its end.
pub fn members(entries: &[Entry]) -> Vec<u8> {
    let mut tar = Vec::new();
    for entry in entries {
        let mut pax = entry.pax.clone();
        if entry.name.len() > 100 {
            pax.push(("path".into(), entry.name.clone().into_bytes()));
        }
        if entry.link.len() > 100 {
            pax.push(("linkpath".into(), entry.link.clone().into_bytes()));
        }
        for (key, id) in [("uid", entry.uid), ("gid", entry.gid)] {
            if id > 0o7_777_777 {
                pax.push((key.into(), id.to_string().into_bytes()));
            }
        }
        if !pax.is_empty() {
            let mut records = Vec::new();
            for (key, value) in &pax {
                let rest = [b" ", key.as_bytes(), b"=", value.as_slice(), b"\n"].concat();
                let mut length = rest.len();
                while length != rest.len() + length.to_string().len() {
                    length = rest.len() + length.to_string().len();
                }
                records.extend_from_slice(length.to_string().as_bytes());
                records.extend_from_slice(&rest);
            }
            tar.extend_from_slice(&header(&entry_of_pax(), b'x', b"pax", records.len()));
            tar.extend_from_slice(&records);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.extend_from_slice(&header(entry, entry.typeflag, entry.name.as_bytes(), entry.data.len()));
        tar.extend_from_slice(&entry.data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar
}

fn entry_of_pax() -> Entry {
    entry(b'x', "pax")
}

pub fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut tar = members(entries);
    tar.resize(tar.len() + 1024, 0);
    tar
}

pub fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// One zstd frame with a checksum, as streaming encoders write it.
pub fn frame(bytes: &[u8], level: i32) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A zstd frame that decompressors skip.
pub fn skippable(content: &[u8]) -> Vec<u8> {
    [&0x184d_2a53_u32.to_le_bytes()[..], &u32::try_from(content.len()).unwrap().to_le_bytes(), content].concat()
}

pub fn build_plain(tar: &[u8]) -> Result<Toc, BuildError> {
    open(build(tar, &BuildOptions::new(millstream_toc::Compression::Plain), &mut ())?.toc)
}

pub fn build_gzip(blob: &[u8]) -> Result<Toc, BuildError> {
    open(build(blob, &BuildOptions::new(millstream_toc::Compression::Gzip), &mut ())?.toc)
}

pub fn build_zstd(blob: &[u8]) -> Result<Toc, BuildError> {
    open(build(blob, &BuildOptions::new(millstream_toc::Compression::Zstd), &mut ())?.toc)
}

/// Every TOC that is built must pass the full check.
fn open(bytes: Vec<u8>) -> Result<Toc, BuildError> {
    let toc = Toc::open(bytes).unwrap();
    toc.check().unwrap();
    Ok(toc)
}

pub fn build_entries(entries: &[Entry]) -> Result<Toc, BuildError> {
    build_plain(&archive(entries))
}

/// Bytes that compress somewhat, in a fixed way.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((state >> 32).to_le_bytes()[..4].iter().map(|byte| byte & 0x3f));
    }
    bytes.truncate(length);
    bytes
}
