//! The snapshots of one node: what each call does, apart from gRPC.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millstream_oci::Digest;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::background::Background;
use crate::disk::{self, Disk};
use crate::filter::Filters;
use crate::metadata::{Metadata, New, TARGET_LABEL};
use crate::mounts::{self, Mount, Run};
use crate::record::Record;
use crate::releases::{Mark, Releases};
use crate::{Backing, Error, Info, Kind, LazyImages, Parent, PrepareOutcome, PrepareRequest, Usage, ViewFailure};

/// Directory trees that are added up at the same time for callers that wait.
const CONCURRENT_USAGE: usize = 4;

/// How long things may take, and where the time comes from.
#[derive(Debug, Clone)]
pub struct Options {
    /// For [`LazyImages::decide`], while containerd holds a lock: then the layer is deferred.
    pub decide_deadline: Duration,
    /// For [`LazyImages::view`]: then the call fails.
    pub view_deadline: Duration,
    /// For the usage of a snapshot that was committed just now: then the call fails.
    pub usage_deadline: Duration,
    /// Snapshots of a database that has given out no number yet get numbers above this one: for a new database on a root whose
    /// old one was lost.
    pub numbers_above: u64,
    /// The clock for time stamps.
    pub now: fn() -> SystemTime,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            decide_deadline: Duration::from_secs(1),
            view_deadline: Duration::from_secs(10),
            usage_deadline: Duration::from_secs(10),
            numbers_above: 0,
            now: SystemTime::now,
        }
    }
}

/// What a `Prepare` comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prepared {
    /// A new active snapshot, to be mounted like this.
    Mounts(Vec<Mount>),
    /// The layer that was offered to be skipped is here, as a committed snapshot of this name.
    Skipped(String),
}

/// A change of labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelUpdate {
    /// These and no others.
    Replace(BTreeMap<String, String>),
    /// These, beside what is there; an empty value removes a label.
    Set(BTreeMap<String, String>),
}

/// A snapshot that did not survive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Its key or name.
    pub name: String,
    /// What is wrong with it.
    pub what: String,
}

/// The snapshots of one node. Cheap to clone; background work ends with the last clone.
#[derive(Clone)]
pub struct Snapshots(Arc<Shared>);

struct Shared {
    metadata: Metadata,
    disk: Arc<Disk>,
    images: Arc<dyn LazyImages>,
    options: Options,
    releases: Releases,
    /// By number of the snapshot; unreadable records have none and count down from the largest.
    damaged: Mutex<BTreeMap<u64, Damage>>,
    background: Background,
    adding_up: Semaphore,
}

impl std::fmt::Debug for Snapshots {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Snapshots").field("disk", &self.0.disk).finish_non_exhaustive()
    }
}

impl Snapshots {
    /// Opens the snapshots below the directory `root`, with records in `db`, and recovers: directories that no record
    /// knows are deleted in the background; records without directory are listed by [`Snapshots::damaged`], and fail
    /// only themselves. Blocks; must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the directories or tables cannot be made, or `root` cannot be part of mount options.
    pub fn open(
        root: &Path,
        db: Arc<redb::Database>,
        images: Arc<dyn LazyImages>,
        options: Options,
    ) -> Result<Self, Error> {
        let disk = Arc::new(Disk::open(root)?);
        let metadata = Metadata::open(db, options.numbers_above)?;
        let damaged = recover(&metadata, &disk)?;
        let background = Background::start(&metadata, &disk);
        Ok(Self(Arc::new(Shared {
            metadata,
            disk,
            images,
            options,
            releases: Releases::default(),
            damaged: Mutex::new(damaged),
            background,
            adding_up: Semaphore::new(CONCURRENT_USAGE),
        })))
    }

    /// Snapshots that did not survive the last end of the program.
    #[must_use]
    pub fn damaged(&self) -> Vec<Damage> {
        self.0.damaged().values().cloned().collect()
    }

    /// Layers that snapshots show. What the node keeps beyond these, it keeps for nobody. Blocks shortly.
    ///
    /// # Errors
    /// When the database fails.
    pub fn layers(&self) -> Result<HashSet<Digest>, Error> {
        self.0.metadata.layers()
    }

    /// Those of them that containers stand on: they are below an active snapshot or a view. Blocks shortly.
    ///
    /// # Errors
    /// When the database fails.
    pub fn held_layers(&self) -> Result<HashSet<Digest>, Error> {
        self.0.metadata.held()
    }

