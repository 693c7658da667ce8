//! Startup profiles: recordings are taken in and merged, packs are made of them in the background, and what is there is found.
//!
//! Between servers that share a store the last writer wins, for recordings and for the plan that was made of them: a recording
//! may be lost then, and the next one makes up for it. Plan and pages of a pack are one object and always belong together.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream_oci::Platform;
use millstream_profile::{PAGE_SIZE, Profile, ProfileLayer, Recording, merge};
use millstream_source::{BlobSource, names};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tracing::{Instrument, Span};

use crate::ServeError;
use crate::bounded::Bounded;
use crate::content::{Content, blocking};
use crate::limits::Limits;
use crate::metrics::ServerMetrics;
use crate::store::Store;

mod inherit;
mod kept;
mod pack;
mod send;

pub(crate) use kept::{ImageKey, KeptProfile};
use kept::{KeptRecording, LatestProfile, OpenPack, PackHead, unless_damaged};
pub(crate) use send::{Line, plan_message};

/// Recordings of one image that are kept: the newest.
const KEPT: usize = 8;
/// Recordings that are taken in or wait for it; more are turned away.
const TAKING: usize = 8;
/// Longest time of taking one in.
const TAKE_DEADLINE: Duration = Duration::from_secs(60);
/// Images whose pack is made or waits for it; for more none is made until somebody asks again.
const QUEUE: usize = 64;
/// Packs that are made at a time.
const PACKS_AT_ONCE: usize = 2;
/// How long an image waits for its turn.
const QUEUE_PATIENCE: Duration = Duration::from_secs(600);
/// Longest time of making one pack.
const PACK_DEADLINE: Duration = Duration::from_secs(600);
/// After a pack could not be made, it is not tried again for so long.
const PACK_PAUSE: Duration = Duration::from_secs(60);
/// Images of which it is remembered that their pack could not be made.
const FAILURES: u64 = 1024;
/// A plan of [`KEPT`] recordings stays as it is until the pages of the next one differ by one of so many.
const STEADY: usize = 64;

/// What startup profiles may cost.
#[derive(Debug, Clone)]
pub struct ProfileOptions {
    /// Bytes of pages of one image's profile, at most [`millstream_profile::run::MAX_PAGES`] pages; zero: there are no profiles.
    pub max: u64,
}

impl Default for ProfileOptions {
    fn default() -> Self {
        Self { max: 256 << 20 }
    }
}

/// Where a request for an image comes from.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) key: ImageKey,
    pub(crate) platform: Platform,
    /// Layers of the image that can be served, each once, bottom first.
    pub(crate) layers: Vec<ProfileLayer>,
    /// Reads with the right of whoever asks.
    pub(crate) source: Arc<dyn BlobSource>,
}

impl Wanted {
    /// Whether a profile is of this image as it is served now.
    fn has_layers_of(&self, kept: &KeptProfile) -> bool {
        kept.layers.iter().all(|layer| self.layers.contains(layer))
    }
}

/// What is known of an image.
pub(crate) struct Found {
    pub(crate) kept: KeptProfile,
    pub(crate) pack: Option<OpenPack>,
}

/// Keeps startup profiles.
pub(crate) struct Profiles {
    store: Store,
    content: Arc<Content>,
    metrics: ServerMetrics,
    limits: Limits,
    scratch: PathBuf,
    /// Pages of one profile.
    most: u64,
    /// Whether packs are made and sent.
    packs: bool,
    taking: Semaphore,
    /// Held from reading an image's recordings to writing them.
    one_at_a_time: tokio::sync::Mutex<()>,
    /// Held while a profile is carried over.
    carrying: tokio::sync::Mutex<()>,
    makers: Semaphore,
    /// Images whose pack is made or waits for it, with whoever wants it once more after that.
    under_way: Mutex<HashMap<ImageKey, Option<Arc<dyn BlobSource>>>>,
    failed: Mutex<Bounded<ImageKey, Instant>>,
}

