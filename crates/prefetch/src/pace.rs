//! Bodies that are waited for, as long as they come along.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use millstream_source::{ByteStream, ErrorKind, SourceError};
use tokio::time::Instant;

/// Bytes that have to come within one idle time-out, or the rest of the body: a source that sends a byte now and then is
/// stalled, too.
const LEAST: u64 = 16 * 1024;

/// A body whose source is given up when it does not get on. Only the time that is spent waiting for it counts.
pub(crate) struct Paced {
    body: ByteStream,
    idle: Duration,
    /// Waited for, and received, since so many bytes had last come.
    waited: Duration,
    received: u64,
}

impl Paced {
    pub(crate) fn new(body: ByteStream, idle: Duration) -> Self {
        Self { body, idle, waited: Duration::ZERO, received: 0 }
    }

    /// The next piece, empty ones skipped; `None` at the end.
    ///
    /// # Errors
    /// That of the body; [`ErrorKind::TimedOut`] when fewer than [`LEAST`] bytes came within the time-out.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            let begun = Instant::now();
            let left = self.idle.saturating_sub(self.waited);
            let Ok(piece) = tokio::time::timeout(left, self.body.next()).await else {
                let message = format!("{} bytes of a body came within {:?}", self.received, self.idle);
                return Err(SourceError::new(ErrorKind::TimedOut, message));
            };
            self.waited += begun.elapsed();
            let Some(piece) = piece.transpose()? else { return Ok(None) };
            self.received += piece.len() as u64;
            if self.received >= LEAST {
                (self.waited, self.received) = (Duration::ZERO, 0);
            }
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body of so many pieces of this size, with a pause before each.
    fn body(pieces: usize, size: usize, pause: Duration) -> ByteStream {
        futures::stream::unfold(0, move |sent| async move {
            tokio::time::sleep(pause).await;
            (sent < pieces).then(|| (Ok(Bytes::from(vec![0; size])), sent + 1))
        })
        .boxed()
    }

    async fn received(mut paced: Paced) -> Result<usize, ErrorKind> {
        let mut bytes = 0;
        while let Some(piece) = paced.next().await.map_err(|error| error.kind)? {
            bytes += piece.len();
        }
        Ok(bytes)
    }

    #[tokio::test(start_paused = true)]
    async fn what_gets_on_may_take_its_time_and_what_dribbles_may_not() {
        let (idle, pause) = (Duration::from_secs(15), Duration::from_secs(10));
        assert_eq!(received(Paced::new(body(20, 16 * 1024, pause), idle)).await, Ok(20 * 16 * 1024));
        let begun = Instant::now();
        let loris = body(1 << 20, 1, Duration::from_secs(1));
        assert_eq!(received(Paced::new(loris, idle)).await, Err(ErrorKind::TimedOut));
        assert_eq!(begun.elapsed(), idle);
        assert_eq!(received(Paced::new(body(1, 1, pause * 2), idle)).await, Err(ErrorKind::TimedOut));
        assert_eq!(received(Paced::new(body(3, 1, Duration::from_secs(3)), idle)).await, Ok(3));
    }

    #[tokio::test(start_paused = true)]
    async fn only_waiting_counts() {
        let mut paced = Paced::new(body(4, 1, Duration::from_secs(1)), Duration::from_secs(15));
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert!(paced.next().await.unwrap().is_some());
        }
        assert!(paced.next().await.unwrap().is_none());
    }
}
