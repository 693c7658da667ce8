//! Memory that is not needed any more goes back to the kernel.

use std::sync::Arc;
use std::time::Duration;

use millstream_sys::heap;
use tokio::sync::Notify;

/// Also without anything large: pulls and reads leave something, too.
const INTERVAL: Duration = Duration::from_secs(60);
/// Not more often than that: layers are often done one after the other.
const PAUSE: Duration = Duration::from_secs(1);

/// Has the allocator give back what it holds, whenever something large is `done` and now and then, for as long as the process
/// lives.
pub(crate) async fn give_back(done: Arc<Notify>) {
    loop {
        let _ = tokio::time::timeout(INTERVAL, done.notified()).await;
        tokio::time::sleep(PAUSE).await;
        let _ = tokio::task::spawn_blocking(heap::give_back).await;
    }
}
