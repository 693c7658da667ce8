//! Tables of contents from outside: the canonical and the packed form, and extraction by a table that may lie.
#![no_main]

use std::io::Read as _;

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::layer::{MOST, options, walk};
use millstream_fuzz::{archive, plant};
use millstream_toc::{Compression, Reassembled, SpanExtractor, Toc, build, pack, unpack};

/// What an extractor is given instead of the blob: never right, but for a plain tar it takes everything.
const BLOB: [u8; 4096] = [0; 4096];

fn seeds() -> Vec<Vec<u8>> {
    let tars = archive::samples();
    let plain = tars.iter().filter_map(|tar| build(&tar[..], &options(Compression::Plain), &mut ()).ok());
    let zipped = tars.iter().filter_map(|tar| {
        let blob = archive::gzip(tar, 6);
        build(&blob[..], &options(Compression::Gzip), &mut ()).ok()
    });
    let canonical: Vec<Vec<u8>> = plain.chain(zipped).map(|built| built.toc).collect();
    let packed: Vec<Vec<u8>> = canonical.iter().map(|toc| pack(toc)).collect();
    canonical.into_iter().chain(packed).collect()
}

/// Extraction never panics, whatever the table says.
fn extract(toc: &Toc) {
    for ix in 0..toc.span_count().min(4) {
        let Ok(span) = toc.span(ix) else { continue };
        let window = vec![0; span.window_len as usize];
        let Ok(mut extractor) = SpanExtractor::new(toc, ix, &window) else { continue };
        for _ in 0..4 {
            if extractor.push(&BLOB, &mut |_, _| {}).is_err() {
                break;
            }
        }
        let _ = (extractor.take_front(), extractor.back());
    }
}

/// So does putting a tar together. Its size is the table's claim: not all of it is read.
fn reassemble(toc: &Toc) {
    let Ok(mut tar) = Reassembled::new(toc, &BLOB[..], |_, _| Ok(())) else { return };
    let mut buffer = [0; 4096];
    for _ in 0..64 {
        if !matches!(tar.read(&mut buffer), Ok(1..)) {
            break;
        }
    }
}

fuzz_target!(init: plant(seeds()), |data: &[u8]| {
    assert_eq!(unpack(&pack(data), data.len() as u64).as_deref(), Ok(data));
    let unpacked = unpack(data, MOST);
    for canonical in [Some(data.to_vec()), unpacked.ok()].into_iter().flatten() {
        let Ok(toc) = Toc::open(canonical) else { continue };
        walk(&toc);
        extract(&toc);
        reassemble(&toc);
        let _ = toc.path_of(toc.inode_count().saturating_sub(1));
    }
});
