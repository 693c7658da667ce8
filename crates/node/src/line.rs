//! What supervisor and worker say to each other: JSON documents over a socket that keeps their boundaries.
//!
//! A new worker is told [`Start`], checks what it can without the store, which one process at a time may own, and says
//! [`Report::Ready`]. When no other worker is left it is told [`GO`]; then it opens everything and says [`Report::Serves`].

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, bail};
use millstream_sys::fuse_device::write_message;
use serde::{Deserialize, Serialize};

/// Version of this exchange. A worker refuses to work for a supervisor that speaks another one.
pub const PROTOCOL: u32 = 1;
/// Bytes of the longest message.
const MAX_MESSAGE: usize = 128 * 1024;
/// Bytes of the longest text of settings: escaped, it still fits into a message.
pub const MAX_SETTINGS: u64 = 60 * 1024;
/// Characters of a reason that are passed on.
const MAX_REASON: usize = 4096;
/// Nobody else serves: the worker may open the store.
pub const GO: &[u8] = b"\"go\"";

/// What a worker works with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// [`PROTOCOL`] of the supervisor.
    pub protocol: u32,
    /// The directory of all state, which the supervisor has locked and in which it mounts.
    pub root: PathBuf,
    /// Where the supervisor listens.
    pub socket: PathBuf,
    /// Text of the settings; empty: the defaults.
    pub settings: String,
    /// Workers of this supervisor that died before.
    pub restarts: u64,
    /// The kernel's INIT request.
    pub init: Vec<u8>,
    /// What the first worker answered to it; `None` for the first worker.
    pub answer: Option<Vec<u8>>,
}

/// Of a message to a worker that may be of another version: all that is certain to be there.
#[derive(Deserialize)]
struct Spoken {
    protocol: u32,
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// What can be checked without the store is fine. With the version of the worker's program.
    Ready(String),
    /// The answer to INIT, for the kernel.
    Answer(Vec<u8>),
    /// The connection is served.
    Serves,
    /// It will not come to that, and why.
    Refused(String),
}

/// One end.
#[derive(Debug)]
pub struct Line(OwnedFd);

impl Line {
    /// Over a socket of [`millstream_sys::fuse_device::message_pair`].
    #[must_use]
    pub const fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Tells the worker what it works with; the other end need not listen yet.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn start(&self, start: &Start) -> io::Result<()> {
        write_message(self.0.as_fd(), &serde_json::to_vec(start)?)
    }

    /// Lets the worker open the store.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn go(&self) -> io::Result<()> {
        write_message(self.0.as_fd(), GO)
    }

    /// Says something to the supervisor.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn report(&self, report: &Report) -> io::Result<()> {
        let short;
        let report = match report {
            Report::Refused(reason) if reason.len() > MAX_REASON => {
                short = Report::Refused(reason.chars().take(MAX_REASON).collect());
                &short
            }
            other => other,
        };
        write_message(self.0.as_fd(), &serde_json::to_vec(report)?)
    }

    /// Waits for [`Start`].
    ///
    /// # Errors
    /// When the supervisor speaks another version, or is gone.
    pub fn await_start(&self) -> anyhow::Result<Start> {
        let message = self.receive()?;
        let Spoken { protocol } = serde_json::from_slice(&message).context("reading what the supervisor says")?;
        if protocol != PROTOCOL {
            bail!(
                "the millstreamd that runs speaks version {protocol} to its workers, this one version {PROTOCOL}; hint: \
                 restart millstreamd, which ends the lazy containers"
            );
        }
        serde_json::from_slice(&message).context("reading what the supervisor says")
    }

    /// Waits for [`GO`].
    ///
    /// # Errors
    /// When the supervisor is gone or says something else.
    pub fn await_go(&self) -> anyhow::Result<()> {
        if self.receive()? != GO {
            bail!("the supervisor does not want this worker");
        }
        Ok(())
    }

    /// What the worker says next; waits for it.
    ///
    /// # Errors
    /// When the worker is gone, or says what is none of [`Report`].
    pub fn await_report(&self) -> io::Result<Report> {
        Ok(serde_json::from_slice(&self.receive()?)?)
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let len = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut buffer))?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.truncate(len);
        Ok(buffer)
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use millstream_sys::fuse_device::message_pair;

    use super::*;

    fn start() -> Start {
        Start {
            protocol: PROTOCOL,
            root: "/var/lib/millstream".into(),
            socket: "/run/millstream.sock".into(),
            settings: "\"".repeat(usize::try_from(MAX_SETTINGS).unwrap()),
            restarts: 7,
            init: (0..=255).collect(),
            answer: Some(vec![1; 80]),
        }
    }

    #[test]
    fn what_is_said_arrives() {
        let (ours, theirs) = message_pair().unwrap();
        let (supervisor, worker) = (Line::new(ours), Line::new(theirs));
        supervisor.start(&start()).unwrap();
        supervisor.go().unwrap();
        assert_eq!(worker.await_start().unwrap(), start());
        worker.await_go().unwrap();
        let long = Report::Refused("x".repeat(1 << 20));
        for report in [Report::Ready("1".into()), Report::Answer(vec![1]), Report::Serves, long] {
            worker.report(&report).unwrap();
        }
        assert_eq!(supervisor.await_report().unwrap(), Report::Ready("1".into()));
        assert_eq!(supervisor.await_report().unwrap(), Report::Answer(vec![1]));
        assert_eq!(supervisor.await_report().unwrap(), Report::Serves);
        assert_eq!(supervisor.await_report().unwrap(), Report::Refused("x".repeat(MAX_REASON)));
        drop(worker);
        assert!(supervisor.await_report().is_err());
    }

    #[test]
    fn another_version_is_refused_whatever_else_it_says() {
        let (ours, theirs) = message_pair().unwrap();
        write_message(ours.as_fd(), br#"{"protocol":2,"new":{}}"#).unwrap();
        let error = Line::new(theirs).await_start().unwrap_err().to_string();
        assert!(error.contains("speaks version 2"), "{error}");
    }
}
