//! Trying again: a [`BlobSource`] around another that survives its passing failures.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use millstream_oci::Digest;
use millstream_toc::BlobRange;

use crate::{BlobSource, ByteStream, ErrorKind, Retry, SourceError};

/// How often and how patiently to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryOptions {
    /// Requests for one read, the first one included; at least 1. A resumed stream counts.
    pub attempts: u32,
    /// Pause before the second request; each later pause is twice as long.
    pub first_pause: Duration,
    /// The longest pause of our own making.
    pub longest_pause: Duration,
    /// The longest pause that a source may ask for ([`Retry::After`]); when it asks for more, its error is passed on.
    pub longest_wait: Duration,
}

impl Default for RetryOptions {
    fn default() -> Self {
        Self {
            attempts: 4,
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(3),
            longest_wait: Duration::from_secs(20),
        }
    }
}

/// Gives numbers in `[0, 1)`, by which pauses are spread so that many readers do not return at one moment.
pub type Jitter = Arc<dyn Fn() -> f64 + Send + Sync>;

/// Repeats what failed in passing and resumes a broken stream at the byte it had reached.
///
/// What the inner source says about an error decides ([`Retry`]); a digest mismatch, for one, is never repeated here.
/// A pause of our own making is between half of and the whole of the doubling step; a pause the source asked for is
/// kept in full.
pub struct RetryingBlobSource {
    inner: Arc<dyn BlobSource>,
    options: RetryOptions,
    jitter: Jitter,
}

impl RetryingBlobSource {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn BlobSource>, options: RetryOptions, jitter: Jitter) -> Self {
        Self { inner, options, jitter }
    }
}

impl fmt::Debug for RetryingBlobSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryingBlobSource").field("inner", &self.inner).field("options", &self.options).finish()
    }
}

#[async_trait]
impl BlobSource for RetryingBlobSource {
    async fn read(&self, blob: &Digest, range: BlobRange) -> Result<ByteStream, SourceError> {
        let mut reading = Reading {
            inner: Arc::clone(&self.inner),
            options: self.options,
            jitter: Arc::clone(&self.jitter),
            blob: *blob,
            left: range,
            requests: 0,
            body: None,
        };
        // Failures to begin are the caller's to see at once, not on the first poll of the stream.
        reading.open().await?;
        Ok(stream::try_unfold(reading, Reading::next).boxed())
    }
}

/// One read under way.
struct Reading {
    inner: Arc<dyn BlobSource>,
    options: RetryOptions,
    jitter: Jitter,
    blob: Digest,
    /// What has not been handed out yet.
    left: BlobRange,
    /// Requests made so far.
    requests: u32,
    body: Option<ByteStream>,
}

impl Reading {
    /// Makes requests for what is left until one is answered.
    async fn open(&mut self) -> Result<(), SourceError> {
        loop {
            self.requests += 1;
            match self.inner.read(&self.blob, self.left).await {
                Ok(body) => {
                    self.body = Some(body);
                    return Ok(());
                }
                Err(error) => self.pause(error).await?,
            }
        }
    }

    /// Sleeps before the next request, or gives `error` back when there is to be none.
    async fn pause(&mut self, error: SourceError) -> Result<(), SourceError> {
        if self.requests >= self.options.attempts {
            return Err(error);
        }
        let pause = match error.retry {
            Retry::Never => return Err(error),
            Retry::After(asked) if asked > self.options.longest_wait => return Err(error),
            Retry::After(asked) => asked,
            Retry::Soon => self.backoff(),
        };
        tracing::debug!(
            layer = %self.blob, offset = self.left.start, code = error.kind.code(), ?pause, requests = self.requests, %error,
            "trying again"
        );
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn backoff(&self) -> Duration {
        let doublings = self.requests.saturating_sub(1).min(20);
        let step = self.options.first_pause.saturating_mul(1 << doublings).min(self.options.longest_pause);
        step.mul_f64(0.5 + 0.5 * (self.jitter)().clamp(0.0, 1.0))
    }

    /// The next piece, from a new request where the last body broke off.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, SourceError> {
        loop {
            let piece = match &mut self.body {
                Some(body) => body.next().await,
                None => {
                    self.open().await?;
                    continue;
                }
            };
            let error = match piece {
                Some(Ok(bytes)) if bytes.len() as u64 <= self.left.len() => {
                    self.left.start += bytes.len() as u64;
                    return Ok(Some((bytes, self)));
                }
                Some(Ok(_)) => {
                    let message = format!("read of {} gave more bytes than were asked for", self.blob);
                    return Err(SourceError::new(ErrorKind::Malformed, message).with_retry(Retry::Never));
                }
                None if self.left.is_empty() => return Ok(None),
                None => {
                    let message = format!("read of {} ended {} bytes early", self.blob, self.left.len());
                    SourceError::new(ErrorKind::Unavailable, message)
                }
                Some(Err(error)) => error,
            };
            self.body = None;
            self.pause(error).await?;
        }
    }
}

#[cfg(test)]
#[path = "retry_tests.rs"]
mod tests;
