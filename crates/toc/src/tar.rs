//! A streaming tar reader that agrees with containerd's, which is Go's `archive/tar`: the same members, the same names and
//! attributes, and an error wherever that one has an error. Two readers that disagree about one archive are how files get past a
//! scanner, so nothing is guessed and nothing malformed is skipped.
//!
//! Understands V7, USTAR, STAR, GNU (base-256 numbers, long names, sparse files) and PAX (attributes, extended attributes,
//! the three sparse forms). It is stricter than the model in one way: numbers that no inode can hold (owner, device) are
//! [`TarError::Unusable`] instead of being cut to what fits.
//!
//! Memory: one extended header of at most [`TarLimits::max_pax_bytes`] and one sparse map at a time, whatever the archive says.

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use header::{BLOCK, Block, Header};
use pax::PaxRecords;
pub use sparse::Extent;

/// What one archive may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TarLimits {
    /// Largest extended header (PAX records, GNU long name) and largest sparse map, in bytes. The model has 1 MiB; more than
    /// that makes this reader accept what the model refuses.
    pub max_pax_bytes: u64,
    /// Longest name and longest link target, in bytes.
    pub max_name: usize,
    /// Most entries in a sparse map.
    pub max_extents: usize,
}

impl Default for TarLimits {
    fn default() -> Self {
        Self { max_pax_bytes: 1 << 20, max_name: 4096, max_extents: 1 << 16 }
    }
}

/// Why an archive cannot be read further.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// Not a tar that containerd would accept.
    #[error("invalid tar: {what} (member at byte {offset})")]
    Invalid {
        /// Where the member's last header starts.
        offset: u64,
        /// Which rule is broken.
        what: &'static str,
    },
    /// The archive ends within a member.
    #[error("invalid tar: ends early, at byte {offset}")]
    Truncated {
        /// Where it ends.
        offset: u64,
    },
    /// More than [`TarLimits`] allow.
    #[error("tar exceeds a limit: {what} (member at byte {offset})")]
    Limit {
        /// Where the member's last header starts.
        offset: u64,
        /// Which limit.
        what: &'static str,
    },
    /// Well-formed, but no inode can have this attribute.
    #[error("tar asks for what no file system can hold: {what} (member at byte {offset})")]
    Unusable {
        /// Where the member's last header starts.
        offset: u64,
        /// Which attribute.
        what: &'static str,
    },
    /// The bytes could not be read.
    #[error("cannot read the tar: {0}")]
    Read(#[from] io::Error),
    /// The reader was used again after an error.
    #[error("the tar could not be read before")]
    Failed,
}

/// What is wrong with a member, before it is known where that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Invalid(&'static str),
    Limit(&'static str),
    Unusable(&'static str),
}

impl Fault {
    const fn at(self, offset: u64) -> TarError {
        match self {
            Self::Invalid(what) => TarError::Invalid { offset, what },
            Self::Limit(what) => TarError::Limit { offset, what },
            Self::Unusable(what) => TarError::Unusable { offset, what },
        }
    }
}

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "POSIX file types")]
pub enum MemberKind {
    Regular,
    /// Another name for the member that `link` names.
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// PAX records for all that follows. containerd ignores them, but not that a member is there: it makes the parents of `name`
    /// and removes what was at `name` before. No other field means anything.
    GlobalHeader,
    /// A type for which containerd has no case: it refuses the member, unless its name makes it a whiteout.
    Unknown,
}

