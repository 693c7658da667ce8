//! The gate and the landing of fetches, run under a scheduler that tries orders out: the very files, with its locks in place
//! of the usual ones. Tests say which change of the code they were seen to fail on.
//!
//! Channels are tokio's own: an operation on one is one step here, and before it others may take theirs. Time does not pass.

mod sync {
    use std::time::Duration;

    pub(crate) use std::sync::PoisonError;

    pub(crate) use shuttle::sync::{Mutex, MutexGuard};

    pub(crate) mod watch {
        use shuttle::thread::yield_now;
        use tokio::sync::watch::{Receiver, Ref, Sender as Channel};

        /// Tokio's, and others may come between any two operations.
        #[derive(Debug, Default)]
        pub(crate) struct Sender<T>(Channel<T>);

        impl<T> Sender<T> {
            pub(crate) fn new(value: T) -> Self {
                Self(Channel::new(value))
            }

            pub(crate) fn send_modify(&self, change: impl FnOnce(&mut T)) {
                yield_now();
                self.0.send_modify(change);
            }

            pub(crate) fn send_if_modified(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
                yield_now();
                self.0.send_if_modified(change)
            }

            pub(crate) fn subscribe(&self) -> Receiver<T> {
                yield_now();
                self.0.subscribe()
            }

            pub(crate) fn borrow(&self) -> Ref<'_, T> {
                yield_now();
                self.0.borrow()
            }
        }
    }

    /// A clock that stands still.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Instant;

    impl Instant {
        pub(crate) fn now() -> Self {
            Self
        }

        #[allow(clippy::unused_self)]
        pub(crate) fn elapsed(&self) -> Duration {
            Duration::ZERO
        }

        pub(crate) fn saturating_duration_since(&self, _earlier: Self) -> Duration {
            self.elapsed()
        }
    }

    impl std::ops::Add<Duration> for Instant {
        type Output = Self;

        fn add(self, _: Duration) -> Self {
            self
        }
    }

    pub(crate) async fn timeout<T>(_: Duration, work: impl Future<Output = T>) -> Result<T, ()> {
        Ok(work.await)
    }

    pub(crate) async fn timeout_at<T>(_: Instant, work: impl Future<Output = T>) -> Result<T, ()> {
        Ok(work.await)
    }
}

#[allow(dead_code)]
#[path = "gate.rs"]
mod gate;
#[path = "landing.rs"]
mod landing;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use millstream_source::{ErrorKind, Priority, SourceError};
use shuttle::future::{self, block_on};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

use self::gate::{Gate, Urgency};
use self::landing::{Flights, Landing, Progress};
use self::sync::Mutex;
use crate::queue::Limits;

/// Orders that a test tries in each of two ways: `MILLSTREAM_SCHEDULES`, else few enough for every day.
fn schedules() -> usize {
    std::env::var("MILLSTREAM_SCHEDULES").ok().and_then(|number| number.parse().ok()).unwrap_or(2000)
}

/// Tries orders at random, and such as change seldom at the worst moments.
fn explore(test: fn()) {
    Runner::new(RandomScheduler::new(schedules()), Config::new()).run(test);
    Runner::new(PctScheduler::new(3, schedules()), Config::new()).run(test);
}

const CHUNKS: u32 = 3;

/// A fetch that brings one chunk and the one after it.
#[derive(Debug)]
struct Fetch {
    first: u32,
    progress: Progress,
}

impl AsRef<Progress> for Fetch {
    fn as_ref(&self) -> &Progress {
        &self.progress
    }
}

/// A store, and what was fetched into it.
#[derive(Debug, Default)]
struct Layer {
    stored: Mutex<BTreeSet<u32>>,
    fetched: Mutex<Vec<u32>>,
    flights: Flights<Fetch>,
    flying: Mutex<Vec<future::JoinHandle<()>>>,
}

impl Layer {
    fn has(&self, chunk: u32) -> bool {
        let found = self.stored.lock().unwrap().contains(&chunk);
        // Others may come between the look and what follows from it.
        shuttle::thread::yield_now();
        found
    }

