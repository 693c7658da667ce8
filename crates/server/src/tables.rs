//! Who is being sent the tables of which image. Pages of its startup profile come behind them: they go to the same node over the
//! same line, and no container is created before the tables are there.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use millstream_oci::ManifestDigest;
use tokio::sync::watch;
use tokio::time::Instant;

/// Pages wait no longer than this in all: another node behind the same address may take its tables slowly.
const PATIENCE: Duration = Duration::from_secs(1);

/// Caller, and the digest of what it asks about.
type Key = (Option<IpAddr>, ManifestDigest);

/// Answers with tables that are under way.
#[derive(Debug, Default)]
pub(crate) struct Tables(watch::Sender<HashMap<Key, usize>>);

impl Tables {
    /// Notes one until the guard is dropped.
    pub(crate) fn begin(&self, peer: Option<IpAddr>, manifest: ManifestDigest) -> UnderWay {
        let key = (peer, manifest);
        self.0.send_modify(|under_way| *under_way.entry(key).or_default() += 1);
        UnderWay { tables: self.0.clone(), key }
    }

    /// The place behind the tables of this image for this caller.
    pub(crate) fn behind(&self, peer: Option<IpAddr>, manifest: ManifestDigest) -> Behind {
        Behind { tables: self.0.subscribe(), key: (peer, manifest), until: OnceLock::new() }
    }
}

/// Tables under way.
#[derive(Debug)]
pub(crate) struct UnderWay {
    tables: watch::Sender<HashMap<Key, usize>>,
    key: Key,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.tables.send_modify(|under_way| {
            if let Some(count) = under_way.get_mut(&self.key) {
                *count -= 1;
                if *count == 0 {
                    under_way.remove(&self.key);
                }
            }
        });
    }
}

/// See [`Tables::behind`].
#[derive(Debug)]
pub(crate) struct Behind {
    tables: watch::Receiver<HashMap<Key, usize>>,
    key: Key,
    /// When patience is at its end; set when pages are there for the first time.
    until: OnceLock<Instant>,
}

impl Behind {
    /// Waits until no tables are under way, or patience is at its end.
    pub(crate) async fn turn(&self) {
        let mut tables = self.tables.clone();
        let sent = tables.wait_for(|under_way| !under_way.contains_key(&self.key));
        // Patience, or a service that ended: in both cases there is nothing to wait for.
        let until = *self.until.get_or_init(|| Instant::now() + PATIENCE);
        let _ = tokio::time::timeout_at(until, sent).await;
    }
}

#[cfg(test)]
mod tests {
    use millstream_oci::Digest;

    use super::*;

    async fn waits(behind: &Behind) -> bool {
        tokio::time::timeout(PATIENCE / 4, behind.turn()).await.is_err()
    }

    fn manifest(number: u8) -> ManifestDigest {
        ManifestDigest(Digest::of(&[number]))
    }

    #[tokio::test(start_paused = true)]
    async fn pages_come_behind_the_tables_of_their_image_and_caller() {
        let tables = Tables::default();
        let (here, there) = (Some(IpAddr::from([10, 0, 0, 1])), Some(IpAddr::from([10, 0, 0, 2])));
        let behind = tables.behind(here, manifest(1));
        assert!(!waits(&behind).await);
        let others = (tables.begin(there, manifest(1)), tables.begin(here, manifest(2)));
        assert!(!waits(&behind).await);
        let (first, second) = (tables.begin(here, manifest(1)), tables.begin(here, manifest(1)));
        assert!(waits(&behind).await);
        drop(first);
        assert!(waits(&behind).await);
        drop((second, others));
        assert!(!waits(&behind).await);
        assert!(tables.0.borrow().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn pages_do_not_wait_for_ever() {
        let tables = Tables::default();
        let _sleeping = tables.begin(None, manifest(1));
        let behind = tables.behind(None, manifest(1));
        tokio::time::sleep(PATIENCE).await;
        let begun = Instant::now();
        behind.turn().await;
        behind.turn().await;
        assert_eq!(begun.elapsed(), PATIENCE, "from the first page on, and in all");
    }
}
