//! Spans and chunks: whatever a build saw of the content must come out of the spans again, and nothing else.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

mod archive;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use archive::{Entry, archive as tar_of, dir, file, frame, gzip, noise, skippable, sparse};
use flate2::write::GzEncoder;
use millstream_toc::{
    BuildError, BuildOptions, BuildSink, Chunk, ClosedSpans, Compression, DataRange, Ineligible, SpanError,
    SpanExtractor, Toc, build, pack, unpack,
};
use proptest::prelude::*;

/// Keeps everything.
#[derive(Default)]
struct Keep {
    windows: Vec<Vec<u8>>,
    chunks: BTreeMap<u32, (DataRange, Vec<u8>)>,
}

impl BuildSink for Keep {
    fn window(&mut self, span: u32, raw: &[u8]) -> io::Result<()> {
        assert_eq!(span as usize, self.windows.len());
        self.windows.push(raw.to_vec());
        Ok(())
    }

    fn chunk(&mut self, chunk: u32, data: DataRange, _: &[u8; 16], bytes: &[u8]) -> io::Result<()> {
        assert_eq!(data.len(), bytes.len() as u64);
        assert!(self.chunks.insert(chunk, (data, bytes.to_vec())).is_none());
        Ok(())
    }
}

fn built(blob: impl Read, compression: Compression) -> (Toc, Keep) {
    let mut keep = Keep::default();
    let toc = Toc::open(build(blob, &BuildOptions::new(compression), &mut keep).unwrap().toc).unwrap();
    toc.check().unwrap();
    (toc, keep)
}

/// Chunks that spans `first` to `last` give, fed in pieces.
fn extract(
    toc: &Toc,
    keep: &Keep,
    blob: &[u8],
    first: u32,
    last: u32,
    piece: usize,
) -> Result<Vec<(Chunk, Vec<u8>)>, SpanError> {
    let window = &keep.windows[first as usize];
    assert!(toc.verify_window(first, window));
    let bytes = &blob[toc.span(first)?.blob.start as usize..toc.span(last)?.blob.end as usize];
    let mut extractor = SpanExtractor::new(toc, first, window)?;
    let mut chunks = Vec::new();
    for piece in bytes.chunks(piece) {
        extractor.push(piece, &mut |chunk, bytes| chunks.push((chunk, bytes.to_vec())))?;
    }
    assert!(extractor.position() >= toc.span(last)?.tar.end, "all output of the last span");
    Ok(chunks)
}

/// Every single span and every pair gives exactly the chunks that need no other span, with the right bytes.
fn check_spans(toc: &Toc, keep: &Keep, blob: &[u8], piece: usize) {
    for first in 0..toc.span_count() {
        for last in first..toc.span_count().min(first + 2) {
            let found = extract(toc, keep, blob, first, last, piece).unwrap();
            let complete = |data: &DataRange| {
                let spans = toc.spans_for(*data).unwrap();
                spans.first() >= Some(&first) && spans.last() <= Some(&last)
            };
            let expected: Vec<_> = keep.chunks.iter().filter(|(_, (data, _))| complete(data)).collect();
            let found_ix: Vec<_> = found.iter().map(|(chunk, _)| chunk.ix).collect();
            // The last span may share its last byte with the next one, whose first bits can hold a little more output.
            assert!(expected.iter().all(|(ix, _)| found_ix.contains(ix)), "spans {first} to {last}");
            for (chunk, bytes) in found {
                assert_eq!(keep.chunks[&chunk.ix], (chunk.data, bytes));
            }
        }
    }
    let all = if toc.span_count() == 0 {
        Vec::new()
    } else {
        extract(toc, keep, blob, 0, toc.span_count() - 1, piece).unwrap()
    };
    assert_eq!(all.len(), keep.chunks.len());
    for ix in 0..toc.chunk_count() {
        assert_eq!(toc.is_hole(ix).unwrap(), !keep.chunks.contains_key(&ix));
    }
}

