//! Locks, channels and time of what the tests also run under a scheduler of their own, with others in their place.

pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use tokio::sync::watch;
pub(crate) use tokio::time::{Instant, timeout, timeout_at};
