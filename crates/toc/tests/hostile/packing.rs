//! Blobs whose packing is not what the manifest says, or not what one program expects of another's gzip.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::Expect::{Declined, Lazy, Refused};
use super::Row;
use super::make::{Archive, file, gzip_row};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// One zstd frame of one block that is not compressed.
fn zstd(bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).unwrap();
    let block = (size << 3 | 1).to_le_bytes();
    [b"\x28\xb5\x2f\xfd\xa0", &size.to_le_bytes()[..], &block[..3], bytes].concat()
}

pub fn rows() -> Vec<Row> {
    // containerd knows layers by what they unpack to, so each of these has another archive.
    let gz = |name: &str, expect, pack: &dyn Fn(&[u8]) -> Vec<u8>| {
        let tar = Archive::new().with(file(name.replace(' ', "-"), &b"content ".repeat(1000))).end();
        gzip_row(name, expect, pack(&tar), tar)
    };
    let spoiled = |tar: &[u8], from_end: usize| {
        let mut blob = gzip(tar);
        let at = blob.len() - from_end;
        blob[at] ^= 0x55;
        blob
    };
    let cut = |tar: &[u8], by: usize| {
        let blob = gzip(tar);
        blob[..blob.len() - by].to_vec()
    };
    // Flags: extra field, name, comment; then what they announce.
    let fields = |tar: &[u8]| {
        let blob = gzip(tar);
        [&blob[..3], &[0x1c], &blob[4..10], b"\x03\0abcname\0comment\0", &blob[10..]].concat()
    };
    let plain_media = gz("gzip that should be tar", Refused("ends early"), &gzip);
    vec![
        gz("gzip", Lazy, &gzip),
        gz("gzip of many members", Lazy, &|tar| tar.chunks(700).flat_map(gzip).collect()),
        gz("gzip with all fields in its header", Lazy, &fields),
        gz("gzip with an empty member at the end", Lazy, &|tar| [gzip(tar), gzip(b"")].concat()),
        gz("gzip with garbage behind", Declined("bytes follow"), &|tar| [&gzip(tar)[..], b"garbage"].concat()),
        gz("gzip with zeros behind", Declined("bytes follow"), &|tar| [&gzip(tar)[..], &[0; 100]].concat()),
        gz("gzip cut in its data", Refused("ends in the middle"), &|tar| cut(tar, 40)),
        gz("gzip cut in its checksum", Refused("ends in the middle"), &|tar| cut(tar, 6)),
        gz("gzip with wrong data", Refused(""), &|tar| spoiled(tar, 30)),
        gz("gzip with a wrong checksum", Refused("gzip"), &|tar| spoiled(tar, 6)),
        gz("gzip with a wrong length", Refused("gzip"), &|tar| spoiled(tar, 2)),
        gz("tar that should be gzip", Declined("not gzip"), &<[u8]>::to_vec),
        gz("zstd that should be gzip", Declined("not gzip"), &zstd),
        gzip_row("no bytes that should be gzip", Lazy, Vec::new(), Vec::new()).over_base(Declined("")),
        Row { media: super::Media::Plain, ..plain_media },
    ]
}
