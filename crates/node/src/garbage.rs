//! Layers that no snapshot uses: they were taken in for a pull which then did not happen, because the client went away or our
//! answer came too late for it.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use millstream_oci::Digest;
use millstream_snapshots::Snapshots;
use tokio::time::MissedTickBehavior;
use tracing::warn;

use crate::images::NodeImages;

/// How often unused layers are looked for. A decision waits for less than this until its snapshot is recorded.
const INTERVAL: Duration = Duration::from_secs(90);
/// Bytes of a block as `stat(2)` counts them, whatever the file system.
const BLOCK: u64 = 512;

/// Finds and gives back unused layers.
#[derive(Debug, Clone)]
pub struct Garbage {
    snapshots: Snapshots,
    images: Arc<NodeImages>,
}

impl Garbage {
    /// Unused is what `images` has and no snapshot shows.
    #[must_use]
    pub fn new(snapshots: Snapshots, images: Arc<NodeImages>) -> Self {
        Self { snapshots, images }
    }

    fn unused(&self) -> anyhow::Result<HashSet<Digest>> {
        let used = self.snapshots.layers()?;
        let all = self.images.store.layers().into_iter().map(|layer| layer.digest());
        Ok(all.filter(|digest| !used.contains(digest)).collect())
    }

    /// Looks for unused layers for as long as the process lives. What is unused at two looks running is not about to get a
    /// snapshot.
    pub async fn give_back_again_and_again(self) {
        let mut before: HashSet<Digest> = HashSet::new();
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let unused = match self.unused() {
                Ok(unused) => unused,
                Err(error) => {
                    warn!(error = format!("{error:#}"), "cannot look for unused layers");
                    continue;
                }
            };
            let stale: Vec<Digest> = unused.intersection(&before).copied().collect();
            if let Err(error) = self.snapshots.release_unused(stale).await {
                warn!(%error, "unused layers stay for now");
            }
            before = unused;
        }
    }

    /// Gives back what is unused now, but for layers that a pull may be about to use, and waits until they are gone. Each with
    /// the bytes of disk space that it took. With `dry_run`, nothing is given back.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn give_back_now(&self, dry_run: bool) -> anyhow::Result<Vec<(Digest, u64)>> {
        // Asked first: what is decided later was not in the store yet, or is used by then.
        let wanted = self.images.about_to_be_used();
        let mut unused: Vec<Digest> = self.unused()?.into_iter().filter(|digest| !wanted.contains(digest)).collect();
        unused.sort_unstable();
        let sized: Vec<(Digest, u64)> = unused.iter().map(|digest| (*digest, self.space(digest))).collect();
        if dry_run {
            return Ok(sized);
        }
        self.snapshots.release_unused(unused).await.context("giving back unused layers")?;
        self.images.removed().await.context("removing unused layers")?;
        // A pull may have taken one of them after all.
        Ok(sized.into_iter().filter(|(digest, _)| self.images.store.layer(digest).is_none()).collect())
    }

    /// Bytes that the layer's data takes on disk.
    fn space(&self, digest: &Digest) -> u64 {
        let metadata = self.images.store.layer(digest).and_then(|layer| layer.data_file().metadata().ok());
        metadata.map_or(0, |metadata| metadata.blocks().saturating_mul(BLOCK))
    }
}
