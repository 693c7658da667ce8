//! What starts of images read on this node, page by page in the order of first touch.
//!
//! A file's reads name its layer, not the image whose container reads it: a layer that two images share has one set of files. So a
//! recording takes in all reads of the image's layers while it runs, and the server, which has recordings of other nodes too,
//! leaves out what only some starts read.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream_profile::run::MAX_PAGES;
use millstream_profile::{PAGE_SIZE, PageRun, Profile, ProfileLayer, Recording};
use millstream_toc::DataRange;
use tokio::time::Instant;

/// A start is over when nothing new was read for so long.
const QUIET: Duration = Duration::from_secs(5);
/// And after this long in any case.
const LONGEST: Duration = Duration::from_secs(60);
/// Runs of one recording: a message to the server may have 1 MiB, and a run is some seven bytes of it.
const MAX_RUNS: usize = 100_000;
/// Recordings at once; more starts at once are not recorded.
const MOST: usize = 16;

/// A layer of a recording.
#[derive(Debug, Clone, Copy)]
pub struct Recorded {
    /// Its number on this node.
    pub number: u32,
    /// What it is called elsewhere.
    pub layer: ProfileLayer,
}

/// Writes down what starts read. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Recorder(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// Recordings under way: reads take no lock while there are none.
    active: AtomicUsize,
}

#[derive(Debug)]
struct State {
    sessions: Vec<Session>,
    next: u64,
    /// Layers with higher numbers are new to this worker, so that the kernel has nothing of them in its cache yet,
    old: u32,
    /// but these, which starts have read from since, or which were read ahead of one.
    read: HashSet<u32>,
}

#[derive(Debug)]
struct Session {
    id: u64,
    layers: Vec<Recorded>,
    fresh: Vec<bool>,
    /// Layers that somebody else reads from, too.
    mixed: Vec<bool>,
    seen: HashSet<(u32, u32)>,
    runs: Vec<PageRun>,
    begun: Instant,
    /// When something new was read last.
    last: Instant,
}

impl Session {
    fn touch(&mut self, number: u32, range: DataRange, now: Instant) -> bool {
        let Some(layer) = self.layers.iter().position(|layer| layer.number == number) else { return false };
        if self.mixed[layer] {
            return true;
        }
        let layer = u32::try_from(layer).unwrap_or(u32::MAX);
        let page = |at: u64| u32::try_from(at).unwrap_or(u32::MAX);
        for page in page(range.start / PAGE_SIZE)..page(range.end.div_ceil(PAGE_SIZE)) {
            if self.seen.len() as u64 >= MAX_PAGES || self.runs.len() >= MAX_RUNS {
                return true;
            }
            if !self.seen.insert((layer, page)) {
                continue;
            }
            self.last = now;
            match self.runs.last_mut() {
                Some(run) if run.layer == layer && run.end() == u64::from(page) => run.pages += 1,
                _ => self.runs.push(PageRun { layer, first: page, pages: 1 }),
            }
        }
        true
    }

    /// When it is over if nothing more is read.
    fn end(&self) -> Instant {
        (self.last + QUIET).min(self.begun + LONGEST)
    }
}

