//! Layers made from code: a list of entries becomes a tar, packed or not, with its digests.
//!
//! What tar headers cannot say plainly (times below a second, large numbers, long or odd names, extended attributes)
//! is written as PAX records, as image builders do.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tar::{EntryType, Header};

use crate::pack::{Hashing, Packer};
use crate::tree;

pub use crate::pack::Packing;

/// Largest number that an eight-byte octal field holds.
const OCTAL_8: u64 = 0o7_777_777;
/// Largest number that a twelve-byte octal field holds.
const OCTAL_12: u64 = 0o77_777_777_777;
/// Bytes of a block of a tar.
const BLOCK: usize = 512;
/// Bytes of the name and link name fields.
const NAME_FIELD: usize = 100;

/// Content of a regular file.
#[derive(Debug, Clone)]
pub enum Content {
    /// In memory.
    Bytes(Vec<u8>),
    /// Read when the layer is written.
    File(PathBuf),
    /// So many bytes of [`Noise`] with this seed, made when the layer is written.
    Noise(u32, u64),
    /// Stored with its holes left out, in GNU's sparse form 1.0: the whole size, and what stands where, ascending.
    Sparse(u64, Vec<(u64, Vec<u8>)>),
}

/// What an entry is.
#[derive(Debug, Clone)]
pub enum Kind {
    /// Directory.
    Directory,
    /// Regular file.
    File(Content),
    /// Symbolic link to this text.
    Symlink(Vec<u8>),
    /// Another name of an entry of the same layer, by its path.
    HardLink(Vec<u8>),
    /// Character device: major, minor.
    Character(u32, u32),
    /// Block device: major, minor.
    Block(u32, u32),
    /// Named pipe.
    Fifo,
}

/// One entry of a layer.
#[derive(Debug, Clone)]
pub struct Entry {
    path: Vec<u8>,
    kind: Kind,
    mode: u32,
    uid: u64,
    gid: u64,
    mtime: (i64, u32),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// An entry with usual rights, owned by root, last changed at the beginning of 2024. `path` has no leading slash.
    pub fn new(path: impl AsRef<[u8]>, kind: Kind) -> Self {
        let mode = match kind {
            Kind::Directory => 0o755,
            Kind::Symlink(_) => 0o777,
            _ => 0o644,
        };
        let path = path.as_ref().to_vec();
        Self { path, kind, mode, uid: 0, gid: 0, mtime: (1_704_067_200, 0), xattrs: Vec::new() }
    }

    /// A directory.
    pub fn directory(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::Directory)
    }

    /// A regular file.
    pub fn file(path: impl AsRef<[u8]>, content: impl Into<Vec<u8>>) -> Self {
        Self::new(path, Kind::File(Content::Bytes(content.into())))
    }

    /// A regular file of `size` bytes that is stored without its holes: `pieces` are what stands where, ascending.
    pub fn sparse(path: impl AsRef<[u8]>, size: u64, pieces: Vec<(u64, Vec<u8>)>) -> Self {
        Self::new(path, Kind::File(Content::Sparse(size, pieces)))
    }

    /// A symbolic link.
    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::Symlink(target.as_ref().to_vec()))
    }

    /// A further name of an entry. What this entry says of mode, owner, time and attributes is applied to the inode that
    /// both share, as containerd does it: repeat what the other says.
    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::HardLink(target.as_ref().to_vec()))
    }

    /// The mark that hides `path` of the layers below.
    pub fn whiteout(path: &str) -> Self {
        let (directory, name) = path.rsplit_once('/').map_or(("", path), |(directory, name)| (directory, name));
        let slash = if directory.is_empty() { "" } else { "/" };
        Self::file(format!("{directory}{slash}.wh.{name}"), "")
    }

    /// The mark that hides all that the layers below have in `directory`.
    pub fn opaque(directory: &str) -> Self {
        Self::file(format!("{directory}/.wh..wh..opq"), "")
    }

    /// With these permission bits, set-user-id and the like included.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// With this owner and group.
    #[must_use]
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// With this time of last change: seconds since 1970 and nanoseconds.
    #[must_use]
    pub fn mtime(mut self, seconds: i64, nanoseconds: u32) -> Self {
        self.mtime = (seconds, nanoseconds);
        self
    }

    /// With this extended attribute.
    #[must_use]
    pub fn xattr(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.xattrs.push((name.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }
}

/// Bytes that do not compress; the same for the same `seed`.
pub fn noise(seed: u32, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    Noise::new(seed, bytes as u64).fill(&mut out);
    out
}

/// The same as a stream of so many bytes.
#[derive(Debug, Clone)]
pub struct Noise {
    state: u64,
    word: [u8; 8],
    /// Bytes of `word` that were given out.
    used: usize,
    left: u64,
}

impl Noise {
    /// A stream of `bytes` bytes.
    pub fn new(seed: u32, bytes: u64) -> Self {
        // Any state but zero is good.
        let state = u64::from(seed) << 1 | 1;
        Self { state, word: [0; 8], used: 8, left: bytes }
    }

    fn fill(&mut self, out: &mut [u8]) {
        let (rest, new) = out.split_at_mut(out.len().min(self.word.len() - self.used));
        rest.copy_from_slice(&self.word[self.used..][..rest.len()]);
        self.used += rest.len();
        for piece in new.chunks_mut(self.word.len()) {
            // Marsaglia's xorshift, scrambled by a multiplication.
            self.state ^= self.state >> 12;
            self.state ^= self.state << 25;
            self.state ^= self.state >> 27;
            self.word = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes();
            piece.copy_from_slice(&self.word[..piece.len()]);
            self.used = piece.len();
        }
    }
}

impl io::Read for Noise {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let take = usize::try_from(self.left).unwrap_or(usize::MAX).min(out.len());
        self.fill(&mut out[..take]);
        self.left -= take as u64;
        Ok(take)
    }
}

