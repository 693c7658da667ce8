//! Keeps the content of lazy layers within its bounds: gives up what was not used for longest.
//!
//! Content may take the quota, or what the file system has but for a reserve, whichever is less. Beyond the high water mark it is
//! given up down to the low one, in this order, in each group the layer first that was not used for longest:
//!
//! 1. layers without any container;
//! 2. layers of containers that are not wholly local: these containers need the network anyway;
//! 3. wholly local layers of containers, only if the operator asked for it: these containers would need the network again.
//!
//! Nothing is given up that could not be fetched again: a layer must have a source. A layer that is to be made wholly local and
//! does not fit has others of the first group make room that were not used since it was.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use millstream_chunkstore::{Layer, LayerState, Refusal};
use millstream_oci::Digest;
use millstream_snapshots::Snapshots;
use millstream_source::names;
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use crate::images::NodeImages;

/// How often it is looked. What comes in between is bounded by the limit, which the store itself holds.
const INTERVAL: Duration = Duration::from_millis(250);
/// Looks without an attempt after one that freed nothing.
const PAUSE: u32 = 8;
/// Looks between two records of last uses.
const RECORD_EVERY: u32 = 240;
/// Of a small file system no more than this part is kept free.
const MAX_RESERVE: u64 = 10;

/// What content may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes; 0: no quota.
    pub quota: u64,
    /// Percent.
    pub high_water: u8,
    /// Percent, less than that.
    pub low_water: u8,
    /// Bytes of the file system.
    pub reserve: u64,
    /// Whether wholly local layers of containers may be given up.
    pub evict_used: bool,
}

/// Bounds at one moment, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bounds {
    limit: u64,
    high: u64,
    low: u64,
}

impl Limits {
    /// `used` is what content takes, `free` and `size` are the file system's.
    fn bounds(&self, used: u64, free: u64, size: u64) -> Bounds {
        let reserve = self.reserve.min(size / MAX_RESERVE);
        let disk = used.saturating_add(free).saturating_sub(reserve);
        let limit = if self.quota == 0 { disk } else { disk.min(self.quota) };
        let part = |percent: u8| limit / 100 * u64::from(percent);
        Bounds { limit, high: part(self.high_water), low: part(self.low_water) }
    }
}

/// Looks after the content of one node.
#[derive(Debug)]
pub struct Keeper {
    limits: Limits,
    root: PathBuf,
    snapshots: Snapshots,
    images: Arc<NodeImages>,
}

impl Keeper {
    /// `root` is on the file system of the store.
    #[must_use]
    pub fn new(limits: Limits, root: PathBuf, snapshots: Snapshots, images: Arc<NodeImages>) -> Arc<Self> {
        Arc::new(Self { limits, root, snapshots, images })
    }

    /// Looks for as long as the process lives.
    pub async fn keep(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pause = 0u32;
        for look in (0..RECORD_EVERY).cycle() {
            ticks.tick().await;
            let this = Arc::clone(&self);
            let (record, attempt) = (look == RECORD_EVERY - 1, pause == 0);
            let looked = tokio::task::spawn_blocking(move || this.look(record, attempt)).await;
            // A panic there was printed; the next look is another one.
            pause = if looked.unwrap_or(true) { pause.saturating_sub(1) } else { PAUSE };
        }
    }

    /// Adapts the bounds to the disk, and gives content up where that is due, if `attempt` says so. False: in vain.
    fn look(&self, record: bool, attempt: bool) -> bool {
        let space = self.images.store.space();
        let Ok(disk) = rustix::fs::statvfs(&self.root) else { return true };
        let (free, size) = (disk.f_bavail.saturating_mul(disk.f_frsize), disk.f_blocks.saturating_mul(disk.f_frsize));
        let used = space.used();
        let bounds = self.limits.bounds(used, free, size);
        space.set_limits(bounds.limit, bounds.high);
        if record {
            self.record_uses();
        }
        if !attempt {
            return true;
        }
        let claim = space.take_claim().filter(|claim| claim.bytes <= bounds.high);
        let given_up = match claim {
            _ if used > bounds.high => self.give_up(used - bounds.low, None),
            Some(claim) => {
                let wanted = used.saturating_add(claim.bytes).saturating_sub(bounds.high);
                // Whoever claims makes pauses of its own.
                self.give_up(wanted, Some(claim.used)).map(|freed| freed.max(1))
            }
            None => return true,
        };
        given_up.unwrap_or_else(|error| {
            warn!(error = format!("{error:#}"), "content cannot be given up");
            0
        }) > 0
    }

