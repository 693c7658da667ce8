//! Makes the TOC of a layer in one pass over its blob.
//!
//! What comes out depends on the bytes of the blob only, not on how they arrive: two builds of one blob are equal byte for
//! byte. The tree is the one that containerd's overlayfs snapshotter would unpack, seen without the layers below.

mod content;
mod error;
mod path;
mod resolve;
mod stream;
mod tree;
mod write;

use std::io::{self, Read};

use crate::format::{ChunkIx, SHORT_DIGEST, SpanIx};
use crate::range::DataRange;
use crate::tar::{MemberKind, TarLimits, TarReader};
use content::Contents;
pub use error::{Bound, BuildError, Ineligible};
use stream::{Shared, TarStream};
use tree::Tree;

/// How a blob is compressed, according to its media type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// The blob is the tar.
    Plain,
    /// One or more gzip members.
    Gzip,
    /// One or more zstd frames.
    Zstd,
}

impl Compression {
    /// As the header of a TOC has it.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Plain => 0,
            Self::Gzip => 1,
            Self::Zstd => 2,
        }
    }

    /// The one with this [`code`](Self::code).
    #[must_use]
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Plain),
            1 => Some(Self::Gzip),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Limits of what one layer may cost. A layer beyond them is [`BuildError::Ineligible`], not wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Files of all kinds, counting replaced ones and implied directories; and, separately, names. Default 2,000,000.
    pub max_entries: u64,
    /// Bytes of the tar. Default 64 GiB.
    pub max_tar_size: u64,
    /// Bytes of one regular file, holes included. Default 64 GiB.
    pub max_file_size: u64,
    /// Bytes of tar for each byte of blob, not counting the first 64 MiB of tar. Default 200 (deflate can reach 1032, zstd more).
    pub max_ratio: u64,
    /// Bytes of the TOC, and also of each of its parts while it is built. Default 256 MiB.
    pub max_toc_bytes: u64,
    /// Bytes of one extended header of the tar. Default 1 MiB.
    pub max_pax_bytes: u64,
    /// Bytes of one member's name or link target. Default 4096.
    pub max_name: usize,
    /// Stored parts of one sparse file. Default 65,536.
    pub max_extents: usize,
    /// Components of a path. Default 1024.
    pub max_depth: u64,
    /// Names looked up for parents that are symbolic links, in all. Default 20,000,000 (about 2 s).
    pub max_link_work: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            max_entries: 2_000_000,
            max_tar_size: 64 << 30,
            max_file_size: 64 << 30,
            max_ratio: 200,
            max_toc_bytes: 256 << 20,
            max_pax_bytes: 1 << 20,
            max_name: 4096,
            max_extents: 1 << 16,
            max_depth: 1024,
            max_link_work: 20_000_000,
        }
    }
}

/// What to build from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildOptions {
    /// How the blob is compressed.
    pub compression: Compression,
    /// What the layer may cost.
    pub budget: Budget,
    /// What to do with a layer that has closed spans.
    pub closed_spans: ClosedSpans,
}

/// What becomes of a layer with a span of more than [`MAX_SPAN`](crate::format::MAX_SPAN) bytes of output, which nobody can
/// enter for a small read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClosedSpans {
    /// It gets its TOC like any other.
    #[default]
    Keep,
    /// It is [`Ineligible::SpanTooLong`], as soon as that is known.
    Decline,
}

impl BuildOptions {
    /// Options with the default budget, for any layer.
    #[must_use]
    pub fn new(compression: Compression) -> Self {
        Self { compression, budget: Budget::default(), closed_spans: ClosedSpans::default() }
    }
}

/// Takes what passes by during the pass. An error stops the build with [`BuildError::Sink`].
pub trait BuildSink {
    /// The raw window of span `span`, empty where none is needed. Called once for each span, in order.
    ///
    /// # Errors
    /// Whatever keeps the sink from going on.
    fn window(&mut self, span: SpanIx, raw: &[u8]) -> io::Result<()> {
        let _ = (span, raw);
        Ok(())
    }

    /// A whole chunk of file content with its place and digest, in the order of the data address space. Chunks that lie
    /// in a hole of a sparse file altogether are left out. Files that a later member replaces are given too.
    ///
    /// # Errors
    /// Whatever keeps the sink from going on.
    fn chunk(&mut self, chunk: ChunkIx, data: DataRange, digest: &[u8; SHORT_DIGEST], bytes: &[u8]) -> io::Result<()> {
        let _ = (chunk, data, digest, bytes);
        Ok(())
    }

    /// The next bytes of the tar that are not stored content of a file: headers, padding, what the tree does not take, the
    /// end. Together, in order, they are the layer's skeleton; see [`Reassembled`](crate::Reassembled).
    ///
    /// # Errors
    /// Whatever keeps the sink from going on.
    fn skeleton(&mut self, bytes: &[u8]) -> io::Result<()> {
        let _ = bytes;
        Ok(())
    }
}

/// The sink that takes nothing.
impl BuildSink for () {}

/// A finished TOC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// Canonical bytes; [`Toc::open`](crate::Toc::open) reads them. The header holds both digests and all sizes.
    pub toc: Vec<u8>,
}

/// Builds the TOC of `blob`, reading it to its end. Memory: 1 MiB of buffers, about 150 bytes per file, and the TOC itself.
///
/// # Errors
/// [`BuildError`]. What the sink was given before is then worthless.
pub fn build(blob: impl Read, options: &BuildOptions, sink: &mut dyn BuildSink) -> Result<Built, BuildError> {
    let budget = &options.budget;
    let shared = Shared::new(sink);
    let stream = TarStream::new(blob, options, &shared)?;
    let limits =
        TarLimits { max_pax_bytes: budget.max_pax_bytes, max_name: budget.max_name, max_extents: budget.max_extents };
    let mut tar = TarReader::new(stream, limits);
    let mut tree = Tree::new(budget);
    let mut contents = Contents::new(budget, &shared);
    while let Some(member) = tar.next().map_err(|error| shared.blame(error))? {
        // A name that makes it a whiteout makes every type one.
        let Some(place) = tree.place(&member)? else { continue };
        if member.typeflag == b'S' {
            // Go reads the old sparse form of GNU tar, but containerd has no case for it.
            return Err(BuildError::member(&member.name, "old GNU sparse file"));
        }
        let content = if member.kind == MemberKind::Regular { contents.add(&mut tar, &member)? } else { None };
        tree.create(place, &member, content)?;
    }
    tree.finish()?;
    let ended = tar.into_inner().finish()?;
    let toc = write::write(&tree, &contents, &ended, options.compression)?;
    Ok(Built { toc })
}
