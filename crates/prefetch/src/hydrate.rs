//! Makes layers wholly local, a few at a time, and proves them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use millstream_chunkstore::{Layer, LayerState, Refusal};
use millstream_source::{ErrorKind, SourceError, names};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::attached::Attached;
use crate::background::at_low_priority;
use crate::deliver::store_failed;
use crate::fetcher::Shared;
use crate::part::Pass;
use crate::parts;
use crate::rebuild::{Verdict, rebuild};
use crate::skeleton::{self, Outcome};

/// How often it is looked whether there is room for a layer, before others have their turn.
const ROOM_LOOKS: u32 = 8;
/// Between two looks. Content of other layers is given up meanwhile.
const ROOM_PAUSE: Duration = Duration::from_millis(250);
/// In how many bytes the room for parts under way is counted.
const PLACE: u64 = 4096;

/// Where the hydration of a layer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HydrationState {
    /// Nobody asked for it.
    #[default]
    Idle,
    /// Other layers come first.
    Queued,
    /// Under way.
    Running,
    /// It failed and is tried again after a pause.
    Waiting,
    /// The layer is wholly local and proven.
    Verified,
    /// The layer was proven wrong.
    Quarantined,
}

/// How far a layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Where its hydration stands.
    pub state: HydrationState,
    /// Compressed bytes that the pass under way has read.
    pub blob_bytes: u64,
    /// Compressed bytes of the layer.
    pub blob_size: u64,
    /// Bytes of file content in the store.
    pub bytes_present: u64,
    /// Bytes of file content of the layer.
    pub bytes_total: u64,
    /// Why the last pass failed.
    pub last_error: Option<String>,
}

/// What is known of the hydration of one layer.
#[derive(Debug, Default)]
pub(crate) struct Status {
    inner: Mutex<Inner>,
    blob_bytes: AtomicU64,
    /// Whether somebody wants this layer before others, and also while hydration is held back.
    first: watch::Sender<bool>,
    /// The layer could not be proven by its skeleton.
    distrusted: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    state: HydrationState,
    failures: u32,
    last_error: Option<String>,
}

impl Status {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: HydrationState) {
        self.lock().state = state;
    }

    /// Notes a failed pass; the number of those so far.
    fn fail(&self, error: &SourceError) -> u32 {
        let mut inner = self.lock();
        inner.state = HydrationState::Waiting;
        inner.failures = inner.failures.saturating_add(1);
        inner.last_error = Some(error.to_string());
        inner.failures
    }

    /// From now on the layer is proven by its blob only.
    pub(crate) fn distrust_skeleton(&self) {
        self.distrusted.store(true, Ordering::Relaxed);
    }

    /// Compressed bytes that the pass under way has read.
    pub(crate) fn blob_bytes(&self) -> u64 {
        self.blob_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn progress(&self, layer: &Layer) -> Progress {
        let inner = self.lock();
        let state = match layer.state() {
            // It was, and then its content was given up.
            LayerState::Lazy if inner.state == HydrationState::Verified => HydrationState::Idle,
            LayerState::Lazy => inner.state,
            LayerState::Verified => HydrationState::Verified,
            LayerState::Quarantined { .. } => HydrationState::Quarantined,
        };
        Progress {
            state,
            blob_bytes: self.blob_bytes.load(Ordering::Relaxed),
            blob_size: layer.toc().blob_size(),
            bytes_present: layer.bytes_present(),
            bytes_total: layer.bytes_total(),
            last_error: inner.last_error.clone(),
        }
    }
}

/// The queue of layers to hydrate, with the switch that holds it back.
pub(crate) struct Hydration {
    shared: Arc<Shared>,
    enabled: watch::Sender<bool>,
    queue: Mutex<Queue>,
}

/// At most one place for each attached layer, as [`Status`] sees to.
#[derive(Default)]
struct Queue {
    /// Those that somebody wants first. They have as many places of their own as all others together: the others may be held
    /// back.
    first: VecDeque<Arc<Attached>>,
    waiting: VecDeque<Arc<Attached>>,
    running_first: usize,
    running: usize,
}

/// Whether a pass may go on: hydration is not held back, or this layer is wanted first.
#[derive(Debug, Clone)]
pub(crate) struct Permission {
    enabled: watch::Receiver<bool>,
    first: watch::Receiver<bool>,
}

impl Permission {
    /// Returns when the pass may go on; `false` when hydration was ended.
    pub(crate) async fn given(&mut self) -> bool {
        self.turns(true).await
    }

    /// Returns when the pass may not go on, or hydration was ended.
    pub(crate) async fn withdrawn(&mut self) {
        self.turns(false).await;
    }

    async fn turns(&mut self, wanted: bool) -> bool {
        loop {
            if (*self.enabled.borrow_and_update() || *self.first.borrow_and_update()) == wanted {
                return true;
            }
            let changed = tokio::select! {
                changed = self.enabled.changed() => changed,
                changed = self.first.changed() => changed,
            };
            if changed.is_err() {
                return false;
            }
        }
    }
}