/// What a written layer is known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// SHA-256 of the blob, 64 hexadecimal digits.
    pub digest: String,
    /// Bytes of the blob.
    pub size: u64,
    /// SHA-256 of the tar, 64 hexadecimal digits.
    pub diff_id: String,
}

/// Writes a layer as a blob to `out`.
///
/// # Errors
///
/// If a source file cannot be read or `out` cannot be written.
pub fn write_layer(entries: &[Entry], packing: Packing, out: impl Write) -> Result<LayerInfo> {
    let packer = Packer::new(packing, Hashing::new(out))?;
    let mut builder = tar::Builder::new(Hashing::new(packer));
    for entry in entries {
        append(&mut builder, entry)
            .with_context(|| format!("writing the entry {}", String::from_utf8_lossy(&entry.path)))?;
    }
    let (packer, diff_id, _) = builder.into_inner()?.finish();
    let (mut out, digest, size) = packer.finish()?.finish();
    out.flush()?;
    Ok(LayerInfo { digest, size, diff_id })
}

/// The entries of a directory, below it, in the order of their names. What overlayfs puts into an upper directory becomes
/// what a layer has for it: whiteouts and opaque marks as files of their special names, its bookkeeping left out.
///
/// # Errors
///
/// If something below it cannot be read.
pub fn entries_of(root: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut links = HashMap::new();
    collect(root, &mut Vec::new(), &mut entries, &mut links)?;
    Ok(entries)
}

fn collect(
    dir: &Path,
    prefix: &mut Vec<u8>,
    entries: &mut Vec<Entry>,
    links: &mut HashMap<(u64, u64), Vec<u8>>,
) -> Result<()> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .with_context(|| format!("listing {}", dir.display()))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    for name in names {
        let at = dir.join(&name);
        let meta = at.symlink_metadata().with_context(|| format!("reading {}", at.display()))?;
        let length = prefix.len();
        if length > 0 {
            prefix.push(b'/');
        }
        prefix.extend_from_slice(name.as_bytes());
        let first = (!meta.is_dir() && meta.nlink() > 1)
            .then(|| links.entry((meta.dev(), meta.ino())).or_insert_with(|| prefix.clone()).clone())
            .filter(|first| first != prefix);
        let kind = match (kind_of(&at, &meta)?, first) {
            // The kernel makes one device of all whiteouts, with many names; that they are links of each other means nothing.
            (whiteout @ Some(Kind::Character(0, 0)), _) => whiteout,
            (_, Some(first)) => Some(Kind::HardLink(first)),
            (kind, None) => kind,
        };
        match kind {
            Some(Kind::Character(0, 0)) => entries.push(Entry::whiteout(&String::from_utf8_lossy(prefix))),
            Some(kind) => push_entry(&at, prefix, kind, &meta, entries)?,
            None => {}
        }
        if meta.is_dir() {
            collect(&at, prefix, entries, links)?;
        }
        prefix.truncate(length);
    }
    Ok(())
}