fn files() -> Vec<Entry> {
    let mut entries = vec![dir("d"), file("d/empty", b"")];
    for i in 0..40u64 {
        entries.push(file(&format!("d/f{i}"), &noise((i * i * 131) as usize, i)));
    }
    let part = noise(20_000, 99);
    entries.push(sparse(
        "sparse",
        10_000_000,
        &[(100, &part[..50]), (16_000, &part[..1_000]), (1_000_000, &part), (9_999_000, &part[..1_000])],
    ));
    entries.push(sparse("hole", 50_000, &[]));
    entries.push(file("large", &noise(3_500_000, 5)));
    entries.push(file("zeros", &vec![0; 2_500_000]));
    entries.push(file("d/f3", b"replaced"));
    entries
}

#[test]
fn plain() {
    let tar = tar_of(&files());
    let (toc, keep) = built(&tar[..], Compression::Plain);
    assert_eq!(u64::from(toc.span_count()), toc.tar_size().div_ceil(1 << 20));
    check_spans(&toc, &keep, &tar, 10_000);
}

#[test]
fn one_member_of_every_level() {
    let tar = tar_of(&files());
    for level in [0, 1, 6, 9] {
        let blob = gzip(&tar, level);
        let (toc, keep) = built(&blob[..], Compression::Gzip);
        assert!(toc.span_count() >= 2, "level {level}");
        check_spans(&toc, &keep, &blob, if level == 6 { 1 } else { 7_777 });
    }
}

#[test]
fn many_members() {
    let tar = tar_of(&files());
    for size in [10_000, 300_000, 1 << 20, 1_500_000] {
        let mut blob = gzip(b"", 6);
        for piece in tar.chunks(size) {
            blob.extend(gzip(piece, 6));
        }
        blob.extend(gzip(b"", 6));
        let (toc, keep) = built(&blob[..], Compression::Gzip);
        assert_eq!(toc.diff_id().0, millstream_oci::Digest::of(&tar));
        check_spans(&toc, &keep, &blob, 5_000);
    }
}

#[test]
fn zstd_frames_of_every_size() {
    let tar = tar_of(&files());
    for (size, level) in [(1, 1), (10_000, 3), (300_000, 1), (1 << 20, 3), (1_500_000, 19), (usize::MAX, 1)] {
        // Tiny frames are many: a part of the tar is enough, the rest is one frame.
        let (small, rest) = tar.split_at(if size == 1 { 3000 } else { tar.len() });
        let mut blob = frame(b"", 3);
        for piece in small.chunks(size) {
            blob.extend(frame(piece, level));
        }
        blob.extend(skippable(b""));
        blob.extend(frame(rest, 1));
        let (toc, keep) = built(&blob[..], Compression::Zstd);
        assert_eq!(toc.diff_id().0, millstream_oci::Digest::of(&tar));
        assert_eq!(toc.span_count() > 1, (10_000..2_000_000).contains(&size), "{size}");
        check_spans(&toc, &keep, &blob, if level == 1 { 5_000 } else { 100_000 });
    }
}

#[test]
fn a_span_of_frames_starts_where_the_last_one_ended_also_before_one_to_be_skipped() {
    let part = noise(1 << 20, 1);
    let tar = tar_of(&[file("a", &part), file("b", &part)]);
    let (first, rest) = tar.split_at(1 << 20);
    let head = frame(first, 3);
    let blob = [head.as_slice(), &skippable(b"what pzstd writes"), &frame(rest, 3), &skippable(&[1; 2000])].concat();
    let (toc, keep) = built(&blob[..], Compression::Zstd);
    assert_eq!(toc.span_count(), 2);
    assert_eq!(toc.span(1).unwrap().blob.start, head.len() as u64);
    assert_eq!(toc.span(1).unwrap().blob.end, blob.len() as u64);
    check_spans(&toc, &keep, &blob, 1000);
}