impl Hydration {
    pub(crate) fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self { shared, enabled: watch::Sender::new(true), queue: Mutex::default() })
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.enabled.send_if_modified(|before| std::mem::replace(before, enabled) != enabled);
    }

    /// Queues a layer that is neither queued, under way nor done.
    pub(crate) fn submit(self: &Arc<Self>, attached: &Arc<Attached>) {
        if attached.layer.state() != LayerState::Lazy {
            return;
        }
        {
            let mut status = attached.hydration.lock();
            // A layer that was verified and is lazy had its content given up.
            if !matches!(status.state, HydrationState::Idle | HydrationState::Verified) {
                return;
            }
            status.state = HydrationState::Queued;
        }
        self.enqueue(attached.clone());
    }

    /// Wants a layer before those that only wait, and also while hydration is held back. One that failed is tried again when
    /// its pause is over.
    pub(crate) fn submit_first(self: &Arc<Self>, attached: &Arc<Attached>) {
        attached.hydration.first.send_replace(true);
        {
            let mut queue = self.lock();
            if let Some(at) = queue.waiting.iter().position(|waiting| Arc::ptr_eq(waiting, attached)) {
                queue.waiting.remove(at);
                queue.first.push_back(attached.clone());
            }
        }
        self.submit(attached);
        self.advance();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Layers that wait for their turn.
    pub(crate) fn waiting(&self) -> usize {
        let queue = self.lock();
        queue.first.len() + queue.waiting.len()
    }

    fn enqueue(self: &Arc<Self>, attached: Arc<Attached>) {
        {
            let mut queue = self.lock();
            let first = *attached.hydration.first.borrow();
            if first { queue.first.push_back(attached) } else { queue.waiting.push_back(attached) }
        }
        self.advance();
    }

    /// Starts what may run now.
    fn advance(self: &Arc<Self>) {
        let mut queue = self.lock();
        let places = self.shared.options.hydrations.max(1);
        while queue.running_first < places {
            let Some(attached) = queue.first.pop_front() else { break };
            if !attached.cancel.is_cancelled() {
                queue.running_first += 1;
                self.start(attached, true);
            }
        }
        while queue.running < places {
            let Some(attached) = queue.waiting.pop_front() else { break };
            if !attached.cancel.is_cancelled() {
                queue.running += 1;
                self.start(attached, false);
            }
        }
    }

    fn start(self: &Arc<Self>, attached: Arc<Attached>, first: bool) {
        let turn = Turn { hydration: self.clone(), first };
        self.shared.runtime.spawn(async move { turn.hydration.run(&attached).await });
    }

    async fn run(self: &Arc<Self>, attached: &Arc<Attached>) {
        attached.hydration.set(HydrationState::Running);
        let Some(verdict) = attached.cancel.run_until_cancelled(self.pass(attached)).await else { return };
        let layer = attached.layer.digest();
        match verdict {
            Ok(()) => {
                attached.hydration.set(HydrationState::Verified);
                self.shared.events.verified(&layer);
            }
            Err(Failure::Quarantine(reason)) => {
                attached.hydration.set(HydrationState::Quarantined);
                tracing::error!({ names::LAYER } = %layer, %reason, "layer is quarantined: its TOC is wrong");
                self.shared.events.quarantined(&layer, &reason);
            }
            Err(Failure::Again(error)) => {
                let failures = attached.hydration.fail(&error);
                tracing::warn!(
                    { names::LAYER } = %layer, { names::CODE } = error.kind.code(), %error, failures, "hydration failed",
                );
                self.shared.events.failed(&layer, &error);
                self.again_later(attached.clone(), failures);
            }
        }
    }

    /// Queues the layer again after a pause, during which others have its place.
    fn again_later(self: &Arc<Self>, attached: Arc<Attached>, failures: u32) {
        let hydration = self.clone();
        let pause = self.shared.options.hydration_pause(failures);
        self.shared.runtime.spawn(async move {
            if attached.cancel.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
                attached.hydration.set(HydrationState::Queued);
                hydration.enqueue(attached);
            }
        });
    }

    /// Makes the layer local and judges it: by its skeleton if that is the short way, else by its blob.
    async fn pass(&self, attached: &Arc<Attached>) -> Result<(), Failure> {
        self.room_for(&attached.layer).await?;
        // Again: what came since for other layers may be of use for this one.
        self.shared.share_all(attached).await;
        let status = &attached.hydration;
        let permission = Permission { enabled: self.enabled.subscribe(), first: status.first.subscribe() };
        let pass = Pass { shared: &self.shared, attached, permission, used: Mutex::default() };
        let failures = status.lock().failures;
        let outcome = match status.distrusted.load(Ordering::Relaxed) {
            true => Outcome::Blob,
            false => skeleton::prove(&pass, failures, self.shared.options.budget).await,
        };
        match outcome {
            Outcome::Blob => self.whole(pass).await,
            Outcome::Failed(error) => Err(Failure::Again(error)),
            Outcome::Proven => self.finish(attached).await,
        }
    }

    /// A layer that would not fit is not begun: half of it would only take the place of others.
    async fn room_for(&self, layer: &Layer) -> Result<(), Failure> {
        let missing = layer.bytes_total().saturating_sub(layer.bytes_present());
        for _ in 0..ROOM_LOOKS {
            if self.shared.store.space().claim(missing, layer.last_use()) {
                return Ok(());
            }
            tokio::time::sleep(ROOM_PAUSE).await;
        }
        let message = format!(
            "{}: {missing} bytes of layer {} are missing and do not fit into the store; hint: store.quota, or a larger disk",
            Refusal::Full.code(),
            layer.digest()
        );
        Err(Failure::Again(SourceError::new(ErrorKind::Local, message)))
    }

    /// Reads the whole blob once, stores it and judges it.
    async fn whole(&self, pass: Pass<'_>) -> Result<(), Failure> {
        let (shared, attached) = (&*self.shared, pass.attached);
        attached.hydration.blob_bytes.store(0, Ordering::Relaxed);
        let (sender, parts) = mpsc::channel(1);
        let (layer, budget) = (attached.layer.clone(), shared.options.budget);
        let built = at_low_priority(move || rebuild(&layer, parts, budget));
        let verdict = match tokio::join!(built, feed(&pass, sender)) {
            (Err(error), _) => Verdict::Failed(error),
            // The builder was told nothing but that the parts ended.
            (Ok(_), Err(error)) => Verdict::Failed(error),
            (Ok(verdict), Ok(())) => verdict,
        };
        match verdict {
            Verdict::Failed(error) => Err(Failure::Again(error)),
            Verdict::WrongBytes => Err(Failure::Again(blame(&pass))),
            Verdict::WrongToc(reason) => {
                self.blocking(attached, {
                    let reason = reason.clone();
                    move |layer| layer.quarantine(&reason)
                })
                .await?;
                Err(Failure::Quarantine(reason))
            }
            Verdict::Proven => self.finish(attached).await,
        }
    }

    async fn finish(&self, attached: &Attached) -> Result<(), Failure> {
        self.blocking(attached, |layer| layer.sync().and_then(|()| layer.set_verified())).await
    }

    async fn blocking(
        &self,
        attached: &Attached,
        work: impl FnOnce(&Layer) -> Result<(), millstream_chunkstore::StoreError> + Send + 'static,
    ) -> Result<(), Failure> {
        let layer = attached.layer.clone();
        match self.shared.runtime.spawn_blocking(move || work(&layer)).await {
            Ok(result) => result.map_err(|e| Failure::Again(store_failed(e))),
            Err(error) => Err(Failure::Again(SourceError::new(ErrorKind::Local, error.to_string()))),
        }
    }
}