/// One member of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Name as it is written: not cleaned, maybe empty or absolute, free of NUL, at most [`TarLimits::max_name`] bytes.
    pub name: Vec<u8>,
    /// Target of a link as it is written; same limits.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: MemberKind,
    /// Its type flag, with NUL already turned into `0` or `5`. Tells the old GNU sparse form (`S`) from a plain file (`0`):
    /// Go reads both, but containerd applies the second only.
    pub typeflag: u8,
    /// Permission bits with setuid, setgid, sticky (07777).
    pub mode: u16,
    /// Owner, at most `u32::MAX - 1`.
    pub uid: u32,
    /// Group, at most `u32::MAX - 1`.
    pub gid: u32,
    /// Seconds since 1970 (negative before), and nanoseconds (below 10^9) after that second.
    pub mtime: (i64, u32),
    /// Bytes of a regular file, holes included; else 0.
    pub size: u64,
    /// Bytes that [`TarReader::read`] gives.
    pub stored: u64,
    /// Where in the tar they start.
    pub data_off: u64,
    /// The parts of a sparse file that are stored, ascending, not empty, not touching; their lengths add up to `stored`.
    /// `None` when the file has no hole.
    pub extents: Option<Vec<Extent>>,
    /// Major (12 bits) and minor (20 bits) number of a device, else zeros.
    pub rdev: (u32, u32),
    /// `SCHILY.xattr.*` without that prefix, sorted by name, each name once. Names and values are not judged.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The stream and how far it was read.
#[derive(Debug)]
struct Source<R> {
    inner: R,
    position: u64,
}