#[test]
fn flushed_blocks() {
    // As pgzip and others write it: many sync flushes in one member, some blocks empty.
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(1));
    for piece in tar_of(&files()).chunks(65_536) {
        encoder.write_all(piece).unwrap();
        encoder.flush().unwrap();
        encoder.flush().unwrap();
    }
    let blob = encoder.finish().unwrap();
    let (toc, keep) = built(&blob[..], Compression::Gzip);
    check_spans(&toc, &keep, &blob, 4_096);
}

/// Gives bytes in pieces of changing size.
struct Trickle<'b>(&'b [u8], usize);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 * 31 % 9_973 + 1;
        let length = self.1.min(buffer.len()).min(self.0.len());
        buffer[..length].copy_from_slice(&self.0[..length]);
        self.0 = &self.0[length..];
        Ok(length)
    }
}

#[test]
fn result_does_not_depend_on_reads() {
    let tar = tar_of(&files());
    // With blocks that end right at a span's least size, too.
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    for piece in tar.chunks(1 << 18) {
        encoder.write_all(piece).unwrap();
        encoder.flush().unwrap();
    }
    for (blob, compression) in [
        (gzip(&tar, 6), Compression::Gzip),
        (encoder.finish().unwrap(), Compression::Gzip),
        (tar.clone(), Compression::Plain),
        (
            tar.chunks(1 << 18).flat_map(|piece| [frame(piece, 3), skippable(piece)].concat()).collect(),
            Compression::Zstd,
        ),
    ] {
        let (whole, kept) = built(&blob[..], compression);
        for seed in [0, 1, 5_000] {
            let (pieces, keep) = built(Trickle(&blob, seed), compression);
            assert!(whole.as_bytes() == pieces.as_bytes());
            assert!(kept.windows == keep.windows);
        }
    }
}

#[test]
fn truncated_blobs_are_refused() {
    let tar = tar_of(&[file("a", &noise(50_000, 1))]);
    for (blob, compression) in [(gzip(&tar, 6), Compression::Gzip), (frame(&tar, 3), Compression::Zstd)] {
        for end in (1..blob.len()).step_by(97).chain(blob.len() - 9..blob.len()) {
            let result = build(&blob[..end], &BuildOptions::new(compression), &mut ());
            assert!(result.is_err(), "{end} of {}", blob.len());
        }
    }
}

#[test]
fn errors_of_reader_and_sink_come_through() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    impl BuildSink for Broken {
        fn window(&mut self, _: u32, _: &[u8]) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
    }
    let options = BuildOptions::new(Compression::Gzip);
    let blob = gzip(&tar_of(&files()), 1);
    assert!(
        matches!(build(Broken, &options, &mut ()), Err(BuildError::Read(e)) if e.kind() == io::ErrorKind::ConnectionReset)
    );
    assert!(
        matches!(build(&blob[..], &options, &mut Broken), Err(BuildError::Sink(e)) if e.kind() == io::ErrorKind::StorageFull)
    );
}

/// A gzip member without its trailer: one block that gives `zeros` zeros and more.
fn one_block(zeros: usize) -> Vec<u8> {
    let mut bits: Vec<bool> = Vec::new();
    // Last block, fixed codes, the literal 0; then copies of 258 bytes from one byte back.
    bits.extend([1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0].map(|bit| bit == 1));
    for _ in 0..=zeros / 258 {
        bits.extend([1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0].map(|bit| bit == 1));
    }
    let mut blob = b"\x1f\x8b\x08\0\0\0\0\0\0\xff".to_vec();
    blob.extend(bits.chunks(8).map(|byte| byte.iter().rev().fold(0, |sum, bit| sum << 1 | u8::from(*bit))));
    blob
}

/// Options that decline what cannot be entered.
fn open_spans(compression: Compression) -> BuildOptions {
    BuildOptions { closed_spans: ClosedSpans::Decline, ..BuildOptions::new(compression) }
}