/// Why a pass did not end with a verified layer.
enum Failure {
    Quarantine(String),
    Again(SourceError),
}

/// One of the places of layers under way; given on when it is dropped, however the task ends.
struct Turn {
    hydration: Arc<Hydration>,
    first: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        {
            let mut queue = self.hydration.lock();
            if self.first { queue.running_first -= 1 } else { queue.running -= 1 }
        }
        self.hydration.advance();
    }
}

/// Fetches the parts, a few at once, and hands them on in order. Ends early when the builder takes no more.
async fn feed(pass: &Pass<'_>, sender: mpsc::Sender<bytes::Bytes>) -> Result<(), SourceError> {
    let options = &pass.shared.options;
    let ranges = parts::of_blob(pass.attached.layer.toc().blob_size(), || pass.shared.part_size.largest());
    let places = u32::try_from(options.part_bytes_in_flight / PLACE).unwrap_or(u32::MAX).max(1);
    let room = Arc::new(Semaphore::new(places as usize));
    // In order, so that the part that everything waits for never waits for a place.
    let begun = futures::stream::iter(ranges).then(|range| {
        let wanted = u32::try_from(range.len().div_ceil(PLACE)).unwrap_or(u32::MAX).min(places);
        Arc::clone(&room).acquire_many_owned(wanted).map(move |place| (range, place))
    });
    let fetch = |(range, place)| pass.part(range).map(move |part| part.map(|part| (part, place)));
    let mut parts = std::pin::pin!(begun.map(fetch).buffered(options.parts_in_flight.max(1)));
    while let Some(part) = parts.next().await {
        let (part, _place) = part?;
        pass.attached.hydration.blob_bytes.fetch_add(part.len() as u64, Ordering::Relaxed);
        if sender.send(part).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The bytes were not the blob: any source that gave some of them is asked last next time.
fn blame(pass: &Pass<'_>) -> SourceError {
    pass.shared.tally.mismatch();
    for source in pass.used.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        source.blame();
    }
    let message = format!("blob {} does not match its digest", pass.attached.layer.digest());
    SourceError::new(ErrorKind::DigestMismatch, message)
}
