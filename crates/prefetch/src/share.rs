//! Content that other layers of the store hold is taken over, not fetched.
//!
//! All of it in the background, as soon as a layer is attached and again before it is hydrated; and what a reader waits for
//! at once. Nothing here is needed for anything: whatever cannot be taken over is fetched.

use std::sync::Arc;

use millstream_chunkstore::Shares;
use millstream_source::names;
use millstream_toc::DataRange;
use tokio::sync::{Semaphore, watch};

use crate::attached::Attached;
use crate::fetcher::Shared;

/// Bytes that are taken over before it is looked whether the layer is still wanted.
const PIECE: u64 = 64 * 1024 * 1024;

/// What is known of the content that other layers hold.
#[derive(Debug, Clone, Default)]
pub(crate) enum Known {
    /// Nobody looked yet.
    #[default]
    Pending,
    /// It is being taken over.
    Found(Arc<Shares>),
    /// There is none, or it was taken over as far as that was possible.
    Nothing,
}

/// Where that stands, for whoever waits.
pub(crate) type Sharing = watch::Sender<Known>;

/// One layer at a time is compared with the others, and one at a time filled: the disk does no more.
#[derive(Debug)]
pub(crate) struct Turns {
    compare: Semaphore,
    copy: Semaphore,
}

impl Default for Turns {
    fn default() -> Self {
        Self { compare: Semaphore::new(1), copy: Semaphore::new(1) }
    }
}

impl Shared {
    /// Takes over all that other layers hold. Ends early when the layer is detached.
    pub(crate) async fn share_all(&self, attached: &Attached) {
        if !self.options.share {
            return;
        }
        let shares = self.compare(attached).await;
        let Some(shares) = shares else {
            attached.sharing.send_replace(Known::Nothing);
            return;
        };
        attached.sharing.send_replace(Known::Found(shares.clone()));
        let turn = self.turns.copy.acquire().await;
        let mut bytes = 0;
        for piece in shares.pieces(PIECE) {
            if attached.cancel.is_cancelled() {
                break;
            }
            match self.take(attached, &shares, piece).await {
                Some(taken) => bytes += taken,
                None => break,
            }
        }
        drop(turn);
        attached.sharing.send_replace(Known::Nothing);
        tracing::info!({ names::LAYER } = %attached.layer.digest(), bytes, "content taken over from other layers");
    }

    async fn compare(&self, attached: &Attached) -> Option<Arc<Shares>> {
        let _turn = self.turns.compare.acquire().await;
        let (store, layer) = (self.store.clone(), attached.layer.clone());
        match self.runtime.spawn_blocking(move || store.shares(&layer)).await {
            Ok(Ok(shares)) if shares.is_empty() => None,
            Ok(Ok(shares)) => Some(Arc::new(shares)),
            Ok(Err(error)) => {
                tracing::warn!({ names::LAYER } = %attached.layer.digest(), %error, "layer is not compared with others");
                None
            }
            Err(_) => None,
        }
    }

    /// Takes over what other layers hold of `range`, for somebody who waits for it.
    pub(crate) async fn share_range(&self, attached: &Attached, range: DataRange) {
        if !self.options.share {
            return;
        }
        let mut known = attached.sharing.subscribe();
        let looked = known.wait_for(|known| !matches!(known, Known::Pending));
        // Others are compared first, or a first comparison takes long: then the network is the quicker way.
        let known = match tokio::time::timeout(self.options.share_patience, looked).await {
            Ok(Ok(known)) => known.clone(),
            _ => return,
        };
        if let Known::Found(shares) = known
            && shares.has(range)
        {
            self.take(attached, &shares, range).await;
        }
    }

    /// Bytes that came over; `None` when that failed, of which some may have come over all the same.
    async fn take(&self, attached: &Attached, shares: &Arc<Shares>, range: DataRange) -> Option<u64> {
        let shares = shares.clone();
        let taken = self.runtime.spawn_blocking(move || shares.copy(range)).await;
        match taken {
            Ok(Ok(bytes)) => {
                self.tally.shared(bytes);
                Some(bytes)
            }
            Ok(Err(error)) => {
                tracing::warn!(
                    { names::LAYER } = %attached.layer.digest(), %error,
                    "content of another layer is not taken over but fetched",
                );
                None
            }
            Err(_) => None,
        }
    }
}

impl Attached {
    /// Whether `range` is about to be taken over from another layer.
    pub(crate) fn will_be_shared(&self, range: DataRange) -> bool {
        matches!(&*self.sharing.borrow(), Known::Found(shares) if shares.has(range))
    }
}
