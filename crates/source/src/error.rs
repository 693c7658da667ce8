//! The one error of everything that gives bytes: what failed, and whether trying again makes sense.

use std::time::Duration;

/// Whether the same request to the same source may succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It will fail again.
    Never,
    /// It may succeed at once or after a short back-off.
    Soon,
    /// The source asked to be left alone for this long.
    After(Duration),
}

/// What went wrong, in terms that do not depend on the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ErrorKind {
    /// Credentials are missing or refused (HTTP 401).
    Unauthorized,
    /// This caller may not read it (HTTP 403, `PERMISSION_DENIED`).
    Denied,
    /// It is not there (HTTP 404, `NOT_FOUND`).
    NotFound,
    /// The source knows it but has not made it ready (`FAILED_PRECONDITION`).
    NotImported,
    /// It can never be served lazily (`INVALID_ARGUMENT`).
    NotEligible,
    /// A limit of the source was reached (HTTP 429, `RESOURCE_EXHAUSTED`).
    Exhausted,
    /// The source does not serve ranges of blobs.
    NoRange,
    /// The answer does not fit the request: wrong length, wrong range, unreadable.
    Malformed,
    /// Bytes differ from their digest. Never retried at the same source.
    DigestMismatch,
    /// It took longer than its bound.
    TimedOut,
    /// The source could not be reached or broke off (network, HTTP 5xx, `UNAVAILABLE`).
    Unavailable,
    /// Our own disk or memory failed.
    Local,
}

impl ErrorKind {
    /// Stable code for logs, events and documents.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Unauthorized => "source.unauthorized",
            Self::Denied => "source.denied",
            Self::NotFound => "source.not-found",
            Self::NotImported => "source.not-imported",
            Self::NotEligible => "source.not-eligible",
            Self::Exhausted => "source.exhausted",
            Self::NoRange => "source.no-range",
            Self::Malformed => "source.malformed",
            Self::DigestMismatch => "source.digest-mismatch",
            Self::TimedOut => "source.timed-out",
            Self::Unavailable => "source.unavailable",
            Self::Local => "source.local",
        }
    }

    /// What [`Retry`] follows from the kind alone.
    #[must_use]
    pub const fn default_retry(self) -> Retry {
        match self {
            Self::Exhausted | Self::TimedOut | Self::Unavailable | Self::Malformed => Retry::Soon,
            Self::Unauthorized
            | Self::Denied
            | Self::NotFound
            | Self::NotImported
            | Self::NotEligible
            | Self::NoRange
            | Self::DigestMismatch
            | Self::Local => Retry::Never,
        }
    }
}

/// A failed request to a source.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// What went wrong.
    pub kind: ErrorKind,
    /// Whether to try again.
    pub retry: Retry,
    /// What was tried, on which object, why it failed: lower case, without credentials, URLs without query.
    pub message: String,
}

impl SourceError {
    /// An error with the retry rule of its kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, retry: kind.default_retry(), message: message.into() }
    }

    /// The same error with another retry rule.
    #[must_use]
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }
}
