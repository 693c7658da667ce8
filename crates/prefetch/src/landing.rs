//! How those who wait for a fetch hear of it, and how it ends: so that nobody fetches twice, waits for one that is over, or
//! misses what came.
//!
//! The rules: who wants something looks in the store and then for a fetch under way, with the list locked, and puts a new one
//! on the list before letting go of it. A fetch stores before it says so, leaves the list after it has stored everything, and
//! tells its outcome last. Tests run this file under a scheduler that tries orders out (`schedules`); `super::sync` is where its
//! locks come from.

use std::sync::Arc;

use millstream_source::{ErrorKind, SourceError};

use super::sync::{Mutex, MutexGuard, PoisonError, watch};

/// How far a fetch is, for whoever waits.
#[derive(Debug, Default)]
pub(crate) struct Progress(watch::Sender<State>);

#[derive(Debug, Default)]
struct State {
    /// Chunks stored so far; a change is what wakes those who wait.
    chunks: u64,
    outcome: Option<Result<(), SourceError>>,
}

impl Progress {
    /// One more chunk is in the store.
    pub(crate) fn stored(&self) {
        self.0.send_modify(|state| state.chunks += 1);
    }

    fn finish(&self, outcome: Result<(), SourceError>) {
        self.0.send_modify(|state| {
            state.outcome.get_or_insert(outcome);
        });
    }

    /// Waits until `complete` says that everything wanted is in the store (`true`) or the fetch has ended.
    ///
    /// # Errors
    /// That of the fetch, and that of `complete`.
    pub(crate) async fn wait(&self, complete: impl Fn() -> Result<bool, SourceError>) -> Result<bool, SourceError> {
        let mut state = self.0.subscribe();
        loop {
            // The outcome first: what was stored before it was set is then seen below.
            let outcome = state.borrow_and_update().outcome.clone();
            if complete()? {
                return Ok(true);
            }
            if let Some(outcome) = outcome {
                return outcome.map(|()| false);
            }
            if state.changed().await.is_err() {
                return Err(aborted());
            }
        }
    }
}

/// Fetches under way for one layer. Cheap to clone.
#[derive(Debug)]
pub(crate) struct Flights<F>(Arc<Mutex<Vec<Arc<F>>>>);

impl<F> Default for Flights<F> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<F> Clone for Flights<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<F> Flights<F> {
    /// The list, for as long as the guard lives.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Arc<F>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a fetch off the list however its task ends, so that nobody joins one that is over.
#[derive(Debug)]
pub(crate) struct Landing<F: AsRef<Progress>> {
    flights: Flights<F>,
    flight: Arc<F>,
    outcome: Option<Result<(), SourceError>>,
}

impl<F: AsRef<Progress>> Landing<F> {
    /// Of a fetch that is on the list.
    pub(crate) fn new(flights: Flights<F>, flight: Arc<F>) -> Self {
        Self { flights, flight, outcome: None }
    }

    /// Ends it with this outcome.
    pub(crate) fn end(mut self, outcome: Result<(), SourceError>) {
        self.outcome = Some(outcome);
    }
}

impl<F: AsRef<Progress>> Drop for Landing<F> {
    fn drop(&mut self) {
        self.flights.lock().retain(|flight| !Arc::ptr_eq(flight, &self.flight));
        self.flight.as_ref().as_ref().finish(self.outcome.take().unwrap_or_else(|| Err(aborted())));
    }
}

/// The end of a fetch that nobody wants any more.
pub(crate) fn aborted() -> SourceError {
    SourceError::new(ErrorKind::Unavailable, "the fetch was ended")
}
