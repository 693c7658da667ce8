//! The lazy images of this node: one decision for each pull of an image, and what follows from it.

mod profile;
mod shared;
mod sources;

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use millstream_chunkstore::{Layer, LayerState, Refusal, Store};
use millstream_layerfs::{Contradiction, ViewLayer, contradiction};
use millstream_oci::{Digest, ManifestDigest};
use millstream_prefetch::{AskedProfile, Fetcher};
use millstream_snapshots::{ImageDecision, PrepareOutcome, PrepareRequest, Reason, outcome};
use millstream_source::{SourceError, names};
use rustix::fs::StatVfsMountFlags;
use tokio::sync::{OnceCell, Semaphore};
use tracing::{info, warn};

use crate::admission::{Admission, Turn};
use crate::catalog::{Catalog, Decision, ImageRecord, LayerRecord};
use crate::damage::Damages;
use crate::embedded::Embedded;
use crate::labels::{Wanted, image_name};
use crate::lookup::Lookup;
use crate::metrics::NodeMetrics;
use crate::origin::{Origin, Origins};
use crate::recorder::Recorder;
use crate::server_client::ServedLayer;
use crate::views::Views;
use crate::warm;

pub use self::shared::{Reporter, SharedImages};

/// How long after its last use one decision serves the following `Prepare`s of the same pull: unpacking one layer may lie
/// between them. The right to read is proven again afterwards.
const PLAN_LIFE: Duration = Duration::from_secs(60);
/// No decision serves longer than this, however often it is used.
const PLAN_AGE: Duration = Duration::from_secs(600);
/// A `Prepare` of the bottom layer begins a pull, and a decision of its own; unless one was made just now, for another client
/// of the same image.
const PLAN_SHARED: Duration = Duration::from_secs(2);
/// Decisions that wait to be written down.
const MAX_PENDING: usize = 1024;
/// Decisions that are kept; pulls of more images at once decide again.
const MAX_PLANS: usize = 256;

/// Part of a decision's time that may go into finding out which image is meant.
const LOOKUP: f32 = 0.3;

/// Bytes that must be free on the disk for new lazy layers: for tables, views and records.
const METADATA_ROOM: u64 = 16 << 20;

/// Code of a layer that was given back while a decision said lazy.
const RELEASED: &str = "node.released";

/// Layers that were taken in, with why those above were not, if so; or why none was.
type Admitted = Result<(Vec<Arc<Layer>>, Option<Reason>), Reason>;

/// What was decided about an image.
#[derive(Debug)]
struct Plan {
    decision: ImageDecision,
    record: ImageRecord,
}

#[derive(Debug)]
struct Slot {
    made: Instant,
    used: Instant,
    /// Images that the embedded server had indexed before.
    indexed: u64,
    plan: Arc<OnceCell<Arc<Plan>>>,
}

/// Implements [`LazyImages`] on store, fetcher, views and the outside world.
#[derive(Debug)]
pub struct NodeImages {
    pub(crate) store: Arc<Store>,
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) views: Arc<Views>,
    pub(crate) catalog: Catalog,
    pub(crate) origins: Origins,
    /// Says which image a client means that does not name it; none where containerd is not to be asked.
    pub(crate) lookup: Option<Lookup>,
    /// What starts of images read.
    pub(crate) recorder: Recorder,
    /// What is broken on this node.
    pub(crate) damages: Damages,
    /// Bound of one decision.
    pub(crate) deadline: Duration,
    metrics: NodeMetrics,
    plans: Mutex<HashMap<(String, ManifestDigest), Slot>>,
    /// In which order layers are admitted, given back and removed.
    admission: Arc<Admission>,
    decisions: SyncSender<Decision>,
    /// Processes that read ahead of programs.
    warming: Arc<Semaphore>,
    runtime: tokio::runtime::Handle,
}

