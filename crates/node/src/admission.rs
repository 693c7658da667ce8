//! Orders what layers go through on this node: they are admitted, shown, given back and removed, by calls that know nothing of
//! each other.
//!
//! Nobody asks here what a layer is, and nothing is done here but keeping the order. So the tests can run this very file under a
//! scheduler that tries the orders out (`schedules`); `super::sync` is where its locks come from.

use std::collections::HashSet;
use std::sync::Arc;

use millstream_oci::Digest;

use super::sync::{Mutex, MutexGuard, PoisonError};

/// The order.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    /// Layers that were given back and wait to be removed; they stay here until they are gone, so that nobody takes one for
    /// usable while it is being removed.
    dying: Mutex<HashSet<Digest>>,
    /// Whoever admits layers first removes those that are dying, so that a layer that is wanted again is never taken away
    /// afterwards.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// One view is built or removed at a time: two requests for the same one must not build it twice, also when the first one
    /// was given up while it was being built, and none may be built of layers that are about to be removed.
    showing: Mutex<()>,
}

/// The right to admit and to remove layers; one at a time has it. It goes along with the work, into other threads, too: a caller
/// that is gone does not end what it began.
#[derive(Debug)]
pub(crate) struct Turn(#[allow(dead_code)] tokio::sync::OwnedMutexGuard<()>);

impl Admission {
    fn dying(&self) -> MutexGuard<'_, HashSet<Digest>> {
        // Every change is one call: the set is whole even if a holder panicked.
        self.dying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to admit and remove layers.
    pub(crate) async fn turn(&self) -> Turn {
        Turn(Arc::clone(&self.turn).lock_owned().await)
    }

    /// The same on a thread that may block.
    pub(crate) fn blocking_turn(&self) -> Turn {
        Turn(Arc::clone(&self.turn).blocking_lock_owned())
    }

    /// These layers are not wanted any more: nobody may begin to use them.
    pub(crate) fn give_back(&self, layers: impl IntoIterator<Item = Digest>) {
        self.dying().extend(layers);
    }

    /// Whether the layer was given back.
    pub(crate) fn is_dying(&self, layer: &Digest) -> bool {
        self.dying().contains(layer)
    }

    /// Keeps others from showing and hiding anything while the guard lives: for work on views as they are.
    pub(crate) fn alone(&self) -> MutexGuard<'_, ()> {
        // It guards no value.
        self.showing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `build`, which shows some layers, unless one of these was given back.
    pub(crate) fn show<T>(&self, layers: &[Digest], build: impl FnOnce() -> T) -> Option<T> {
        let _alone = self.alone();
        // Looked at under the lock: what is given back after this is hidden after this.
        if layers.iter().any(|layer| self.is_dying(layer)) { None } else { Some(build()) }
    }

    /// Removes what was given back: `hide` takes away what shows these layers, then `remove` them, and gives whether a layer is
    /// gone. One that is not is dying still. Gives false if there was nothing to do.
    ///
    /// # Errors
    /// That of `hide`, and nothing is removed then.
    pub(crate) fn remove_dying<E>(
        &self,
        _turn: &Turn,
        hide: impl FnOnce(&[Digest]) -> Result<(), E>,
        mut remove: impl FnMut(&Digest) -> bool,
    ) -> Result<bool, E> {
        let dying: Vec<Digest> = self.dying().iter().copied().collect();
        if dying.is_empty() {
            return Ok(false);
        }
        {
            let _alone = self.alone();
            hide(&dying)?;
        }
        for layer in &dying {
            if remove(layer) {
                self.dying().remove(layer);
            }
        }
        Ok(true)
    }
}
