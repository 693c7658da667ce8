//! Hosts that are left alone for a while: those that asked for it, and those that keep failing.
//!
//! Requests for the same repository with the same credential share what one of them has learnt, so that a host in trouble is
//! not asked by each of them in turn, and the next configured host is asked at once. Others are not concerned: whoever names a
//! repository that always fails, or has used up what a registry allows him, must not lock out the rest.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream_source::{ErrorKind, Retry, SourceError};
use tokio::time::Instant;

use crate::auth::TokenKey;
use crate::options::MAX_CACHED;

/// Failures in a row from which a host rests. Fewer are the ordinary bad luck of a connection.
const FAILURES: u32 = 3;
/// The first rest of our own making; doubles with each failure after it.
const FIRST: Duration = Duration::from_millis(250);
/// The longest one: how long a host that is well again may still be thought ill.
const LONGEST: Duration = Duration::from_secs(4);

/// What is known of the hosts that failed last.
#[derive(Debug, Default)]
pub(crate) struct Rests {
    hosts: Mutex<HashMap<TokenKey, Rest>>,
}

#[derive(Debug)]
struct Rest {
    /// Failures in a row.
    failures: u32,
    until: Instant,
    last: SourceError,
}

impl Rests {
    /// Why the host of `key` is not to be asked now, as the error that asking it would be.
    pub(crate) fn check(&self, key: &TokenKey) -> Result<(), SourceError> {
        let hosts = self.hosts();
        let Some(rest) = hosts.get(key) else { return Ok(()) };
        let left = rest.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let message = format!("{} is left alone for {left:.1?} more: {}", key.host, rest.last.message);
        Err(SourceError::new(rest.last.kind, message).with_retry(Retry::After(left)))
    }

    /// What asking the host of `key` has led to.
    pub(crate) fn note(&self, key: &TokenKey, error: Option<&SourceError>) {
        let mut hosts = self.hosts();
        let Some(error) = error.filter(|error| is_trouble(error)) else {
            // Also a refusal is an answer of a host that is well.
            hosts.remove(key);
            return;
        };
        let now = Instant::now();
        if hosts.len() >= MAX_CACHED {
            hosts.retain(|_, rest| rest.until > now);
        }
        if hosts.len() >= MAX_CACHED && !hosts.contains_key(key) {
            return;
        }
        let rest = hosts.entry(key.clone()).or_insert_with(|| Rest { failures: 0, until: now, last: error.clone() });
        rest.failures = rest.failures.saturating_add(1);
        let doublings = rest.failures.saturating_sub(FAILURES).min(10);
        let pause = match error.retry {
            Retry::After(asked) => asked,
            _ if rest.failures < FAILURES => Duration::ZERO,
            _ => FIRST.saturating_mul(1 << doublings).min(LONGEST),
        };
        rest.until = rest.until.max(now + pause);
        rest.last = error.clone();
    }

    fn hosts(&self) -> MutexGuard<'_, HashMap<TokenKey, Rest>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether it says something about the host, and not about what was asked.
fn is_trouble(error: &SourceError) -> bool {
    matches!(error.kind, ErrorKind::Unavailable | ErrorKind::TimedOut | ErrorKind::Exhausted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(repository: &str) -> TokenKey {
        let credential = millstream_oci::Digest::of(b"anonymous");
        TokenKey { host: "https://r.example".to_owned(), repository: repository.to_owned(), credential }
    }

    fn error(kind: ErrorKind) -> SourceError {
        SourceError::new(kind, "no answer")
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_rests_from_the_third_failure_on_and_longer_each_time() {
        let rests = Rests::default();
        for expected in [0, 0, 250, 500, 1000, 2000, 4000, 4000] {
            rests.note(&key("a"), Some(&error(ErrorKind::Unavailable)));
            let begun = Instant::now();
            while rests.check(&key("a")).is_err() {
                tokio::time::advance(Duration::from_millis(50)).await;
            }
            assert_eq!(begun.elapsed().as_millis(), expected);
        }
        assert!(rests.check(&key("b")).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_that_was_asked_for_is_kept_to_its_end() {
        let rests = Rests::default();
        let busy = error(ErrorKind::Exhausted).with_retry(Retry::After(Duration::from_secs(7)));
        rests.note(&key("a"), Some(&busy));
        tokio::time::advance(Duration::from_secs(3)).await;
        let told = rests.check(&key("a")).unwrap_err();
        assert_eq!((told.kind, told.retry), (ErrorKind::Exhausted, Retry::After(Duration::from_secs(4))));
        tokio::time::advance(Duration::from_secs(4)).await;
        assert!(rests.check(&key("a")).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_ends_it_and_a_refusal_is_one() {
        for answer in [None, Some(error(ErrorKind::NotFound)), Some(error(ErrorKind::Denied))] {
            let rests = Rests::default();
            (0..5).for_each(|_| rests.note(&key("a"), Some(&error(ErrorKind::TimedOut))));
            assert!(rests.check(&key("a")).is_err());
            rests.note(&key("a"), answer.as_ref());
            assert!(rests.check(&key("a")).is_ok());
        }
    }
}
