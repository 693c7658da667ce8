//! Why containerd did not do what it was asked.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use millstream_oci::Digest;
use tonic::{Code, Status};

/// A failed call.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContainerdError {
    /// Nobody answers at the socket.
    #[error("{action}: cannot reach containerd at {address}: {cause}; hint: does it run, and are you root?")]
    Unreachable {
        /// What was tried.
        action: String,
        /// The socket.
        address: PathBuf,
        /// Why.
        cause: String,
    },
    /// It is not there.
    #[error("{action}: {message}")]
    NotFound {
        /// What was tried.
        action: String,
        /// In containerd's words.
        message: String,
    },
    /// It is there already.
    #[error("{action}: {message}")]
    AlreadyExists {
        /// What was tried.
        action: String,
        /// In containerd's words.
        message: String,
    },
    /// Another client is at it.
    #[error("{action}: {message}")]
    Busy {
        /// What was tried.
        action: String,
        /// In containerd's words.
        message: String,
    },
    /// It took longer than its limit.
    #[error("{action}: containerd did not answer within {limit:?}")]
    TimedOut {
        /// What was tried.
        action: String,
        /// The limit.
        limit: Duration,
    },
    /// There is more of it than is taken.
    #[error("{action}: more than {limit} bytes")]
    TooLarge {
        /// What was tried.
        action: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A blob is not what its digest says.
    #[error("containerd has bytes with digest {found} under {wanted}; hint: its content store is damaged")]
    Damaged {
        /// The name.
        wanted: Digest,
        /// What it should be called.
        found: Digest,
    },
    /// The answer makes no sense.
    #[error("{action}: {message}")]
    Malformed {
        /// What was tried.
        action: String,
        /// What is wrong with the answer.
        message: String,
    },
    /// No namespace can be called so.
    #[error("{0:?} is no name of a containerd namespace; hint: letters, digits, '-', '_' and '.', at most 76")]
    Name(String),
    /// Anything else.
    #[error("{action}: {code}: {message}")]
    Refused {
        /// What was tried.
        action: String,
        /// gRPC's code.
        code: Code,
        /// In containerd's words.
        message: String,
    },
}

impl ContainerdError {
    pub(crate) fn refused(action: &str, address: &Path, status: &Status) -> Self {
        let (action, message) = (action.to_owned(), status.message().to_owned());
        match status.code() {
            Code::NotFound => Self::NotFound { action, message },
            Code::AlreadyExists => Self::AlreadyExists { action, message },
            // A status that containerd itself sent has no source: then a lock is taken.
            Code::Unavailable if status.source().is_none() => Self::Busy { action, message },
            Code::Unavailable => Self::Unreachable { action, address: address.to_owned(), cause: root_cause(status) },
            code => Self::Refused { action, code, message },
        }
    }

    pub(crate) fn malformed(action: &str, message: impl Into<String>) -> Self {
        Self::Malformed { action: action.to_owned(), message: message.into() }
    }
}

/// The innermost reason: "No such file or directory" rather than "transport error".
fn root_cause(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
