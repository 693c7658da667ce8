//! `millstream check`: everything in the store of a running node compared with what it should be.
//!
//! What is read is not compared with its digest each time: it was when it was written. A disk may change bytes all the same. A
//! check reads all of them, takes out what is wrong, lets the kernel forget what it keeps of these files, and has the bytes
//! fetched again.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use millstream_chunkstore::{Layer, LayerState, WrongContent};
use millstream_fuse::Invalidator;
use millstream_layerfs::NodeId;
use millstream_oci::Digest;

use millstream_source::{Priority, names};
use millstream_toc::DataRange;
use millstream_wire::millstream::v1 as wire;
use redb::Database;
use tokio::sync::{Semaphore, mpsc};
use tonic::Status;
use tracing::{info, warn};

use crate::control::damage_to_wire;
use crate::damage::{self, Damage};
use crate::database;
use crate::images::NodeImages;
use crate::repair::Repairer;

/// Messages that wait for a slow caller.
const MAX_MESSAGES: usize = 8;
/// How often progress is reported.
const INTERVAL: Duration = Duration::from_millis(500);
/// The lowest priority short of running only on an idle machine, which could hold a lock for ever.
const NICEST: i32 = 19;

type Message = Result<wire::CheckProgress, Status>;
type Outcome = wire::check_finding::Outcome;

/// Checks the node, one check at a time.
#[derive(Debug, Clone)]
pub struct Checker {
    repairer: Repairer,
    database: Arc<Database>,
    kernel: Invalidator,
    turn: Arc<Semaphore>,
}

/// One check under way.
#[derive(Debug)]
struct Check {
    checker: Checker,
    progress: wire::CheckProgress,
    reported: Instant,
    to: mpsc::Sender<Message>,
}

impl Checker {
    /// Damage goes where `repairer` has it; `kernel` forgets what was wrong. `database` is the one of the store.
    #[must_use]
    pub fn new(repairer: Repairer, database: Arc<Database>, kernel: Invalidator) -> Self {
        Self { repairer, database, kernel, turn: Arc::new(Semaphore::new(1)) }
    }

    fn images(&self) -> &Arc<NodeImages> {
        &self.repairer.images
    }

    /// Begins a check, which ends with its caller.
    ///
    /// # Errors
    /// FAILED_PRECONDITION while another one is under way, RESOURCE_EXHAUSTED when no thread can be had.
    pub fn start(&self) -> Result<mpsc::Receiver<Message>, Status> {
        let turn = Arc::clone(&self.turn).try_acquire_owned();
        let turn = turn.map_err(|_| Status::failed_precondition("another check of this node is under way"))?;
        let (to, messages) = mpsc::channel(MAX_MESSAGES);
        let layers = self.images().store.layers();
        let progress = wire::CheckProgress {
            layers_total: u32::try_from(layers.len()).unwrap_or(u32::MAX),
            bytes_total: layers.iter().map(|layer| layer.bytes_present()).sum(),
            ..wire::CheckProgress::default()
        };
        let check = Check { checker: self.clone(), progress, reported: Instant::now(), to };
        let runtime = tokio::runtime::Handle::current();
        // A thread of its own, because a priority once lowered stays so.
        let work = move || {
            let _ = rustix::process::setpriority_process(None, NICEST);
            check.run(&runtime, layers);
            drop(turn);
        };
        let thread = std::thread::Builder::new().name("check".to_owned()).spawn(work);
        thread.map_err(|error| Status::resource_exhausted(format!("starting a thread: {error}")))?;
        Ok(messages)
    }
}

impl Check {
    fn run(mut self, runtime: &tokio::runtime::Handle, layers: Vec<Arc<Layer>>) {
        info!(layers = layers.len(), "checking the store");
        let result = self.check(runtime, layers);
        let last = match result {
            Ok(()) => {
                self.progress.done = true;
                Ok(self.progress.clone())
            }
            Err(error) => Err(Status::internal(format!("{error:#}"))),
        };
        info!("the check of the store ended");
        let _ = self.to.blocking_send(last);
    }

    fn check(&mut self, runtime: &tokio::runtime::Handle, layers: Vec<Arc<Layer>>) -> anyhow::Result<()> {
        let repairer = self.checker.repairer.clone();
        runtime.block_on(repairer.check_snapshots())?;
        repairer.look()?;
        self.database()?;
        // What was known before; chunks and the database are told of where they are looked at.
        for known in repairer
            .damages()
            .all()
            .into_iter()
            .filter(|known| ![damage::CHUNKS, damage::DATABASE].contains(&known.code))
        {
            let outcome = match known.code {
                damage::LAYER | damage::CONTENT | damage::VIEW | damage::IMAGE => Outcome::Waiting,
                damage::DATABASE_RESTORED => Outcome::Repaired,
                _ => Outcome::NotRepaired,
            };
            self.found(known, outcome);
        }
        for layer in layers {
            if self.to.is_closed() {
                return Ok(());
            }
            self.layer(runtime, &layer).with_context(|| format!("checking layer {}", layer.digest()))?;
            self.progress.layers_checked += 1;
        }
        for (number, what, failed) in self.checker.images().views.check()? {
            let outcome = if failed.is_some() { Outcome::Waiting } else { Outcome::Repaired };
            let what = failed.map_or_else(|| what.clone(), |why| format!("{what}; it cannot be made again now: {why}"));
            self.found(Damage { code: damage::VIEW, object: number.to_string(), what }, outcome);
        }
        Ok(())
    }