    /// Makes the active snapshot `key` on `parent` (empty for none), or, when `labels` offer to skip a layer and that is
    /// possible, a committed snapshot of that layer.
    ///
    /// # Errors
    /// When the key is taken, the parent is missing or not committed, or the disk fails. That an image cannot be lazy
    /// is no error.
    pub async fn prepare(
        &self,
        namespace: &str,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Prepared, Error> {
        let chain = self.parents(key, parent).await?;
        if let Some(target) = labels.get(TARGET_LABEL)
            && let Some(name) = self.skip(namespace, target, &chain, &labels).await?
        {
            return Ok(Prepared::Skipped(name));
        }
        self.create(Kind::Active, key, &chain, labels).await.map(Prepared::Mounts)
    }

    /// Makes the read-only view `key` of `parent` (empty for none).
    ///
    /// # Errors
    /// As [`Snapshots::prepare`].
    pub async fn view(&self, key: &str, parent: &str, labels: BTreeMap<String, String>) -> Result<Vec<Mount>, Error> {
        let chain = self.parents(key, parent).await?;
        self.create(Kind::View, key, &chain, labels).await
    }

    /// The mounts of the active snapshot or view `key`.
    ///
    /// # Errors
    /// When there is no such snapshot, it is committed, or its layers cannot be shown.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let name = key.to_owned();
        let chain = self.blocking(move |shared| shared.metadata.chain(&name)).await?;
        let Some(((_, own), below)) = chain.split_first() else { return Err(Error::NotFound(key.to_owned())) };
        if own.kind == Kind::Committed {
            return Err(Error::NoMounts(key.to_owned()));
        }
        self.0.undamaged(own.id)?;
        let lowers = self.lowers(below).await?;
        Ok(mounts::mounts(own.kind, &self.0.disk.fs(own.id), &self.0.disk.work(own.id), &lowers)?)
    }

    /// Turns the active snapshot `key` into the committed snapshot `name`, with the labels given. `parent` must be empty
    /// or the parent that it has.
    ///
    /// # Errors
    /// When the name is taken, or the key is missing or not active.
    pub async fn commit(
        &self,
        key: &str,
        name: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let (key, name, parent) = (key.to_owned(), name.to_owned(), parent.to_owned());
        self.blocking(move |shared| {
            let record = shared.metadata.commit(&key, &name, &parent, labels, shared.now())?;
            // Not added up here: containerd holds the transaction of its whole database meanwhile.
            shared.background.usage.push(record.id, &name);
            if let Some(target) = record.labels.get(TARGET_LABEL).and_then(|target| target.parse().ok()) {
                shared.images.committed(target);
            }
            Ok(())
        })
        .await
    }

    /// Removes a snapshot that nothing is built on; its files are deleted in the background.
    ///
    /// # Errors
    /// When there is no such snapshot, or others are built on it.
    pub async fn remove(&self, name: &str) -> Result<(), Error> {
        let name = name.to_owned();
        self.blocking(move |shared| shared.remove(&name)).await
    }

