//! The one table from [`Error`] to gRPC status codes, in the meaning that containerd gives them.

use std::io;

use tonic::{Code, Status};

use crate::Error;

/// The gRPC code of an error.
fn code(error: &Error) -> Code {
    match error {
        Error::NotFound(_) => Code::NotFound,
        Error::AlreadyExists(_) => Code::AlreadyExists,
        Error::HasChildren(..) | Error::NotActive(_) | Error::NoMounts(_) => Code::FailedPrecondition,
        Error::ParentNotCommitted(_) | Error::TooDeep(_) | Error::Invalid(_) | Error::Filter(_) => {
            Code::InvalidArgument
        }
        Error::Damaged { .. } => Code::DataLoss,
        Error::View(_) | Error::UsagePending(_) | Error::Stopping => Code::Unavailable,
        Error::Disk { source, .. } => match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
            _ => Code::Internal,
        },
        Error::Mount(_) | Error::Database(_) | Error::Encode(_) => Code::Internal,
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut message = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        Self::new(code(&error), message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_finds_what_it_looks_for() {
        let status = Status::from(Error::HasChildren("base".into(), 2));
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("remove"), "containerd's suite looks for that word");
        assert_eq!(Status::from(Error::AlreadyExists("a".into())).code(), Code::AlreadyExists);
        assert_eq!(Status::from(Error::NotFound("a".into())).code(), Code::NotFound);
    }

    #[test]
    fn a_full_disk_is_not_an_internal_error() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let status = Status::from(Error::disk("create", "/x")(full));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().starts_with("cannot create /x: "), "{}", status.message());
    }
}
