//! Looks at what is damaged, and has it from its source again when that answers. Nothing here is waited for by anybody.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};
use millstream_chunkstore::LayerState;
use millstream_oci::{Digest, ImageRef};
use millstream_snapshots::Snapshots;
use millstream_source::names;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::catalog::ImageRecord;
use crate::damage::{self, Damages};
use crate::images::NodeImages;
use crate::lost_mounts::LostMounts;

/// How often it is looked what is damaged.
const LOOK: Duration = Duration::from_secs(2);
/// First pause after a failed attempt; doubled with every one that follows.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// Longest pause between two attempts: damage is mended at the latest this long after its source came back.
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// How long an image's description and tables may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What looks and repairs.
#[derive(Debug, Clone)]
pub struct Repairer {
    pub(crate) images: Arc<NodeImages>,
    snapshots: Snapshots,
    lost: Arc<LostMounts>,
}

impl Repairer {
    /// Damage goes to the list of `images`.
    #[must_use]
    pub fn new(images: Arc<NodeImages>, snapshots: Snapshots, lost: LostMounts) -> Self {
        Self { images, snapshots, lost: Arc::new(lost) }
    }

    pub(crate) fn damages(&self) -> &Damages {
        &self.images.damages
    }

    /// Looks again at the directories and records of snapshots.
    ///
    /// # Errors
    /// When the database or the disk fails.
    pub async fn check_snapshots(&self) -> anyhow::Result<()> {
        self.snapshots.check().await?;
        Ok(())
    }

    /// Has the table of a damaged layer from the source of an image that has it; whether that worked.
    pub async fn fetch_layer(&self, digest: &Digest) -> bool {
        let images = self.images.catalog.images().unwrap_or_default();
        for (repository, record) in images {
            if !record.layers.iter().any(|layer| layer.digest == *digest) {
                continue;
            }
            let name = format!("{repository}@{}", record.manifest);
            match self.fetch(&name, Some(record)).await {
                Ok(()) => return true,
                Err(error) => {
                    warn!({ names::IMAGE } = name, error = format!("{error:#}"), "damage cannot be mended now")
                }
            }
        }
        false
    }

    /// Finds out what is damaged now. Blocks.
    ///
    /// # Errors
    /// Those of the database.
    pub fn look(&self) -> anyhow::Result<()> {
        let layers = self.images.store.damaged().into_iter();
        let again = |what| format!("{what}; it is fetched again once its source answers");
        let layers = layers.map(|(digest, what)| (digest.to_string(), again(what))).collect();
        self.damages().set(damage::LAYER, layers);

        let layers = self.images.store.layers();
        let lost = layers.iter().filter(|layer| layer.state() == LayerState::Lazy);
        let lost = lost.filter_map(|layer| Some((layer.digest().to_string(), again(layer.lost()?.to_owned()))));
        self.damages().set(damage::CONTENT, lost.collect());
        let whole: HashSet<String> = layers
            .iter()
            .filter(|layer| layer.state() == LayerState::Verified)
            .map(|layer| layer.digest().to_string())
            .collect();
        let known: HashSet<String> = layers.iter().map(|layer| layer.digest().to_string()).collect();
        let mut chunks = self.damages().of(damage::CHUNKS);
        chunks.retain(|layer, _| known.contains(layer) && !whole.contains(layer));
        self.damages().set(damage::CHUNKS, chunks);

        let views = self.images.views.broken().into_iter().map(|(number, what)| (number.to_string(), what));
        self.damages().set(damage::VIEW, views.collect());

        let snapshots = self.snapshots.damaged().into_iter();
        let remove = |what| format!("{what}; hint: remove the containers and images that use it, and pull them again");
        let snapshots = snapshots.map(|damage| (damage.name, remove(damage.what))).collect();
        self.damages().set(damage::SNAPSHOT, snapshots);

        let records = self.images.catalog.unreadable()?.into_iter();
        self.damages().set(damage::IMAGE, records.map(|(name, what)| (name, again(what))).collect());
        self.damages().set(damage::MOUNTS, self.lost.still_mounted());
        Ok(())
    }

