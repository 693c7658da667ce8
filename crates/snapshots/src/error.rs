//! What can go wrong with a snapshot.

use std::io;
use std::path::PathBuf;

use crate::ViewFailure;
use crate::filter::FilterError;
use crate::mounts::MountError;

/// A failed operation on snapshots. [`crate::SnapshotService`] turns it into a gRPC status (`status.rs`).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No snapshot has this key or name.
    #[error("snapshot {0:?} does not exist")]
    NotFound(String),
    /// The key or name is taken, or the layer that was asked for is here already.
    #[error("snapshot {0:?} already exists")]
    AlreadyExists(String),
    /// Others are built on it.
    #[error("cannot remove snapshot {0:?}: {1} snapshots are built on it")]
    HasChildren(String, u64),
    /// Only an active snapshot can be committed.
    #[error("snapshot {0:?} is not active")]
    NotActive(String),
    /// Only active snapshots and views have mounts.
    #[error("snapshot {0:?} is committed: it has no mounts of its own")]
    NoMounts(String),
    /// Only committed snapshots can be parents.
    #[error("parent {0:?} is not a committed snapshot")]
    ParentNotCommitted(String),
    /// A parent chain deeper than [`crate::mounts::MAX_LAYERS`].
    #[error("snapshot {0:?} has more than {max} layers", max = crate::mounts::MAX_LAYERS)]
    TooDeep(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A filter of a list request cannot be read.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The directory of a snapshot is gone, or its record cannot be read.
    #[error("snapshot {name:?} is damaged: {what}; hint: remove the images that use it and pull them again")]
    Damaged {
        /// Key or name.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A lazy image cannot be shown now.
    #[error(transparent)]
    View(#[from] ViewFailure),
    /// Mount options cannot express a path.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The size of a committed snapshot is still being computed.
    #[error("the usage of snapshot {0:?} is still being computed")]
    UsagePending(String),
    /// A directory of ours cannot be made, read or moved.
    #[error("cannot {action} {}", path.display())]
    Disk {
        /// What was tried: `create`, `rename`...
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The database failed.
    #[error("the snapshot database failed")]
    Database(#[source] Box<redb::Error>),
    /// A record cannot be written as bytes: never expected.
    #[error("cannot encode a snapshot record")]
    Encode(#[source] serde_json::Error),
    /// The daemon is shutting down.
    #[error("the snapshot service is stopping")]
    Stopping,
}

/// For `map_err`: every error of redb becomes [`Error::Database`].
pub(crate) fn database(error: impl Into<redb::Error>) -> Error {
    Error::Database(Box::new(error.into()))
}

impl Error {
    /// For `map_err`: an I/O error with what was tried on which path.
    pub(crate) fn disk(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Disk { action, path, source }
    }
}