    fn record_uses(&self) {
        for layer in self.images.store.layers() {
            if let Err(error) = layer.record_use() {
                debug!({ names::LAYER } = %layer.digest(), %error, "last use is not recorded");
            }
        }
    }

    /// Gives up content until `wanted` bytes are free; with `since`, only of layers without container not used since then.
    /// Gives the bytes that are free now.
    fn give_up(&self, wanted: u64, since: Option<SystemTime>) -> anyhow::Result<u64> {
        let held = self.snapshots.held_layers()?;
        let mut freed = 0;
        for layer in candidates(self.images.store.layers(), &held, self.limits.evict_used, since) {
            if freed >= wanted {
                break;
            }
            // What is complete had no need of sources so far.
            if let Err(error) = self.images.supply(&layer) {
                debug!({ names::LAYER } = %layer.digest(), %error, "content stays: it could not be fetched again");
                continue;
            }
            match self.images.store.evict(&layer, wanted - freed) {
                Ok(bytes) => {
                    info!({ names::LAYER } = %layer.digest(), bytes, "content given up");
                    freed = freed.saturating_add(bytes);
                }
                Err(error) => {
                    let code = Refusal::of(&error).map_or("store.read", Refusal::code);
                    warn!({ names::CODE } = code, { names::LAYER } = %layer.digest(), %error, "content is not given up");
                }
            }
        }
        Ok(freed)
    }
}

/// The layers whose content may be given up, in the order in which it is.
fn candidates(
    layers: Vec<Arc<Layer>>,
    held: &HashSet<Digest>,
    evict_used: bool,
    since: Option<SystemTime>,
) -> Vec<Arc<Layer>> {
    let mut candidates: Vec<(u8, SystemTime, Arc<Layer>)> = layers
        .into_iter()
        .filter(|layer| layer.bytes_stored() > 0)
        .filter_map(|layer| {
            let group = group(&layer.state(), held.contains(&layer.digest()))?;
            Some((group, layer.last_use(), layer))
        })
        .collect();
    candidates.retain(|(group, used, _)| match since {
        Some(since) => *group == 1 && *used < since,
        None => *group < 3 || evict_used,
    });
    candidates.sort_by_key(|(group, used, layer)| (*group, *used, layer.number()));
    candidates.into_iter().map(|(_, _, layer)| layer).collect()
}

/// The group of a layer as the module describes them; none for one of which nothing is served.
fn group(state: &LayerState, held: bool) -> Option<u8> {
    match (state, held) {
        (LayerState::Quarantined { .. }, _) => None,
        (_, false) => Some(1),
        (LayerState::Lazy, true) => Some(2),
        (LayerState::Verified, true) => Some(3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_tighter_of_quota_and_disk_counts() {
        let limits = Limits { quota: 10 * GIB, high_water: 90, low_water: 80, reserve: GIB, evict_used: false };
        let roomy = limits.bounds(4 * GIB, 100 * GIB, 200 * GIB);
        assert_eq!((roomy.limit, roomy.high / GIB, roomy.low / GIB), (10 * GIB, 8, 7));
        assert_eq!(
            limits.bounds(4 * GIB, 3 * GIB, 200 * GIB).limit,
            6 * GIB,
            "what is here, what is free, less the reserve"
        );
        assert_eq!(limits.bounds(4 * GIB, 0, 200 * GIB).limit, 3 * GIB, "others took the reserve");
        let none = Limits { quota: 0, ..limits };
        assert_eq!(none.bounds(4 * GIB, 100 * GIB, 200 * GIB).limit, 103 * GIB);
        assert_eq!(none.bounds(0, GIB, GIB).limit, GIB - GIB / 10, "a tenth of a small disk");
        assert_eq!(none.bounds(0, 0, 0), Bounds { limit: 0, high: 0, low: 0 });
    }

    #[test]
    fn what_containers_need_offline_is_last() {
        let quarantined = LayerState::Quarantined { reason: String::new() };
        let groups = [(LayerState::Lazy, false), (LayerState::Verified, false), (LayerState::Lazy, true)];
        assert_eq!(groups.map(|(state, held)| group(&state, held)), [Some(1), Some(1), Some(2)]);
        assert_eq!((group(&LayerState::Verified, true), group(&quarantined, false)), (Some(3), None));
    }
}
