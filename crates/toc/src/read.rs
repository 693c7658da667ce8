//! Reads a TOC in place: no table is copied, nothing is allocated for a look-up.
//!
//! The bytes may be a memory map over a file that somebody truncates or whose disk fails; such pages turn to zeros at any
//! moment. [`Toc::check`] therefore proves nothing about the next access: every accessor looks at the bounds again, copies
//! the record it judges, and answers [`FormatError::Damaged`] where the record makes no sense. A zeroed record never does.

mod check;
mod data;

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use millstream_oci::{DiffId, Digest};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::build::Compression;
use crate::format::{
    ContentIx, ContentRecord, DirentRecord, ExtentRecord, FLAG_IMPLIED, FLAG_LATE, FLAG_OPAQUE, FormatError, Header,
    InodeIx, InodeRecord, Kind, MAGIC, NONE, SHORT_DIGEST, SpanRecord, VERSION, XattrRecord, XattrSetRecord,
};

pub use data::{Chunk, PageMask, Span, SpanStart};

/// Longest name of a directory entry or of an extended attribute, in bytes.
pub const MAX_NAME: usize = 255;
/// Longest path that [`Toc::path_of`] gives, and longest text of a symbolic link plus one, in bytes (Linux' `PATH_MAX`).
pub const MAX_PATH: usize = 4096;

/// [`FormatError::Damaged`] with the rule that is broken.
const fn damaged(what: &'static str) -> FormatError {
    FormatError::Damaged { what }
}

/// Name and value of an extended attribute.
pub type Xattr<'a> = Result<(&'a [u8], &'a [u8]), FormatError>;

/// The tables in the order of the file and of [`Header::counts`].
#[derive(Debug, Clone, Copy)]
enum Table {
    Inodes,
    Dirents,
    Contents,
    Chunks,
    Extents,
    XattrSets,
    Xattrs,
    Spans,
    Strings,
}

/// Bytes of one record of each table, in the order of [`Table`].
const RECORD_SIZES: [usize; 9] = [
    size_of::<InodeRecord>(),
    size_of::<DirentRecord>(),
    size_of::<ContentRecord>(),
    SHORT_DIGEST,
    size_of::<ExtentRecord>(),
    size_of::<XattrSetRecord>(),
    size_of::<XattrRecord>(),
    size_of::<SpanRecord>(),
    1,
];

/// The table of contents of one layer.
pub struct Toc {
    bytes: Box<dyn AsRef<[u8]> + Send + Sync>,
    /// A copy: what was checked by [`Toc::open`] stays what is used.
    header: Header,
    /// Where each table starts in `bytes`, and where the last one ends.
    starts: [usize; RECORD_SIZES.len() + 1],
}

impl fmt::Debug for Toc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Toc")
            .field("blob", &self.blob_digest())
            .field("inodes", &self.inode_count())
            .finish_non_exhaustive()
    }
}

impl Toc {
    /// Takes a TOC in its canonical form, from wherever it lies. Costs the same for every size: looks at the header only and
    /// that the tables it announces fill `bytes` exactly.
    ///
    /// # Errors
    ///
    /// [`FormatError`] when the bytes are no TOC, one of another version, or when header and length contradict each other.
    pub fn open(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self, FormatError> {
        let all = bytes.as_ref();
        let (header, _) = Header::read_from_prefix(all).map_err(|_| damaged("shorter than its header"))?;
        if header.magic != MAGIC {
            return Err(FormatError::Magic);
        }
        if header.version.get() != VERSION {
            return Err(FormatError::Version { found: header.version.get() });
        }
        if Compression::from_code(header.compression.get()).is_none() {
            return Err(damaged("unknown compression"));
        }
        if header.reserved.get() != 0 {
            return Err(damaged("reserved header field is not zero"));
        }
        let mut starts = [size_of::<Header>(); RECORD_SIZES.len() + 1];
        for (i, (count, size)) in header.counts.iter().zip(RECORD_SIZES).enumerate() {
            let table = (count.get() as usize).checked_mul(size);
            starts[i + 1] = table
                .and_then(|bytes| starts[i].checked_add(bytes))
                .ok_or(damaged("tables exceed the address space"))?;
        }
        if starts[RECORD_SIZES.len()] != all.len() {
            return Err(damaged("tables do not add up to the size of the file"));
        }
        Ok(Self { bytes: Box::new(bytes), header, starts })
    }

    /// Checks every rule of the format once, for a TOC that comes from outside: that all references are in range, names legal
    /// and strictly sorted, the directories one tree, link counts true, contents, chunks, extents and spans in order and
    /// without overlap, and unused fields zero. Takes time and memory proportional to the size of the TOC.
    ///
    /// # Errors
    ///
    /// [`FormatError::Damaged`] with the first broken rule.
    pub fn check(&self) -> Result<(), FormatError> {
        check::check(self)
    }

    /// The canonical bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// SHA-256 of the canonical bytes: the identity of this TOC. Reads all of them.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(self.as_bytes())
    }

