//! A layer with the places it can be fetched from.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millstream_chunkstore::Layer;
use millstream_source::{BlobSource, ContentSource, WindowSource};
use tokio_util::sync::CancellationToken;

use crate::around::{Fetched, RecentReads};
use crate::flight::Flight;
use crate::hydrate::Status;
use crate::landing::Flights;
use crate::replay::Replay;
use crate::share::Sharing;

/// Where the layers of one image come from.
#[derive(Debug, Clone)]
pub struct ImageSources {
    /// Compressed bytes.
    pub blob: Arc<dyn BlobSource>,
    /// Windows to decompress them with.
    pub windows: Arc<dyn WindowSource>,
    /// Plain content, asked when `blob` fails.
    pub content: Option<Arc<dyn ContentSource>>,
}

/// Sources of one image, with what this layer has seen of them.
#[derive(Debug)]
pub(crate) struct Source {
    /// Unlike that of any other source of the layer.
    pub(crate) id: u64,
    pub(crate) image: ImageSources,
    mismatches: AtomicU32,
}

impl Source {
    /// Wrong bytes came from here: ask here last.
    pub(crate) fn blame(&self) {
        self.mismatches.fetch_add(1, Ordering::Relaxed);
    }
}

/// Everything that is under way for one layer.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) layer: Arc<Layer>,
    /// Ends all work for the layer.
    pub(crate) cancel: CancellationToken,
    pub(crate) hydration: Status,
    pub(crate) sharing: Sharing,
    sources: Mutex<Vec<Arc<Source>>>,
    next_source: AtomicU64,
    flights: Flights<Flight>,
    recent: Mutex<RecentReads>,
    fetched: Mutex<Fetched>,
    replays: Mutex<Vec<Arc<Replay>>>,
}

impl Attached {
    pub(crate) fn new(layer: Arc<Layer>) -> Self {
        Self {
            layer,
            cancel: CancellationToken::new(),
            hydration: Status::default(),
            sharing: Sharing::default(),
            sources: Mutex::default(),
            next_source: AtomicU64::new(0),
            flights: Flights::default(),
            recent: Mutex::default(),
            fetched: Mutex::default(),
            replays: Mutex::default(),
        }
    }

    /// Adds sources as the first to be tried and keeps the newest `keep`.
    pub(crate) fn add_sources(&self, image: ImageSources, keep: usize) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |source: &Arc<Source>| Arc::ptr_eq(&source.image.blob, &image.blob);
        let mismatches = match sources.iter().position(same) {
            Some(at) => sources.remove(at).mismatches.load(Ordering::Relaxed),
            None => 0,
        };
        let id = self.next_source.fetch_add(1, Ordering::Relaxed);
        sources.insert(0, Arc::new(Source { id, image, mismatches: AtomicU32::new(mismatches) }));
        sources.truncate(keep.max(1));
    }

    /// The sources in the order in which to try them: those that gave wrong bytes last, the newest first.
    pub(crate) fn sources(&self) -> Vec<Arc<Source>> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner).clone();
        sources.sort_by_key(|source| source.mismatches.load(Ordering::Relaxed));
        sources
    }

    /// Fetches under way; as many as the queues of the scheduler allow.
    pub(crate) fn flights(&self) -> MutexGuard<'_, Vec<Arc<Flight>>> {
        self.flights.lock()
    }

    /// The list itself.
    pub(crate) fn all_flights(&self) -> Flights<Flight> {
        self.flights.clone()
    }

    pub(crate) fn fetched(&self) -> MutexGuard<'_, Fetched> {
        self.fetched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replays under way that bring pages of it; as many as may run at once.
    pub(crate) fn replays(&self) -> MutexGuard<'_, Vec<Arc<Replay>>> {
        self.replays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn recent(&self) -> MutexGuard<'_, RecentReads> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
