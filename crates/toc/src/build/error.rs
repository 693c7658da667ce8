//! Why no TOC was made.

use std::io;

use crate::frames::FrameError;
use crate::tar::TarError;

/// Why a layer gets no TOC.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// containerd may unpack this layer, but it cannot be shown lazily.
    #[error("layer cannot be shown lazily: {reason}")]
    Ineligible {
        /// What stands in the way.
        reason: Ineligible,
    },
    /// containerd refuses this layer too.
    #[error("layer is not valid: {what}")]
    Invalid {
        /// What is wrong with it, and where.
        what: String,
    },
    /// The blob could not be read; another try may succeed.
    #[error("cannot read the blob")]
    Read(#[source] io::Error),
    /// The sink refused what it was given.
    #[error("cannot store what the build gives")]
    Sink(#[source] io::Error),
}

/// What keeps a layer from being shown lazily.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ineligible {
    /// A limit of the [`Budget`](super::Budget) or of the format.
    #[error("more than {limit} {what}")]
    Budget {
        /// What was counted.
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
    /// A hard link to a file that is not in the layer.
    #[error("{path} is a hard link to {target}, which is not in the layer")]
    HardLinkBelow {
        /// The link.
        path: String,
        /// The missing file.
        target: String,
    },
    /// A deflate block or zstd frame is so long that no checkpoint can be made in time. Only with
    /// [`ClosedSpans::Decline`](super::ClosedSpans::Decline).
    #[error("no {end} ends within {limit} bytes of output after byte {start} of the tar")]
    SpanTooLong {
        /// `deflate block` or `zstd frame`.
        end: &'static str,
        /// Where the span starts in the tar.
        start: u64,
        /// [`MAX_SPAN`](crate::format::MAX_SPAN).
        limit: u64,
    },
    /// The media type names a compression that the bytes do not have: containerd would look for another one.
    #[error("blob is not {compression}, though its media type says so")]
    NotCompressed {
        /// `gzip` or `zstd`.
        compression: &'static str,
    },
    /// Bytes follow the last gzip member or zstd frame. Go's decompressors refuse them, others ignore them, so that what
    /// containerd does depends on the programs that are installed beside it.
    #[error("bytes follow the last {unit} at byte {offset} of the blob")]
    TrailingBytes {
        /// `gzip member` or `zstd frame`.
        unit: &'static str,
        /// Where they start.
        offset: u64,
    },
    /// A zstd frame asks for a dictionary, or for more history than
    /// [`MAX_FRAME_WINDOW`](crate::format::MAX_FRAME_WINDOW).
    #[error("{what}")]
    Frame {
        /// What it asks for.
        what: FrameError,
    },
    /// The tar exceeds a limit of the reader, or asks for what no inode can hold.
    #[error("{what}")]
    Tar {
        /// What, and where.
        what: String,
    },
    /// An access control list, which we could show but not enforce.
    #[error("{path} has an access control list")]
    AccessControlList {
        /// The file.
        path: String,
    },
    /// A name, a value or a sum of extended attributes that not every kernel and file system takes.
    #[error("{path} has an extended attribute that not every file system takes")]
    Xattr {
        /// The file.
        path: String,
    },
    /// containerd unpacks the lowest layer of an image by other rules than those above it, and a layer does not know where it will
    /// be: here the two give different trees, or one of them none.
    #[error("{path}: {what}, of which containerd makes one thing in the lowest layer and another above")]
    PositionMatters {
        /// The member.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// A directory that no member describes was made in one that is described later: which group it inherits depends on layers
    /// below.
    #[error("directory {name} has no description, and that of its parent comes after it")]
    Group {
        /// Name of the directory in its parent.
        name: String,
    },
    /// User or group 2^32-1, which `chown` takes for "leave it as it is".
    #[error("{path} has an owner that cannot be set")]
    Owner {
        /// The file.
        path: String,
    },
}

/// What a [`Budget`](super::Budget) counts, as errors say it.
pub(super) mod counted {
    pub(in crate::build) const DIRECTORIES: &str = "directories";
    pub(in crate::build) const FILES: &str = "files";
    pub(in crate::build) const FILE_BYTES: &str = "bytes of one file";
    pub(in crate::build) const NAMES: &str = "names";
    pub(in crate::build) const NAME_BYTES: &str = "bytes of names";
    pub(in crate::build) const RATIO: &str = "bytes of tar per byte of blob";
    pub(in crate::build) const TAR_BYTES: &str = "bytes of tar";
    pub(in crate::build) const TOC_BYTES: &str = "bytes of TOC";
}

/// The fields of a [`Budget`](super::Budget) that whoever builds may want to raise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bound {
    /// `max_entries`.
    Entries,
    /// `max_tar_size`.
    TarSize,
    /// `max_file_size`.
    FileSize,
    /// `max_ratio`.
    Ratio,
    /// `max_toc_bytes`.
    TocBytes,
}

impl Ineligible {
    /// The field of the budget that was spent, if that was the reason.
    #[must_use]
    pub fn bound(&self) -> Option<Bound> {
        let Self::Budget { what, .. } = self else { return None };
        match *what {
            counted::DIRECTORIES | counted::FILES | counted::NAMES => Some(Bound::Entries),
            counted::TAR_BYTES => Some(Bound::TarSize),
            counted::FILE_BYTES => Some(Bound::FileSize),
            counted::RATIO => Some(Bound::Ratio),
            counted::TOC_BYTES | counted::NAME_BYTES => Some(Bound::TocBytes),
            _ => None,
        }
    }
}

impl BuildError {
    pub(super) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    /// Something is wrong with the member `path`.
    pub(super) fn member(path: &[u8], what: &str) -> Self {
        Self::Invalid { what: format!("{}: {what}", text(path)) }
    }

    /// The member `path` comes to something else in the lowest layer of an image.
    pub(super) fn position_matters(path: &[u8], what: &'static str) -> Self {
        Ineligible::PositionMatters { path: text(path), what }.into()
    }

    pub(super) const fn over(what: &'static str, limit: u64) -> Self {
        Self::Ineligible { reason: Ineligible::Budget { what, limit } }
    }
}

impl From<Ineligible> for BuildError {
    fn from(reason: Ineligible) -> Self {
        Self::Ineligible { reason }
    }
}

impl From<TarError> for BuildError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Read(error) => Self::Read(error),
            TarError::Limit { .. } | TarError::Unusable { .. } => Ineligible::Tar { what: error.to_string() }.into(),
            TarError::Invalid { .. } | TarError::Truncated { .. } | TarError::Failed => {
                Self::Invalid { what: error.to_string() }
            }
        }
    }
}

/// A name for people, of bounded length.
pub(super) fn text(name: &[u8]) -> String {
    const SHOWN: usize = 200;
    let shown = String::from_utf8_lossy(&name[..name.len().min(SHOWN)]);
    if name.len() > SHOWN { format!("{shown}…") } else { shown.into_owned() }
}
