//! Archives that are small or cheap to send and cost much to read: each is declined soon, with what it is too much of, and without
//! much memory. They are made as they are read and never stored; most have no end.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod archive;

use std::io::{self, Read};
use std::time::{Duration, Instant};

use archive::{Entry, dir, entry, file, gzip, members, sparse};
use millstream_toc::{Bound, Budget, BuildError, BuildOptions, Compression, Ineligible, build};

const MIB: u64 = 1 << 20;
/// Longest time for one bomb, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most memory that all of them together may add.
const MEMORY: u64 = 128 * MIB;

/// Bytes that are made piece by piece, counted as they are read.
struct Endless<F> {
    make: F,
    number: u64,
    piece: Vec<u8>,
    at: usize,
    read: u64,
}

impl<F: FnMut(u64) -> Vec<u8>> Endless<F> {
    /// `make` gives piece after piece, by number.
    fn new(make: F) -> Self {
        Self { make, number: 0, piece: Vec::new(), at: 0, read: 0 }
    }
}

impl<F: FnMut(u64) -> Vec<u8>> Read for Endless<F> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            (self.piece, self.at) = ((self.make)(self.number), 0);
            self.number += 1;
        }
        let len = out.len().min(self.piece.len() - self.at);
        out[..len].copy_from_slice(&self.piece[self.at..self.at + len]);
        self.at += len;
        self.read += len as u64;
        Ok(len)
    }
}

/// A budget a hundredth of the usual one, so that nothing takes long.
fn small() -> Budget {
    Budget { max_entries: 20_000, max_tar_size: 640 * MIB, max_toc_bytes: 2 * MIB, ..Budget::default() }
}

/// Reads the bomb; gives the reason and how many bytes of the blob were read for it.
fn declined<F: FnMut(u64) -> Vec<u8>>(compression: Compression, make: F) -> (Ineligible, u64) {
    let mut blob = Endless::new(make);
    let options = BuildOptions { budget: small(), ..BuildOptions::new(compression) };
    let started = Instant::now();
    let built = build(&mut blob, &options, &mut ());
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    match built {
        Err(BuildError::Ineligible { reason }) => (reason, blob.read),
        other => panic!("{other:?} after {} bytes", blob.read),
    }
}

/// The most memory that this process ever had.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// One member after the other, by number.
fn plain(make: impl Fn(u64) -> Entry) -> (Ineligible, u64) {
    declined(Compression::Plain, move |number| members(&[make(number)]))
}

fn assert_bound((reason, read): (Ineligible, u64), bound: Bound, most: u64) {
    assert_eq!(reason.bound(), Some(bound), "{reason}");
    assert!(read <= most, "{reason} after {read} bytes");
}

/// One test, so that the memory is that of the bombs.
#[test]
fn bombs_are_declined_soon_and_with_little_memory() {
    let before = peak();
    files_and_names();
    extended_headers();
    sparse_files();
    compressed();
    let used = peak() - before;
    assert!(used < MEMORY, "{} MiB", used / MIB);
}

fn files_and_names() {
    // Each member is a block, so 20,000 of them are 10 MiB.
    assert_bound(plain(|number| file(&format!("f{number}"), b"")), Bound::Entries, 11 * MIB);
    assert_bound(plain(|_| file("again", b"")), Bound::Entries, 11 * MIB);
    assert_bound(plain(|_| dir("again")), Bound::Entries, 11 * MIB);
    assert_bound(plain(|number| file(&format!("d{number}/d/d/d/f"), b"")), Bound::Entries, 3 * MIB);
    let long = "n".repeat(240);
    assert_bound(plain(|number| file(&format!("{long}{number}"), b"")), Bound::TocBytes, 32 * MIB);
    let value = |number: u64| number.to_le_bytes().repeat(300);
    assert_bound(plain(|number| file("x", b"").xattr("user.x", &value(number))), Bound::TocBytes, 8 * MIB);
    // Deeper with each member.
    let (reason, _) = plain(|number| dir(&"d/".repeat(usize::try_from(number).unwrap() + 1)));
    assert!(reason.to_string().contains("directories above a file"), "{reason}");
    let (reason, _) = plain(|_| file(&"d/".repeat(2000), b""));
    assert!(reason.to_string().contains("directories above a file"), "{reason}");
}

fn extended_headers() {
    // It is not even begun to be read.
    let huge = |_| {
        let mut head = members(&[entry(b'x', "huge")]);
        head[124..136].copy_from_slice(b"10000000000\0");
        head[148..156].fill(b' ');
        let sum: u64 = head[..512].iter().map(|byte| u64::from(*byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        head
    };
    let (reason, read) = declined(Compression::Plain, huge);
    assert!(reason.to_string().contains("extended header is too long"), "{reason}");
    assert!(read < MIB, "{read}");
    // Announcements that are never followed by what they announce.
    let mut announcement = entry(b'x', "announcement");
    announcement.data = b"19 comment=nothing\n".repeat(20_000);
    assert_bound(plain(|_| announcement.clone()), Bound::TarSize, 641 * MIB);
}

fn sparse_files() {
    assert_bound(plain(|_| sparse("tebibyte", 1 << 40, &[(0, b"x")])), Bound::FileSize, MIB);
    // Each is allowed; their digests together are not.
    assert_bound(plain(|number| sparse(&format!("s{number}"), 1 << 30, &[(0, b"x")])), Bound::TocBytes, MIB);
    let many: Vec<(u64, &[u8])> = (0..70_000).map(|at| (at * 10, &b"x"[..])).collect();
    let (reason, _) = plain(|_| sparse("holes", 1 << 30, &many));
    assert!(reason.to_string().contains("sparse map is too long"), "{reason}");
}

fn compressed() {
    // A file of many zeros: a thousandfold.
    let mut head = members(&[file("zeros", b"")]);
    head[124..136].copy_from_slice(b"10000000000\0");
    head[148..156].fill(b' ');
    let sum: u64 = head[..512].iter().map(|byte| u64::from(*byte)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let (first, zeros) = (gzip(&head, 6), gzip(&vec![0; 16 << 20], 9));
    let bomb = declined(Compression::Gzip, |number| if number == 0 { first.clone() } else { zeros.clone() });
    assert_bound(bomb, Bound::Ratio, MIB);
    // Members without output, of which no budget but the time of the import says anything, end with the blob.
    let nothing = gzip(b"", 6);
    let blob = nothing.repeat(100_000);
    let built = build(&blob[..], &BuildOptions::new(Compression::Gzip), &mut ());
    assert!(built.is_ok(), "{built:?}");
    // One block without end: fixed codes, all literals are zeros.
    let endless = declined(Compression::Gzip, |number| match number {
        0 => b"\x1f\x8b\x08\0\0\0\0\0\0\xff\x62".to_vec(),
        _ => vec![0x60; 1 << 16],
    });
    assert!(endless.1 <= 641 * MIB, "{endless:?}");
}