impl Profiles {
    pub(crate) fn new(
        store: Store,
        content: Arc<Content>,
        metrics: ServerMetrics,
        limits: Limits,
        scratch: PathBuf,
        options: &ProfileOptions,
        packs: bool,
    ) -> Self {
        Self {
            store,
            content,
            metrics,
            limits,
            scratch,
            most: options.max / PAGE_SIZE,
            packs,
            taking: Semaphore::new(TAKING),
            one_at_a_time: tokio::sync::Mutex::default(),
            carrying: tokio::sync::Mutex::default(),
            makers: Semaphore::new(PACKS_AT_ONCE),
            under_way: Mutex::default(),
            failed: Mutex::new(Bounded::new(FAILURES)),
        }
    }

    /// Whether there are any.
    pub(crate) const fn are_kept(&self) -> bool {
        self.most > 0
    }

    /// Takes in a recording whose layers are those of `wanted`; `false`: it was turned away.
    pub(crate) async fn take(self: &Arc<Self>, wanted: Wanted, recording: Recording) -> Result<bool, ServeError> {
        let Ok(_place) = self.taking.try_acquire() else { return Ok(false) };
        let kept = timeout(TAKE_DEADLINE, self.keep(&wanted, recording)).await;
        kept.unwrap_or(Err(ServeError::TimedOut { what: "taking in a recording" }))?;
        self.want_pack(wanted.key, wanted.source);
        Ok(true)
    }

    async fn keep(&self, wanted: &Wanted, mut recording: Recording) -> Result<(), ServeError> {
        let _one = self.one_at_a_time.lock().await;
        let Wanted { key, platform, layers, .. } = wanted;
        recording.read = recording.read.cut(self.most);
        let before = unless_damaged(self.store.recordings(key).await)?;
        let old = unless_damaged(self.store.profile(key).await)?;
        let (layers, most) = (layers.clone(), self.most);
        let for_merge = old.clone();
        let (kept, profile) = blocking(move || merged(before, &recording, &layers, for_merge.as_ref(), most)).await?;
        self.store.put_recordings(key, &kept).await?;
        if old.as_ref() != Some(&profile) {
            self.store.put_profile(key, &profile).await?;
        }
        let latest = LatestProfile { repository: key.repository.clone(), manifest: key.manifest };
        if unless_damaged(self.store.latest_profile(&key.repository, platform).await)?.as_ref() != Some(&latest) {
            self.store.put_latest_profile(platform, &latest).await?;
        }
        Ok(())
    }

    /// What is known of an image: with its pages if `pages` and they are there, else they will be made.
    pub(crate) async fn find(self: &Arc<Self>, wanted: &Wanted, pages: bool) -> Result<Option<Found>, ServeError> {
        let pages = pages && self.packs;
        let mut newest = self.newest(wanted).await?;
        let pack = if pages { self.pack_of(wanted).await? } else { None };
        if newest.is_none() && pack.is_none() {
            newest = self.inherit(wanted).await?;
        }
        let is_current = |pack: &OpenPack| newest.as_ref().is_none_or(|new| new.has_plan_of(&pack.head.profile));
        if pages && newest.is_some() && !pack.as_ref().is_some_and(is_current) {
            self.want_pack(wanted.key.clone(), Arc::clone(&wanted.source));
        }
        Ok(match (pack, newest) {
            // Pages of the plan before are worth more than none of the newest.
            (Some(pack), newest) => {
                let mut kept = pack.head.profile.clone();
                if let Some(newest) = newest.filter(|newest| newest.has_plan_of(&kept)) {
                    kept.recordings = newest.recordings;
                }
                Some(Found { kept, pack: Some(pack) })
            }
            (None, newest) => newest.map(|kept| Found { kept, pack: None }),
        })
    }

    /// The newest plan of an image, if it has pages of its layers as they are served now.
    async fn newest(&self, wanted: &Wanted) -> Result<Option<KeptProfile>, ServeError> {
        let Some(kept) = unless_damaged(self.store.profile(&wanted.key).await)? else { return Ok(None) };
        Ok(self.usable(wanted, kept))
    }

    fn usable(&self, wanted: &Wanted, kept: KeptProfile) -> Option<KeptProfile> {
        if kept.runs.is_empty() || !wanted.has_layers_of(&kept) {
            return None;
        }
        // The limit may have been larger when it was made.
        Some(KeptProfile { runs: kept.profile()?.cut(self.most).numbers(), ..kept })
    }

