#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use std::io::Write;

use proptest::prelude::*;
use zstd::stream::write::Encoder;

use super::*;

/// Bytes that compress somewhat.
fn text(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * at / 977) as u8 % 23).collect()
}

fn frame(bytes: &[u8], level: i32, checksum: bool) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new(), level).unwrap();
    encoder.include_checksum(checksum).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn skipped(nibble: u8, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x50 | nibble, 0x2a, 0x4d, 0x18];
    bytes.extend(length.to_le_bytes());
    bytes.resize(8 + length as usize, b'x');
    bytes
}

/// Output, and where in blob and output a frame could begin.
type Found = (Vec<u8>, Vec<(usize, usize)>);

/// Decompresses all of `blob`; an error if it does not end between two frames.
fn read(blob: &[u8], piece: usize, room: usize) -> Result<Found, FrameError> {
    let mut frames = Frames::new()?;
    let (mut output, mut starts, mut at) = (Vec::new(), Vec::new(), 0);
    let mut buffer = vec![0; room];
    loop {
        if frames.between() && starts.last() != Some(&(at, output.len())) {
            starts.push((at, output.len()));
        }
        let input = &blob[at..blob.len().min(at + piece)];
        let progress = frames.step(input, &mut buffer)?;
        at += progress.consumed;
        output.extend_from_slice(&buffer[..progress.produced]);
        if progress == (Progress { consumed: 0, produced: 0 }) && at == blob.len() {
            let whole = frames.between();
            return if whole { Ok((output, starts)) } else { Err(FrameError::Corrupt { what: "cut".to_owned() }) };
        }
    }
}

#[test]
fn borders_are_seen_whatever_the_pieces() {
    let (one, two) = (text(300_000), text(70));
    let parts = [
        skipped(0, 0),
        frame(&one, 3, true),
        skipped(15, 1000),
        frame(b"", 1, true),
        zstd::bulk::compress(&two, 19).unwrap(),
        skipped(7, 3),
    ];
    let blob = parts.concat();
    let mut starts = vec![(0, 0)];
    let mut at = 0;
    for (part, output) in parts.iter().zip([0, 300_000, 300_000, 300_000, 300_070, 300_070]) {
        at += part.len();
        starts.push((at, output));
    }
    for (piece, room) in [(usize::MAX / 2, 1 << 20), (1, 1000), (5, 1), (131_072, 65_536), (7, 1 << 20)] {
        let (output, found) = read(&blob, piece, room).unwrap();
        assert!(output == [one.as_slice(), &two].concat(), "{piece} {room}");
        assert_eq!(found, starts, "{piece} {room}");
    }
    // Each of them can be entered.
    for (blob_off, output_off) in starts {
        let (output, _) = read(&blob[blob_off..], 1000, 1000).unwrap();
        assert!(output == [one.as_slice(), &two].concat()[output_off..]);
    }
}

#[test]
fn what_no_frame_begins_with_is_refused() {
    for bad in [&b"\x28\xb5\x2f\xfe"[..], b"\x1f\x8b\x08\0", b"\x60\x2a\x4d\x18", &[0; 512]] {
        assert_eq!(read(bad, 1, 100), Err(FrameError::Magic));
        let after = [frame(b"text", 3, false).as_slice(), bad].concat();
        assert_eq!(read(&after, 100, 100), Err(FrameError::Magic));
    }
}

#[test]
fn cut_and_changed_frames_are_refused() {
    let blob = frame(&text(5000), 3, true);
    for end in 1..blob.len() {
        assert!(read(&blob[..end], 100, 1000).is_err(), "{end}");
    }
    let mut bad = blob.clone();
    *bad.last_mut().unwrap() ^= 1;
    assert!(matches!(read(&bad, 100, 1000), Err(FrameError::Corrupt { what }) if what.contains("checksum")));
}

#[test]
fn an_announced_size_must_be_true() {
    let mut blob = zstd::bulk::compress(&text(1000), 3).unwrap();
    // Single segment, two bytes of content size.
    assert_eq!(blob[4] & 0xe0, 0x60);
    blob[5] ^= 1;
    assert!(matches!(read(&blob, 1 << 20, 1 << 20), Err(FrameError::Corrupt { .. })));
}

#[test]
fn dictionaries_and_huge_windows_are_declined() {
    for (dictionary, id) in [(&[1, 7][..], 7), (&[2, 7, 1], 263), (&[3, 7, 0, 0, 1], (1 << 24) + 7)] {
        let mut header = [&MAGIC[..], &[dictionary[0], 0x50], &dictionary[1..]].concat();
        header.extend([1, 0, 0]);
        assert_eq!(read(&header, 1, 1), Err(FrameError::Dictionary { id }));
    }
    // 128 MiB is the most; then one eighth more, and the largest there is.
    let window = |descriptor: u8| [&MAGIC[..], &[0, descriptor, 1, 0, 0]].concat();
    assert_eq!(read(&window(17 << 3), 100, 1).unwrap().0, b"");
    assert_eq!(read(&window(17 << 3 | 1), 100, 1), Err(FrameError::Window { size: 144 << 20 }));
    assert!(matches!(read(&window(0xff), 100, 1), Err(FrameError::Window { .. })));
    // Whoever writes all in one segment asks for all of it.
    let single = [&MAGIC[..], &[0xe0], &(1u64 << 40).to_le_bytes()].concat();
    assert_eq!(read(&single, 100, 1), Err(FrameError::Window { size: 1 << 40 }));
}

proptest! {
    #[test]
    fn anything_ends_without_a_panic(
        changes in proptest::collection::vec((0usize..4000, any::<u8>()), 0..6), piece in 1usize..500, room in 1usize..500,
    ) {
        let mut blob = [frame(&text(3000), 1, true), skipped(3, 20), frame(&text(900), 5, false)].concat();
        for (at, value) in changes {
            let at = at % blob.len();
            blob[at] = value;
        }
        let _ = read(&blob, piece, room);
    }
}