    /// Gives back those of `layers` that no snapshot shows: they were decided to be lazy, and then the client went away. A
    /// `Prepare` that wants one of them at the same moment either keeps it or defers it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_unused(&self, layers: Vec<Digest>) -> Result<(), Error> {
        self.blocking(move |shared| layers.iter().try_for_each(|layer| shared.release_unused(layer))).await
    }

    /// What is known of a snapshot.
    ///
    /// # Errors
    /// When there is no such snapshot.
    pub async fn stat(&self, name: &str) -> Result<Info, Error> {
        let name = name.to_owned();
        self.blocking(move |shared| Ok(shared.metadata.get(&name)?.info(&name))).await
    }

    /// Changes the labels of a snapshot.
    ///
    /// # Errors
    /// When there is no such snapshot.
    pub async fn update(&self, name: &str, update: LabelUpdate) -> Result<Info, Error> {
        let name = name.to_owned();
        self.blocking(move |shared| Ok(shared.metadata.update(&name, update, shared.now())?.info(&name))).await
    }

    /// Up to `limit` snapshots that match, in order of their names, beginning after the name `after`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(&self, filters: Arc<Filters>, after: Option<String>, limit: usize) -> Result<Vec<Info>, Error> {
        self.blocking(move |shared| shared.metadata.list(after.as_deref(), limit, &filters)).await
    }

    /// Looks again which snapshots have their directory and a record that can be read; gives those that do not.
    ///
    /// # Errors
    /// When the database or the disk fails.
    pub async fn check(&self) -> Result<Vec<Damage>, Error> {
        self.blocking(|shared| {
            let damaged = recover(&shared.metadata, &shared.disk)?;
            let found = damaged.values().cloned().collect();
            *shared.damaged() = damaged;
            shared.background.empty_trash();
            Ok(found)
        })
        .await
    }

    /// Disk space of one snapshot, without what is below it.
    ///
    /// # Errors
    /// When there is no such snapshot, or it was committed just now and is not added up yet.
    pub async fn usage(&self, name: &str) -> Result<Usage, Error> {
        let record = self.get(name).await?;
        match (record.kind, record.backing) {
            (_, Backing::Lazy(layer)) => Ok(self.0.images.usage(&layer)),
            // What is gone takes no space: an error would only be asked about again and again.
            (_, Backing::Local) if self.0.undamaged(record.id).is_err() => Ok(Usage::default()),
            (Kind::View, Backing::Local) => Ok(Usage::default()),
            (Kind::Active, Backing::Local) => {
                let _permit = self.0.adding_up.acquire().await.map_err(|_| Error::Stopping)?;
                let directory = self.0.disk.fs(record.id);
                self.blocking(move |_| disk::usage(&directory).map_err(Error::disk("add up", &directory))).await
            }
            (Kind::Committed, Backing::Local) => self.committed_usage(name, &record).await,
        }
    }

    /// Deletes, in the background, directories that no snapshot has.
    ///
    /// # Errors
    /// When the database or the disk fails.
    pub async fn cleanup(&self) -> Result<(), Error> {
        self.blocking(|shared| {
            recover(&shared.metadata, &shared.disk)?;
            shared.background.empty_trash();
            Ok(())
        })
        .await
    }

    async fn get(&self, name: &str) -> Result<Record, Error> {
        let name = name.to_owned();
        self.blocking(move |shared| shared.metadata.get(&name)).await
    }

    async fn committed_usage(&self, name: &str, record: &Record) -> Result<Usage, Error> {
        if let Some(usage) = record.usage {
            return Ok(usage);
        }
        let queue = &self.0.background.usage;
        queue.push(record.id, name);
        let pending = || Error::UsagePending(name.to_owned());
        timeout(self.0.options.usage_deadline, queue.settled(record.id)).await.map_err(|_| pending())?;
        self.get(name).await?.usage.ok_or_else(pending)
    }

    /// `parent` (empty for none) and everything below it, top first, for a new snapshot `key`.
    async fn parents(&self, key: &str, parent: &str) -> Result<Vec<(String, Record)>, Error> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        self.blocking(move |shared| {
            match shared.metadata.get(&key) {
                Err(Error::NotFound(_)) => {}
                Ok(_) => return Err(Error::AlreadyExists(key)),
                Err(error) => return Err(error),
            }
            let chain = shared.metadata.chain(&parent)?;
            match chain.first() {
                Some((_, top)) if top.kind != Kind::Committed => Err(Error::ParentNotCommitted(parent)),
                _ => Ok(chain),
            }
        })
        .await
    }

    /// The name of a committed snapshot for the layer that a `Prepare` offers to skip; none when containerd has to unpack
    /// it.
    async fn skip(
        &self,
        namespace: &str,
        target: &str,
        chain: &[(String, Record)],
        labels: &BTreeMap<String, String>,
    ) -> Result<Option<String>, Error> {
        let below = chain.first();
        let parent = below.map(|(name, _)| name.clone()).unwrap_or_default();
        let (known, mark) = {
            let (target, namespace) = (target.to_owned(), namespace.to_owned());
            // The mark is taken here because its lock is held while others write to the database.
            let look = move |shared: &Shared| {
                let mark = shared.releases.mark();
                Ok((shared.existing(&target, &parent, Some(&namespace))?, mark))
            };
            self.blocking(look).await?
        };
        if known.is_some() {
            return Ok(known);
        }
        let Ok(chain_id) = target.parse() else {
            tracing::info!(
                code = "labels.invalid",
                chain_id = target,
                "a layer is left to containerd: its label is no chain ID"
            );
            return Ok(None);
        };
        let request = PrepareRequest {
            namespace: namespace.to_owned(),
            target: chain_id,
            labels: labels.clone(),
            parent: below.map(|(name, record)| Parent {
                name: name.clone(),
                target: record.labels.get(TARGET_LABEL).and_then(|target| target.parse().ok()),
                backing: record.backing,
            }),
        };
        let decided = timeout(self.0.options.decide_deadline, self.0.images.decide(&request)).await;
        let decided = decided.unwrap_or_else(|_| {
            let text = "the decision whether the image can be lazy took too long; hint: millstream explain IMAGE";
            PrepareOutcome::deferred("node.slow", text)
        });
        let parent_id = below.map(|(_, record)| record.id);
        let (outcome, name) = self.record(request.clone(), decided, parent_id, mark).await?;
        report(&request, &outcome);
        self.0.images.answered(&request, &outcome);
        Ok(name)
    }

    /// Records the snapshot that an outcome asks for, if it does. Gives the outcome that holds in the end.
    async fn record(
        &self,
        request: PrepareRequest,
        outcome: PrepareOutcome,
        parent_id: Option<u64>,
        mark: Mark,
    ) -> Result<(PrepareOutcome, Option<String>), Error> {
        let layer = match &outcome {
            PrepareOutcome::Lazy { layer } | PrepareOutcome::Local { layer } => *layer,
            PrepareOutcome::Deferred { .. } | PrepareOutcome::Failed { .. } => return Ok((outcome, None)),
        };
        let name = self.blocking(move |shared| shared.record(request, parent_id, layer, mark)).await?;
        if name.is_some() {
            return Ok((outcome, name));
        }
        let text = "the layer was given up while the decision was under way";
        Ok((PrepareOutcome::deferred("node.released", text), None))
    }

    /// Makes an active snapshot or view on `chain` (top first).
    async fn create(
        &self,
        kind: Kind,
        key: &str,
        chain: &[(String, Record)],
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, Error> {
        // First, because nothing has to be undone when it fails.
        let lowers = self.lowers(chain).await?;
        let owner = match lowers.first().cloned() {
            None => None,
            Some(top) => Some(self.owner(top).await?),
        };
        let parent = chain.first().map(|(name, record)| (name.clone(), record.id));
        let key = key.to_owned();
        self.blocking(move |shared| {
            let new = New { key, kind, parent, labels, now: shared.now() };
            let directories = |id| shared.disk.create(id, kind == Kind::Active, owner);
            let id = shared.metadata.create(new, directories)?.id;
            Ok(mounts::mounts(kind, &shared.disk.fs(id), &shared.disk.work(id), &lowers)?)
        })
        .await
    }

    /// Who owns a lower directory. It may be on a mount of ours, so neither without a bound nor in a transaction.
    async fn owner(&self, directory: PathBuf) -> Result<(u32, u32), Error> {
        let owner = self.blocking(move |_| disk::owner(&directory));
        timeout(self.0.options.view_deadline, owner).await.map_err(|_| slow_view())?
    }

    /// The lower directories of `chain` (top first), top first.
    async fn lowers(&self, chain: &[(String, Record)]) -> Result<Vec<PathBuf>, Error> {
        let bottom_first: Vec<_> = chain.iter().rev().map(|(_, record)| (record.id, record.backing)).collect();
        let mut lowers: Vec<PathBuf> = Vec::new();
        for run in mounts::runs(&bottom_first) {
            let lower = match run {
                Run::Local(id) => {
                    self.0.undamaged(id)?;
                    self.0.disk.fs(id)
                }
                Run::Lazy(layers) => {
                    let view = self.0.images.view(&layers, &lowers);
                    timeout(self.0.options.view_deadline, view).await.map_err(|_| slow_view())??
                }
            };
            lowers.insert(0, lower);
        }
        Ok(lowers)
    }

    /// Runs `work` where it may block. It runs to its end even if nobody waits any more.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let shared = Arc::clone(&self.0);
        let span = tracing::Span::current();
        let work = move || span.in_scope(|| work(&shared));
        tokio::task::spawn_blocking(work).await.map_err(|_| Error::Stopping)?
    }
}

