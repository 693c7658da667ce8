//! What can go wrong in the local store.

use std::io;
use std::path::{Path, PathBuf};

use millstream_oci::Digest;
use millstream_toc::{DataRange, FormatError};

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system is full or a quota was reached. Nothing was changed; serving without storing is still possible.
    #[error("no space left to {action} {}", path.display())]
    NoSpace {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
    },
    /// Another failure of the file system.
    #[error("failed to {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The metadata database failed.
    #[error("metadata of the store: {0}")]
    Metadata(#[source] Box<redb::Error>),
    /// A record of the metadata database cannot be read.
    #[error("metadata of the store: damaged record: {0}")]
    Record(String),
    /// Bytes that should be a TOC are none.
    #[error(transparent)]
    Toc(#[from] FormatError),
    /// The layer is here with another TOC, and neither has been proven. Remove it first.
    #[error("layer {layer} is in the store with another TOC")]
    DifferentToc {
        /// The layer.
        layer: Digest,
    },
    /// The layer was proven wrong and must not be used.
    #[error("layer {layer} is quarantined: {reason}")]
    Quarantined {
        /// The layer.
        layer: Digest,
        /// What was found.
        reason: String,
    },
    /// Files of the layer or view were changed behind our back.
    #[error("{what} of {object} is damaged")]
    Damaged {
        /// Which file.
        what: &'static str,
        /// Digest of the layer or number of the view.
        object: String,
    },
    /// A layer cannot be called verified while chunks are missing.
    #[error("layer {layer} is not complete: {missing} chunks are missing")]
    Incomplete {
        /// The layer.
        layer: Digest,
        /// Number of missing chunks.
        missing: u32,
    },
    /// The range or the chunk does not fit the layer, or the buffer does not fit the range.
    #[error("range {range} does not fit the layer or the buffer")]
    OutOfRange {
        /// The range that was asked for.
        range: DataRange,
    },
    /// No such layer or view.
    #[error("{object} is not in the store")]
    Unknown {
        /// Digest of the layer or number of the view.
        object: String,
    },
    /// All numbers were given out.
    #[error("no {what} number is left")]
    NoNumber {
        /// "layer" or "view".
        what: &'static str,
    },
}

impl StoreError {
    /// Sorts a failure of the file system into [`StoreError::NoSpace`] or [`StoreError::Io`].
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { action, path },
            _ => Self::Io { action, path, source },
        }
    }
}

/// redb has one error type for each kind of call; all of them become its umbrella type here.
macro_rules! from_redb {
    ($($name:ident),*) => {
        $(impl From<redb::$name> for StoreError {
            fn from(error: redb::$name) -> Self {
                Self::Metadata(Box::new(error.into()))
            }
        })*
    };
}

from_redb!(TransactionError, TableError, StorageError, CommitError);
