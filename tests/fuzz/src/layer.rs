//! What must hold of every table of contents, and of one that was just built.

use std::collections::BTreeMap;
use std::io::{self, Read};

use millstream_oci::{DiffId, Digest};
use millstream_toc::format::{FormatError, Kind};
use millstream_toc::{Budget, BuildOptions, BuildSink, Compression, DataRange, Reassembled, SpanExtractor, Toc, build};

/// Largest TOC and largest tar that is built, in bytes. Small, so that a run stays within its memory.
pub const MOST: u64 = 4 << 20;

/// Everything that a build gives out beside the TOC.
#[derive(Debug, Default)]
struct Keep {
    skeleton: Vec<u8>,
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

    fn skeleton(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.skeleton.extend_from_slice(bytes);
        Ok(())
    }
}

/// Uses every accessor on every record. Nothing may panic; where the TOC has passed [`Toc::check`], nothing may fail either.
///
/// # Panics
///
/// Where that does not hold.
pub fn walk(toc: &Toc) {
    let checked = toc.check().is_ok();
    let judge = |result: Result<(), FormatError>| assert!(!checked || result.is_ok(), "{result:?}");
    for ix in 0..toc.inode_count() {
        judge(visit(toc, ix, checked));
    }
    for ix in 0..toc.chunk_count() {
        judge(toc.chunk_digest(ix).map(drop));
        judge(toc.chunk(ix).map(drop));
        judge(toc.is_hole(ix).map(drop));
    }
    for ix in 0..toc.span_count() {
        judge(toc.span(ix).map(drop));
    }
}

/// Everything about one inode. Whether look-ups find what listings show is a question only for a TOC that is in order.
fn visit(toc: &Toc, ix: u32, checked: bool) -> Result<(), FormatError> {
    let inode = toc.inode(ix)?;
    for attribute in toc.xattrs(&inode)? {
        let (name, value) = attribute?;
        let found = toc.xattr(&inode, name)?;
        assert!(!checked || found == Some(value));
    }
    match inode.kind() {
        Kind::Directory => {
            for child in toc.children(&inode)? {
                let child = child?;
                let found = toc.lookup(ix, child.name)?;
                assert!(!checked || found == Some(child));
            }
        }
        Kind::Symlink => {
            assert_eq!(toc.symlink_target(&inode)?.len() as u64, toc.size(&inode)?);
        }
        Kind::Regular => {
            let data = toc.file_data(&inode)?;
            assert_eq!(data.len(), toc.size(&inode)?);
            toc.chunks_in(data)?;
            toc.spans_for(data)?;
        }
        Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {}
    }
    Ok(())
}

/// Bounds that keep one run small.
#[must_use]
pub fn options(compression: Compression) -> BuildOptions {
    let budget = Budget {
        max_entries: 10_000,
        max_tar_size: MOST,
        max_file_size: MOST,
        max_toc_bytes: MOST,
        max_link_work: 100_000,
        ..Budget::default()
    };
    BuildOptions { compression, budget }
}

/// Gives its bytes in pieces of one size, as a network might.
struct Pieces<'a>(&'a [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.1.min(buffer.len());
        self.0.read(&mut buffer[..most])
    }
}

/// What a build gives does not depend on how the bytes arrive.
///
/// # Panics
///
/// Where it does.
pub fn same_in_pieces(blob: &[u8], compression: Compression) {
    let options = options(compression);
    let whole = build(blob, &options, &mut ());
    let in_pieces = build(Pieces(blob, 97), &options, &mut ());
    match (whole, in_pieces) {
        (Ok(whole), Ok(in_pieces)) => assert_eq!(whole, in_pieces),
        (Err(_), Err(_)) => {}
        (whole, in_pieces) => panic!("whole: {:?}, in pieces: {:?}", whole.err(), in_pieces.err()),
    }
}

/// Builds the TOC of a blob. If there is one, it must be right: it passes its check, and its spans give back every chunk that
/// passed by.
///
/// # Panics
///
/// Where it is not.
#[must_use]
pub fn build_and_read_back(blob: &[u8], compression: Compression) -> Option<Toc> {
    let mut keep = Keep::default();
    let canonical = build(blob, &options(compression), &mut keep).ok()?.toc;
    let toc = Toc::open(canonical).expect("what was built opens");
    toc.check().expect("what was built is in order");
    walk(&toc);
    assert_eq!(toc.blob_size(), blob.len() as u64);
    assert_eq!(keep.windows.len(), toc.span_count() as usize);
    for span in 0..toc.span_count() {
        read_back(&toc, &keep, blob, span);
    }
    reassemble(&toc, &keep);
    for ix in 0..toc.chunk_count() {
        assert_eq!(toc.is_hole(ix), Ok(!keep.chunks.contains_key(&ix)), "chunk {ix}");
    }
    Some(toc)
}

/// The tar from its skeleton and the chunks.
fn reassemble(toc: &Toc, keep: &Keep) {
    let mut data = vec![0; usize::try_from(toc.data_size()).expect("in memory")];
    let place = |range: &DataRange| {
        let place = |at: u64| usize::try_from(at).expect("in memory");
        place(range.start)..place(range.end)
    };
    for (range, bytes) in keep.chunks.values() {
        data[place(range)].copy_from_slice(bytes);
    }
    let content = |range: DataRange, out: &mut [u8]| {
        out.copy_from_slice(&data[place(&range)]);
        Ok(())
    };
    let mut tar = Vec::new();
    let mut reassembled = Reassembled::new(toc, &keep.skeleton[..], content).expect("in order");
    reassembled.read_to_end(&mut tar).expect("both halves are whole");
    assert_eq!(DiffId(Digest::of(&tar)), toc.diff_id());
}

/// From one span to the end of the blob: every chunk that lies behind its start, with the right bytes.
fn read_back(toc: &Toc, keep: &Keep, blob: &[u8], first: u32) {
    let window = &keep.windows[first as usize];
    assert!(toc.verify_window(first, window));
    let span = toc.span(first).expect("in order");
    let mut extractor = SpanExtractor::new(toc, first, window).expect("in order");
    let mut given = BTreeMap::new();
    let start = usize::try_from(span.blob.start).expect("in memory");
    extractor
        .push(&blob[start..], &mut |chunk, bytes| {
            given.insert(chunk.ix, (chunk.data, bytes.to_vec()));
        })
        .expect("the blob is the one that was built from");
    for (ix, (data, bytes)) in &keep.chunks {
        let behind = toc.spans_for(*data).expect("in order").first().is_some_and(|needed| *needed >= first);
        // A chunk that begins before the span in the tar cannot be given; one that begins right in it must be.
        match given.remove(ix) {
            Some(found) => assert_eq!(found, (*data, bytes.clone()), "chunk {ix} from span {first}"),
            None => assert!(!behind, "chunk {ix} is missing from span {first}"),
        }
    }
    assert!(given.is_empty(), "chunks from nowhere: {:?}", given.keys());
}
