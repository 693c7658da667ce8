//! Locks of what is also run under a scheduler of the tests, with others in their place.

pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};
