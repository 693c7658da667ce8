//! Layers for the tests.

use millstream_toc::build::{BuildOptions, Compression, build};
use millstream_toc::{DataRange, Toc};

pub(crate) struct Sample {
    pub(crate) toc: Toc,
    /// Files in order, with what is in them.
    pub(crate) files: Vec<(String, Vec<u8>)>,
}

impl Sample {
    /// Where a file lies.
    pub(crate) fn place(&self, name: &str) -> DataRange {
        let inode = self.toc.lookup_path(name.as_bytes()).unwrap().unwrap();
        self.toc.file_data(&self.toc.inode(inode).unwrap()).unwrap()
    }
}

/// A layer of files with these names and sizes.
pub(crate) fn sample(files: &[(&str, usize)]) -> Sample {
    let content = |name: &str, size: usize| {
        let seed = name.bytes().fold(7_usize, |sum, byte| sum * 31 % 65_521 + usize::from(byte));
        (0..size).map(|n| u8::try_from((n * 13 + n / 4096 + seed) % 251).unwrap()).collect::<Vec<u8>>()
    };
    let files: Vec<_> = files.iter().map(|(name, size)| ((*name).to_owned(), content(name, *size))).collect();
    let mut tar = Vec::new();
    for (name, bytes) in &files {
        member(&mut tar, b'0', name, bytes);
    }
    Sample { toc: toc(tar), files }
}

/// A layer of one sparse file `name` of `size` bytes, of which only `bytes` at `offset` are stored.
pub(crate) fn sparse(name: &str, size: u64, offset: u64, bytes: &[u8]) -> Toc {
    let mut pax = Vec::new();
    for (key, value) in [("major", "1"), ("minor", "0"), ("name", name), ("realsize", &size.to_string())] {
        let body = format!(" GNU.sparse.{key}={value}\n");
        let mut len = body.len() + 2;
        if len.to_string().len() != 2 {
            len += 1;
        }
        pax.extend_from_slice(format!("{len}{body}").as_bytes());
    }
    let mut data = format!("1\n{offset}\n{}\n", bytes.len()).into_bytes();
    data.resize(data.len().next_multiple_of(512), 0);
    data.extend_from_slice(bytes);
    let mut tar = Vec::new();
    member(&mut tar, b'x', "pax", &pax);
    member(&mut tar, b'0', "GNUSparseFile.0/x", &data);
    toc(tar)
}

fn toc(mut tar: Vec<u8>) -> Toc {
    tar.resize(tar.len() + 1024, 0);
    Toc::open(build(&tar[..], &BuildOptions::new(Compression::Plain), &mut ()).unwrap().toc).unwrap()
}

fn member(tar: &mut Vec<u8>, kind: u8, name: &str, content: &[u8]) {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[136..147].copy_from_slice(b"14000000000");
    header[148..156].copy_from_slice(b"        ");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend_from_slice(&header);
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
}
