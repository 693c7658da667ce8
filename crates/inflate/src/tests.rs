#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;

/// Bytes that compress somewhat, in a fixed way.
fn text(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 16);
    while bytes.len() < length {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if state & 0x300 == 0 && bytes.len() > 100 {
            let from = bytes.len() - 1 - (state >> 16) as usize % 100;
            let copy: Vec<u8> = bytes[from..].to_vec();
            bytes.extend_from_slice(&copy);
        } else {
            bytes.push((state >> 24) as u8 % 61);
        }
    }
    bytes.truncate(length);
    bytes
}

fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A boundary that was seen: compressed position, bits, output position.
#[derive(Debug, Clone, Copy)]
struct Boundary {
    input: usize,
    bits: u8,
    output: usize,
}

/// Decompresses one member in pieces and notes every boundary.
fn inflate(compressed: &[u8], piece: usize, room: usize) -> Result<(Vec<u8>, Vec<Boundary>, usize), InflateError> {
    let mut inflater = Inflater::gzip()?;
    let (mut output, mut boundaries, mut at) = (Vec::new(), Vec::new(), 0);
    let mut buffer = vec![0; room];
    loop {
        let input = &compressed[at..compressed.len().min(at + piece)];
        let progress = inflater.step(input, &mut buffer, Stop::BlockBoundary)?;
        at += progress.consumed;
        output.extend_from_slice(&buffer[..progress.produced]);
        if progress.at_block_boundary {
            let input = at - usize::from(progress.bits).div_ceil(8);
            boundaries.push(Boundary { input, bits: progress.bits % 8, output: output.len() });
        } else if progress.stream_end || (progress.consumed == 0 && progress.produced == 0) {
            return Ok((output, boundaries, at));
        }
    }
}

fn resume(compressed: &[u8], plain: &[u8], boundary: Boundary) -> Vec<u8> {
    let window = &plain[boundary.output.saturating_sub(WINDOW_SIZE)..boundary.output];
    let mut inflater = Inflater::resume(boundary.bits, compressed[boundary.input], window).unwrap();
    let mut at = boundary.input + usize::from(boundary.bits > 0);
    let mut output = Vec::new();
    let mut buffer = vec![0; 10_000];
    loop {
        let progress = inflater.step(&compressed[at..], &mut buffer, Stop::Never).unwrap();
        at += progress.consumed;
        output.extend_from_slice(&buffer[..progress.produced]);
        if progress.stream_end {
            assert_eq!(compressed.len() - at, 8, "what is left is the trailer");
            return output;
        }
    }
}

#[test]
fn every_boundary_resumes() {
    // Level 0 gives stored blocks, 1 to 9 dynamic ones; sync flushes add empty and fixed blocks at odd bit positions.
    for level in [0, 1, 6, 9] {
        let plain = text(600_000, level);
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
        for piece in plain.chunks(70_001) {
            encoder.write_all(piece).unwrap();
            encoder.flush().unwrap();
        }
        encoder.write_all(b"abc").unwrap();
        let compressed = encoder.finish().unwrap();
        let plain = [plain.as_slice(), b"abc"].concat();
        let (output, boundaries, at) = inflate(&compressed, usize::MAX / 2, 1 << 16).unwrap();
        assert_eq!(output, plain);
        assert_eq!(at, compressed.len());
        assert!(boundaries.len() > 8, "level {level}: {} boundaries", boundaries.len());
        for boundary in boundaries {
            assert!(resume(&compressed, &plain, boundary) == plain[boundary.output..], "level {level}, {boundary:?}");
        }
    }
}

#[test]
fn fixed_block() {
    // A tiny text is written as one fixed block: the only boundary is before it.
    let compressed = gzip(b"abc", 6);
    let (output, boundaries, at) = inflate(&compressed, 1, 1).unwrap();
    assert_eq!(output, b"abc");
    assert_eq!(at, compressed.len());
    assert!(boundaries.iter().all(|boundary| boundary.output == 0), "none after the last block");
}

