//! The reader over tables made by hand: what it finds, what `check` refuses, and that damage is an error and never a panic.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation, reason = "tests")]

use millstream_toc::format::*;
use millstream_toc::{DataRange, Toc};
use proptest::prelude::*;
use zerocopy::IntoBytes;

/// The tables of a TOC before they are written.
#[derive(Clone)]
struct Tables {
    inodes: Vec<InodeRecord>,
    dirents: Vec<DirentRecord>,
    contents: Vec<ContentRecord>,
    chunks: Vec<[u8; SHORT_DIGEST]>,
    extents: Vec<ExtentRecord>,
    sets: Vec<XattrSetRecord>,
    xattrs: Vec<XattrRecord>,
    spans: Vec<SpanRecord>,
    strings: Vec<u8>,
}

const WINDOW: &[u8] = b"window";

fn short(bytes: &[u8]) -> [u8; SHORT_DIGEST] {
    blake3::hash(bytes).as_bytes()[..SHORT_DIGEST].try_into().unwrap()
}

fn inode(kind: Kind, nlink: u32, a: u32, b: u32) -> InodeRecord {
    InodeRecord {
        kind: kind as u8,
        flags: 0,
        mode: 0o755.into(),
        uid: 1.into(),
        gid: 2.into(),
        mtime_nsec: 5.into(),
        mtime_sec: (-7).into(),
        nlink: nlink.into(),
        xattrs: NONE.into(),
        a: a.into(),
        b: b.into(),
    }
}

fn span(blob: u64, tar: u64, bits: u8, start: u8, window: &[u8]) -> SpanRecord {
    SpanRecord {
        blob_off: blob.into(),
        tar_off: tar.into(),
        bits,
        start,
        reserved: 0.into(),
        window_len: (window.len() as u32).into(),
        window_digest: if window.is_empty() { [0; SHORT_DIGEST] } else { short(window) },
    }
}

impl Tables {
    /// `/d/f` of 20,000 bytes, `/d/gone` a whiteout, `/hard` the same file, `/link` to `d/f`, `/sparse` with one hole in front.
    fn sample() -> Self {
        let mut tables = Self {
            inodes: vec![
                inode(Kind::Directory, 3, 0, 4),
                inode(Kind::Directory, 2, 4, 2),
                inode(Kind::Regular, 2, 0, 0),
                inode(Kind::Symlink, 1, 0, 3),
                inode(Kind::Regular, 1, 1, 0),
            ],
            dirents: Vec::new(),
            contents: vec![
                ContentRecord {
                    size: 40_000.into(),
                    data_off: 0.into(),
                    tar_off: 512.into(),
                    first_chunk: 0.into(),
                    first_extent: NONE.into(),
                    extents: 0.into(),
                },
                ContentRecord {
                    size: 80_000.into(),
                    data_off: 40_960.into(),
                    tar_off: 50_000.into(),
                    first_chunk: 2.into(),
                    first_extent: 0.into(),
                    extents: 1.into(),
                },
            ],
            chunks: (0..5).map(|n| [n + 1; SHORT_DIGEST]).collect(),
            extents: vec![ExtentRecord { file_off: 79_000.into(), tar_off: 50_000.into(), len: 10.into() }],
            sets: vec![XattrSetRecord { first: 0.into(), count: 2.into() }],
            xattrs: Vec::new(),
            spans: vec![span(0, 0, 0, 1, b""), span(100, 10_000, 3, 0, WINDOW), span(200, 45_000, 0, 1, b"")],
            strings: b"d/f".to_vec(),
        };
        for (name, inode) in [("d", 1), ("hard", 2), ("link", 3), ("sparse", 4), ("f", 2), ("gone", NONE)] {
            let name_off = tables.string(name);
            let name_len = (name.len() as u16).into();
            tables.dirents.push(DirentRecord {
                name_off: name_off.into(),
                name_len,
                reserved: 0.into(),
                inode: inode.into(),
            });
        }
        for (name, value) in [("user.a", "1"), ("user.b", "")] {
            let (name_off, value_off) = (tables.string(name).into(), tables.string(value).into());
            let (name_len, value_len) = ((name.len() as u32).into(), (value.len() as u32).into());
            tables.xattrs.push(XattrRecord { name_off, name_len, value_off, value_len });
        }
        tables.inodes[1].xattrs = 0.into();
        tables
    }

