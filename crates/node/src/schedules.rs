//! What layers, views and workers go through, run under a scheduler that tries orders out: the very files that keep the order,
//! here and in `millstream-snapshots`, with its locks in place of the usual ones. Each test says which change of the code it was
//! seen to fail on.

mod sync {
    pub(crate) use std::sync::PoisonError;

    pub(crate) use shuttle::sync::{Mutex, MutexGuard};

    /// Others may come before it, and it is on no other thread: there are enough of these.
    pub(crate) async fn spawn_blocking<T>(work: impl FnOnce() -> T) -> Result<T, std::convert::Infallible> {
        shuttle::future::yield_now().await;
        Ok(work())
    }
}

#[allow(dead_code)]
#[path = "admission.rs"]
mod admission;
mod hand_over;
mod mounts;
#[path = "../../snapshots/src/releases.rs"]
mod releases;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;

use millstream_oci::Digest;
use shuttle::future::{self, JoinHandle, block_on};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

use self::admission::{Admission, Turn};
use self::releases::Releases;
use self::sync::Mutex;

/// Orders that a test tries in each of two ways: `MILLSTREAM_SCHEDULES`, else few enough for every day.
fn schedules() -> usize {
    std::env::var("MILLSTREAM_SCHEDULES").ok().and_then(|number| number.parse().ok()).unwrap_or(2000)
}

/// Tries orders at random, and such as change seldom at the worst moments.
fn explore(test: fn()) {
    explore_some(schedules(), test);
}

fn explore_some(orders: usize, test: fn()) {
    let config = || {
        let mut config = Config::new();
        config.silence_warnings = true;
        // Enough for a database.
        config.stack_size = 1 << 20;
        config
    };
    Runner::new(RandomScheduler::new(orders), config()).run(test);
    Runner::new(PctScheduler::new(3, orders), config()).run(test);
}

/// A node with one layer. What it is admitted as counts up, so that a successor is told from what was removed.
#[derive(Debug)]
struct Node {
    layer: Digest,
    admission: Admission,
    releases: Releases,
    /// The database's records of snapshots.
    snapshots: Mutex<BTreeSet<u32>>,
    /// The store.
    stored: Mutex<Option<u32>>,
    /// How often it was admitted.
    admitted: Mutex<u32>,
    /// The layer that a view shows.
    shown: Mutex<Option<u32>>,
    /// Removals under way.
    removals: Mutex<Vec<JoinHandle<()>>>,
}

impl Node {
    /// With one snapshot, number 0.
    fn new() -> Arc<Self> {
        Arc::new(Self {
            layer: Digest::of(b"layer"),
            admission: Admission::default(),
            releases: Releases::default(),
            snapshots: Mutex::new([0].into()),
            stored: Mutex::new(Some(1)),
            admitted: Mutex::new(1),
            shown: Mutex::default(),
            removals: Mutex::default(),
        })
    }

    fn usable(&self) -> bool {
        !self.admission.is_dying(&self.layer) && self.stored.lock().unwrap().is_some()
    }

    fn remove_dying(&self, turn: &Turn) {
        let hide = |_: &[Digest]| {
            *self.shown.lock().unwrap() = None;
            Ok::<_, Infallible>(())
        };
        let remove = |_: &Digest| {
            *self.stored.lock().unwrap() = None;
            true
        };
        self.admission.remove_dying(turn, hide, remove).unwrap();
    }

    /// A `Prepare` that can be lazy: the decision, then the record.
    async fn pull(&self, snapshot: u32) -> bool {
        let mark = self.releases.mark();
        if !self.usable() {
            let turn = self.admission.turn().await;
            self.remove_dying(&turn);
            let missing = self.stored.lock().unwrap().is_none();
            if missing {
                let mut admitted = self.admitted.lock().unwrap();
                *admitted += 1;
                *self.stored.lock().unwrap() = Some(*admitted);
            }
        }
        if !self.usable() {
            return false;
        }
        let existing = || Ok::<_, Infallible>(self.snapshots.lock().unwrap().first().copied());
        let make = || {
            self.snapshots.lock().unwrap().insert(snapshot);
            Ok(snapshot)
        };
        self.releases.record(mark, &self.layer, existing, make).unwrap().is_some()
    }