    /// As `ensure` does for one chunk: in few rounds, or with an error. With `fails`, a fetch that this begins is broken off after
    /// its first chunk.
    async fn read(self: &Arc<Self>, chunk: u32, fails: bool) -> Result<(), SourceError> {
        for _ in 0..4 {
            let Some(flight) = self.join(chunk, fails) else { return Ok(()) };
            let complete = flight.progress.wait(|| Ok(self.has(chunk))).await;
            if let Ok(true) = complete {
                return Ok(());
            }
            assert!(complete.is_err(), "it brought {chunk}, and its end was told before that was seen");
            assert!(!self.flights.lock().iter().any(|other| Arc::ptr_eq(other, &flight)), "others join what is over");
            complete?;
        }
        Err(SourceError::new(ErrorKind::Local, "not after four rounds"))
    }

    /// Waits for the end of all fetches.
    fn settle(&self) {
        loop {
            let flying = self.flying.lock().unwrap().pop();
            let Some(flying) = flying else { return };
            block_on(flying).unwrap();
        }
    }

    fn join(self: &Arc<Self>, chunk: u32, fails: bool) -> Option<Arc<Fetch>> {
        let mut list = self.flights.lock();
        if self.has(chunk) {
            return None;
        }
        if let Some(flight) = list.iter().find(|flight| (flight.first..flight.first + 2).contains(&chunk)) {
            return Some(flight.clone());
        }
        let flight = Arc::new(Fetch { first: chunk, progress: Progress::default() });
        list.push(flight.clone());
        let (this, flown) = (self.clone(), flight.clone());
        let flying = future::spawn(async move { this.fly(flown, fails).await });
        self.flying.lock().unwrap().push(flying);
        Some(flight)
    }

    async fn fly(self: Arc<Self>, flight: Arc<Fetch>, fails: bool) {
        let landing = Landing::new(self.flights.clone(), flight.clone());
        for chunk in flight.first..flight.first + 2 {
            // As `wants` asks: another fetch may have brought it.
            if !self.has(chunk) {
                self.fetched.lock().unwrap().push(chunk);
                future::yield_now().await;
                self.stored.lock().unwrap().insert(chunk);
                flight.progress.stored();
            }
            if fails {
                return;
            }
        }
        landing.end(Ok(()));
    }
}

/// No change of the code that was tried has broken this one alone; the next two are the sharper ones.
#[test]
fn readers_of_one_chunk_share_one_fetch_and_all_hear_of_it() {
    explore(|| {
        let layer = Arc::new(Layer::default());
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let layer = layer.clone();
                future::spawn(async move { layer.read(0, false).await })
            })
            .collect();
        for reader in readers {
            block_on(reader).unwrap().unwrap();
        }
        layer.settle();
        let fetched = layer.fetched.lock().unwrap().clone();
        assert_eq!(fetched.iter().filter(|chunk| **chunk == 0).count(), 1, "{fetched:?}");
    });
}

/// Seen to fail with: no outcome where a fetch is broken off (readers wait for ever); the outcome told before the fetch is taken
/// off the list; the outcome looked at after the store in `wait`.
#[test]
fn a_fetch_that_is_broken_off_fails_those_who_wait_and_nobody_after_them() {
    explore(|| {
        let layer = Arc::new(Layer::default());
        let readers: Vec<_> = (0..CHUNKS)
            .map(|chunk| {
                let layer = layer.clone();
                future::spawn(async move { layer.read(chunk, chunk == 0).await })
            })
            .collect();
        for (chunk, reader) in (0..).zip(readers) {
            if block_on(reader).unwrap().is_ok() {
                assert!(layer.has(chunk));
            }
        }
        for chunk in 0..CHUNKS {
            // One that joins what others have left may be let down once more, by a fetch of theirs that is under way.
            let read = block_on(layer.read(chunk, false));
            assert!(read.is_ok() || chunk == 1, "{read:?}");
        }
        layer.settle();
    });
}