    async fn pack_of(&self, wanted: &Wanted) -> Result<Option<OpenPack>, ServeError> {
        let pack = unless_damaged(self.store.pack(&wanted.key).await)?;
        Ok(pack.filter(|pack| !pack.head.profile.runs.is_empty() && wanted.has_layers_of(&pack.head.profile)))
    }

    /// Has the pack of an image's newest plan made, unless it is there. One at a time is made of an image; if it is under way, it
    /// is looked once more afterwards.
    fn want_pack(self: &Arc<Self>, key: ImageKey, source: Arc<dyn BlobSource>) {
        let rests = lock(&self.failed).get(&key).is_some_and(|failed| failed.elapsed() < PACK_PAUSE);
        if !self.packs || rests {
            return;
        }
        let mut under_way = lock(&self.under_way);
        if let Some(again) = under_way.get_mut(&key) {
            *again = Some(source);
            return;
        }
        if under_way.len() >= QUEUE {
            return;
        }
        under_way.insert(key.clone(), None);
        drop(under_way);
        let mut turn = Turn { profiles: Arc::clone(self), key, is_over: false };
        let work = async move {
            let mut source = source;
            loop {
                if let Err(error) = turn.profiles.make_pack(&turn.key, &*source).await {
                    tracing::warn!(
                        { names::CODE } = error.name(), %error, manifest = %turn.key.manifest,
                        "the pages of a startup profile could not be put together"
                    );
                    lock(&turn.profiles.failed).insert(turn.key.clone(), Instant::now(), 1);
                    break;
                }
                match turn.again() {
                    Some(next) => source = next,
                    None => break,
                }
            }
        };
        tokio::spawn(work.instrument(Span::current()));
    }

    async fn make_pack(&self, key: &ImageKey, source: &dyn BlobSource) -> Result<(), ServeError> {
        let exhausted = |_| ServeError::Exhausted { what: "packs", limit: PACKS_AT_ONCE };
        let _maker = timeout(QUEUE_PATIENCE, self.makers.acquire()).await.map_err(exhausted)?;
        let _place = self.limits.admit_work(QUEUE_PATIENCE).await?;
        let Some(kept) = unless_damaged(self.store.profile(key).await)? else { return Ok(()) };
        let Some(profile) = kept.profile().map(|profile| profile.cut(self.most)) else { return Ok(()) };
        let kept = KeptProfile::new(&profile, kept.recordings, kept.from);
        let known = unless_damaged(self.store.pack(key).await)?;
        if profile.runs.is_empty() || known.is_some_and(|pack| pack.head.profile.has_plan_of(&kept)) {
            return Ok(());
        }
        let watch = self.metrics.making_pack();
        let made = timeout(PACK_DEADLINE, self.put_together(key, source, &profile, kept)).await;
        let bytes = made.unwrap_or(Err(ServeError::TimedOut { what: "putting the pages together" }))?;
        watch.end(bytes);
        tracing::info!(manifest = %key.manifest, bytes, "pages of a startup profile put together");
        Ok(())
    }

    /// Makes and stores the pack; its bytes.
    async fn put_together(
        &self,
        key: &ImageKey,
        source: &dyn BlobSource,
        profile: &Profile,
        kept: KeptProfile,
    ) -> Result<u64, ServeError> {
        let made = pack::make(&self.content, source, profile, &self.scratch).await?;
        let head =
            PackHead { profile: kept, sizes: made.sizes, size: made.size, digest: made.digest.to_hex().to_string() };
        self.store.put_pack(key, &head, made.packed).await?;
        Ok(made.size)
    }
}

/// The pack of one image, made or waiting for it, however that ends.
struct Turn {
    profiles: Arc<Profiles>,
    key: ImageKey,
    is_over: bool,
}

impl Turn {
    /// Whoever wants it once more; `None`: it is over.
    fn again(&mut self) -> Option<Arc<dyn BlobSource>> {
        let mut under_way = lock(&self.profiles.under_way);
        let again = under_way.get_mut(&self.key).and_then(Option::take);
        if again.is_none() {
            // Under the lock: whoever comes now begins anew.
            under_way.remove(&self.key);
            self.is_over = true;
        }
        again
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.is_over {
            lock(&self.profiles.under_way).remove(&self.key);
        }
    }
}