    fn string(&mut self, text: &str) -> u32 {
        self.strings.extend_from_slice(text.as_bytes());
        (self.strings.len() - text.len()) as u32
    }

    fn bytes(&self) -> Vec<u8> {
        let counts = [
            self.inodes.len(),
            self.dirents.len(),
            self.contents.len(),
            self.chunks.len(),
            self.extents.len(),
            self.sets.len(),
            self.xattrs.len(),
            self.spans.len(),
            self.strings.len(),
        ];
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            compression: 1.into(),
            blob_digest: [1; 32],
            diff_id: [2; 32],
            blob_size: 300.into(),
            tar_size: 51_000.into(),
            data_size: 122_880.into(),
            counts: counts.map(|count| (count as u32).into()),
            reserved: 0.into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        for table in [
            self.inodes.as_bytes(),
            self.dirents.as_bytes(),
            self.contents.as_bytes(),
            self.chunks.as_bytes(),
            self.extents.as_bytes(),
            self.sets.as_bytes(),
            self.xattrs.as_bytes(),
            self.spans.as_bytes(),
            &self.strings,
        ] {
            bytes.extend_from_slice(table);
        }
        bytes
    }
}

fn sample() -> Toc {
    let toc = Toc::open(Tables::sample().bytes()).unwrap();
    toc.check().unwrap();
    toc
}

#[test]
fn names_lead_to_inodes() {
    let toc = sample();
    let found = |path: &str| toc.lookup_path(path.as_bytes()).unwrap();
    assert_eq!(found(""), Some(0));
    assert_eq!(found("/d//f"), Some(2));
    assert_eq!(found("hard"), Some(2));
    for missing in ["d/gone", "d/g", "e", "d/f/x", "link/x", "d/.."] {
        assert_eq!(found(missing), None, "{missing}");
    }
    assert_eq!(toc.lookup(1, b"gone").unwrap().unwrap().inode, None);
    let root = toc.inode(0).unwrap();
    let children = toc.children(&root).unwrap();
    assert_eq!(children.len(), 4);
    assert_eq!(children.get(3).unwrap().name, b"sparse");
    let names: Vec<_> = children.map(|entry| entry.unwrap().name).collect();
    assert_eq!(names, [&b"d"[..], b"hard", b"link", b"sparse"]);
    assert_eq!(toc.path_of(2).unwrap(), b"hard");
    assert_eq!(toc.path_of(0).unwrap(), b"");
    assert_eq!(toc.path_of(9), None);
}

#[test]
fn inodes_show_their_attributes() {
    let toc = sample();
    let dir = toc.inode(1).unwrap();
    assert_eq!((dir.mode(), dir.uid(), dir.gid(), dir.mtime(), dir.nlink()), (0o755, 1, 2, (-7, 5), 2));
    let xattrs: Vec<_> = toc.xattrs(&dir).unwrap().map(Result::unwrap).collect();
    assert_eq!(xattrs, [(&b"user.a"[..], &b"1"[..]), (b"user.b", b"")]);
    assert_eq!(toc.xattr(&dir, b"user.b").unwrap(), Some(&b""[..]));
    assert_eq!(toc.xattr(&dir, b"user.c").unwrap(), None);
    let link = toc.inode(3).unwrap();
    assert_eq!((toc.symlink_target(&link).unwrap(), toc.size(&link).unwrap()), (&b"d/f"[..], 3));
    assert_eq!(toc.size(&toc.inode(4).unwrap()).unwrap(), 80_000);
    assert!(toc.children(&link).is_err() && toc.symlink_target(&dir).is_err() && toc.inode(5).is_err());
}

