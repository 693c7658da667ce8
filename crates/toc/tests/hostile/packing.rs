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

pub fn rows() -> Vec<Row> {
    let tar = Archive::new().with(file("g", &b"content ".repeat(1000))).end();
    let plain = gzip(&tar);
    let gz = |name: &str, expect, blob: Vec<u8>| gzip_row(name, expect, blob, tar.clone());
    let members = tar.chunks(700).flat_map(gzip).collect();
    let spoiled = |at: usize| {
        let mut blob = plain.clone();
        blob[at] ^= 0x55;
        blob
    };
    // Flags: extra field, name, comment; then what they announce.
    let fields = [&plain[..3], &[0x1c], &plain[4..10], b"\x03\0abcname\0comment\0", &plain[10..]].concat();
    vec![
        gz("gzip", Lazy, plain.clone()),
        gz("gzip of many members", Lazy, members),
        gz("gzip with all fields in its header", Lazy, fields),
        gz("gzip with an empty member at the end", Lazy, [plain.clone(), gzip(b"")].concat()),
        gz("gzip with garbage behind", Declined("bytes follow"), [&plain[..], b"garbage"].concat()),
        gz("gzip with zeros behind", Declined("bytes follow"), [&plain[..], &[0; 100]].concat()),
        gz("gzip cut in its data", Refused("ends in the middle"), plain[..plain.len() / 2].to_vec()),
        gz("gzip cut in its checksum", Refused("ends in the middle"), plain[..plain.len() - 3].to_vec()),
        gz("gzip with wrong data", Refused(""), spoiled(plain.len() / 2)),
        gz("gzip with a wrong checksum", Refused("gzip"), spoiled(plain.len() - 6)),
        gz("gzip with a wrong length", Refused("gzip"), spoiled(plain.len() - 2)),
        gz("tar that should be gzip", Declined("not gzip"), tar.clone()),
        gz("no bytes that should be gzip", Lazy, Vec::new()).unpacking_to_nothing(),
        // It must say zstd itself: the test has no use for a compressor here.
        gz("zstd that should be gzip", Declined("not gzip"), b"\x28\xb5\x2f\xfd\x04\x00\x01\x00\x00\x99\xe9\xd8\x51".to_vec())
            .unpacking_to_nothing(),
        Row { media: super::Media::Plain, ..gz("gzip that should be tar", Refused("ends early"), plain.clone()) },
    ]
}

impl Row {
    fn unpacking_to_nothing(self) -> Self {
        Self { tar: Vec::new(), ..self }
    }
}
