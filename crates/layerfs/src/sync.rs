//! Locks of what the tests also run under a scheduler of their own, with others in their place.

pub(crate) use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