impl<R: Read> Source<R> {
    /// Reads until `buf` is full or the stream ends; gives how many bytes there were.
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.read(&mut buf[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        Ok(filled)
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.inner.read(buf) {
                // A reader that claims more than it was asked for is broken; believing it would be a panic later.
                Ok(n) if n > buf.len() => return Err(io::Error::other("reader returned more than was asked for")),
                Ok(n) => {
                    self.position = self.position.saturating_add(n as u64);
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    const fn truncated(&self) -> TarError {
        TarError::Truncated { offset: self.position }
    }

    /// The next block; `None` when the stream ends exactly here.
    fn block(&mut self) -> Result<Option<Block>, TarError> {
        let mut block = [0; BLOCK];
        match self.fill(&mut block)? {
            0 => Ok(None),
            BLOCK => Ok(Some(block)),
            _ => Err(self.truncated()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Reading,
    Ended,
    Failed,
}

/// Reads the members of an archive one after the other.
#[derive(Debug)]
pub struct TarReader<R> {
    source: Source<R>,
    limits: TarLimits,
    /// Stored bytes of the current member that were not read yet.
    remaining: u64,
    /// Bytes between the end of the current member and the next block.
    padding: usize,
    state: State,
}

/// What headers before the one of the member said about it.
#[derive(Debug, Default)]
struct Announced {
    pax: PaxRecords,
    name: Vec<u8>,
    link: Vec<u8>,
}

impl<R: Read> TarReader<R> {
    /// Reads an archive that starts where `inner` stands. `inner` is read in small pieces.
    pub const fn new(inner: R, limits: TarLimits) -> Self {
        Self { source: Source { inner, position: 0 }, limits, remaining: 0, padding: 0, state: State::Reading }
    }

    /// The next member, whatever is left of the previous one being skipped. `None` at the end: two blocks of zeros, or the end
    /// of the stream where a header could start. Bytes may follow the end; they are not read.
    ///
    /// # Errors
    ///
    /// See [`TarError`]. After an error every call fails.
    #[allow(
        clippy::should_implement_trait,
        reason = "a member lends the reader its content, which an iterator cannot say"
    )]
    pub fn next(&mut self) -> Result<Option<Member>, TarError> {
        match self.state {
            State::Ended => return Ok(None),
            State::Failed => return Err(TarError::Failed),
            State::Reading => {}
        }
        let result = self.advance();
        self.state = match &result {
            Ok(Some(_)) => State::Reading,
            Ok(None) => State::Ended,
            Err(_) => State::Failed,
        };
        result
    }

    /// Stored bytes of the current member, in order; holes are left out. 0 at its end.
    ///
    /// # Errors
    ///
    /// [`TarError::Truncated`] when the archive ends within the member, [`TarError::Read`] when it cannot be read; every call
    /// after that fails.
    pub fn read(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        if self.state == State::Failed {
            return Err(TarError::Failed);
        }
        let result = self.read_stored(buf);
        if result.is_err() {
            self.state = State::Failed;
        }
        result
    }

    /// Bytes of the tar that were read so far.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.source.position
    }

    /// The stream, at [`TarReader::position`].
    #[must_use]
    pub fn into_inner(self) -> R {
        self.source.inner
    }

    fn read_stored(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        let most = usize::try_from(self.remaining).map_or(buf.len(), |remaining| remaining.min(buf.len()));
        if most == 0 {
            return Ok(0);
        }
        match self.source.read(&mut buf[..most])? {
            0 => Err(self.source.truncated()),
            n => {
                self.remaining -= n as u64;
                Ok(n)
            }
        }
    }

    /// Reads headers up to and including the one of a member.
    fn advance(&mut self) -> Result<Option<Member>, TarError> {
        let mut announced = Announced::default();
        // Each turn consumes a block at least, and what it announces replaces what was announced before.
        loop {
            if !self.skip()? {
                return Ok(None);
            }
            let offset = self.source.position;
            let Some(block) = self.header_block()? else { return Ok(None) };
            let header = Header::parse(&block).map_err(|fault| fault.at(offset))?;
            self.start_data(&header, offset)?;
            match header.typeflag {
                b'x' => announced.pax = self.pax_records(offset)?,
                b'g' => {
                    // Like the model: what was announced before a global header is forgotten.
                    let records = self.pax_records(offset)?;
                    return self.global_header(header, &records, offset).map(Some);
                }
                b'L' => announced.name = until_nul(self.extended(offset)?),
                b'K' => announced.link = until_nul(self.extended(offset)?),
                _ => return self.member(header, &block, announced, offset).map(Some),
            }
        }
    }

    /// Skips the rest of the current member; `false` when the archive ends with it. Missing padding is such an end, missing
    /// content is not.
    fn skip(&mut self) -> Result<bool, TarError> {
        let mut scratch = [0; 16 * BLOCK];
        while self.read_stored(&mut scratch)? > 0 {}
        let padding = std::mem::take(&mut self.padding);
        Ok(self.source.fill(&mut scratch[..padding])? == padding)
    }

    /// The next block that is not the end of the archive.
    fn header_block(&mut self) -> Result<Option<Block>, TarError> {
        let offset = self.source.position;
        let Some(block) = self.source.block()? else { return Ok(None) };
        if block != [0; BLOCK] {
            return Ok(Some(block));
        }
        match self.source.block()? {
            None => Ok(None),
            Some(second) if second == [0; BLOCK] => Ok(None),
            Some(_) => Err(Fault::Invalid("data after a block of zeros").at(offset)),
        }
    }

    /// Notes how many bytes follow `header`.
    fn start_data(&mut self, header: &Header, offset: u64) -> Result<(), TarError> {
        let size = if header.has_no_data() { 0 } else { header.size };
        self.remaining = u64::try_from(size).map_err(|_| Fault::Invalid("negative size").at(offset))?;
        let padding = self.remaining.next_multiple_of(BLOCK as u64) - self.remaining;
        self.padding = usize::try_from(padding).unwrap_or_default();
        Ok(())
    }

    /// The content of an extended header.
    fn extended(&mut self, offset: u64) -> Result<Vec<u8>, TarError> {
        let len = usize::try_from(self.remaining)
            .ok()
            .filter(|_| self.remaining <= self.limits.max_pax_bytes)
            .ok_or(Fault::Limit("extended header is too long").at(offset))?;
        let mut text = vec![0; len];
        let mut filled = 0;
        while filled < len {
            filled += self.read_stored(&mut text[filled..])?;
        }
        Ok(text)
    }

    fn pax_records(&mut self, offset: u64) -> Result<PaxRecords, TarError> {
        PaxRecords::parse(&self.extended(offset)?).map_err(|fault| fault.at(offset))
    }

    fn global_header(&self, mut header: Header, records: &PaxRecords, offset: u64) -> Result<Member, TarError> {
        let name = header.name.clone();
        let name = match records.merge_into(&mut header) {
            Ok(()) => header.name,
            // The model merges in random order until it meets the bad record; here the name depends on that.
            Err(_) if records.has_path() => {
                return Err(Fault::Unusable("global header with two possible names").at(offset));
            }
            Err(_) => name,
        };
        if name.len() > self.limits.max_name {
            return Err(Fault::Limit("name is too long").at(offset));
        }
        Ok(Member {
            name,
            link: Vec::new(),
            kind: MemberKind::GlobalHeader,
            typeflag: b'g',
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size: 0,
            stored: 0,
            data_off: self.source.position,
            extents: None,
            rdev: (0, 0),
            xattrs: Vec::new(),
        })
    }

    /// The member that `header`, in `block` at `offset`, and what was `announced` describe.
    fn member(
        &mut self,
        mut header: Header,
        block: &Block,
        announced: Announced,
        offset: u64,
    ) -> Result<Member, TarError> {
        let Announced { mut pax, name, link } = announced;
        pax.merge_into(&mut header).map_err(|fault| fault.at(offset))?;
        if !name.is_empty() {
            header.name = name;
        }
        if !link.is_empty() {
            header.link = link;
        }
        if header.typeflag == 0 {
            // V7 had no type for directories.
            header.typeflag = if header.name.ends_with(b"/") { b'5' } else { b'0' };
        }
        // Once more: the size, and whether there is content, may have changed.
        self.start_data(&header, offset)?;
        let map = self.sparse_map(&mut header, block, &pax, offset)?;
        let member = header.into_member(pax.take_xattrs(), &self.limits).map_err(|fault| fault.at(offset))?;
        let (stored, data_off) = (self.remaining, self.source.position);
        let extents = match map {
            None => None,
            Some(map) => sparse::extents(&map, member.size, stored, data_off).map_err(|fault| fault.at(offset))?,
        };
        Ok(Member { stored, data_off, extents, ..member })
    }

    /// The sparse map of the member, if it has one, in whichever form; adjusts name and size.
    fn sparse_map(
        &mut self,
        header: &mut Header,
        block: &Block,
        pax: &PaxRecords,
        offset: u64,
    ) -> Result<Option<sparse::Map>, TarError> {
        let at = |fault: Fault| fault.at(offset);
        let mut map = sparse::Map::new(&self.limits);
        if header.typeflag == b'S' {
            header.size = header::gnu_real_size(block).map_err(at)?;
            let mut more = map.old_gnu_header(block).map_err(at)?;
            while more {
                // These blocks belong to the header: the member's size does not count them.
                let block = self.source.block()?.ok_or(self.source.truncated())?;
                more = map.old_gnu_block(&block).map_err(at)?;
            }
            return Ok(Some(map));
        }
        let Some(form) = pax.sparse_form() else { return Ok(None) };
        pax.merge_sparse_into(header).map_err(at)?;
        if header.has_no_data() {
            return Err(at(Fault::Invalid("sparse map of what has no content")));
        }
        match form {
            pax::SparseForm::InRecords { count, list } => map.list(count, list).map_err(at)?,
            pax::SparseForm::InContent => {
                let mut text = sparse::MapText::default();
                while !map.text(&mut text).map_err(at)? {
                    let mut block = [0; BLOCK];
                    let mut filled = 0;
                    while filled < BLOCK {
                        match self.read_stored(&mut block[filled..])? {
                            0 => return Err(at(Fault::Invalid("sparse map is longer than its file"))),
                            n => filled += n,
                        }
                    }
                    text.push(&block);
                }
            }
        }
        Ok(Some(map))
    }
}

fn until_nul(mut text: Vec<u8>) -> Vec<u8> {
    text.truncate(header::c_string(&text).len());
    text
}