/// The recordings that are kept from now on, and what follows from them. Blocks.
fn merged(
    before: Vec<KeptRecording>,
    recording: &Recording,
    layers: &[ProfileLayer],
    old: Option<&KeptProfile>,
    most: u64,
) -> (Vec<KeptRecording>, KeptProfile) {
    let mut recordings: Vec<Recording> = before.iter().filter_map(KeptRecording::recording).collect();
    // Of tables that were made anew since, nothing can be said.
    recordings.retain(|recording| recording.read.layers.iter().any(|layer| layers.contains(layer)));
    recordings.push(recording.clone());
    let surplus = recordings.len().saturating_sub(KEPT);
    recordings.drain(..surplus);
    let profile = merge(layers, &recordings, most);
    let count = u32::try_from(recordings.len()).unwrap_or(u32::MAX);
    let kept = recordings.iter().map(KeptRecording::new).collect();
    let new = KeptProfile::new(&profile, count, None);
    let is_steady = |old: &&KeptProfile| {
        old.recordings == count && recordings.len() == KEPT && old.layers == new.layers && is_near(old, &profile)
    };
    (kept, old.filter(is_steady).cloned().unwrap_or(new))
}

/// Whether both have the same pages, but for one of [`STEADY`].
fn is_near(old: &KeptProfile, new: &Profile) -> bool {
    fn pages(profile: &Profile) -> HashSet<(u32, u32)> {
        profile.runs.iter().flat_map(|run| (0..run.pages).map(|page| (run.layer, run.first + page))).collect()
    }
    let Some(old) = old.profile() else { return false };
    let (old, new) = (pages(&old), pages(new));
    old.symmetric_difference(&new).count() * STEADY <= old.len()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use millstream_oci::Digest;

    use super::*;

    fn layers() -> Vec<ProfileLayer> {
        vec![ProfileLayer { digest: Digest::of(b"layer"), toc: Digest::of(b"toc") }]
    }

    fn recording(numbers: &[u32]) -> Recording {
        Recording { read: Profile::from_numbers(layers(), numbers).unwrap(), fresh: vec![true] }
    }

    #[test]
    fn the_newest_are_kept_and_a_settled_plan_stays() {
        let (mut kept, mut plan) = (Vec::new(), None::<KeptProfile>);
        for n in 0..12 {
            // Each with a page of its own, of one that nobody else read.
            let (next, profile) =
                merged(kept, &recording(&[0, 10, 200, 0, 1000 + n, 1]), &layers(), plan.as_ref(), 1000);
            (kept, plan) = (next, Some(profile));
            assert_eq!(kept.len(), KEPT.min(n as usize + 1));
        }
        let settled = plan.unwrap();
        assert_eq!((settled.recordings as usize, &settled.runs[..]), (KEPT, &[0, 10, 200][..]));
        // Half of the newest read two pages more: too few to change it. Then forty more.
        for _ in 0..4 {
            let (next, profile) = merged(kept, &recording(&[0, 10, 202]), &layers(), Some(&settled), 1000);
            assert_eq!(profile, settled);
            kept = next;
        }
        for n in 0..4 {
            let (next, profile) = merged(kept, &recording(&[0, 10, 240]), &layers(), Some(&settled), 1000);
            assert_eq!(profile == settled, n < 3, "{n}");
            kept = next;
        }
    }

    #[test]
    fn recordings_of_other_tables_are_forgotten() {
        let other = ProfileLayer { toc: Digest::of(b"another"), ..layers()[0] };
        let read = Profile::from_numbers(vec![other], &[0, 5, 1]).unwrap();
        let old = KeptRecording::new(&Recording { read, fresh: vec![true] });
        let (kept, profile) = merged(vec![old], &recording(&[0, 7, 1]), &layers(), None, 1000);
        assert_eq!((kept.len(), profile.recordings, &profile.runs[..]), (1, 1, &[0, 7, 1][..]));
    }
}