#[test]
fn long_stretches_are_closed_spans_or_declined() {
    let tar = tar_of(&[
        file("before", &noise(1_500_000, 1)),
        file("long", &noise(17 << 20, 2)),
        file("after", &noise(3_000_000, 3)),
    ]);
    // "before" alone, "long" with a little of both neighbours in one go, the rest in pieces.
    let (first, rest) = tar.split_at(1_200_000);
    let (long, last) = rest.split_at(18 << 20);
    let blob: Vec<u8> = [first, long].into_iter().chain(last.chunks(500_000)).flat_map(|part| frame(part, 1)).collect();
    let (toc, keep) = built(&blob[..], Compression::Zstd);
    assert!(toc.has_closed_spans().unwrap());
    let closed: Vec<_> = (0..toc.span_count()).filter(|ix| toc.span(*ix).unwrap().is_closed()).collect();
    assert_eq!(closed, [1]);
    assert_eq!(SpanExtractor::new(&toc, 1, &[]).unwrap_err(), SpanError::Closed { span: 1 });
    for (data, bytes) in keep.chunks.values() {
        let spans = toc.spans_for(*data).unwrap();
        assert_eq!(toc.is_closed(*data).unwrap(), spans.contains(&1), "{spans:?}");
        assert!(!bytes.is_empty());
    }
    let open = (2..toc.span_count()).map(|ix| extract(&toc, &keep, &blob, ix, ix, 10_000).unwrap().len());
    assert!(open.sum::<usize>() > 20);
    let reason = Ineligible::SpanTooLong { end: "zstd frame", start: 1_200_000, limit: 16 << 20 };
    let declined = build(&blob[..], &open_spans(Compression::Zstd), &mut ());
    assert!(matches!(declined, Err(BuildError::Ineligible { reason: found }) if found == reason));
}

#[test]
fn long_block_makes_a_layer_ineligible() {
    let result = |mebibytes: usize| build(&one_block(mebibytes << 20)[..], &open_spans(Compression::Gzip), &mut ());
    let reason = Ineligible::SpanTooLong { end: "deflate block", start: 0, limit: 16 << 20 };
    assert!(matches!(result(17), Err(BuildError::Ineligible { reason: found }) if found == reason));
    // Short enough, so that only the missing end is wrong with it.
    assert!(matches!(result(15), Err(BuildError::Invalid { what }) if what.contains("ends in the middle")));
}

fn no_damage_becomes_a_chunk(blob: &[u8], compression: Compression) {
    let (toc, keep) = built(blob, compression);
    for seed in 0..60u64 {
        let mut bad = blob.to_vec();
        let at = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8) as usize % (bad.len() * 8);
        bad[at / 8] ^= 1 << (at % 8);
        let mut extractor = SpanExtractor::new(&toc, 0, &[]).unwrap();
        let result =
            extractor.push(&bad, &mut |chunk, bytes| assert!(keep.chunks[&chunk.ix] == (chunk.data, bytes.to_vec())));
        if result.is_err() {
            assert_eq!(extractor.push(b"x", &mut |_, _| {}), Err(SpanError::Failed));
        }
        let _ = build(&bad[..], &BuildOptions::new(compression), &mut ());
    }
}

#[test]
fn wrong_bytes_never_become_chunks() {
    let tar = tar_of(&files());
    no_damage_becomes_a_chunk(
        &tar.chunks(400_000).flat_map(|piece| frame(piece, 1)).collect::<Vec<_>>(),
        Compression::Zstd,
    );
    let blob = gzip(&tar, 6);
    no_damage_becomes_a_chunk(&blob, Compression::Gzip);
    let (toc, keep) = built(&blob[..], Compression::Gzip);
    let wrong_window = vec![0; keep.windows[1].len()];
    assert!(!toc.verify_window(1, &wrong_window));
    assert!(matches!(SpanExtractor::new(&toc, 1, b"short"), Err(SpanError::Window { .. })));
}