/// Seen to fail with: `stored` that wakes nobody.
#[test]
fn a_reader_goes_on_as_soon_as_its_own_chunk_is_there() {
    explore(|| {
        let fetch = Arc::new(Fetch { first: 0, progress: Progress::default() });
        let stored = Arc::new(Mutex::new(false));
        let reader = {
            let (fetch, stored) = (fetch.clone(), stored.clone());
            future::spawn(async move { fetch.progress.wait(|| Ok(*stored.lock().unwrap())).await })
        };
        *stored.lock().unwrap() = true;
        fetch.progress.stored();
        // The fetch does not end before the reader does.
        assert!(block_on(reader).unwrap().unwrap());
    });
}

fn limits() -> Limits {
    Limits { slots: 2, hydrate_slots: 1, settle: Duration::ZERO, waiting: [8; 3], starvation: Duration::from_secs(1) }
}

/// Takes a place, holds it for a moment and gives it back.
async fn hold(gate: Arc<Gate>, running: Arc<Mutex<usize>>, priority: Priority) {
    let urgency = Urgency::new(priority, 1);
    let permit = gate.acquire(&urgency).await.unwrap();
    *running.lock().unwrap() += 1;
    future::yield_now().await;
    assert!(*running.lock().unwrap() <= 2);
    *running.lock().unwrap() -= 1;
    drop(permit);
}

/// Has these requests made at once, and looks at the gate when all is over.
fn all_are_given_and_given_back(requests: &[Priority]) {
    let gate = Arc::new(Gate::new(limits()));
    let running = Arc::new(Mutex::new(0));
    let start = |priority: &Priority| future::spawn(hold(gate.clone(), running.clone(), *priority));
    let requests: Vec<_> = requests.iter().map(start).collect();
    for request in requests {
        block_on(request).unwrap();
    }
    assert_eq!((gate.running(), gate.waiting()), (0, [0; 3]));
    // Would wait for ever, since time does not pass.
    block_on(gate.yield_to_demand(Duration::from_secs(1)));
}

/// Seen to fail with: a permit that does not give its place back.
#[test]
fn places_are_given_to_all_and_given_back() {
    explore(|| {
        all_are_given_and_given_back(&[Priority::Demand, Priority::Prefetch, Priority::Hydrate, Priority::Demand]);
    });
}

/// Seen to fail with: the state of demand told after the lock of the queue was let go, as it was before this test. Only few take
/// part, since one must not move while the others come to their end.
#[test]
fn nobody_yields_to_demand_that_is_over() {
    explore(|| all_are_given_and_given_back(&[Priority::Hydrate, Priority::Demand]));
}

/// Seen to fail with: a drop of `Permit` that only ends what runs (a place in the queue that nobody waits for is granted).
#[test]
fn who_goes_away_while_waiting_or_becomes_urgent_holds_nobody_up() {
    explore(|| {
        let gate = Arc::new(Gate::new(limits()));
        let urgency = Arc::new(Urgency::new(Priority::Hydrate, 1));
        let holder = block_on(gate.acquire(&Urgency::new(Priority::Demand, 1))).unwrap();
        let waits = |urgency: Arc<Urgency>| {
            let gate = gate.clone();
            future::spawn(async move { drop(gate.acquire(&urgency).await.unwrap()) })
        };
        let (one, two) = (waits(urgency.clone()), waits(Arc::new(Urgency::new(Priority::Hydrate, 1))));
        let raising = {
            let (gate, urgency) = (gate.clone(), urgency.clone());
            future::spawn(async move { urgency.raise(&gate, Priority::Demand) })
        };
        let leaving = future::spawn(async move { two.abort() });
        block_on(raising).unwrap();
        // It is urgent now, so it has the place that is kept for those.
        block_on(one).unwrap();
        block_on(leaving).unwrap();
        drop(holder);
        let last = gate.clone();
        block_on(future::spawn(async move { drop(last.acquire(&Urgency::new(Priority::Hydrate, 1)).await.unwrap()) }))
            .unwrap();
    });
}
