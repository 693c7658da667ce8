//! How many requests are served at a time. What is above the limit is refused at once: waiting would only move the queue
//! from the caller, who can choose, to us.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ServeError;

/// Bounds of concurrent requests.
#[derive(Debug, Clone)]
pub struct LimitOptions {
    /// In all.
    pub requests: usize,
    /// From one address.
    pub requests_per_peer: usize,
}

impl Default for LimitOptions {
    fn default() -> Self {
        Self { requests: 256, requests_per_peer: 64 }
    }
}

/// Requests under way, by peer.
type Peers = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// Counts requests under way. Clones count together.
#[derive(Clone)]
pub(crate) struct Limits {
    options: LimitOptions,
    all: Arc<Semaphore>,
    /// Only peers with a request under way have an entry, so that `options.requests` bounds it.
    peers: Peers,
}

/// One request under way; ends when dropped.
pub(crate) struct Permit {
    _one: OwnedSemaphorePermit,
    peer: Option<(IpAddr, Peers)>,
}

impl Limits {
    pub(crate) fn new(options: LimitOptions) -> Self {
        let all = Arc::new(Semaphore::new(options.requests.min(Semaphore::MAX_PERMITS)));
        Self { options, all, peers: Arc::default() }
    }

    /// Admits a request from `peer`; an in-process caller has none.
    pub(crate) fn admit(&self, peer: Option<IpAddr>) -> Result<Permit, ServeError> {
        let exhausted = |what, limit| ServeError::Exhausted { what, limit };
        let one =
            Arc::clone(&self.all).try_acquire_owned().map_err(|_| exhausted("requests", self.options.requests))?;
        let Some(peer) = peer else { return Ok(Permit { _one: one, peer: None }) };
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = peers.entry(peer).or_default();
        if *count >= self.options.requests_per_peer {
            if *count == 0 {
                peers.remove(&peer);
            }
            return Err(exhausted("requests from one address", self.options.requests_per_peer));
        }
        *count += 1;
        drop(peers);
        Ok(Permit { _one: one, peer: Some((peer, Arc::clone(&self.peers))) })
    }

    /// Waits for the place of a request, for work that nobody waits for.
    pub(crate) async fn admit_work(&self, patience: Duration) -> Result<Permit, ServeError> {
        let exhausted = || ServeError::Exhausted { what: "requests", limit: self.options.requests };
        let one = tokio::time::timeout(patience, Arc::clone(&self.all).acquire_owned()).await;
        Ok(Permit { _one: one.map_err(|_| exhausted())?.map_err(|_| exhausted())?, peer: None })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some((peer, peers)) = &self.peer else { return };
        let mut peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = peers.get_mut(peer) {
            *count -= 1;
            if *count == 0 {
                peers.remove(peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_and_are_given_back() {
        let limits = Limits::new(LimitOptions { requests: 3, requests_per_peer: 2 });
        let (a, b) = (Some(IpAddr::from([10, 0, 0, 1])), Some(IpAddr::from([10, 0, 0, 2])));
        let one = limits.admit(a).unwrap();
        let two = limits.admit(a).unwrap();
        assert!(matches!(limits.admit(a), Err(ServeError::Exhausted { limit: 2, .. })));
        let three = limits.admit(b).unwrap();
        assert!(matches!(limits.admit(None), Err(ServeError::Exhausted { limit: 3, .. })));
        drop(one);
        let again = limits.admit(a).unwrap();
        drop((two, three, again));
        assert!(limits.peers.lock().unwrap().is_empty());
        assert_eq!(limits.all.available_permits(), 3);
    }
}