#[test]
fn zstd_blobs_that_are_declined_and_those_that_are_wrong() {
    let tar = tar_of(&[file("a", &noise(50_000, 1))]);
    let good = frame(&tar, 3);
    let size = good.len() as u64;
    let after = |bytes: &[u8]| [good.as_slice(), bytes].concat();
    let result = |blob: &[u8]| archive::build_zstd(blob).map(drop);
    // containerd's decompressor goes on to the end of the blob and fails there.
    for trailing in [&b"x"[..], b"\x28\xb5", &[0; 512], &gzip(b"more", 6)] {
        let reason = Ineligible::TrailingBytes { unit: "zstd frame", offset: size };
        assert!(matches!(result(&after(trailing)), Err(BuildError::Ineligible { reason: found }) if found == reason));
    }
    assert!(result(&after(&skippable(b"x"))).is_ok());
    for other in [&tar[..], &gzip(&tar, 6), b"\x28"] {
        let reason = Ineligible::NotCompressed { compression: "zstd" };
        assert!(matches!(result(other), Err(BuildError::Ineligible { reason: found }) if found == reason));
    }
    let header = |rest: &[u8]| after(&[b"\x28\xb5\x2f\xfd", rest, &[1, 0, 0]].concat());
    for (rest, text) in [(&[1, 0, 9][..], "dictionary 9"), (&[0, 0x90], "window of 268435456 bytes")] {
        let declined = result(&header(rest)).unwrap_err();
        assert!(matches!(declined, BuildError::Ineligible { .. }) && declined.to_string().contains(text), "{declined}");
    }
    let mut checksum = good.clone();
    *checksum.last_mut().unwrap() ^= 0x80;
    for wrong in [&checksum[..], &after(&good[..30]), &after(&skippable(&[0; 30])[..20]), &after(&good[..5])] {
        assert!(matches!(result(wrong), Err(BuildError::Invalid { .. })));
    }
}

#[test]
fn a_small_frame_of_many_zeros_is_stopped_by_the_budget() {
    // 64 MiB of zeros are free of the ratio; these are 1 GiB in about 100 KiB.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    for _ in 0..1024 {
        encoder.write_all(&[0; 1 << 20]).unwrap();
        encoder.flush().unwrap();
    }
    let bomb = encoder.finish().unwrap();
    assert!(bomb.len() < 200_000, "{}", bomb.len());
    let start = [tar_of(&[]), vec![]].concat();
    let blob = [frame(&start, 1), bomb].concat();
    assert!(matches!(archive::build_zstd(&blob), Err(BuildError::Ineligible { .. })));
}

#[test]
fn packed_form_gives_the_same_bytes() {
    let (toc, _) = built(&gzip(&tar_of(&files()), 6)[..], Compression::Gzip);
    let bytes = toc.as_bytes();
    let packed = pack(bytes);
    assert!(packed.len() * 2 < bytes.len());
    assert_eq!(unpack(&packed, bytes.len() as u64).unwrap(), bytes);
    assert!(unpack(&packed, bytes.len() as u64 - 1).is_err());
    for end in 0..packed.len() {
        assert!(unpack(&packed[..end], 1 << 30).is_err());
    }
    for other in [&b""[..], b"x", &[0; 500], &bytes[..300]] {
        assert_eq!(unpack(&pack(other), 1 << 20).unwrap(), other);
    }
}

