//! What can go wrong while a request is served, and the one table from there to gRPC.

use millstream_oci::{Digest, DocumentError};
use millstream_source::{ErrorKind, SourceError};
use millstream_toc::FormatError;
use tonic::{Code, Status};

use crate::store::StoreError;

/// Why a request failed. The text is what the caller sees, but for [`ServeError::Store`].
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The image (or one of its layers) was never imported for this repository.
    #[error("{image} is not imported yet; hint: millstream import {image}")]
    NotImported {
        /// Reference by digest.
        image: String,
    },
    /// It can never be streamed.
    #[error("{what} cannot be streamed: {reason}")]
    NotEligible {
        /// Image or layer.
        what: String,
        /// Why.
        reason: String,
    },
    /// There is no such thing in an image that is known.
    #[error("{what}")]
    NotFound {
        /// What was looked for, where.
        what: String,
    },
    /// The request makes no sense.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// A limit of this server was reached.
    #[error("too many {what} at a time (limit {limit}); try again later")]
    Exhausted {
        /// What there are too many of.
        what: &'static str,
        /// The limit's value.
        limit: usize,
    },
    /// The registry refused or failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The object store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The reference leads to something that is not an image.
    #[error("{what}: {source}")]
    Document {
        /// Which document.
        what: String,
        /// What is wrong with it.
        source: DocumentError,
    },
    /// Manifest, config, blob and TOC contradict each other.
    #[error("{what}")]
    Mismatch {
        /// Which of them, and how.
        what: String,
    },
    /// A stored TOC cannot be read.
    #[error("TOC of layer {layer}: {source}")]
    Toc {
        /// The layer.
        layer: Digest,
        /// What is wrong.
        source: FormatError,
    },
    /// It took longer than its bound.
    #[error("{what} took too long")]
    TimedOut {
        /// What did.
        what: &'static str,
    },
    /// The caller left, or does not take the answer.
    #[error("the caller went away")]
    Gone,
    /// A fault of this program or its machine.
    #[error("internal error: {what}")]
    Internal {
        /// What failed.
        what: String,
    },
}

impl ServeError {
    /// The gRPC code that stands for this error.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NotImported { .. } => Code::FailedPrecondition,
            Self::NotEligible { .. } | Self::Invalid { .. } | Self::Document { .. } => Code::InvalidArgument,
            Self::NotFound { .. } => Code::NotFound,
            Self::Exhausted { .. } => Code::ResourceExhausted,
            Self::Source(error) => source_code(error.kind),
            Self::Store(error) => store_code(error),
            Self::Mismatch { .. } => Code::DataLoss,
            Self::TimedOut { .. } => Code::DeadlineExceeded,
            Self::Gone => Code::Cancelled,
            Self::Toc { .. } | Self::Internal { .. } => Code::Internal,
        }
    }

    /// Stable code for the log.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::NotImported { .. } => "server.not-imported",
            Self::NotEligible { .. } => "server.not-eligible",
            Self::NotFound { .. } => "server.not-found",
            Self::Invalid { .. } => "server.invalid-request",
            Self::Exhausted { .. } => "server.exhausted",
            Self::Source(error) => error.kind.code(),
            Self::Store(_) => "server.store",
            Self::Document { .. } => "server.not-an-image",
            Self::Mismatch { .. } => "server.mismatch",
            Self::Toc { .. } => "server.damaged-toc",
            Self::TimedOut { .. } => "server.timed-out",
            Self::Gone => "server.caller-gone",
            Self::Internal { .. } => "server.internal",
        }
    }
}

impl From<ServeError> for Status {
    fn from(error: ServeError) -> Self {
        let text = match &error {
            // Names paths of this machine.
            ServeError::Store(_) => "the server's object store failed; hint: see the server's log".to_owned(),
            _ => error.to_string(),
        };
        Self::new(error.code(), text)
    }
}

/// The registry decides who may read; its "who are you" and its "not you" are the same answer to our caller.
fn source_code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Unauthorized | ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::NotImported => Code::FailedPrecondition,
        ErrorKind::NotEligible | ErrorKind::NoRange => Code::InvalidArgument,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        // An answer of the registry that cannot be right: not that this server, or the registry, is down.
        ErrorKind::DigestMismatch | ErrorKind::Malformed => Code::DataLoss,
        ErrorKind::TimedOut => Code::DeadlineExceeded,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Local => Code::Internal,
    }
}

fn store_code(error: &StoreError) -> Code {
    match error {
        StoreError::Object { .. } => Code::Unavailable,
        StoreError::Location { .. } | StoreError::Damaged { .. } | StoreError::Scratch { .. } => Code::Internal,
    }
}
