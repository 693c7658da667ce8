//! What can be wrong with an answer.

use std::net::SocketAddr;
use std::time::Duration;

/// What becomes of answers about blobs. Everything else passes as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Spoiling {
    /// Nothing.
    #[default]
    None,
    /// The wish for a range is not passed on, so the whole blob is answered, with status 200.
    NoRange,
    /// In every answer one bit is wrong; which one is drawn.
    WrongByte,
    /// So many bytes in a second for each answer.
    Slow(u32),
    /// The request is read and never answered.
    Mute,
    /// Silence after so many bytes of the body.
    Stall(usize),
    /// The connection is reset after so many bytes of the body.
    Reset(usize),
    /// The connection is closed after so many bytes of the body.
    Cut(usize),
    /// So many bytes are missing at the end, and the length says nothing of it.
    Short(usize),
    /// So many bytes too many at the end, and the length counts them.
    Long(usize),
    /// A right answer to a request for one byte less.
    OtherRange,
    /// The bytes of another place under the name of those that were asked for.
    ForgedRange,
    /// The bytes as the only part of `multipart/byteranges`.
    Multipart,
    /// The bytes with the content encoding gzip.
    Gzip,
    /// This status without more.
    Status(u16),
    /// This status with `Retry-After`.
    Busy {
        /// 429 or 503.
        status: u16,
        /// What the client is asked to wait.
        after: Duration,
        /// As a date, not as seconds.
        date: bool,
    },
    /// A redirect to this address, in which `{path}` stands for path and query of the request.
    Redirect(String),
    /// A redirect to an address at another [`Spoiler`](super::Spoiler) that is good for a while, then refused with 403.
    Signed {
        /// Where it leads.
        to: SocketAddr,
        /// How long it is good; zero: it never was.
        life: Duration,
        /// Part of its query, to be found again wherever it should not be.
        mark: String,
    },
    /// Status 401 with this challenge.
    Challenge(String),
}