#[test]
fn members_one_after_the_other() {
    let compressed = [gzip(b"one", 6), gzip(b"two", 0)].concat();
    let mut inflater = Inflater::gzip().unwrap();
    let mut buffer = [0; 16];
    let first = inflater.step(&compressed, &mut buffer, Stop::Never).unwrap();
    assert!(first.stream_end);
    assert_eq!(&buffer[..first.produced], b"one");
    let again = inflater.step(&compressed[first.consumed..], &mut buffer, Stop::Never).unwrap();
    assert_eq!((again.consumed, again.stream_end), (0, true));
    inflater.restart_gzip().unwrap();
    let second = inflater.step(&compressed[first.consumed..], &mut buffer, Stop::Never).unwrap();
    assert!(second.stream_end);
    assert_eq!(&buffer[..second.produced], b"two");
    assert_eq!(first.consumed + second.consumed, compressed.len());
}

#[test]
fn restart_after_resume_reads_headers_again() {
    let compressed = gzip(b"two", 6);
    let mut inflater = Inflater::resume(0, 0, b"window").unwrap();
    inflater.restart_gzip().unwrap();
    let mut buffer = [0; 16];
    let progress = inflater.step(&compressed, &mut buffer, Stop::Never).unwrap();
    assert!(progress.stream_end);
    assert_eq!(&buffer[..progress.produced], b"two");
}

#[test]
fn truncated_stream_just_stops() {
    let compressed = gzip(&text(100_000, 3), 6);
    for end in [0, 1, 9, 10, 11, compressed.len() / 2, compressed.len() - 9, compressed.len() - 1] {
        let mut inflater = Inflater::gzip().unwrap();
        let mut buffer = vec![0; 200_000];
        let progress = inflater.step(&compressed[..end], &mut buffer, Stop::Never).unwrap();
        assert!(!progress.stream_end);
        let idle = inflater.step(&[], &mut buffer, Stop::Never).unwrap();
        assert_eq!((idle.consumed, idle.produced, idle.stream_end), (0, 0, false));
    }
}

#[test]
fn garbage_and_wrong_checksums_are_refused() {
    let mut buffer = [0; 64];
    let mut inflater = Inflater::gzip().unwrap();
    assert_eq!(inflater.step(b"this is not gzip", &mut buffer, Stop::Never), Err(InflateError::Corrupt));
    assert_eq!(inflater.step(b"x", &mut buffer, Stop::Never), Err(InflateError::Broken));
    let good = gzip(b"some text", 6);
    for at in good.len() - 8..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert_eq!(inflate(&bad, 100, 100).unwrap_err(), InflateError::Corrupt);
    }
}

#[test]
fn checkpoint_arguments_are_checked() {
    assert_eq!(Inflater::resume(8, 0, &[]).unwrap_err(), InflateError::Checkpoint);
    assert_eq!(Inflater::resume(0, 0, &vec![0; WINDOW_SIZE + 1]).unwrap_err(), InflateError::Checkpoint);
}

#[test]
fn inflater_may_change_threads() {
    fn is_send<T: Send>() {}
    is_send::<Inflater>();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn pieces_do_not_matter(length in 0usize..60_000, level in 0u32..=9, piece in 1usize..5_000, room in 1usize..5_000) {
        let plain = text(length, 7);
        let compressed = gzip(&plain, level);
        let (output, _, at) = inflate(&compressed, piece, room).unwrap();
        prop_assert_eq!(output, plain);
        prop_assert_eq!(at, compressed.len());
    }

    #[test]
    fn flipped_bits_never_panic(bit in 0usize..8 * 20_000, room in 1usize..5_000) {
        let mut compressed = gzip(&text(30_000, 9), 6);
        let bit = bit % (compressed.len() * 8);
        compressed[bit / 8] ^= 1 << (bit % 8);
        let _ = inflate(&compressed, 1_000, room);
    }

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..2_000), bits in 0u8..8) {
        let mut inflater = Inflater::resume(bits, 0xff, &[1, 2, 3]).unwrap();
        let mut buffer = vec![0; 4_096];
        let mut at = 0;
        for _ in 0..10_000 {
            match inflater.step(&bytes[at..], &mut buffer, Stop::BlockBoundary) {
                Ok(progress) if progress.stream_end || progress.consumed + progress.produced == 0 => break,
                Ok(progress) => at += progress.consumed,
                Err(_) => break,
            }
        }
    }
}