#[test]
fn data_leads_to_chunks_and_spans() {
    let toc = sample();
    let chunks = |start, end| -> Vec<u32> {
        toc.chunks_in(DataRange::new(start, end)).unwrap().iter().map(|chunk| chunk.ix).collect()
    };
    assert_eq!(toc.file_data(&toc.inode(2).unwrap()).unwrap(), DataRange::new(0, 40_000));
    assert_eq!(chunks(0, 122_880), [0, 1, 2, 3, 4]);
    assert_eq!(chunks(32_767, 32_769), [0, 1]);
    assert_eq!(chunks(40_000, 40_960), [0; 0], "alignment gap");
    assert_eq!(toc.chunk(1).unwrap().data, DataRange::new(32_768, 40_000));
    assert_eq!(toc.chunk(4).unwrap().data, DataRange::new(40_960 + 65_536, 120_960));
    assert_eq!((toc.content_of_chunk(1).unwrap(), toc.content_of_chunk(2).unwrap()), (0, 1));
    assert!(toc.chunk(5).is_err() && toc.chunk_digest(5).is_err());
    assert_eq!((0..5).map(|ix| toc.is_hole(ix).unwrap()).collect::<Vec<_>>(), [false, false, true, true, false]);

    let spans = |start, end| toc.spans_for(DataRange::new(start, end)).unwrap();
    assert_eq!(spans(0, 122_880), [0, 1, 2]);
    assert_eq!(spans(0, 9_488), [0], "up to byte 10,000 of the tar");
    assert_eq!(spans(9_487, 9_489), [0, 1]);
    assert_eq!(spans(40_960, 40_960 + 79_000), [0; 0], "a hole");
    assert_eq!(spans(40_960 + 79_009, 122_880), [2]);
    assert_eq!([0, 512, 40_511, 40_512, 50_009, 50_010].map(|at| toc.content_from(at).unwrap()), [0, 0, 0, 1, 1, 2]);

    let first = toc.span(0).unwrap();
    assert_eq!((first.blob.start, first.blob.end, first.tar.end), (0, 101, 10_000), "shares a byte with the next");
    assert_eq!(toc.span(2).unwrap().blob.end, 300);
    assert!(toc.verify_window(1, WINDOW) && !toc.verify_window(1, b"Window") && !toc.verify_window(1, b""));
    assert!(toc.verify_window(0, b"") && !toc.verify_window(0, WINDOW) && !toc.verify_window(9, b""));
}

#[test]
fn check_refuses_what_no_single_access_sees() {
    type Change = fn(&mut Tables);
    let changes: [(&str, Change); 26] = [
        ("root is a file", |t| t.inodes[0] = inode(Kind::Fifo, 1, 0, 0)),
        ("names not sorted", |t| t.dirents.swap(0, 1)),
        ("name with a slash", |t| t.strings[3] = b'/'),
        ("name with a dot", |t| t.strings[3] = b'.'),
        ("directory with two names", |t| t.dirents[1].inode = 1.into()),
        ("directory in itself", |t| t.dirents[4].inode = 1.into()),
        ("inode without a name", |t| t.dirents[3].inode = NONE.into()),
        ("links of a file", |t| t.inodes[2].nlink = 3.into()),
        ("links of a directory", |t| t.inodes[0].nlink = 2.into()),
        ("shared entries", |t| t.inodes[1].a = 3.into()),
        ("entries of nobody", |t| t.inodes[1].b = 1.into()),
        ("entry out of range", |t| t.dirents[0].inode = 5.into()),
        ("reserved", |t| t.dirents[0].reserved = 1.into()),
        ("flag of a file", |t| t.inodes[2].flags = 1),
        ("whiteout device", |t| t.inodes[3] = inode(Kind::CharDevice, 1, 0, 0)),
        ("reserved owner", |t| t.inodes[3].uid = u32::MAX.into()),
        ("content not aligned", |t| t.contents[1].data_off = 40_961.into()),
        ("contents overlap", |t| t.contents[1].data_off = 32_768.into()),
        ("chunks too many", |t| t.chunks.push([1; SHORT_DIGEST])),
        ("chunk digest gone", |t| t.chunks[2] = [0; SHORT_DIGEST]),
        ("extent after its file", |t| t.extents[0].file_off = 79_991.into()),
        ("attributes not sorted", |t| t.xattrs.swap(0, 1)),
        ("first span late", |t| t.spans[0].tar_off = 1.into()),
        ("spans not ascending", |t| t.spans.swap(1, 2)),
        ("window without digest", |t| t.spans[1].window_digest = [0; SHORT_DIGEST]),
        ("deflate without member", |t| t.spans[0].start = 0),
    ];
    for (what, change) in changes {
        let mut tables = Tables::sample();
        change(&mut tables);
        let toc = Toc::open(tables.bytes()).unwrap();
        assert!(matches!(toc.check(), Err(FormatError::Damaged { .. })), "{what}");
        use_all(&toc);
    }
}

