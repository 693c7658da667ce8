//! Images that were pulled the ordinary way for want of tables, and are indexed from this node's own copy: one at a time, in the
//! background, each once its last layer was unpacked.
//!
//! What is expected is written down, so that a worker that dies, in the middle of it or not, leaves the work to the next one.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream_oci::{ChainId, ImageRef};
use millstream_source::{ErrorKind, SourceError, names};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::catalog::{Catalog, Decision};
use crate::embedded::Embedded;

/// Images that are expected or wait at a time; more are not indexed until their next pull.
const MAX_EXPECTED: usize = 256;
/// How often an image is begun, over all workers. One that kills its worker must not do so for ever.
const MAX_TRIES: u32 = 3;
/// How long containerd is left alone after it did not answer.
const PAUSE: Duration = Duration::from_secs(20);

/// An image that is being pulled the ordinary way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Reference as the client gave it.
    pub image: String,
    /// Repository and digest: `HOST/NAME@sha256:...`.
    pub name: String,
    /// Chain ID of its top layer.
    pub top: ChainId,
}

/// An expected image as it is written down, under its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexRecord {
    /// Reference as the client gave it.
    pub image: String,
    /// Chain ID of its top layer.
    pub top: ChainId,
    /// How often it was begun.
    #[serde(default)]
    pub tries: u32,
}

#[derive(Debug, Default)]
struct State {
    /// Until its top layer is there.
    expected: Vec<Expected>,
    /// To be indexed.
    queue: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    image: Expected,
    /// Whether its top layer was seen; else an earlier worker has left it, and it may still be on its way.
    unpacked: bool,
    /// Not begun before.
    not_before: Instant,
}

/// The images to index.
#[derive(Debug)]
pub struct Indexer {
    catalog: Catalog,
    /// How long an image is left alone after it was unpacked: its container starts then, and the lowest priority counts only within
    /// one control group.
    after: Duration,
    state: Mutex<State>,
    more: Notify,
}

impl State {
    /// Adds an image unless it is known. Gives the name of the one that had to go for it; fails when none could.
    fn expect(&mut self, expected: &Expected) -> Result<Option<String>, ()> {
        if self.expected.iter().any(|known| known.name == expected.name) {
            return Ok(None);
        }
        let full = self.expected.len() + self.queue.len() >= MAX_EXPECTED;
        if full && self.expected.is_empty() {
            return Err(());
        }
        // A pull that was broken off may have left it; the oldest is the least likely to come.
        let given_up = full.then(|| self.expected.remove(0).name);
        self.expected.push(expected.clone());
        Ok(given_up)
    }

    /// Takes the image that may be begun first, not the one that came first: one that is tried again would hold up those behind it.
    /// Where none may be begun `now`, gives the time when one may, if any waits.
    fn take_due(&mut self, now: Instant) -> Result<Waiting, Option<Instant>> {
        let first = self.queue.iter().enumerate().min_by_key(|(_, waiting)| waiting.not_before);
        let (at, not_before) = first.map(|(at, waiting)| (at, waiting.not_before)).ok_or(None)?;
        if not_before > now {
            return Err(Some(not_before));
        }
        self.queue.remove(at).ok_or(None)
    }
}

