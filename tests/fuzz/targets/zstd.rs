//! Zstd blobs: a build from one can be read back, and its tar is what the library itself makes of the blob.
#![no_main]

use std::io::Read as _;

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::layer::{MOST, build_and_read_back, same_in_pieces};
use millstream_fuzz::{archive, plant};
use millstream_oci::{DiffId, Digest};
use millstream_toc::Compression;

/// A frame that decoders skip.
const SKIPPED: [u8; 12] = [0x53, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];

fn frame(tar: &[u8], level: i32) -> Vec<u8> {
    zstd::bulk::compress(tar, level).expect("memory")
}

fn seeds() -> Vec<Vec<u8>> {
    let tars = archive::samples();
    let mut seeds: Vec<_> = [1, 9].iter().flat_map(|level| tars.iter().map(|tar| frame(tar, *level))).collect();
    let (first, second) = tars[0].split_at(1000);
    seeds.push([&frame(first, 3)[..], &SKIPPED, &frame(second, -5)].concat());
    // Content size unknown, a checksum at the end.
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3).expect("memory");
    encoder.include_checksum(true).expect("memory");
    std::io::copy(&mut &tars[1][..], &mut encoder).expect("memory");
    seeds.push(encoder.finish().expect("memory"));
    seeds
}

/// What the library makes of all frames.
fn decompressed(blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    let decoder = zstd::stream::read::Decoder::with_buffer(blob).expect("memory");
    decoder.take(MOST + 1).read_to_end(&mut tar).expect("what was built from is in order");
    tar
}

fuzz_target!(init: plant(seeds()), |blob: &[u8]| {
    same_in_pieces(blob, Compression::Zstd);
    // No frame at all is an empty tar to us, as to containerd, and an error to the library.
    if let Some(toc) = build_and_read_back(blob, Compression::Zstd)
        && !blob.is_empty()
    {
        assert_eq!(DiffId(Digest::of(&decompressed(blob))), toc.diff_id());
    }
});