    /// A `Remove`; the layer is removed in the background.
    fn remove(self: &Arc<Self>, snapshot: u32) {
        self.snapshots.lock().unwrap().remove(&snapshot);
        let shown = || Ok::<_, Infallible>(!self.snapshots.lock().unwrap().is_empty());
        let release = || {
            self.admission.give_back([self.layer]);
            let this = Arc::clone(self);
            let removal = future::spawn(async move {
                let turn = this.admission.turn().await;
                this.remove_dying(&turn);
            });
            self.removals.lock().unwrap().push(removal);
        };
        self.releases.release_unless(&self.layer, shown, release).unwrap();
    }

    /// A `Prepare` of a container: what is below it was looked up before, and is gone perhaps.
    fn show(&self) {
        let below = !self.snapshots.lock().unwrap().is_empty();
        if below {
            future_point();
            let build = || {
                let stored = *self.stored.lock().unwrap();
                if stored.is_some() {
                    *self.shown.lock().unwrap() = stored;
                }
            };
            self.admission.show(&[self.layer], build);
        }
    }

    /// Waits for what is under way, then looks whether what is recorded and shown is there.
    fn settle(&self) {
        loop {
            let removal = self.removals.lock().unwrap().pop();
            let Some(removal) = removal else { break };
            block_on(removal).unwrap();
        }
        let (stored, shown) = (*self.stored.lock().unwrap(), *self.shown.lock().unwrap());
        let snapshots = self.snapshots.lock().unwrap().clone();
        assert!(snapshots.is_empty() || stored.is_some(), "snapshots {snapshots:?} of a layer that was removed");
        assert!(shown.is_none() || shown == stored, "a view shows {shown:?}, the store has {stored:?}");
        if snapshots.is_empty() {
            assert!(!self.admission.is_dying(&self.layer), "nobody removes it");
        }
    }
}

/// Any time may pass here. The operation on an atomic is where others may come in between; a call of `yield_now` would make
/// them come rather often, and never long enough.
fn future_point() {
    shuttle::sync::atomic::AtomicBool::new(false).load(std::sync::atomic::Ordering::SeqCst);
}

/// Seen to fail with: no look at the releases since the decision (a snapshot of a layer that is gone); a release that asks outside
/// the log's lock whether the layer is used; a turn that others can have at the same time (what was admitted again is removed, as
/// it could be when the caller of `millstream gc` went away).
#[test]
fn no_snapshot_is_left_of_a_layer_that_was_removed() {
    explore(|| {
        let node = Node::new();
        let removing = {
            let node = node.clone();
            future::spawn(async move { node.remove(0) })
        };
        let pulls: Vec<_> = (1..3)
            .map(|snapshot| {
                let node = node.clone();
                future::spawn(async move {
                    if node.pull(snapshot).await && snapshot == 1 {
                        node.remove(1);
                    }
                })
            })
            .collect();
        let collecting = {
            let node = node.clone();
            future::spawn(async move {
                let turn = node.admission.turn().await;
                node.remove_dying(&turn);
            })
        };
        for task in pulls.into_iter().chain([removing, collecting]) {
            block_on(task).unwrap();
        }
        node.settle();
    });
}

/// Seen to fail with: a view that is built without asking whether its layer was given back, as it was before this test: between
/// the look at views and the removal from the store.
#[test]
fn no_view_is_left_of_a_layer_that_was_removed() {
    explore(|| {
        let node = Node::new();
        let tasks: Vec<_> = (0..4)
            .map(|task| {
                let node = node.clone();
                future::spawn(async move {
                    match task {
                        0 => node.remove(0),
                        1 => drop(node.pull(1).await),
                        _ => node.show(),
                    }
                })
            })
            .collect();
        for task in tasks {
            block_on(task).unwrap();
        }
        node.settle();
    });
}
