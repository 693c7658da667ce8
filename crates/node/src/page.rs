//! The page of metrics and probes of a worker.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use millstream_metrics::{Page, Readiness};
use redb::{Database, ReadableDatabase};
use tracing::{error, info};

use crate::images::NodeImages;
use crate::metrics::NodeMetrics;

/// `f_type` of FUSE, as `statfs(2)` gives it.
const FUSE: i64 = 0x6573_5546;

/// Shows the page for as long as the process lives. An address that cannot be had is no reason not to serve containers: it is
/// logged.
pub async fn show(
    address: SocketAddr,
    metrics: &NodeMetrics,
    images: Arc<NodeImages>,
    db: Arc<Database>,
    mountpoint: PathBuf,
    restarts: u64,
) {
    let registry = metrics.registry(images, restarts);
    let ready = move || -> Readiness {
        let (db, mountpoint) = (Arc::clone(&db), mountpoint.clone());
        Box::pin(async move {
            let looked = tokio::task::spawn_blocking(move || look(&db, &mountpoint)).await;
            looked.unwrap_or_else(|error| Err(error.to_string()))
        })
    };
    match millstream_metrics::bind(address).await {
        Ok(listener) => {
            info!(%address, "metrics are shown");
            tokio::spawn(millstream_metrics::serve(listener, Page { registry, ready: Box::new(ready) }));
        }
        Err(error) => error!(%error, "metrics are not shown"),
    }
}

/// Whether the database can be read and the mount is ours and answers. Blocks.
fn look(db: &Database, mountpoint: &Path) -> Result<(), String> {
    db.begin_read().map_err(|error| format!("the database cannot be read: {error}"))?;
    match rustix::fs::statfs(mountpoint) {
        Ok(found) if found.f_type == FUSE => Ok(()),
        Ok(_) => Err(format!("nothing is mounted at {}", mountpoint.display())),
        Err(error) => Err(format!("the mount at {} does not answer: {error}", mountpoint.display())),
    }
}