impl Shared {
    /// Nanoseconds since 1970.
    fn now(&self) -> u64 {
        let now = (self.options.now)().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
    }

    fn damaged(&self) -> MutexGuard<'_, BTreeMap<u64, Damage>> {
        // Every change is one call: the map is whole even if a holder panicked.
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn undamaged(&self, id: u64) -> Result<(), Error> {
        match self.damaged().get(&id) {
            None => Ok(()),
            Some(Damage { name, what }) => Err(Error::Damaged { name: name.clone(), what: what.clone() }),
        }
    }

    /// A committed snapshot of `target` on `parent`; with `namespace`, only one that this namespace may read.
    fn existing(&self, target: &str, parent: &str, namespace: Option<&str>) -> Result<Option<String>, Error> {
        let may_read = |name: &str, record: &Record| {
            namespace.is_none_or(|namespace| {
                // The whole part before the first slash: a caller may call itself `k8s.io/lazy-1`.
                name.split_once('/').is_some_and(|(owner, _)| owner == namespace)
                    || record.namespaces.iter().any(|known| known == namespace)
            })
        };
        let found = self.metadata.find(target, parent)?.into_iter();
        let mut usable = found.filter(|(name, record)| may_read(name, record) && self.undamaged(record.id).is_ok());
        Ok(usable.next().map(|(name, _)| name))
    }

