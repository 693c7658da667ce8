//! Whether an application is ready: it is asked, and gives the right answer.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::process::pause;

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// What is sent to an application's port, and what its answer has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    request: Vec<u8>,
    begins: &'static [u8],
    has: &'static str,
}

impl Question {
    /// A page that has this text.
    pub fn page(path: &str, has: &'static str) -> Self {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").into_bytes();
        Self { request, begins: b"HTTP/1.1 200", has }
    }

    /// A query of PostgreSQL, as its user, and a text of the result.
    pub fn query(sql: &str, has: &'static str) -> Self {
        let message = |kind: &[u8], body: &[u8]| {
            let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX).to_be_bytes();
            [kind, &length, body].concat()
        };
        // Version 3.0 of the protocol.
        let hello = [&196_608_u32.to_be_bytes()[..], b"user\0postgres\0database\0postgres\0\0"].concat();
        let query = [sql.as_bytes(), b"\0"].concat();
        let request = [message(b"", &hello), message(b"Q", &query), message(b"X", b"")].concat();
        // It welcomes the user.
        Self { request, begins: b"R", has }
    }

    /// Asks until the answer is right.
    ///
    /// # Errors
    ///
    /// If it is not until `deadline`.
    pub fn await_answer(&self, port: u16, deadline: Instant) -> Result<()> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        loop {
            let answer = self.ask(address).unwrap_or_default();
            if answer.starts_with(self.begins) && String::from_utf8_lossy(&answer).contains(self.has) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the application did not answer in time; the last answer was {:?}",
                String::from_utf8_lossy(&answer).chars().take(200).collect::<String>()
            );
            pause();
        }
    }

    fn ask(&self, address: SocketAddr) -> Result<Vec<u8>> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&self.request)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    }
}