impl NodeImages {
    /// See the fields.
    #[must_use]
    pub fn new(
        store: Arc<Store>,
        fetcher: Arc<Fetcher>,
        views: Arc<Views>,
        catalog: Catalog,
        origins: Origins,
        lookup: Option<Lookup>,
        deadline: Duration,
    ) -> Self {
        Self {
            metrics: origins.metrics.clone(),
            damages: views.damages().clone(),
            decisions: record_decisions(catalog.clone()),
            admission: views.admission(),
            recorder: Recorder::new(store.layers().iter().map(|layer| layer.number()).max().unwrap_or_default()),
            store,
            fetcher,
            views,
            catalog,
            origins,
            lookup,
            deadline,
            plans: Mutex::default(),
            warming: Arc::new(Semaphore::new(warm::PROCESSES)),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    /// The decision for the pull that `wanted` belongs to: shared by all its layers. `bottom` says that this is the first of
    /// them. `until` is when the caller stops waiting.
    async fn plan(self: &Arc<Self>, wanted: &Wanted, bottom: bool, until: Instant) -> Arc<Plan> {
        let key = (wanted.image.name(), wanted.manifest);
        let indexed = self.origins.embedded.as_ref().map_or(0, Embedded::indexed);
        let cell = {
            let now = Instant::now();
            let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
            plans.retain(|_, slot| {
                let fresh = now.duration_since(slot.used) < PLAN_LIFE && now.duration_since(slot.made) < PLAN_AGE;
                fresh && slot.indexed == indexed
            });
            if bottom && plans.get(&key).is_some_and(|slot| now.duration_since(slot.made) >= PLAN_SHARED) {
                plans.remove(&key);
            }
            if plans.len() >= MAX_PLANS {
                plans.clear();
            }
            let slot = plans.entry(key).or_insert_with(|| Slot { made: now, used: now, indexed, plan: Arc::default() });
            slot.used = now;
            Arc::clone(&slot.plan)
        };
        let this = Arc::clone(self);
        let wanted = wanted.clone();
        Arc::clone(cell.get_or_init(|| async move { Arc::new(this.make_plan(&wanted, until).await) }).await)
    }

    fn forget_plan(&self, wanted: &Wanted) {
        let key = (wanted.image.name(), wanted.manifest);
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    async fn make_plan(self: &Arc<Self>, wanted: &Wanted, until: Instant) -> Plan {
        let empty = ImageRecord { image: wanted.image.to_string(), manifest: wanted.manifest, layers: Vec::new() };
        let begun = Instant::now();
        let made = self.try_plan(wanted, until).await;
        self.metrics.decided(begun.elapsed());
        match made {
            Ok(plan) => plan,
            Err(error) => {
                let reason = Reason::new("node.local", format!("{error:#}"));
                Plan { decision: ImageDecision::Deferred(reason), record: empty }
            }
        }
    }

    async fn try_plan(self: &Arc<Self>, wanted: &Wanted, until: Instant) -> anyhow::Result<Plan> {
        let (origins, image, manifest) = (self.origins.clone(), wanted.image.clone(), wanted.manifest);
        // A credential helper may take seconds.
        let origin = match tokio::task::spawn_blocking(move || origins.of(&image, manifest)).await? {
            Ok(origin) => origin,
            Err(error) => return Ok(Plan { decision: self.without_credential(error), record: none(wanted) }),
        };
        let known = self.catalog.image(&wanted.image.name(), &wanted.manifest)?;
        // A margin, so that the reason is known before the caller gives up waiting.
        let patience = until.saturating_duration_since(Instant::now()).mul_f32(0.9);
        let profile = self.ask_for_profile(&origin);
        let (probe, served) = tokio::join!(
            bounded(patience, origin.repository.probe(&wanted.layer)),
            bounded(patience, self.served(&origin, known)),
        );
        let (server, record, tocs) = match served {
            outcome::Answer::Got((record, tocs)) => {
                let layers = record.layers.iter().map(|layer| match &layer.ineligible {
                    None => outcome::LayerAnswer::Eligible,
                    Some(reason) if layer.pending => outcome::LayerAnswer::Pending { reason: reason.clone() },
                    Some(reason) => outcome::LayerAnswer::Ineligible { reason: reason.clone() },
                });
                (outcome::Answer::Got(layers.collect()), record, tocs)
            }
            outcome::Answer::Failed { kind, message } => {
                (outcome::Answer::Failed { kind, message }, none(wanted), Vec::new())
            }
            outcome::Answer::TimedOut => (outcome::Answer::TimedOut, none(wanted), Vec::new()),
        };
        let chain_matches = record.layers.iter().any(|layer| layer.digest == wanted.layer);
        let local = !record.layers.is_empty() && record.layers.iter().all(|layer| self.is_verified(&layer.digest));
        let inputs = outcome::ImageInputs { streaming: true, missing: None, local, chain_matches, server, probe };
        let decision = outcome::decide_image(&inputs);
        self.take_in(wanted, &origin, decision, record, tocs, profile).await
    }

    /// The credential for the registry cannot be had: as if the registry had said so itself.
    fn without_credential(&self, error: SourceError) -> ImageDecision {
        outcome::decide_image(&outcome::ImageInputs {
            streaming: true,
            missing: None,
            local: false,
            chain_matches: false,
            server: outcome::Answer::TimedOut,
            probe: outcome::Answer::Failed { kind: error.kind, message: error.message },
        })
    }

    /// What is known of the image: from the catalog if the store has all its TOCs, else from the server.
    async fn served(
        &self,
        origin: &Origin,
        known: Option<ImageRecord>,
    ) -> Result<(ImageRecord, Vec<Vec<u8>>), SourceError> {
        if let Some(record) = &known
            // What could not be lazy once may be so now: another server, another table. Only the server knows.
            && record.layers.iter().all(|layer| layer.ineligible.is_none() && self.usable(&layer.digest).is_some())
        {
            return Ok((record.clone(), Vec::new()));
        }
        let (record, layers) = self.ask(origin).await?;
        Ok((record, layers.into_iter().filter_map(|layer| layer.bytes).collect()))
    }

    /// What the server says of the image, with the tables of those layers that are not here.
    async fn ask(&self, origin: &Origin) -> Result<(ImageRecord, Vec<ServedLayer>), SourceError> {
        // The TOCs of layers that other images brought need not travel again; the server is told all that might matter.
        let known_layers = self.store.layers().into_iter().map(|layer| layer.digest());
        let known_layers =
            known_layers.filter(|digest| !self.admission.is_dying(digest)).take(MAX_KNOWN_LAYERS).collect();
        let served = origin.image(known_layers).await?;
        let layers = served.layers.iter().map(|layer| LayerRecord {
            digest: layer.digest,
            diff_id: layer.diff_id,
            ineligible: layer.toc.as_ref().err().cloned().or_else(|| self.other_table(layer)),
            pending: layer.pending,
        });
        let record =
            ImageRecord { image: origin.image.clone(), manifest: origin.scope.manifest, layers: layers.collect() };
        Ok((record, served.layers))
    }

    /// Why a layer that is here already cannot be gone on with: windows and content of the server would not fit its table.
    fn other_table(&self, served: &ServedLayer) -> Option<String> {
        let layer = self.usable(&served.digest)?;
        let differs =
            layer.state() == LayerState::Lazy && served.toc.as_ref().is_ok_and(|toc| *toc != layer.toc_digest());
        differs.then(|| {
            "this node has another table of it than the server, from an earlier import; hint: remove the images that use it"
                .to_owned()
        })
    }

    fn is_verified(&self, digest: &Digest) -> bool {
        self.usable(digest).is_some_and(|layer| layer.state() == LayerState::Verified)
    }

    /// The layer, if the store has it and it was not given back.
    fn usable(&self, digest: &Digest) -> Option<Arc<Layer>> {
        if self.admission.is_dying(digest) { None } else { self.store.layer(digest) }
    }

    /// Puts what will be lazy into the store and lets the fetcher know where its bytes come from.
    async fn take_in(
        self: &Arc<Self>,
        wanted: &Wanted,
        origin: &Origin,
        decision: ImageDecision,
        record: ImageRecord,
        tocs: Vec<Vec<u8>>,
        profile: Option<AskedProfile>,
    ) -> anyhow::Result<Plan> {
        let lazy = match &decision {
            ImageDecision::Lazy { lazy, .. } => *lazy,
            ImageDecision::Local => record.layers.len(),
            ImageDecision::Deferred(_) => return Ok(Plan { decision, record }),
        };
        let taken = self.take_tables(wanted.image.name(), record.clone(), lazy, tocs, origin).await?;
        if let Ok(stop) = &taken {
            self.replay(&record, profile, stop.is_none() && lazy == record.layers.len());
        }
        let decision = match taken {
            Ok(None) => decision,
            Ok(Some((lazy, reason))) => ImageDecision::Lazy { lazy, rest: Some(reason) },
            Err(reason) => ImageDecision::Deferred(reason),
        };
        Ok(Plan { decision, record })
    }

    /// Puts tables into the store and gives the first `lazy` layers of the image to the fetcher. Gives how many were taken if that
    /// were fewer, and why; or why none is.
    async fn take_tables(
        self: &Arc<Self>,
        name: String,
        record: ImageRecord,
        lazy: usize,
        tocs: Vec<Vec<u8>>,
        origin: &Origin,
    ) -> anyhow::Result<Result<Option<(usize, Reason)>, Reason>> {
        // Held until the fetcher knows the layers: one that is removed in between would be fetched for nobody.
        let turn = self.admission.turn().await;
        let this = Arc::clone(self);
        let admitting = move || this.admit(&turn, &name, &record, lazy, &tocs).map(|admitted| (turn, admitted));
        let (_turn, admitted) = tokio::task::spawn_blocking(admitting).await??;
        let (admitted, stop) = match admitted {
            Ok(admitted) => admitted,
            Err(mismatch) => return Ok(Err(mismatch)),
        };
        let stop = stop.map(|reason| (admitted.len(), reason));
        let sources = origin.sources();
        let now = SystemTime::now();
        for layer in admitted {
            layer.note_use(now);
            if layer.state() == LayerState::Lazy {
                let digest = layer.digest();
                self.views.readahead().narrow();
                self.fetcher.attach(layer, sources.clone());
                self.fetcher.hydrate(&digest);
            }
        }
        Ok(Ok(stop))
    }

    /// Takes tables into the store and remembers the image. Gives those of its first `lazy` layers that are there and, if that
    /// ends before the last of them, why; or why the tables are not those of the image. Blocks.
    fn admit(
        &self,
        turn: &Turn,
        name: &str,
        record: &ImageRecord,
        lazy: usize,
        tocs: &[Vec<u8>],
    ) -> anyhow::Result<Admitted> {
        self.remove_dying(turn)?;
        self.store.admit_all(tocs)?;
        let mut admitted = Vec::new();
        for described in record.layers.iter().take(lazy) {
            let Some(layer) = self.usable(&described.digest) else {
                if self.admission.is_dying(&described.digest) {
                    continue;
                }
                // Tables are stored under the layer that they themselves name.
                let text = format!("no table that came is that of layer {}", described.digest);
                return Ok(Err(Reason::new("image.mismatch", text)));
            };
            if layer.toc().diff_id() != described.diff_id {
                let text = format!("the table of layer {} is of another tar than the server says", described.digest);
                return Ok(Err(Reason::new("image.mismatch", text)));
            }
            admitted.push(layer);
        }
        let stop = impossible(&admitted)?.map(|found| {
            admitted.truncate(found.layer);
            let (layer, layers, path) = (found.layer + 1, record.layers.len(), String::from_utf8_lossy(&found.path));
            let text = format!(
                "layer {layer} of {layers} cannot be lazy: it has something in the directory {path}, and a layer below has no \
                 directory on the way there; containerd will not unpack it either"
            );
            Reason::new("image.not-eligible", text)
        });
        self.catalog.put_image(name, record)?;
        Ok(Ok((admitted, stop)))
    }

    /// Removes the layers that were given back. Blocks.
    fn remove_dying(&self, turn: &Turn) -> anyhow::Result<()> {
        let hide = |dying: &[Digest]| {
            let layers = dying.iter().filter_map(|digest| self.store.layer(digest));
            self.views.hide(&layers.map(|layer| layer.number()).collect::<Vec<u32>>())
        };
        let remove = |digest: &Digest| {
            self.fetcher.detach(digest);
            match self.store.remove(digest) {
                Ok(()) => info!({ names::LAYER } = %digest, "layer removed"),
                Err(error) => warn!({ names::LAYER } = %digest, %error, "layer is not removed completely"),
            }
            // What the database did not let go of is still dying.
            self.store.layer(digest).is_none()
        };
        if self.admission.remove_dying(turn, hide, remove)? {
            self.catalog.forget_images(|digest| self.store.layer(digest).is_some())?;
            self.plans.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        Ok(())
    }

    /// Gives back layers that no snapshot uses: a pull that was broken off, or a death between two steps.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn sweep(self: &Arc<Self>, used: &HashSet<Digest>) -> anyhow::Result<()> {
        let all = self.store.layers().into_iter().map(|layer| layer.digest());
        self.admission.give_back(all.filter(|digest| !used.contains(digest)));
        self.removed().await
    }

    /// Returns when every layer that was given back so far is removed.
    ///
    /// # Errors
    /// Those of the database; what stays then is removed at the next start.
    pub async fn removed(self: &Arc<Self>) -> anyhow::Result<()> {
        let (turn, images) = (self.admission.turn().await, Arc::clone(self));
        tokio::task::spawn_blocking(move || images.remove_dying(&turn)).await?
    }

    /// Layers of images that were decided about lately: a pull may be about to use them.
    #[must_use]
    pub fn about_to_be_used(&self) -> HashSet<Digest> {
        let now = Instant::now();
        let plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let live = plans.values().filter(|slot| now.duration_since(slot.used) < PLAN_LIFE);
        let records = live.filter_map(|slot| slot.plan.get()).flat_map(|plan| &plan.record.layers);
        records.map(|layer| layer.digest).collect()
    }

    /// Places for processes that read ahead of programs.
    pub(crate) const fn warming(&self) -> &Arc<Semaphore> {
        &self.warming
    }

    /// What all work of this node is done on.
    pub(crate) const fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// Tasks of the runtime that all work of this node is done on.
    pub(crate) fn tasks(&self) -> usize {
        self.runtime.metrics().num_alive_tasks()
    }

    async fn decide_wanted(self: Arc<Self>, request: PrepareRequest) -> PrepareOutcome {
        let until = Instant::now() + self.deadline;
        let streaming = match self.catalog.streaming() {
            Ok(streaming) => streaming,
            Err(error) => return failed(&error),
        };
        if let Some(reason) = outcome::precondition(streaming, None) {
            return PrepareOutcome::Deferred { reason };
        }
        if let Some(reason) = self.no_room() {
            return PrepareOutcome::Deferred { reason };
        }
        let candidates = match self.candidates(&request).await {
            Ok(candidates) => candidates,
            Err(missing) => {
                let reason = outcome::precondition(streaming, Some(&missing));
                return reason.map_or_else(
                    || PrepareOutcome::deferred("labels.missing", missing),
                    |reason| PrepareOutcome::Deferred { reason },
                );
            }
        };
        let mut first = None;
        let count = candidates.len();
        for (number, wanted) in candidates.into_iter().enumerate() {
            // One that does not answer leaves time for the others.
            let left = until.saturating_duration_since(Instant::now());
            let until = Instant::now() + left / u32::try_from(count - number).unwrap_or(u32::MAX);
            if first.is_none() {
                self.choose(&request, &wanted);
            }
            let outcome = self.decide_as(&wanted, &request, until).await;
            if matches!(outcome, PrepareOutcome::Lazy { .. } | PrepareOutcome::Local { .. }) {
                self.choose(&request, &wanted);
                return outcome;
            }
            // What is wrong with the image that was touched last is the reason to show.
            first.get_or_insert(outcome);
        }
        first.unwrap_or_else(|| PrepareOutcome::deferred("labels.missing", "no image has this layer"))
    }

    /// Why nothing new can be taken in: tables and records need room on the disk. What is here is served all the same.
    fn no_room(&self) -> Option<Reason> {
        let root = self.store.root();
        let disk = rustix::fs::statvfs(root).ok()?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        // Since an error is no reason for ext4 to show the flag (kernel 6.15), the store may know better.
        let read_only =
            disk.f_flag.contains(StatVfsMountFlags::RDONLY) || self.store.space().trouble() == Some(Refusal::ReadOnly);
        let text = match (read_only, free < METADATA_ROOM) {
            (true, _) => format!("{} is read-only; hint: see the kernel's log", root.display()),
            (_, true) => format!("only {free} bytes are free on the disk with {}; hint: make room", root.display()),
            _ => return None,
        };
        Some(Reason::new("node.no-room", text))
    }

    /// Remembers what a request is taken for, for the name of its decision.
    fn choose(&self, request: &PrepareRequest, wanted: &Wanted) {
        if let Some(lookup) = &self.lookup {
            lookup.choose(request, wanted);
        }
    }

    /// What the request may be about: one image if its labels say, else those that containerd has with this layer.
    async fn candidates(&self, request: &PrepareRequest) -> Result<Vec<Wanted>, String> {
        match (Wanted::from_labels(&request.labels), &self.lookup) {
            (Ok(wanted), _) => Ok(vec![wanted]),
            (Err(missing), None) => Err(missing),
            (Err(missing), Some(lookup)) => {
                let found = lookup.candidates(request, self.deadline.mul_f32(LOOKUP)).await;
                found.map_err(|why| format!("{missing}, and {why}"))
            }
        }
    }

    /// The decision about a request that is taken for a layer of this image.
    async fn decide_as(self: &Arc<Self>, wanted: &Wanted, request: &PrepareRequest, until: Instant) -> PrepareOutcome {
        let plan = self.plan(wanted, request.parent.is_none(), until).await;
        match self.of_layer(&plan, wanted, request) {
            PrepareOutcome::Deferred { reason } if reason.code == RELEASED => {
                // Given back since the plan was made: decide afresh, which waits for the removal.
                self.forget_plan(wanted);
                let plan = self.plan(wanted, false, until).await;
                self.of_layer(&plan, wanted, request)
            }
            outcome => outcome,
        }
    }

    fn of_layer(&self, plan: &Plan, wanted: &Wanted, request: &PrepareRequest) -> PrepareOutcome {
        let (lazy, rest) = match &plan.decision {
            ImageDecision::Deferred(reason) => return PrepareOutcome::Deferred { reason: reason.clone() },
            ImageDecision::Local => (plan.record.layers.len(), None),
            ImageDecision::Lazy { lazy, rest } => (*lazy, rest.as_ref()),
        };
        // The same blob may occur twice in an image; the chain ID tells which of them is meant.
        let position = plan
            .record
            .layers
            .iter()
            .zip(plan.record.chain_ids())
            .position(|(layer, chain)| layer.digest == wanted.layer && chain == request.target);
        let Some(position) = position else {
            let text = "the layers known for this image are not those that containerd asks for";
            return PrepareOutcome::deferred("image.mismatch", text);
        };
        if position >= lazy {
            let reason =
                rest.cloned().unwrap_or_else(|| Reason::new("image.not-eligible", "a layer below cannot be lazy"));
            return PrepareOutcome::Deferred { reason };
        }
        match self.usable(&wanted.layer).map(|layer| layer.state()) {
            Some(LayerState::Verified) => PrepareOutcome::Local { layer: wanted.layer },
            Some(LayerState::Lazy) => PrepareOutcome::Lazy { layer: wanted.layer },
            Some(LayerState::Quarantined { reason }) => {
                PrepareOutcome::deferred("layer.quarantined", format!("layer {}: {reason}", wanted.layer))
            }
            None => PrepareOutcome::deferred(RELEASED, format!("layer {} is not in the store any more", wanted.layer)),
        }
    }

    fn record_decision(&self, request: &PrepareRequest, outcome: &PrepareOutcome) {
        let labelled = Wanted::from_labels(&request.labels).ok();
        let wanted = labelled.or_else(|| self.lookup.as_ref()?.chosen(request));
        let image = match (image_name(&request.labels), &wanted) {
            (name, Some(wanted)) if name.is_empty() => wanted.image.to_string(),
            (name, _) => name,
        };
        let (code, reason) = match outcome {
            PrepareOutcome::Lazy { .. } | PrepareOutcome::Local { .. } => (String::new(), String::new()),
            PrepareOutcome::Deferred { reason } | PrepareOutcome::Failed { reason } => {
                (reason.code.to_owned(), reason.message.clone())
            }
        };
        let decision = Decision {
            image,
            manifest: wanted.map_or_else(String::new, |wanted| wanted.manifest.to_string()),
            outcome: outcome.name().to_owned(),
            code,
            reason,
            decided_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX)),
        };
        // A full queue means that the disk does not keep up; the log has the decision too.
        if self.decisions.try_send(decision).is_err() {
            warn!("a decision is not recorded");
        }
    }
}

/// Writes decisions down, in their order, on a thread of its own: who makes them must not wait for the disk. Ends with the
/// last sender.
fn record_decisions(catalog: Catalog) -> SyncSender<Decision> {
    let (sender, decisions) = sync_channel::<Decision>(MAX_PENDING);
    std::thread::spawn(move || {
        for decision in decisions {
            if let Err(error) = catalog.put_decision(&decision) {
                warn!(error = format!("{error:#}"), "a decision is not recorded");
            }
        }
    });
    sender
}

/// Layers whose TOCs the server is told to leave out, at most.
const MAX_KNOWN_LAYERS: usize = 1000;

/// What makes a layer one that containerd could not unpack over those below it.
fn impossible(layers: &[Arc<Layer>]) -> anyhow::Result<Option<Contradiction>> {
    let layer = |layer: &Arc<Layer>| ViewLayer { number: layer.number(), toc: Arc::clone(layer.toc()) };
    Ok(contradiction(&layers.iter().map(layer).collect::<Vec<_>>())?)
}

fn none(wanted: &Wanted) -> ImageRecord {
    ImageRecord { image: wanted.image.to_string(), manifest: wanted.manifest, layers: Vec::new() }
}

fn failed(error: &anyhow::Error) -> PrepareOutcome {
    PrepareOutcome::Failed { reason: Reason::new("node.local", format!("{error:#}; hint: see the log of millstreamd")) }
}

async fn bounded<T>(patience: Duration, work: impl Future<Output = Result<T, SourceError>>) -> outcome::Answer<T> {
    match tokio::time::timeout(patience, work).await {
        Ok(Ok(value)) => outcome::Answer::Got(value),
        Ok(Err(error)) => outcome::Answer::Failed { kind: error.kind, message: error.message },
        Err(_) => outcome::Answer::TimedOut,
    }
}