#[test]
fn open_refuses_wrong_heads_and_lengths() {
    let bytes = Tables::sample().bytes();
    for len in [0, 7, size_of::<Header>() - 1, size_of::<Header>(), bytes.len() - 1] {
        assert!(Toc::open(bytes[..len].to_vec()).is_err(), "{len}");
    }
    assert!(Toc::open([&bytes[..], b"x"].concat()).is_err());
    assert_eq!(Toc::open(vec![0; 400]).unwrap_err(), FormatError::Magic);
    let mut other = bytes;
    other[8] = 9;
    assert_eq!(Toc::open(other).unwrap_err(), FormatError::Version { found: 9 });
}

/// Calls every accessor with all that exists and a little more. Only a panic or an endless loop can fail.
fn use_all(toc: &Toc) {
    let _ = (toc.check(), toc.digest(), toc.lookup_path(b"d/f"), format!("{toc:?}"));
    for ix in (0..8).chain([NONE - 1, NONE]) {
        let _ = (toc.content(ix), toc.chunk(ix), toc.chunk_digest(ix), toc.is_hole(ix), toc.content_of_chunk(ix));
        let _ = (toc.span(ix), toc.verify_window(ix, WINDOW), toc.path_of(ix), toc.lookup(ix, b"f"));
        let Ok(inode) = toc.inode(ix) else { continue };
        let _ = (toc.size(&inode), toc.symlink_target(&inode), toc.file_data(&inode), toc.xattr(&inode, b"user.b"));
        let _ = toc.xattrs(&inode).map(Iterator::count);
        let _ = toc.children(&inode).map(Iterator::count);
    }
    for range in [DataRange::new(0, u64::MAX), DataRange::new(100, 30_000), DataRange::new(u64::MAX, u64::MAX)] {
        let _ = (toc.chunks_in(range).map(|chunks| assert!(chunks.len() <= 8)), toc.spans_for(range));
    }
    let _ = [0, 30_000, u64::MAX].map(|at| toc.content_from(at));
}

/// A map whose pages turn to zeros after it was opened.
#[test]
fn zeroed_pages_are_damage() {
    use std::sync::{Arc, Mutex};
    /// Hands out the damaged bytes from the second access on, as a map would after a fault.
    struct Faulting(Vec<u8>, Vec<u8>, Arc<Mutex<bool>>);
    impl AsRef<[u8]> for Faulting {
        fn as_ref(&self) -> &[u8] {
            if *self.2.lock().unwrap() { &self.1 } else { &self.0 }
        }
    }
    let bytes = Tables::sample().bytes();
    for at in (0..bytes.len()).step_by(8) {
        let mut damaged = bytes.clone();
        let end = bytes.len().min(at + 64);
        damaged[at..end].fill(0);
        let faulted = Arc::new(Mutex::new(false));
        let toc = Toc::open(Faulting(bytes.clone(), damaged, faulted.clone())).unwrap();
        *faulted.lock().unwrap() = true;
        use_all(&toc);
    }
    let faulted = Arc::new(Mutex::new(false));
    let toc = Toc::open(Faulting(bytes.clone(), vec![0; bytes.len()], faulted.clone())).unwrap();
    *faulted.lock().unwrap() = true;
    assert!(toc.inode(0).is_err() && toc.content(0).is_err() && toc.chunk_digest(0).is_err() && toc.span(0).is_err());
    assert!(toc.lookup(0, b"d").is_err() && toc.chunks_in(DataRange::new(0, 1)).is_err());
    assert!(toc.spans_for(DataRange::new(0, 1)).is_err() && !toc.verify_window(0, b""));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damage_is_an_error_and_never_a_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = Tables::sample().bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(toc) = Toc::open(bytes) {
            use_all(&toc);
        }
    }
}
