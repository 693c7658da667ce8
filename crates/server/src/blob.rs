//! From an asynchronous blob source to a blocking reader, through a bounded channel.

use std::io::{self, Read};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use millstream_oci::Digest;
use millstream_source::{BlobSource, ErrorKind, Retry, SourceError};
use millstream_toc::BlobRange;
use tokio::sync::mpsc;

/// Pieces that wait between source and reader.
const QUEUE: usize = 16;
/// Failures in a row, without a byte in between, after which a transfer is given up.
const MAX_FAILURES: u32 = 5;
/// Wait after the first failure; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// A source that asks for more than this is given up.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A sender for [`pump`] and the reader of what it sends.
pub(crate) fn channel() -> (mpsc::Sender<Bytes>, ChannelReader) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (sender, ChannelReader { receiver, piece: Bytes::new() })
}

/// Sends `range` of `blob` in order and tells `progress` the length of every piece. Where the source breaks off, goes on from
/// there. Ends without an error when the reader is gone: then the reader knows why.
pub(crate) async fn pump(
    source: &dyn BlobSource,
    blob: &Digest,
    range: BlobRange,
    sender: mpsc::Sender<Bytes>,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), SourceError> {
    let mut at = range.start;
    let mut failures = 0;
    while at < range.end {
        let before = at;
        let end = match source.read(blob, BlobRange::new(at, range.end)).await {
            Err(error) => Err(error),
            Ok(mut stream) => loop {
                match stream.next().await {
                    None => break Ok(()),
                    Some(Err(error)) => break Err(error),
                    Some(Ok(piece)) => {
                        let len = piece.len() as u64;
                        at += len;
                        if at > range.end {
                            return Err(SourceError::new(ErrorKind::Malformed, format!("blob {blob}: too many bytes")));
                        }
                        if sender.send(piece).await.is_err() {
                            return Ok(());
                        }
                        progress(len);
                    }
                }
            },
        };
        if at == range.end {
            break;
        }
        let error = end.err().unwrap_or_else(|| {
            SourceError::new(
                ErrorKind::Malformed,
                format!("blob {blob}: the answer ended at {at}, not at {}", range.end),
            )
        });
        failures = if at > before { 1 } else { failures + 1 };
        let wait = match error.retry {
            Retry::Soon => FIRST_WAIT * 2_u32.pow(failures.min(8)),
            Retry::After(wait) if wait <= MAX_WAIT => wait,
            Retry::Never | Retry::After(_) => return Err(error),
        };
        if failures >= MAX_FAILURES {
            return Err(error);
        }
        tracing::debug!({ millstream_source::names::LAYER } = %blob, { millstream_source::names::OFFSET } = at, %error, "transfer broke off, going on");
        tokio::time::sleep(wait).await;
    }
    Ok(())
}

/// Reads what [`pump`] sends. For threads that may block, not for the asynchronous runtime's own. An end before the expected
/// length means that the pump failed.
pub(crate) struct ChannelReader {
    receiver: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl ChannelReader {
    /// The next piece; `None` at the end.
    pub(crate) fn next(&mut self) -> Option<Bytes> {
        self.receiver.blocking_recv()
    }
}

impl Read for ChannelReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.next() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let len = out.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut out[..len]);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use futures::stream;
    use millstream_source::ByteStream;

    use super::*;

    /// Gives at most `step` bytes per request, then breaks off.
    #[derive(Debug)]
    struct Breaking {
        bytes: Vec<u8>,
        step: usize,
        requests: Mutex<Vec<u64>>,
    }

    #[async_trait]
    impl BlobSource for Breaking {
        async fn read(&self, _: &Digest, range: BlobRange) -> Result<ByteStream, SourceError> {
            self.requests.lock().unwrap().push(range.start);
            let start = usize::try_from(range.start).unwrap();
            let end = usize::try_from(range.end).unwrap().min(start + self.step);
            let piece = Ok(Bytes::copy_from_slice(&self.bytes[start..end]));
            let broken = Err(SourceError::new(ErrorKind::Unavailable, "broke off"));
            Ok(stream::iter([piece, broken]).boxed())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_transfer_goes_on() {
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let source = Breaking { bytes: bytes.clone(), step: 1000, requests: Mutex::default() };
        let (sender, mut reader) = channel();
        // A plain thread: a task that may block would hold the paused clock.
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        pump(&source, &Digest::of(b""), BlobRange::new(0, 10_000), sender, &|_| ()).await.unwrap();
        assert_eq!(read.join().unwrap().unwrap(), bytes);
        assert_eq!(*source.requests.lock().unwrap(), (0..10).map(|n| n * 1000).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn no_progress_gives_up() {
        let source = Breaking { bytes: vec![], step: 0, requests: Mutex::default() };
        let (sender, _reader) = channel();
        let error = pump(&source, &Digest::of(b""), BlobRange::new(0, 1), sender, &|_| ()).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert_eq!(source.requests.lock().unwrap().len(), MAX_FAILURES as usize);
    }
}
