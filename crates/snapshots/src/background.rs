//! Work that nobody waits for: deleting, and adding up the size of what was committed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::disk::{self, Disk};
use crate::metadata::Metadata;

/// Most snapshots that wait for their size. Others are added up when somebody asks.
const MAX_WAITING: usize = 4096;

/// Committed snapshots whose size is to be added up, in order of their numbers.
#[derive(Debug)]
pub(crate) struct UsageQueue {
    waiting: Mutex<BTreeMap<u64, String>>,
    more: Notify,
    /// Counts what was done, so that others can wait for it.
    done: watch::Sender<u64>,
}

impl UsageQueue {
    fn new() -> Self {
        Self { waiting: Mutex::default(), more: Notify::new(), done: watch::Sender::new(0) }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, String>> {
        // Every change is one call: the map is whole even if a holder panicked.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a snapshot, if there is room.
    pub(crate) fn push(&self, id: u64, name: &str) {
        let mut waiting = self.waiting();
        if waiting.len() < MAX_WAITING {
            waiting.insert(id, name.to_owned());
            self.more.notify_one();
        }
    }

    /// Returns when the snapshot is not waiting (any more). The caller bounds the time.
    pub(crate) async fn settled(&self, id: u64) {
        let mut done = self.done.subscribe();
        while self.waiting().contains_key(&id) {
            if done.changed().await.is_err() {
                return;
            }
        }
    }

    /// Works until it is aborted.
    async fn work(&self, metadata: Metadata, disk: Arc<Disk>) {
        loop {
            let next = self.waiting().first_key_value().map(|(id, name)| (*id, name.clone()));
            let Some((id, name)) = next else {
                self.more.notified().await;
                continue;
            };
            let (metadata, directory) = (metadata.clone(), disk.fs(id));
            let result = tokio::task::spawn_blocking(move || {
                let usage = disk::usage(&directory).map_err(|error| error.to_string())?;
                metadata.set_usage(&name, id, usage).map_err(|error| error.to_string())
            });
            match result.await {
                Ok(Ok(())) => {}
                // Removed meanwhile, mostly.
                Ok(Err(error)) => tracing::debug!(number = id, error, "the usage of a snapshot stays unknown"),
                Err(error) => tracing::warn!(number = id, %error, "adding up a snapshot broke off"),
            }
            self.waiting().remove(&id);
            self.done.send_modify(|done| *done += 1);
        }
    }
}

/// The tasks of one service; they end with it.
#[derive(Debug)]
pub(crate) struct Background {
    pub(crate) usage: Arc<UsageQueue>,
    trash: Arc<Notify>,
    tasks: [JoinHandle<()>; 2],
}

impl Background {
    /// Starts the tasks on the current tokio runtime.
    pub(crate) fn start(metadata: &Metadata, disk: &Arc<Disk>) -> Self {
        let usage = Arc::new(UsageQueue::new());
        let trash = Arc::new(Notify::new());
        let adding = {
            let (usage, metadata, disk) = (Arc::clone(&usage), metadata.clone(), Arc::clone(disk));
            async move { usage.work(metadata, disk).await }
        };
        let deleting = delete(Arc::clone(disk), Arc::clone(&trash));
        let tasks = [tokio::spawn(adding), tokio::spawn(deleting)];
        // What an earlier run has left.
        trash.notify_one();
        Self { usage, trash, tasks }
    }

    /// Something is in the trash.
    pub(crate) fn empty_trash(&self) {
        self.trash.notify_one();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Empties the trash whenever it is told to. The trash directory itself is the queue.
async fn delete(disk: Arc<Disk>, trash: Arc<Notify>) {
    loop {
        trash.notified().await;
        let disk = Arc::clone(&disk);
        match tokio::task::spawn_blocking(move || disk.empty_trash()).await {
            Ok(Ok(0)) => {}
            Ok(Ok(left)) => tracing::warn!(left, "some directories in the trash cannot be deleted: are they mounted?"),
            Ok(Err(error)) => tracing::warn!(%error, "the trash cannot be emptied"),
            Err(error) => tracing::warn!(%error, "emptying the trash broke off"),
        }
    }
}