/// Sockets have no place in a tar.
fn kind_of(at: &Path, meta: &std::fs::Metadata) -> Result<Option<Kind>> {
    let device = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    Ok(Some(match tree::Kind::of(meta.mode()) {
        tree::Kind::Directory => Kind::Directory,
        tree::Kind::File => Kind::File(Content::File(at.to_owned())),
        tree::Kind::Symlink => Kind::Symlink(std::fs::read_link(at)?.into_os_string().into_vec()),
        tree::Kind::Character => Kind::Character(device.0, device.1),
        tree::Kind::Block => Kind::Block(device.0, device.1),
        tree::Kind::Fifo => Kind::Fifo,
        tree::Kind::Other => return Ok(None),
    }))
}

fn push_entry(at: &Path, path: &[u8], kind: Kind, meta: &std::fs::Metadata, entries: &mut Vec<Entry>) -> Result<()> {
    let nanoseconds = u32::try_from(meta.mtime_nsec()).unwrap_or_default();
    let mut entry = Entry::new(path, kind)
        .mode(meta.mode() & 0o7777)
        .owner(meta.uid().into(), meta.gid().into())
        .mtime(meta.mtime(), nanoseconds);
    entry.xattrs = tree::xattrs(at)?.into_iter().collect();
    let opaque = entry.xattrs.iter().any(|(name, value)| name == b"trusted.overlay.opaque" && value == b"y");
    entry.xattrs.retain(|(name, _)| !name.starts_with(b"trusted.overlay."));
    entries.push(entry);
    if opaque {
        entries.push(Entry::opaque(&String::from_utf8_lossy(path)));
    }
    Ok(())
}

fn append<W: Write>(builder: &mut tar::Builder<W>, entry: &Entry) -> Result<()> {
    let mut header = Header::new_ustar();
    let mut records: Vec<(String, Vec<u8>)> = Vec::new();
    let mut name = entry.path.clone();
    if matches!(entry.kind, Kind::Directory) {
        name.push(b'/');
    }
    set_name(&mut header.as_old_mut().name, "path", &name, &mut records);
    header.set_mode(entry.mode);
    set_number("uid", entry.uid, OCTAL_8, &mut records, |value| header.set_uid(value));
    set_number("gid", entry.gid, OCTAL_8, &mut records, |value| header.set_gid(value));
    let (seconds, nanoseconds) = entry.mtime;
    header.set_mtime(u64::try_from(seconds).unwrap_or(0).min(OCTAL_12));
    if nanoseconds != 0 || seconds < 0 {
        records.push(("mtime".to_owned(), pax_time(seconds, nanoseconds).into_bytes()));
    }
    for (xattr, value) in &entry.xattrs {
        let key = format!("SCHILY.xattr.{}", String::from_utf8_lossy(xattr));
        records.push((key, value.clone()));
    }
    let kind = match &entry.kind {
        Kind::Directory => EntryType::Directory,
        Kind::File(Content::Sparse(size, _)) => {
            records.extend(sparse_records(&entry.path, *size));
            EntryType::Regular
        }
        Kind::File(_) => EntryType::Regular,
        Kind::Symlink(target) => {
            set_name(&mut header.as_old_mut().linkname, "linkpath", target, &mut records);
            EntryType::Symlink
        }
        Kind::HardLink(target) => {
            set_name(&mut header.as_old_mut().linkname, "linkpath", target, &mut records);
            EntryType::Link
        }
        Kind::Character(major, minor) => set_device(&mut header, *major, *minor, EntryType::Char)?,
        Kind::Block(major, minor) => set_device(&mut header, *major, *minor, EntryType::Block)?,
        Kind::Fifo => EntryType::Fifo,
    };
    header.set_entry_type(kind);
    if !records.is_empty() {
        builder.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
    }
    match &entry.kind {
        Kind::File(Content::Bytes(bytes)) => append_data(builder, header, bytes.len() as u64, bytes.as_slice()),
        Kind::File(Content::File(path)) => {
            let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
            let size = file.metadata()?.len();
            // A file that grows meanwhile must not make the tar invalid.
            append_data(builder, header, size, file.take(size))
        }
        Kind::File(Content::Noise(seed, size)) => {
            // A tar is written in small pieces; noise is made in larger ones.
            append_data(builder, header, *size, io::BufReader::with_capacity(1 << 16, Noise::new(*seed, *size)))
        }
        Kind::File(Content::Sparse(_, pieces)) => {
            let stored = sparse_data(pieces);
            append_data(builder, header, stored.len() as u64, stored.as_slice())
        }
        _ => append_data(builder, header, 0, io::empty()),
    }
}

