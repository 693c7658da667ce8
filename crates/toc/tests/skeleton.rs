//! A tar is its skeleton and the content of its files, and nothing else.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

mod archive;

use std::io::{self, Read};

use archive::{Entry, archive as tar_of, build_gzip, build_plain, device, dir, file, gzip, hard_link, sparse, symlink};
use millstream_toc::{
    BuildOptions, BuildSink, Compression, DataRange, FormatError, Reassembled, Toc, build, format::SHORT_DIGEST,
};
use proptest::prelude::*;

#[derive(Default)]
struct Halves {
    skeleton: Vec<u8>,
    data: Vec<u8>,
}

impl BuildSink for Halves {
    fn chunk(&mut self, _: u32, data: DataRange, _: &[u8; SHORT_DIGEST], bytes: &[u8]) -> io::Result<()> {
        self.data.resize(self.data.len().max(data.end as usize), 0);
        self.data[data.start as usize..data.end as usize].copy_from_slice(bytes);
        Ok(())
    }

    fn skeleton(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.skeleton.extend_from_slice(bytes);
        Ok(())
    }
}

fn halves(blob: &[u8], compression: Compression) -> (Toc, Halves) {
    let mut halves = Halves::default();
    let toc = build(blob, &BuildOptions::new(compression), &mut halves).unwrap().toc;
    (Toc::open(toc).unwrap(), halves)
}

/// What comes out, read in pieces of `step`.
fn reassembled(toc: &Toc, halves: &Halves, step: usize) -> io::Result<Vec<u8>> {
    let content = |range: DataRange, out: &mut [u8]| {
        out.copy_from_slice(&halves.data[range.start as usize..range.end as usize]);
        Ok(())
    };
    let mut tar = Reassembled::new(toc, &halves.skeleton[..], content).map_err(io::Error::other)?;
    let (mut out, mut buffer) = (Vec::new(), vec![0; step]);
    loop {
        match tar.read(&mut buffer)? {
            0 => return Ok(out),
            read => out.extend_from_slice(&buffer[..read]),
        }
    }
}

fn every_kind() -> Vec<Entry> {
    vec![
        dir("bin").mode(0o750).owner(1, 2),
        file("bin/tool", &[7; 70_000]).mode(0o4755).xattr("security.capability", archive::CAPABILITY),
        hard_link("bin/alias", "bin/tool"),
        symlink("sh", "bin/tool"),
        device("dev/null", b'3', (1, 3)),
        file("gone/.wh.file", b"content that nobody takes"),
        file("bin/tool", b"replaced"),
        sparse("sparse", 100_000, &[(40_000, b"middle"), (90_000, &[3; 5000])]),
        sparse("hole", 50_000, &[]),
        file("empty", b""),
    ]
}

#[test]
fn every_kind_of_member_comes_back() {
    let mut tar = tar_of(&every_kind());
    // What follows the end belongs to the diff ID.
    tar.extend_from_slice(b"behind the end");
    for (blob, compression) in [(tar.clone(), Compression::Plain), (gzip(&tar, 6), Compression::Gzip)] {
        let (toc, halves) = halves(&blob, compression);
        assert!(reassembled(&toc, &halves, 1000).unwrap() == tar);
        assert!(halves.skeleton.len() < 20_000);
    }
}

#[test]
fn a_short_skeleton_is_an_error() {
    let (toc, mut halves) = halves(&tar_of(&every_kind()), Compression::Plain);
    halves.skeleton.pop();
    assert_eq!(reassembled(&toc, &halves, 4096).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn tocs_of_one_tar_are_the_same_but_for_the_blob() {
    let tar = tar_of(&every_kind());
    let (plain, packed) = (build_plain(&tar).unwrap(), build_gzip(&gzip(&tar, 6)).unwrap());
    assert_ne!(plain.blob_digest(), packed.blob_digest());
    assert!(plain.same_tar(&packed).unwrap() && packed.same_tar(&plain).unwrap());
    let mut other = every_kind();
    other[0].mode = 0o700;
    assert!(!plain.same_tar(&build_plain(&tar_of(&other)).unwrap()).unwrap());
    // A TOC that claims the diff ID and lies in any one byte of its tables.
    for at in (144..plain.as_bytes().len()).step_by(7) {
        let mut bytes = plain.as_bytes().to_vec();
        bytes[at] ^= 1;
        let lie = Toc::open(bytes).unwrap();
        let in_spans = at + 40 >= plain.as_bytes().len() - plain.header().counts[8].get() as usize
            && at < plain.as_bytes().len() - plain.header().counts[8].get() as usize;
        assert_eq!(packed.same_tar(&lie), Ok::<_, FormatError>(in_spans), "byte {at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_archive_comes_back(
        members in proptest::collection::vec((0u8..4, 0usize..80_000, any::<u8>()), 0..8), step in 1usize..40_000,
    ) {
        let entries: Vec<Entry> = members.iter().enumerate().map(|(n, (kind, size, byte))| match kind {
            0 => dir(&format!("d{n}")),
            1 => sparse(&format!("s{n}"), *size as u64 + 3000, &[(*size as u64, &[*byte; 1000]), (*size as u64 + 2000, &[1; 999])]),
            _ => file(&format!("f{n}"), &vec![*byte; *size]),
        }).collect();
        let tar = tar_of(&entries);
        let (toc, halves) = halves(&gzip(&tar, 6), Compression::Gzip);
        prop_assert!(reassembled(&toc, &halves, step).unwrap() == tar);
    }
}