/// A random tree: sizes, directories, and names that meet each other.
fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let size = prop_oneof![Just(0usize), 1usize..600, 16_000usize..17_000, 1usize..300_000];
    let one = (0u8..6, 0u8..5, 0u8..12, size, any::<u64>());
    proptest::collection::vec(one, 0..30).prop_map(|list| {
        let mut entries = vec![dir("d0"), dir("d1"), dir("d1/d2")];
        for (kind, at, name, size, seed) in list {
            let parent = ["", "d0/", "d1/", "d1/d2/", "e/implied/"][usize::from(at)];
            entries.push(match kind {
                0 => dir(&format!("{parent}d{name}")),
                1 => archive::symlink(&format!("{parent}s{name}"), "../f1").mtime(seed % 2_000_000_000),
                2 => file(&format!("{parent}x{name}"), &noise(size, seed)).xattr("user.n", &seed.to_le_bytes()[..1]),
                _ => file(&format!("{parent}f{name}"), &noise(size, seed)).mode((seed & 0o7777) as u32),
            });
        }
        entries
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn random_trees_come_back(entries in entries(), level in 0u32..=9, members in 1usize..4, piece in 1usize..100_000) {
        let tar = tar_of(&entries);
        let mut blob = Vec::new();
        for part in tar.chunks(tar.len().div_ceil(members)) {
            blob.extend(gzip(part, level));
        }
        let (toc, keep) = built(&blob[..], Compression::Gzip);
        check_spans(&toc, &keep, &blob, piece);
        let packed = pack(toc.as_bytes());
        prop_assert_eq!(unpack(&packed, 1 << 30).unwrap(), toc.as_bytes());
        // The last member of each name is what the tree shows.
        let last: BTreeMap<&str, &Entry> = entries.iter().map(|entry| (entry.name.as_str(), entry)).collect();
        for (name, entry) in last {
            let ix = toc.lookup_path(name.as_bytes()).unwrap().unwrap();
            let inode = toc.inode(ix).unwrap();
            prop_assert_eq!(toc.size(&inode).unwrap(), if entry.typeflag == b'0' { entry.data.len() as u64 } else { entry.link.len() as u64 });
            let mut content = Vec::new();
            for chunk in toc.chunks_in(toc.file_data(&inode).unwrap()).unwrap() {
                content.extend_from_slice(&keep.chunks[&chunk.ix].1);
            }
            prop_assert!(content == entry.data, "{}", name);
            if entry.typeflag == b'0' {
                prop_assert_eq!(u32::from(inode.mode()), entry.mode & 0o7777);
            }
            prop_assert_eq!(inode.mtime(), (entry.mtime as i64, 0));
        }
    }

    #[test]
    fn random_frames_come_back(
        entries in entries(),
        cuts in proptest::collection::vec((1usize..400_000, 1i32..6, any::<bool>()), 1..12),
        piece in 1usize..100_000,
    ) {
        let tar = tar_of(&entries);
        let (mut blob, mut rest) = (Vec::new(), &tar[..]);
        for (size, level, skip) in cuts {
            let (part, after) = rest.split_at(size.min(rest.len()));
            blob.extend(frame(part, level));
            if skip {
                blob.extend(skippable(&part[..size.min(part.len()) / 100]));
            }
            rest = after;
        }
        blob.extend(frame(rest, 1));
        let (toc, keep) = built(&blob[..], Compression::Zstd);
        prop_assert_eq!(toc.diff_id().0, millstream_oci::Digest::of(&tar));
        check_spans(&toc, &keep, &blob, piece);
        // The same files as without compression.
        let (_, plain) = built(&tar[..], Compression::Plain);
        prop_assert!(plain.chunks == keep.chunks);
    }

    #[test]
    fn damaged_packs_never_panic(at in 0usize..10_000, bit in 0u8..8) {
        let (toc, _) = built(&tar_of(&[dir("d"), file("d/a", &noise(40_000, 3)), archive::symlink("s", "d/a")])[..], Compression::Plain);
        let mut packed = pack(toc.as_bytes());
        let at = at % packed.len();
        packed[at] ^= 1 << bit;
        if let Ok(bytes) = unpack(&packed, 1 << 20)
            && let Ok(toc) = Toc::open(bytes)
        {
            let _ = toc.check();
        }
    }

    #[test]
    fn random_tars_never_panic(at in proptest::collection::vec((0usize..20_000, any::<u8>()), 1..8)) {
        let mut tar = tar_of(&files()[..12]);
        for (at, value) in at {
            let at = at % tar.len();
            tar[at] = value;
        }
        if let Ok(built) = build(&tar[..], &BuildOptions::new(Compression::Plain), &mut ()) {
            Toc::open(built.toc).unwrap().check().unwrap();
        }
    }
}