/// Readers that do not know the form see a file of another name.
fn sparse_records(path: &[u8], size: u64) -> Vec<(String, Vec<u8>)> {
    let record = |key: &str, value: Vec<u8>| (format!("GNU.sparse.{key}"), value);
    let numbers = [("major", 1), ("minor", 0), ("realsize", size)];
    let numbers = numbers.map(|(key, value)| record(key, value.to_string().into_bytes()));
    numbers.into_iter().chain([record("name", path.to_vec())]).collect()
}

/// The map in decimal lines, filled up to a block, then the pieces.
fn sparse_data(pieces: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut map = format!("{}\n", pieces.len());
    for (offset, piece) in pieces {
        map.push_str(&format!("{offset}\n{}\n", piece.len()));
    }
    let mut stored = map.into_bytes();
    stored.resize(stored.len().next_multiple_of(BLOCK), 0);
    for (_, piece) in pieces {
        stored.extend_from_slice(piece);
    }
    stored
}

fn append_data<W: Write>(
    builder: &mut tar::Builder<W>,
    mut header: Header,
    size: u64,
    data: impl io::Read,
) -> Result<()> {
    header.set_size(size);
    header.set_cksum();
    Ok(builder.append(&header, data)?)
}

fn set_device(header: &mut Header, major: u32, minor: u32, kind: EntryType) -> Result<EntryType> {
    header.set_device_major(major)?;
    header.set_device_minor(minor)?;
    Ok(kind)
}

/// What does not fit stands in a record, with its beginning in the field for old readers.
fn set_name(field: &mut [u8; NAME_FIELD], key: &str, name: &[u8], records: &mut Vec<(String, Vec<u8>)>) {
    let fits = name.len().min(NAME_FIELD);
    field.fill(0);
    field[..fits].copy_from_slice(&name[..fits]);
    if name.len() > NAME_FIELD {
        records.push((key.to_owned(), name.to_vec()));
    }
}

fn set_number(key: &str, value: u64, limit: u64, records: &mut Vec<(String, Vec<u8>)>, set: impl FnOnce(u64)) {
    if value > limit {
        records.push((key.to_owned(), value.to_string().into_bytes()));
    }
    set(if value > limit { 0 } else { value });
}

/// A decimal fraction; of a time before 1970 the sign belongs to the whole number.
fn pax_time(seconds: i64, nanoseconds: u32) -> String {
    if seconds < 0 && nanoseconds != 0 {
        let (whole, rest) = ((seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds);
        return format!("-{whole}.{rest:09}");
    }
    if nanoseconds == 0 { seconds.to_string() } else { format!("{seconds}.{nanoseconds:09}") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn members_and_one_stream_hold_the_same_tar() {
        let entries = [Entry::directory("d"), Entry::file("d/f", vec![7; 5000]).mtime(1, 5).xattr("user.a", "b")];
        let mut blobs = Vec::new();
        for packing in
            [Packing::Plain, Packing::Gzip, Packing::GzipMembers(1000), Packing::Zstd, Packing::ZstdFrames(1000)]
        {
            let mut blob = Vec::new();
            let info = write_layer(&entries, packing, &mut blob).unwrap();
            assert_eq!(info.size, blob.len() as u64);
            blobs.push((info.diff_id, blob));
        }
        assert!(blobs.iter().all(|(diff_id, _)| *diff_id == blobs[0].0));
        let mut tar = Vec::new();
        flate2::read::MultiGzDecoder::new(blobs[2].1.as_slice()).read_to_end(&mut tar).unwrap();
        assert_eq!(tar, blobs[0].1);
        let mut first = Vec::new();
        flate2::read::GzDecoder::new(blobs[2].1.as_slice()).read_to_end(&mut first).unwrap();
        assert_eq!(first.len(), 1000);
    }

    #[test]
    fn noise_is_the_same_however_it_is_read() {
        let mut streamed = Vec::new();
        let mut stream = Noise::new(7, 1000);
        let mut piece = [0; 13];
        loop {
            let read = stream.read(&mut piece).unwrap();
            if read == 0 {
                break;
            }
            streamed.extend_from_slice(&piece[..read]);
        }
        assert_eq!(streamed, noise(7, 1000));
        assert_ne!(streamed, noise(8, 1000));
    }

    #[test]
    fn times_before_1970_keep_their_fraction() {
        assert_eq!(pax_time(-1, 500_000_000), "-0.500000000");
        assert_eq!(pax_time(-2, 750_000_000), "-1.250000000");
        assert_eq!(pax_time(3, 1), "3.000000001");
    }
}
