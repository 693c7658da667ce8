//! Tar archives: the reader takes whatever comes, and what a build makes of them can be read back, the same from a plain blob
//! and from a compressed one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::layer::{build_and_read_back, same_in_pieces};
use millstream_fuzz::{archive, plant};
use millstream_toc::tar::{TarLimits, TarReader};
use millstream_toc::{Compression, Toc};

/// Reads all members with all their content.
fn read(tar: &[u8]) {
    let mut reader = TarReader::new(tar, TarLimits { max_pax_bytes: 1 << 16, max_name: 4096, max_extents: 1 << 10 });
    let mut buffer = [0; 300];
    while let Ok(Some(member)) = reader.next() {
        let mut left = member.stored;
        while let Ok(read @ 1..) = reader.read(&mut buffer) {
            left = left.checked_sub(read as u64).expect("no more than the member says");
        }
    }
    assert!(reader.position() <= tar.len() as u64);
}

/// What two TOCs of one tar share: everything but how to get at its bytes.
fn tree(toc: &Toc) -> (u32, u32, u32, u64, u64, String) {
    let digests: Vec<_> = (0..toc.chunk_count()).map(|ix| toc.chunk_digest(ix)).collect();
    let attributes: Vec<_> = (0..toc.inode_count()).map(|ix| toc.inode(ix)).collect();
    let rest = format!("{digests:?} {attributes:?} {}", toc.diff_id());
    (toc.inode_count(), toc.content_count(), toc.chunk_count(), toc.data_size(), toc.tar_size(), rest)
}

fuzz_target!(init: plant(archive::samples()), |data: &[u8]| {
    read(data);
    let mut tar = data.to_vec();
    archive::repair(&mut tar);
    read(&tar);
    same_in_pieces(&tar, Compression::Plain);
    let plain = build_and_read_back(&tar, Compression::Plain);
    let zipped = build_and_read_back(&archive::gzip(&tar, 1), Compression::Gzip);
    assert_eq!(plain.as_ref().map(tree), zipped.as_ref().map(tree));
});
