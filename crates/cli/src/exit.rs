//! What the exit code of `millstream` means: the whole table is here.

use std::error::Error;
use std::process::ExitCode;

use millstream_containerd::ContainerdError;
use millstream_source::{ErrorKind, SourceError};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It was done.
    Ok,
    /// It was tried and did not work; `doctor`: a check failed; `check`: something is damaged still.
    Failed,
    /// A daemon or registry cannot be reached, or does not answer.
    Unreachable,
    /// The image, or a variant for the platform, is not on this node or not at its registry.
    NotFound,
    /// It was not done in the time that `--timeout` gave; it goes on.
    TimedOut,
}

impl Exit {
    const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            // 2 is what clap ends with when a command line makes no sense.
            Self::Unreachable => 3,
            Self::NotFound => 4,
            Self::TimedOut => 5,
        }
    }
}

/// Of the help and the manual.
pub(crate) const TABLE: &str = "\
Exit codes:
  0  done
  1  tried, and it did not work; doctor: a check failed; check: something is damaged still
  2  the command line makes no sense
  3  a daemon or registry cannot be reached or does not answer
  4  the image is not there
  5  not done in the time given with --timeout; it goes on";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// A failure with an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }
}

/// What a daemon refused, in its own words.
impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code;
        let exit = match status.code() {
            Code::Ok => Exit::Ok,
            Code::Unavailable | Code::DeadlineExceeded => Exit::Unreachable,
            Code::NotFound => Exit::NotFound,
            Code::Cancelled
            | Code::Unknown
            | Code::InvalidArgument
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Internal
            | Code::DataLoss
            | Code::Unauthenticated => Exit::Failed,
        };
        let message = match status.message() {
            "" => status.code().to_string(),
            message => message.to_owned(),
        };
        Self { exit, message }
    }
}

/// The exit code for an error, wherever in its causes one with a code is.
pub(crate) fn of(error: &anyhow::Error) -> Exit {
    error.chain().find_map(of_cause).unwrap_or(Exit::Failed)
}

fn of_cause(cause: &(dyn Error + 'static)) -> Option<Exit> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(failure.exit);
    }
    if let Some(error) = cause.downcast_ref::<SourceError>() {
        return match error.kind {
            ErrorKind::NotFound => Some(Exit::NotFound),
            ErrorKind::Unavailable | ErrorKind::TimedOut => Some(Exit::Unreachable),
            _ => None,
        };
    }
    match cause.downcast_ref::<ContainerdError>()? {
        ContainerdError::Unreachable { .. } | ContainerdError::TimedOut { .. } => Some(Exit::Unreachable),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_code() {
        for exit in [Exit::Ok, Exit::Failed, Exit::Unreachable, Exit::NotFound, Exit::TimedOut] {
            assert!(TABLE.contains(&format!("\n  {}  ", exit.code())), "{exit:?}");
        }
    }

    #[test]
    fn the_code_is_found_below_what_was_tried() {
        let error = anyhow::Error::from(Failure::new(Exit::NotFound, "not there")).context("looking");
        assert_eq!(of(&error), Exit::NotFound);
        assert_eq!(of(&anyhow::anyhow!("something else")), Exit::Failed);
        let registry =
            |kind| anyhow::Error::from(SourceError::new(kind, "a request")).context("resolving r.example/a:1");
        assert_eq!(of(&registry(ErrorKind::NotFound)), Exit::NotFound);
        assert_eq!(of(&registry(ErrorKind::Unavailable)), Exit::Unreachable);
        assert_eq!(of(&registry(ErrorKind::Denied)), Exit::Failed);
    }
}