impl Indexer {
    /// Images are indexed `after` they were unpacked. Takes up what an earlier worker has left: whether the top layers were unpacked
    /// meanwhile is found out by trying.
    ///
    /// # Errors
    /// Those of the database.
    pub fn new(catalog: Catalog, after: Duration) -> anyhow::Result<Self> {
        let left = catalog.to_index()?;
        let left = left.into_iter().map(|(name, IndexRecord { image, top, .. })| Expected { image, name, top });
        let not_before = Instant::now();
        let waiting = left.map(|image| Waiting { image, unpacked: false, not_before });
        let state = State { expected: Vec::new(), queue: waiting.collect() };
        Ok(Self { catalog, after, state: Mutex::new(state), more: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Expects an image to be unpacked; it is indexed when its top layer is committed.
    pub async fn expect(&self, expected: Expected) {
        let Ok(given_up) = self.state().expect(&expected) else {
            warn!({ names::IMAGE } = expected.image, "too many images wait to be indexed: this one does not");
            return;
        };
        let catalog = self.catalog.clone();
        let Expected { image, name, top } = expected;
        let written = tokio::task::spawn_blocking(move || {
            if let Some(given_up) = given_up {
                catalog.remove_to_index(&given_up)?;
            }
            catalog.put_to_index(&name, &IndexRecord { image, top, tries: 0 })
        });
        if let Ok(Err(error)) = written.await {
            warn!(error = format!("{error:#}"), "an image to index would be forgotten at a restart");
        }
    }

    /// Called when a layer was unpacked. Does not wait.
    pub fn committed(&self, chain: ChainId) {
        let mut state = self.state();
        let all = std::mem::take(&mut state.expected).into_iter();
        let (ready, expected): (Vec<_>, Vec<_>) = all.partition(|image| image.top == chain);
        state.expected = expected;
        if !ready.is_empty() {
            let not_before = Instant::now() + self.after;
            state.queue.extend(ready.into_iter().map(|image| Waiting { image, unpacked: true, not_before }));
            self.more.notify_one();
        }
    }

    /// Works until it is dropped.
    pub async fn work(&self, server: Embedded) {
        loop {
            let next = self.state().take_due(Instant::now());
            match next {
                Ok(next) => self.index(&server, next).await,
                // One that comes meanwhile may be due earlier.
                Err(Some(due)) => tokio::time::timeout_at(due, self.more.notified()).await.unwrap_or_default(),
                Err(None) => self.more.notified().await,
            }
        }
    }

    async fn index(&self, server: &Embedded, waiting: Waiting) {
        let Waiting { image: next, unpacked, .. } = waiting;
        let begun = self.begin(&next).await;
        let result = match begun {
            Ok(true) => import(server, &next.name).await,
            Ok(false) => {
                let text = format!("it was begun {MAX_TRIES} times and never ended; hint: see the log of millstreamd");
                Err(SourceError::new(ErrorKind::Local, text))
            }
            Err(error) => Err(SourceError::new(ErrorKind::Local, format!("{error:#}"))),
        };
        let passing = |kind| matches!(kind, ErrorKind::Unavailable | ErrorKind::TimedOut | ErrorKind::Exhausted);
        let (code, reason) = match result {
            Ok(()) => {
                info!({ names::IMAGE } = next.image, "image indexed; its next pull is lazy");
                (
                    "index.done",
                    "it has been indexed since, from this node's own copy: it streams from the next pull on".to_owned(),
                )
            }
            Err(error) if passing(error.kind) && self.tries(&next.name) < MAX_TRIES => {
                warn!({ names::IMAGE } = next.image, %error, "image is not indexed now; it is tried again");
                let not_before = Instant::now() + PAUSE;
                self.state().queue.push_back(Waiting { image: next, unpacked, not_before });
                return;
            }
            Err(error) if error.kind == ErrorKind::NotFound && !unpacked => {
                info!({ names::IMAGE } = next.image, %error, "image is not here (yet): waiting for its top layer");
                self.expect(next).await;
                return;
            }
            Err(error) if error.kind == ErrorKind::NotFound => {
                ("index.missing", format!("it cannot be indexed from this node's own copy: {error}"))
            }
            Err(error) => ("index.failed", format!("it could not be indexed from this node's own copy: {error}")),
        };
        if code != "index.done" {
            warn!({ names::CODE } = code, { names::IMAGE } = next.image, reason, "image is not indexed");
        }
        self.conclude(next, code, reason).await;
    }

    /// Counts an attempt; false if there were enough.
    async fn begin(&self, next: &Expected) -> anyhow::Result<bool> {
        let tries = self.tries(&next.name);
        if tries >= MAX_TRIES {
            return Ok(false);
        }
        let (catalog, name) = (self.catalog.clone(), next.name.clone());
        let record = IndexRecord { image: next.image.clone(), top: next.top, tries: tries + 1 };
        tokio::task::spawn_blocking(move || catalog.put_to_index(&name, &record)).await??;
        Ok(true)
    }

    fn tries(&self, name: &str) -> u32 {
        self.catalog.one_to_index(name).ok().flatten().map_or(0, |record| record.tries)
    }

    /// Writes down what came of an image, where `millstream explain` finds it.
    async fn conclude(&self, done: Expected, code: &str, reason: String) {
        let manifest = done.name.rsplit_once('@').map_or("", |(_, manifest)| manifest).to_owned();
        let decision = Decision::now(done.image, manifest, "deferred", code, reason);
        let catalog = self.catalog.clone();
        let written = tokio::task::spawn_blocking(move || {
            catalog.put_decision(&decision)?;
            catalog.remove_to_index(&done.name)
        });
        if let Ok(Err(error)) = written.await {
            warn!(error = format!("{error:#}"), "what came of indexing an image is not recorded");
        }
    }
}

async fn import(server: &Embedded, name: &str) -> Result<(), SourceError> {
    let image: ImageRef =
        name.parse().map_err(|error| SourceError::new(ErrorKind::Malformed, format!("{name}: {error}")))?;
    server.import_whole(&image).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(name: &str, not_before: Instant) -> Waiting {
        let top = ChainId(millstream_oci::Digest::of(name.as_bytes()));
        let image = Expected { image: name.to_owned(), name: name.to_owned(), top };
        Waiting { image, unpacked: true, not_before }
    }

    #[test]
    fn an_image_that_is_tried_again_holds_up_nobody() {
        let now = Instant::now();
        let (soon, late) = (now + Duration::from_secs(10), now + PAUSE);
        let mut state = State::default();
        assert_eq!(state.take_due(now).unwrap_err(), None);
        state.queue.push_back(waiting("again", late));
        state.queue.push_back(waiting("first", soon));
        state.queue.push_back(waiting("second", soon));
        assert_eq!(state.take_due(now).unwrap_err(), Some(soon));
        assert_eq!(state.take_due(soon).unwrap().image.name, "first");
        assert_eq!(state.take_due(soon).unwrap().image.name, "second");
        assert_eq!(state.take_due(soon).unwrap_err(), Some(late));
        assert_eq!(state.take_due(late).unwrap().image.name, "again");
    }
}