    /// Whether both are TOCs of the same tar: equal in everything but what only the blob determines, which is its digest,
    /// size and compression, and the spans. Reads all of both.
    ///
    /// # Errors
    ///
    /// When a table is gone.
    pub fn same_tar(&self, other: &Self) -> Result<bool, FormatError> {
        let sizes = |toc: &Self| (toc.tar_size(), toc.data_size());
        if self.diff_id() != other.diff_id() || sizes(self) != sizes(other) {
            return Ok(false);
        }
        let spans = Table::Spans as usize;
        for table in (0..RECORD_SIZES.len()).filter(|table| *table != spans) {
            let bytes = |toc: &Self| -> Option<Range<usize>> { Some(toc.starts[table]..*toc.starts.get(table + 1)?) };
            let gone = damaged("file became shorter");
            let one = bytes(self).and_then(|range| self.as_bytes().get(range)).ok_or(gone.clone())?;
            let two = bytes(other).and_then(|range| other.as_bytes().get(range)).ok_or(gone)?;
            if one != two {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The header as it was when the TOC was opened.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// How the blob is compressed.
    ///
    /// # Errors
    ///
    /// When the code is unknown, which [`Toc::open`] has refused.
    pub fn compression(&self) -> Result<Compression, FormatError> {
        Compression::from_code(self.header.compression.get()).ok_or(damaged("unknown compression"))
    }

    /// Digest of the layer's blob.
    #[must_use]
    pub fn blob_digest(&self) -> Digest {
        Digest::from_bytes(self.header.blob_digest)
    }

    /// Digest of the layer's uncompressed tar.
    #[must_use]
    pub fn diff_id(&self) -> DiffId {
        DiffId(Digest::from_bytes(self.header.diff_id))
    }

    /// Bytes of the blob.
    #[must_use]
    pub const fn blob_size(&self) -> u64 {
        self.header.blob_size.get()
    }

    /// Bytes of the tar.
    #[must_use]
    pub const fn tar_size(&self) -> u64 {
        self.header.tar_size.get()
    }

    /// Bytes of the data address space.
    #[must_use]
    pub const fn data_size(&self) -> u64 {
        self.header.data_size.get()
    }

    /// Number of inodes; the root directory is inode 0.
    #[must_use]
    pub const fn inode_count(&self) -> u32 {
        self.count(Table::Inodes)
    }

    /// Number of contents (regular files that are not empty).
    #[must_use]
    pub const fn content_count(&self) -> u32 {
        self.count(Table::Contents)
    }

    /// Number of chunks.
    #[must_use]
    pub const fn chunk_count(&self) -> u32 {
        self.count(Table::Chunks)
    }

    /// Number of spans.
    #[must_use]
    pub const fn span_count(&self) -> u32 {
        self.count(Table::Spans)
    }

    /// The inode `ix`.
    ///
    /// # Errors
    ///
    /// When there is no such inode, or its record is damaged.
    pub fn inode(&self, ix: InodeIx) -> Result<Inode<'_>, FormatError> {
        let record =
            *self.table::<InodeRecord>(Table::Inodes)?.get(ix as usize).ok_or(damaged("inode out of range"))?;
        let kind = kind_of(record.kind).ok_or(damaged("unknown kind of inode"))?;
        if record.mode.get() > 0o7777 || record.mtime_nsec.get() >= 1_000_000_000 {
            return Err(damaged("mode or time out of range"));
        }
        Ok(Inode { ix, kind, record, toc: PhantomData })
    }

    /// What `dir` contains, sorted by name.
    ///
    /// # Errors
    ///
    /// When `dir` is no directory, or its entries are out of range.
    pub fn children(&self, dir: &Inode<'_>) -> Result<Children<'_>, FormatError> {
        if !dir.is_dir() {
            return Err(damaged("entries of what is not a directory"));
        }
        let all = self.table::<DirentRecord>(Table::Dirents)?;
        let records =
            all.get(indices(dir.record.a.get(), dir.record.b.get())).ok_or(damaged("entries out of range"))?;
        Ok(Children { toc: self, records, next: 0 })
    }

    /// The entry `name` of directory `dir`. `None` when there is none, or when `dir` is not a directory; a whiteout is an
    /// entry.
    ///
    /// # Errors
    ///
    /// When a record on the way is damaged.
    pub fn lookup(&self, dir: InodeIx, name: &[u8]) -> Result<Option<Dirent<'_>>, FormatError> {
        let dir = self.inode(dir)?;
        if !dir.is_dir() {
            return Ok(None);
        }
        let children = self.children(&dir)?;
        let (mut low, mut high) = (0, children.records.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = children.get(middle)?;
            match entry.name.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(entry)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The inode at `path`, whose components are separated by slashes; empty ones do not count, so that `/` and the empty
    /// path are the root. Symbolic links, `.` and `..` are not followed; a whiteout is nothing.
    ///
    /// # Errors
    ///
    /// When a record on the way is damaged.
    pub fn lookup_path(&self, path: &[u8]) -> Result<Option<InodeIx>, FormatError> {
        let mut at = 0;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            match self.lookup(at, name)?.and_then(|entry| entry.inode) {
                Some(inode) => at = inode,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Bytes that `stat` shows as size: of a regular file its content, of a symbolic link its text, else 0.
    ///
    /// # Errors
    ///
    /// When the content's record is damaged.
    pub fn size(&self, inode: &Inode<'_>) -> Result<u64, FormatError> {
        match inode.kind {
            Kind::Regular => inode.content().map_or(Ok(0), |ix| Ok(self.content(ix)?.size.get())),
            Kind::Symlink => Ok(inode.record.b.get().into()),
            _ => Ok(0),
        }
    }

    /// The extended attributes of `inode`, sorted by name.
    ///
    /// # Errors
    ///
    /// When the set is out of range; the iterator gives an error where a name or value is.
    pub fn xattrs(&self, inode: &Inode<'_>) -> Result<impl ExactSizeIterator<Item = Xattr<'_>>, FormatError> {
        Ok(self.xattr_records(inode.record.xattrs.get())?.iter().map(|record| self.xattr_text(record)))
    }

    /// The value of the extended attribute `name` of `inode`.
    ///
    /// # Errors
    ///
    /// When a record on the way is damaged.
    pub fn xattr(&self, inode: &Inode<'_>, name: &[u8]) -> Result<Option<&[u8]>, FormatError> {
        let records = self.xattr_records(inode.record.xattrs.get())?;
        let (mut low, mut high) = (0, records.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let (found, value) = self.xattr_text(&records[middle])?;
            match found.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(value)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The text of the symbolic link `inode`.
    ///
    /// # Errors
    ///
    /// When `inode` is no symbolic link, or its text is out of range, empty or longer than a path may be.
    pub fn symlink_target(&self, inode: &Inode<'_>) -> Result<&[u8], FormatError> {
        let (offset, len) = (inode.record.a.get(), inode.record.b.get());
        if inode.kind != Kind::Symlink || len == 0 || len as usize >= MAX_PATH {
            return Err(damaged("no text of a symbolic link"));
        }
        self.string(offset, len)
    }

    /// A path of inode `ix` for messages, without leading slash; the first found where there are several. Reads the tables
    /// once per level. `None` when it has none, is deeper than [`MAX_PATH`] bytes, or the TOC is damaged.
    #[must_use]
    pub fn path_of(&self, ix: InodeIx) -> Option<Vec<u8>> {
        let mut names: Vec<&[u8]> = Vec::new();
        let (mut at, mut len) = (ix, 0);
        while at != 0 {
            let (parent, name) = self.parent(at)?;
            len += name.len() + 1;
            if len > MAX_PATH {
                return None;
            }
            names.push(name);
            at = parent;
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// A directory that has an entry for `ix`, and the entry's name.
    fn parent(&self, ix: InodeIx) -> Option<(InodeIx, &[u8])> {
        let dirents = self.table::<DirentRecord>(Table::Dirents).ok()?;
        let position = dirents.iter().position(|record| record.inode.get() == ix)?;
        let inodes = self.table::<InodeRecord>(Table::Inodes).ok()?;
        let parent = inodes.iter().position(|record| {
            record.kind == Kind::Directory as u8 && indices(record.a.get(), record.b.get()).contains(&position)
        })?;
        let name = self.dirent(&dirents[position]).ok()?.name;
        Some((u32::try_from(parent).ok()?, name))
    }

    const fn count(&self, table: Table) -> u32 {
        self.header.counts[table as usize].get()
    }

    /// The records of a table. `T` must be the record type of `table`.
    fn table<T: FromBytes + Immutable + KnownLayout>(&self, table: Table) -> Result<&[T], FormatError> {
        let range = self.starts[table as usize]..self.starts[table as usize + 1];
        let bytes = self.as_bytes().get(range).ok_or(damaged("file became shorter"))?;
        <[T]>::ref_from_bytes(bytes).map_err(|_| damaged("table is not whole"))
    }

    /// `len` bytes of the string table.
    fn string(&self, offset: u32, len: u32) -> Result<&[u8], FormatError> {
        self.table::<u8>(Table::Strings)?.get(indices(offset, len)).ok_or(damaged("text out of range"))
    }

    fn dirent(&self, record: &DirentRecord) -> Result<Dirent<'_>, FormatError> {
        let record = *record;
        let len = record.name_len.get();
        if len == 0 || usize::from(len) > MAX_NAME {
            return Err(damaged("length of a name out of range"));
        }
        let inode = match record.inode.get() {
            NONE => None,
            // The root is nobody's entry; a walk that met it would begin again.
            0 => return Err(damaged("the root is an entry of a directory")),
            ix if ix < self.inode_count() => Some(ix),
            _ => return Err(damaged("entry refers to no inode")),
        };
        Ok(Dirent { name: self.string(record.name_off.get(), len.into())?, inode })
    }

    fn xattr_records(&self, set: u32) -> Result<&[XattrRecord], FormatError> {
        if set == NONE {
            return Ok(&[]);
        }
        let sets = self.table::<XattrSetRecord>(Table::XattrSets)?;
        let set = *sets.get(set as usize).ok_or(damaged("set of attributes out of range"))?;
        let records = self.table(Table::Xattrs)?.get(indices(set.first.get(), set.count.get()));
        match records {
            Some(records) if !records.is_empty() => Ok(records),
            _ => Err(damaged("attributes out of range")),
        }
    }

    fn xattr_text(&self, record: &XattrRecord) -> Result<(&[u8], &[u8]), FormatError> {
        let record = *record;
        let len = record.name_len.get();
        if len == 0 || len as usize > MAX_NAME {
            return Err(damaged("length of an attribute's name out of range"));
        }
        let name = self.string(record.name_off.get(), len)?;
        Ok((name, self.string(record.value_off.get(), record.value_len.get())?))
    }
}

/// `count` positions from `first` on. Where `usize` has 32 bits the sum may not fit; an empty range beyond every table
/// (never `get`-able) is the answer then.
fn indices(first: u32, count: u32) -> Range<usize> {
    let first = first as usize;
    first.checked_add(count as usize).map_or(usize::MAX..usize::MAX, |end| first..end)
}

const fn kind_of(byte: u8) -> Option<Kind> {
    Some(match byte {
        1 => Kind::Directory,
        2 => Kind::Regular,
        3 => Kind::Symlink,
        4 => Kind::CharDevice,
        5 => Kind::BlockDevice,
        6 => Kind::Fifo,
        _ => return None,
    })
}

/// A copy of the attributes of one inode; the lifetime is that of the TOC its references lead into.
#[derive(Debug, Clone, Copy)]
pub struct Inode<'a> {
    /// Which inode it is.
    pub ix: InodeIx,
    kind: Kind,
    record: InodeRecord,
    toc: PhantomData<&'a Toc>,
}

impl Inode<'_> {
    /// File type.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether it is a directory.
    #[must_use]
    pub const fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Directory)
    }

    /// Permission bits with setuid, setgid and sticky (07777).
    #[must_use]
    pub const fn mode(&self) -> u16 {
        self.record.mode.get()
    }

    /// Owner.
    #[must_use]
    pub const fn uid(&self) -> u32 {
        self.record.uid.get()
    }

    /// Group.
    #[must_use]
    pub const fn gid(&self) -> u32 {
        self.record.gid.get()
    }

    /// Modification time: seconds since 1970, and nanoseconds (below 10^9) after that second.
    #[must_use]
    pub const fn mtime(&self) -> (i64, u32) {
        (self.record.mtime_sec.get(), self.record.mtime_nsec.get())
    }

    /// Number of links, counting this layer only.
    #[must_use]
    pub const fn nlink(&self) -> u32 {
        self.record.nlink.get()
    }

    /// Whether the layer has no entry of its own for this directory, so that its attributes come from below.
    #[must_use]
    pub const fn is_implied(&self) -> bool {
        self.record.flags & FLAG_IMPLIED != 0
    }

    /// Whether nothing of lower layers shows through this directory.
    #[must_use]
    pub const fn is_opaque(&self) -> bool {
        self.record.flags & FLAG_OPAQUE != 0
    }

    /// Whether the layer describes this directory only after something in it, so that it has extended attributes from below as well.
    #[must_use]
    pub const fn is_late(&self) -> bool {
        self.record.flags & FLAG_LATE != 0
    }

    /// Whether it has extended attributes.
    #[must_use]
    pub const fn has_xattrs(&self) -> bool {
        self.record.xattrs.get() != NONE
    }

    /// Major and minor number of a device; (0, 0) for everything else.
    #[must_use]
    pub const fn rdev(&self) -> (u32, u32) {
        match self.kind {
            Kind::CharDevice | Kind::BlockDevice => (self.record.a.get(), self.record.b.get()),
            _ => (0, 0),
        }
    }

    /// The content of a regular file; `None` for empty files and everything else.
    #[must_use]
    pub const fn content(&self) -> Option<ContentIx> {
        match (self.kind, self.record.a.get()) {
            (Kind::Regular, ix) if ix != NONE => Some(ix),
            _ => None,
        }
    }
}

/// One name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirent<'a> {
    /// The name: 1 to 255 bytes.
    pub name: &'a [u8],
    /// What it names in this layer; `None` when it is a whiteout.
    pub inode: Option<InodeIx>,
}

/// The entries of a directory, sorted by name.
#[derive(Debug, Clone)]
pub struct Children<'a> {
    toc: &'a Toc,
    records: &'a [DirentRecord],
    next: usize,
}

impl<'a> Children<'a> {
    /// Entry number `position`, counted from the first one of the directory however far the iterator has come.
    ///
    /// # Errors
    ///
    /// When there is no such entry, or it is damaged.
    pub fn get(&self, position: usize) -> Result<Dirent<'a>, FormatError> {
        self.toc.dirent(self.records.get(position).ok_or(damaged("no such entry"))?)
    }
}

impl<'a> Iterator for Children<'a> {
    type Item = Result<Dirent<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        let record = self.records.get(self.next)?;
        self.next += 1;
        Some(self.toc.dirent(record))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.records.len() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Children<'_> {}