    /// Looks and repairs for as long as the process lives. Layers without a source are given one once `resumed` says that all
    /// images were taken up.
    pub async fn work(self, resumed: watch::Receiver<bool>) {
        let mut pause = FIRST_PAUSE;
        let mut failed = BTreeMap::new();
        let mut credentials = self.credentials();
        loop {
            tokio::time::sleep(LOOK).await;
            if *resumed.borrow() && credentials != self.credentials() {
                credentials = self.credentials();
                let images = Arc::clone(&self.images);
                if let Ok(Err(error)) = tokio::task::spawn_blocking(move || images.resume()).await {
                    warn!(error = format!("{error:#}"), "layers do not get the new credentials");
                }
            }
            let this = self.clone();
            let looked = tokio::task::spawn_blocking(move || this.look().and_then(|()| this.to_fetch())).await;
            let wanted = match looked {
                Ok(Ok(wanted)) => wanted,
                Ok(Err(error)) => {
                    warn!(error = format!("{error:#}"), "cannot look for damage now");
                    continue;
                }
                Err(_) => continue,
            };
            let mut again = BTreeMap::new();
            if *resumed.borrow() {
                for digest in self.images.without_source() {
                    match self.images.attach_anew(digest).await {
                        Ok(()) => self.images.fetcher.hydrate(&digest),
                        Err(error) => drop(again.insert(digest.to_string(), format!("{error:#}"))),
                    }
                }
            }
            if wanted.is_empty() && again.is_empty() {
                (pause, failed) = (FIRST_PAUSE, BTreeMap::new());
                continue;
            }
            for (name, record) in wanted {
                match self.fetch(&name, record).await {
                    Ok(()) => info!({ names::IMAGE } = name, "what was damaged of this image is here again"),
                    Err(error) => {
                        let error = format!("{error:#}");
                        if failed.get(&name) != Some(&error) {
                            warn!({ names::IMAGE } = name, error, "damage cannot be mended now; it is tried again");
                        }
                        again.insert(name, error);
                    }
                }
            }
            pause = if again.is_empty() { FIRST_PAUSE } else { (pause * 2).min(LAST_PAUSE) };
            failed = again;
            tokio::time::sleep(pause).await;
        }
    }

    /// When the file with credentials was changed, and its size. What was taken up without it, or with an older one, is given the
    /// new ones.
    fn credentials(&self) -> Option<(SystemTime, u64)> {
        let found = std::fs::metadata(self.images.origins.docker_config.as_ref()?).ok()?;
        Some((found.modified().ok()?, found.len()))
    }

    /// Images of which something has to be asked for: those with a damaged layer, and those whose record cannot be read.
    fn to_fetch(&self) -> anyhow::Result<Vec<(String, Option<ImageRecord>)>> {
        let damaged: HashSet<Digest> = self.images.store.damaged().into_iter().map(|(digest, _)| digest).collect();
        let mut wanted: Vec<(String, Option<ImageRecord>)> = Vec::new();
        let unreadable = self.images.catalog.unreadable()?;
        if damaged.is_empty() && unreadable.is_empty() {
            return Ok(wanted);
        }
        for (repository, record) in self.images.catalog.images()? {
            if record.layers.iter().any(|layer| damaged.contains(&layer.digest)) {
                wanted.push((format!("{repository}@{}", record.manifest), Some(record)));
            }
        }
        wanted.extend(unreadable.into_iter().map(|(name, _)| (name, None)));
        Ok(wanted)
    }

    /// Asks the source of an image (`REPOSITORY@MANIFEST`) for its description and for the tables that are not here.
    async fn fetch(&self, name: &str, record: Option<ImageRecord>) -> anyhow::Result<()> {
        let (repository, manifest) = name.rsplit_once('@').ok_or_else(|| anyhow!("{name} names no image"))?;
        let image: ImageRef = match &record {
            Some(record) => record.image.parse()?,
            None => name.parse()?,
        };
        let manifest = manifest.parse().context("digest of the manifest")?;
        let origins = self.images.origins.clone();
        let origin = tokio::task::spawn_blocking(move || origins.of(&image, manifest)).await??;
        let fetched = timeout(PATIENCE, self.images.bring_back(repository, &origin)).await;
        let described = fetched.unwrap_or_else(|_| bail!("no answer within {} s", PATIENCE.as_secs()))?;
        let missing = described.layers.iter().filter(|layer| layer.ineligible.is_none());
        let missing: Vec<Digest> =
            missing.map(|layer| layer.digest).filter(|digest| self.images.store.is_damaged(digest)).collect();
        anyhow::ensure!(missing.is_empty(), "the source did not give the tables of {missing:?}");
        Ok(())
    }
}