    /// Both files. What is damaged is not mended under the worker that has them open, but by the next one.
    fn database(&mut self) -> anyhow::Result<()> {
        let found = database::check(self.checker.images().store.root(), &self.checker.database)?;
        let hint = match found.len() {
            0 | 1 => {
                "hint: reload millstreamd (`millstreamd upgrade`); its next worker makes it again from the other file"
            }
            _ => {
                "hint: both files are damaged, and with the next worker they are lost: look at the disk, and see \
                  store.database-lost"
            }
        };
        let objects = found.into_iter().map(|(name, what)| (name.to_owned(), format!("{what}; {hint}")));
        let objects: BTreeMap<String, String> = objects.collect();
        self.checker.images().damages.set(damage::DATABASE, objects.clone());
        for (object, what) in objects {
            self.found(Damage { code: damage::DATABASE, object, what }, Outcome::NotRepaired);
        }
        Ok(())
    }

    fn layer(&mut self, runtime: &tokio::runtime::Handle, layer: &Arc<Layer>) -> anyhow::Result<()> {
        let (digest, object) = (layer.digest(), layer.digest().to_string());
        let images = Arc::clone(self.checker.images());
        if images.store.layer(&digest).is_none() {
            return Ok(());
        }
        let table = layer.check_toc();
        if !matches!(table, Ok(true)) {
            let what =
                table.err().map_or_else(|| "its table of contents is damaged".to_owned(), |error| error.to_string());
            images.store.set_damaged(&digest, what.clone());
            images.fetcher.detach(&digest);
            images.views.hide_with(layer.number())?;
            let repaired = runtime.block_on(self.checker.repairer.fetch_layer(&digest));
            let outcome = if repaired { Outcome::Repaired } else { Outcome::Waiting };
            self.found(Damage { code: damage::LAYER, object, what }, outcome);
            return Ok(());
        }
        if !layer.check_presence()? {
            let what = "its presence file was damaged and is written anew".to_owned();
            self.found(Damage { code: damage::CONTENT, object: object.clone(), what }, Outcome::Repaired);
        }
        let wrong = layer.check_chunks(|bytes| self.checked(bytes))?;
        if wrong.is_empty() {
            let mut chunks = images.damages.of(damage::CHUNKS);
            if layer.state() == LayerState::Verified && chunks.remove(&object).is_some() {
                images.damages.set(damage::CHUNKS, chunks);
            }
            return Ok(());
        }
        let chunks: usize = wrong.iter().map(|wrong| wrong.chunks.len()).sum();
        let what = format!("{chunks} chunks of {} files had wrong bytes and were taken out", wrong.len());
        let was_verified = layer.state() == LayerState::Verified;
        self.take_out(layer, &wrong)?;
        images.damages.add(damage::CHUNKS, object.clone(), format!("{what}; they are fetched again"));
        let fetched = runtime.block_on(fetch(&images, layer, &wrong, was_verified));
        let (what, outcome) = match fetched {
            Ok(()) => {
                let mut chunks = images.damages.of(damage::CHUNKS);
                chunks.remove(&object);
                images.damages.set(damage::CHUNKS, chunks);
                (format!("{what}; they are here again"), Outcome::Repaired)
            }
            Err(error) => (format!("{what}; they cannot be fetched now: {error:#}"), Outcome::Waiting),
        };
        self.found(Damage { code: damage::CHUNKS, object, what }, outcome);
        Ok(())
    }

    /// First the store, so that a read after it is answered anew; then what the kernel keeps.
    fn take_out(&self, layer: &Layer, wrong: &[WrongContent]) -> anyhow::Result<()> {
        let chunks: Vec<u32> = wrong.iter().flat_map(|wrong| wrong.chunks.iter().copied()).collect();
        let dropped = layer.drop_chunks(&chunks);
        let contents: HashSet<u32> = wrong.iter().map(|wrong| wrong.content).collect();
        let toc = layer.toc();
        for inode in 0..toc.inode_count() {
            let hit = toc.inode(inode)?.content().is_some_and(|content| contents.contains(&content));
            if let Some(file) = NodeId::file(layer.number(), inode).filter(|_| hit)
                && let Err(error) = self.checker.kernel.forget(file)
            {
                warn!({ names::LAYER } = %layer.digest(), %error, "the kernel may keep wrong bytes of a file");
            }
        }
        dropped.context("taking wrong chunks out")
    }

    /// Counts bytes and reports now and then; false when the caller has left.
    fn checked(&mut self, bytes: u64) -> bool {
        self.progress.bytes_checked += bytes;
        if self.reported.elapsed() >= INTERVAL {
            self.report();
        }
        !self.to.is_closed()
    }

    fn found(&mut self, damage: Damage, outcome: Outcome) {
        let outcome = outcome.into();
        self.progress.findings.push(wire::CheckFinding { damage: Some(damage_to_wire(damage)), outcome });
        self.report();
    }

    fn report(&mut self) {
        self.reported = Instant::now();
        // Without room it is said with the next message.
        if self.to.try_send(Ok(self.progress.clone())).is_ok() {
            self.progress.findings.clear();
        }
    }
}

/// Has wrong chunks fetched again; a layer that was verified is proven again afterwards, which nobody waits for.
async fn fetch(
    images: &Arc<NodeImages>,
    layer: &Arc<Layer>,
    wrong: &[WrongContent],
    was_verified: bool,
) -> anyhow::Result<()> {
    let digest: Digest = layer.digest();
    images.attach_anew(digest).await?;
    if was_verified {
        images.fetcher.hydrate_first(&digest);
    } else {
        images.fetcher.hydrate(&digest);
    }
    for wrong in wrong {
        let record = layer.toc().content(wrong.content)?;
        let whole = DataRange::with_len(record.data_off.get(), record.size.get());
        images.fetcher.ensure(&digest, whole, Priority::Prefetch).await?;
    }
    Ok(())
}
