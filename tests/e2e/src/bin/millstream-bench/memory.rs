//! How much memory of its own a daemon has while it works.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use millstream_e2e::process::{anonymous_memory, let_pass};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// Memory of these processes now, without mapped files, in bytes. Those that have ended have none.
pub(crate) fn of(processes: &[u32]) -> u64 {
    processes.iter().filter_map(|process| anonymous_memory(*process).ok()).sum()
}

/// Looks at processes from time to time until it is dropped.
#[derive(Debug)]
pub(crate) struct Sampler {
    most: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    pub(crate) fn start(processes: Vec<u32>) -> Self {
        let (most, end) = (Arc::new(AtomicU64::new(of(&processes))), Arc::new(AtomicBool::new(false)));
        let (seen, ended) = (Arc::clone(&most), Arc::clone(&end));
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                seen.fetch_max(of(&processes), Ordering::Relaxed);
                let_pass(LOOK);
            }
        });
        Self { most, end, thread: Some(thread) }
    }

    /// The most at any look so far, in bytes.
    pub(crate) fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
