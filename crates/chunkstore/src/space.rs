//! How much of the disk the content of layers takes, how much it may take, and what became of that.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::StoreError;

/// Why something could not be stored. Whoever wanted to store it serves it without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The quota was reached, or the file system is full.
    Full,
    /// The file system is mounted read-only, or became so after an error.
    ReadOnly,
    /// The file system gave another error.
    Failing,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Full, Self::ReadOnly, Self::Failing];

    /// Its stable code.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Full => "store.full",
            Self::ReadOnly => "store.read-only",
            Self::Failing => "store.failing",
        }
    }

    /// What kind of refusal an error is; `None`: it says nothing about the disk.
    #[must_use]
    pub fn of(error: &StoreError) -> Option<Self> {
        match error {
            StoreError::NoSpace { .. } => Some(Self::Full),
            StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
                Some(Self::ReadOnly)
            }
            StoreError::Io { .. } | StoreError::Metadata(_) => Some(Self::Failing),
            _ => None,
        }
    }
}

/// A layer that did not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Bytes that it misses.
    pub bytes: u64,
    /// When somebody last had use for it. Only what was used longer ago should give way.
    pub used: SystemTime,
}

/// The account of a store. What counts is the content of layers in whole blocks, shared blocks as if they were copies; tables
/// of contents and views come on top, with one to two hundredths of that.
#[derive(Debug)]
pub struct Space {
    used: AtomicU64,
    limit: AtomicU64,
    /// As `limit`, for what nobody waits for.
    background: AtomicU64,
    claim: Mutex<Option<Claim>>,
    evicted: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
    /// The last attempt to store something came to this.
    trouble: Mutex<Option<Refusal>>,
}

impl Default for Space {
    fn default() -> Self {
        Self {
            used: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            background: AtomicU64::new(u64::MAX),
            claim: Mutex::default(),
            evicted: AtomicU64::new(0),
            refused: Default::default(),
            trouble: Mutex::default(),
        }
    }
}

impl Space {
    /// Bytes that content takes now.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that were given back by eviction since the start.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }

    /// Nothing is stored any more from `limit` bytes on, and beyond `background` no layer begins to be made wholly local;
    /// `u64::MAX`: no bound. What is under way at once may exceed it, by one chunk for each writer, or 8 MiB where content is
    /// taken over from another layer.
    pub fn set_limits(&self, limit: u64, background: u64) {
        self.limit.store(limit, Ordering::Relaxed);
        self.background.store(background, Ordering::Relaxed);
    }

    /// Whether `bytes` more of a layer fit, which was last used at `used`. If not, it is remembered until
    /// [`Space::take_claim`].
    pub fn claim(&self, bytes: u64, used: SystemTime) -> bool {
        if self.used().saturating_add(bytes) <= self.background.load(Ordering::Relaxed) {
            return true;
        }
        let mut claim = self.claim.lock().unwrap_or_else(PoisonError::into_inner);
        if claim.is_none_or(|claim| claim.used <= used) {
            *claim = Some(Claim { bytes, used });
        }
        false
    }

    /// The claim of the layer that was used last, of those that did not fit since the last call.
    pub fn take_claim(&self) -> Option<Claim> {
        self.claim.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Bytes that may still be stored.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.limit.load(Ordering::Relaxed).saturating_sub(self.used())
    }

    /// How often something could not be stored since the start, by why.
    #[must_use]
    pub fn refused(&self) -> [(Refusal, u64); Refusal::ALL.len()] {
        Refusal::ALL.map(|refusal| (refusal, self.refused[refusal as usize].load(Ordering::Relaxed)))
    }

    /// Why the last attempt to store something failed; `None` when it did not.
    #[must_use]
    pub fn trouble(&self) -> Option<Refusal> {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how an attempt to store something ended. Says in the log when that changes.
    pub(crate) fn note<T>(&self, result: &Result<T, StoreError>) {
        let now = match result {
            Ok(_) => None,
            Err(error) => match Refusal::of(error) {
                None => return,
                refusal => refusal,
            },
        };
        if let Some(refusal) = now {
            self.refused[refusal as usize].fetch_add(1, Ordering::Relaxed);
        }
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if *trouble == now {
            return;
        }
        *trouble = now;
        drop(trouble);
        match (now, result) {
            (Some(refusal), Err(error)) => {
                tracing::warn!(code = refusal.code(), %error, "content is served without being stored")
            }
            _ => tracing::info!("content is stored again"),
        }
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn note_evicted(&self, bytes: u64) {
        self.evicted.fetch_add(bytes, Ordering::Relaxed);
    }
}
