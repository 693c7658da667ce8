//! Gzip blobs: the decompressor gives the same however it is fed, goes on from every block boundary, and a build from it can be
//! read back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::layer::{MOST, build_and_read_back, same_in_pieces};
use millstream_fuzz::{archive, choice, plant};
use millstream_inflate::{Inflater, Stop, WINDOW_SIZE};
use millstream_toc::Compression;

/// A place where decompression can begin.
struct Boundary {
    /// Position in the input behind the last byte taken.
    input: usize,
    bits: u8,
    output: usize,
}

/// Decompresses one stream, `piece` bytes of input at a time.
fn inflate(mut inflater: Inflater, input: &[u8], piece: usize, stop: Stop) -> (Vec<u8>, bool, Vec<Boundary>) {
    let (mut at, mut output, mut boundaries) = (0, Vec::new(), Vec::new());
    let mut buffer = [0; 4096];
    loop {
        let end = (at + piece).min(input.len());
        let Ok(progress) = inflater.step(&input[at..end], &mut buffer, stop) else {
            return (output, false, boundaries);
        };
        at += progress.consumed;
        output.extend_from_slice(&buffer[..progress.produced]);
        if progress.at_block_boundary {
            boundaries.push(Boundary { input: at, bits: progress.bits, output: output.len() });
        }
        if progress.stream_end {
            // Beyond the limit the size of the pieces decides which is noticed first.
            let ended = output.len() as u64 <= MOST;
            return (output, ended, boundaries);
        }
        let stuck = progress.consumed == 0 && progress.produced == 0 && !progress.at_block_boundary;
        if stuck && at == input.len() || output.len() as u64 > MOST {
            return (output, false, boundaries);
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let tars = archive::samples();
    let zipped = |level: u32| tars.iter().map(move |tar| archive::gzip(tar, level));
    let members = [archive::gzip(&tars[0][..1024], 9), archive::gzip(&tars[0][1024..], 1)].concat();
    let with_choice = |blob: Vec<u8>| [vec![u8::MAX], blob].concat();
    zipped(0).chain(zipped(1)).chain(zipped(9)).chain([members]).map(with_choice).collect()
}

fuzz_target!(init: plant(seeds()), |data: &[u8]| {
    let (piece, blob) = choice(data);
    let gzip = || Inflater::gzip().expect("memory");
    let (whole, ended, _) = inflate(gzip(), blob, usize::MAX >> 1, Stop::Never);
    let (pieces, ended_too, boundaries) = inflate(gzip(), blob, usize::from(piece).max(1), Stop::BlockBoundary);
    // A stream that is broken somewhere may give a little more or less of what comes right before.
    assert_eq!(ended, ended_too);
    assert!(!ended || whole == pieces);
    for boundary in boundaries.iter().take(16).filter(|_| ended) {
        let back = usize::from(boundary.bits.div_ceil(8));
        let first = if boundary.bits.is_multiple_of(8) { 0 } else { blob[boundary.input - back] };
        let start = boundary.input - usize::from(boundary.bits / 8);
        let window = &whole[boundary.output.saturating_sub(WINDOW_SIZE)..boundary.output];
        let resumed = Inflater::resume(boundary.bits % 8, first, window).expect("a boundary");
        let (rest, ended, _) = inflate(resumed, &blob[start..], usize::MAX >> 1, Stop::Never);
        assert!(ended && rest == whole[boundary.output..]);
    }
    same_in_pieces(blob, Compression::Gzip);
    let _ = build_and_read_back(blob, Compression::Gzip);
});