    /// Records the snapshot of a lazy layer, or takes the one that is there. None when the layer was released since
    /// `mark`.
    fn record(
        &self,
        request: PrepareRequest,
        parent: Option<u64>,
        layer: Digest,
        mark: Mark,
    ) -> Result<Option<String>, Error> {
        let target = request.target.to_string();
        let below = request.parent.as_ref().map(|parent| parent.name.clone()).unwrap_or_default();
        let namespace = request.namespace.clone();
        let existing = || match self.existing(&target, &below, None)? {
            Some(name) => Ok(self.metadata.admit(&name, &namespace)?.then_some(name)),
            None => Ok(None),
        };
        let make = || {
            let parent = request.parent.map(|parent| parent.name).zip(parent);
            let new =
                New { key: String::new(), kind: Kind::Committed, parent, labels: request.labels, now: self.now() };
            self.metadata.create_lazy(new, &namespace, &target, layer)
        };
        self.releases.record(mark, &layer, existing, make)
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        let removed = self.metadata.remove(name)?;
        let id = removed.record.id;
        self.damaged().remove(&id);
        if let Err(error) = self.disk.discard(id) {
            // The snapshot is gone; the next clean-up tries again.
            tracing::warn!(snapshot = name, %error, "the directory of a removed snapshot stays for now");
        }
        self.background.empty_trash();
        removed.unused.map_or(Ok(()), |layer| self.release_unused(&layer))
    }

    fn release_unused(&self, layer: &Digest) -> Result<(), Error> {
        self.releases.release_unless(layer, || self.metadata.uses(layer), || self.images.released(&[*layer]))
    }
}

fn slow_view() -> Error {
    let message = "a lazy image could not be shown in time; hint: see the log of millstreamd".to_owned();
    Error::View(ViewFailure { code: "node.slow-view", message })
}

/// Directories without record go to the trash; gives the records without directory, and those that cannot be read.
fn recover(metadata: &Metadata, disk: &Disk) -> Result<BTreeMap<u64, Damage>, Error> {
    metadata.numbers(|known, unreadable| {
        if !unreadable.is_empty() {
            // One of the directories without readable record may be theirs: nothing is deleted.
            let number = |below: usize| u64::MAX - below as u64;
            let damage = |(name, error): (String, Error)| Damage { name, what: error.to_string() };
            return Ok(unreadable.into_iter().map(damage).enumerate().map(|(i, d)| (number(i), d)).collect());
        }
        let lost = disk.reconcile(&known)?;
        let damage = |id: u64| {
            let name = known.get(&id)?.clone();
            Some((id, Damage { name, what: "its directory is gone".to_owned() }))
        };
        Ok(lost.into_iter().filter_map(damage).collect())
    })
}

/// The one log line about a layer that could have been skipped. (A field named `message` would be the line's own text.)
fn report(request: &PrepareRequest, outcome: &PrepareOutcome) {
    let image = request.labels.get("containerd.io/snapshot/cri.image-ref").map(String::as_str).unwrap_or_default();
    let chain_id = request.target.to_string();
    match outcome {
        PrepareOutcome::Lazy { layer } | PrepareOutcome::Local { layer } => {
            tracing::info!(image, chain_id, %layer, outcome = outcome.name(), "a layer need not be unpacked");
        }
        PrepareOutcome::Deferred { reason } => {
            tracing::info!(
                image,
                chain_id,
                code = reason.code,
                reason = reason.message,
                "a layer is left to containerd"
            );
        }
        PrepareOutcome::Failed { reason } => {
            tracing::error!(
                image,
                chain_id,
                code = reason.code,
                reason = reason.message,
                "a layer is left to containerd"
            );
        }
    }
}