impl Recorder {
    /// Of a worker that found layers up to number `old` when it started: what the kernel has of those in its cache nobody
    /// knows.
    #[must_use]
    pub fn new(old: u32) -> Self {
        let state = State { sessions: Vec::new(), next: 0, old, read: HashSet::new() };
        Self(Arc::new(Inner { state: Mutex::new(state), active: AtomicUsize::new(0) }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a read of `range` of a layer.
    pub fn touch(&self, layer: u32, range: DataRange) {
        if self.0.active.load(Ordering::Relaxed) == 0 {
            return;
        }
        let now = Instant::now();
        let mut state = self.state();
        let State { sessions, read, .. } = &mut *state;
        for session in sessions {
            if session.touch(layer, range, now) {
                read.insert(layer);
            }
        }
    }

    /// Somebody else than a start reads from `layers`: what is read of them says nothing from now on, also to recordings under way.
    pub fn not_fresh(&self, layers: impl Iterator<Item = u32>) {
        let mut state = self.state();
        let State { sessions, read, .. } = &mut *state;
        for layer in layers {
            read.insert(layer);
            for session in &mut *sessions {
                for at in (0..session.layers.len()).filter(|at| session.layers[*at].number == layer) {
                    session.fresh[at] = false;
                    session.mixed[at] = true;
                }
            }
        }
    }

    /// Records a start that is about to read from `layers`. `None` where that would teach nothing: all of them were read before,
    /// the same is being recorded, or too much is.
    #[must_use]
    pub fn begin(&self, layers: Vec<Recorded>) -> Option<Running> {
        let mut state = self.state();
        let fresh: Vec<bool> =
            layers.iter().map(|layer| layer.number > state.old && !state.read.contains(&layer.number)).collect();
        let known = |session: &Session| session.layers.iter().map(|l| l.number).eq(layers.iter().map(|l| l.number));
        if !fresh.contains(&true) || state.sessions.len() >= MOST || state.sessions.iter().any(known) {
            return None;
        }
        let (id, now) = (state.next, Instant::now());
        state.next += 1;
        state.sessions.push(Session {
            id,
            mixed: vec![false; layers.len()],
            layers,
            fresh,
            seen: HashSet::new(),
            runs: Vec::new(),
            begun: now,
            last: now,
        });
        self.0.active.store(state.sessions.len(), Ordering::Relaxed);
        Some(Running { recorder: self.clone(), id })
    }
}

/// A recording under way; given up when it is dropped.
#[derive(Debug)]
pub struct Running {
    recorder: Recorder,
    id: u64,
}

impl Running {
    /// Waits until the start is over, and gives what it read; `None` when that was nothing, or says nothing.
    pub async fn over(self) -> Option<Recording> {
        loop {
            let end = self.recorder.state().sessions.iter().find(|session| session.id == self.id)?.end();
            if Instant::now() >= end {
                break;
            }
            tokio::time::sleep_until(end).await;
        }
        let session = self.take()?;
        if session.runs.is_empty() || !session.fresh.contains(&true) {
            return None;
        }
        let layers = session.layers.iter().map(|layer| layer.layer).collect();
        Some(Recording { read: Profile { layers, runs: session.runs }, fresh: session.fresh })
    }

    fn take(&self) -> Option<Session> {
        let mut state = self.recorder.state();
        let at = state.sessions.iter().position(|session| session.id == self.id)?;
        let session = state.sessions.swap_remove(at);
        self.recorder.0.active.store(state.sessions.len(), Ordering::Relaxed);
        Some(session)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.take());
    }
}

#[cfg(test)]
mod tests {
    use millstream_oci::Digest;

    use super::*;

    fn layer(number: u32) -> Recorded {
        let digest = Digest::of(&number.to_le_bytes());
        Recorded { number, layer: ProfileLayer { digest, toc: digest } }
    }

    fn pages(first: u64, end: u64) -> DataRange {
        DataRange::new(first * PAGE_SIZE, end * PAGE_SIZE)
    }

    #[tokio::test(start_paused = true)]
    async fn pages_are_noted_once_in_the_order_of_first_touch() {
        let recorder = Recorder::new(10);
        let running = recorder.begin(vec![layer(11), layer(12)]).unwrap();
        recorder.touch(12, DataRange::new(5 * PAGE_SIZE + 7, 6 * PAGE_SIZE + 1));
        recorder.touch(11, pages(0, 2));
        recorder.touch(11, pages(2, 3));
        recorder.touch(12, pages(4, 8));
        recorder.touch(99, pages(0, 8));
        let recording = running.over().await.unwrap();
        assert_eq!(recording.read.numbers(), [1, 5, 2, 0, 0, 3, 1, 4, 1, 1, 7, 1]);
        assert_eq!(recording.fresh, [true, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_is_over_when_nothing_new_is_read_or_it_takes_too_long() {
        let recorder = Recorder::new(0);
        let (running, begun) = (recorder.begin(vec![layer(1)]).unwrap(), Instant::now());
        let over = tokio::spawn(running.over());
        for page in 0..3 {
            tokio::time::sleep(QUIET / 2).await;
            recorder.touch(1, pages(page, page + 1));
            // What was read before does not count.
            recorder.touch(1, pages(0, 1));
        }
        assert_eq!(over.await.unwrap().unwrap().read.pages(), 3);
        assert_eq!(begun.elapsed(), QUIET / 2 * 3 + QUIET);

        let (running, begun) = (recorder.begin(vec![layer(2)]).unwrap(), Instant::now());
        let over = tokio::spawn(async move {
            running.over().await;
            begun.elapsed()
        });
        while !over.is_finished() {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let page = begun.elapsed().as_secs();
            recorder.touch(2, pages(page, page + 1));
        }
        assert_eq!(over.await.unwrap(), LONGEST);
        assert_eq!(recorder.0.active.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_kernel_may_have_in_its_cache_is_not_fresh() {
        let recorder = Recorder::new(5);
        assert!(recorder.begin(vec![layer(4), layer(5)]).is_none(), "here before this worker");
        let running = recorder.begin(vec![layer(5), layer(6)]).unwrap();
        assert!(recorder.begin(vec![layer(5), layer(6)]).is_none(), "the same start");
        recorder.touch(6, pages(0, 1));
        assert_eq!(running.over().await.unwrap().fresh, [false, true]);
        assert!(recorder.begin(vec![layer(6)]).is_none(), "read before");
        let (running, other) =
            (recorder.begin(vec![layer(8), layer(9)]).unwrap(), recorder.begin(vec![layer(8)]).unwrap());
        recorder.touch(8, pages(0, 1));
        recorder.not_fresh([8].into_iter());
        recorder.touch(8, pages(1, 9));
        recorder.touch(9, pages(3, 4));
        let recording = running.over().await.unwrap();
        assert_eq!((recording.fresh, recording.read.numbers()), (vec![false, true], vec![0, 0, 1, 1, 3, 1]));
        assert!(other.over().await.is_none(), "read by somebody else");
        assert!(recorder.begin(vec![layer(8)]).is_none());
        let running = recorder.begin(vec![layer(7)]).unwrap();
        assert!(running.over().await.is_none(), "nothing was read");
        assert!(recorder.begin(vec![layer(7)]).is_some(), "so that it is still fresh");
    }
}
