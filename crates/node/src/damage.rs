//! What is broken on this node: found at the start or by a check, named until it is whole again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millstream_source::names;
use tracing::{error, info};

/// The database was damaged and came back from its copy.
pub const DATABASE_RESTORED: &str = "store.database-restored";
/// A check found a file of the database damaged; the worker goes on with what it has.
pub const DATABASE: &str = "store.database-damaged";
/// Database and copy are lost.
pub const DATABASE_LOST: &str = "store.database-lost";
/// A layer's table of contents or record cannot be used; nothing of it can be shown.
pub const LAYER: &str = "store.layer-damaged";
/// Content of a layer that was here is fetched again.
pub const CONTENT: &str = "store.content-lost";
/// A check found wrong bytes in a layer.
pub const CHUNKS: &str = "store.chunks-damaged";
/// The file of a merged view cannot be used.
pub const VIEW: &str = "store.view-damaged";
/// The directory or the record of a snapshot is gone.
pub const SNAPSHOT: &str = "store.snapshot-damaged";
/// What was remembered of an image cannot be read.
pub const IMAGE: &str = "store.image-damaged";
/// Running containers stand on a mount that is gone.
pub const MOUNTS: &str = "store.mounts-lost";

/// All of them.
pub const CODES: [&str; 10] =
    [DATABASE_RESTORED, DATABASE, DATABASE_LOST, LAYER, CONTENT, CHUNKS, VIEW, SNAPSHOT, IMAGE, MOUNTS];

/// Damaged things that are named one by one in the log, for each code; of the rest there is the number.
const MAX_LINES: usize = 100;

/// Damage of one kind: what is damaged, and how.
type Objects = BTreeMap<String, String>;

#[derive(Debug, Default)]
struct Kind {
    now: Objects,
    /// How often something was found damaged.
    found: u64,
}

/// Something that is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// One of [`CODES`].
    pub code: &'static str,
    /// Digest of a layer, number of a view, name of a snapshot or image, path.
    pub object: String,
    /// What is wrong, and what becomes of it.
    pub what: String,
}

/// See the module. Cheap to clone: all clones are the same list.
#[derive(Debug, Clone, Default)]
pub struct Damages(Arc<Mutex<BTreeMap<&'static str, Kind>>>);

impl Damages {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Kind>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This is damaged now, all that is of this kind. What is new is logged as an error; what is not damaged any more, too.
    pub fn set(&self, code: &'static str, now: Objects) {
        let mut kinds = self.lock();
        let kind = kinds.entry(code).or_default();
        let new: Vec<_> = now.iter().filter(|(object, _)| !kind.now.contains_key(*object)).collect();
        kind.found += new.len() as u64;
        for (object, what) in new.iter().take(MAX_LINES) {
            error!({ names::CODE } = code, found = object, reason = what, "damage found");
        }
        if new.len() > MAX_LINES {
            error!({ names::CODE } = code, left = new.len() - MAX_LINES, "damage found, more of the same kind");
        }
        for object in kind.now.keys().filter(|object| !now.contains_key(*object)).take(MAX_LINES) {
            info!({ names::CODE } = code, found = object, "damage is mended");
        }
        kind.now = now;
    }

    /// One more thing of this kind is damaged.
    pub fn add(&self, code: &'static str, object: String, what: String) {
        let mut now = self.of(code);
        now.insert(object, what);
        self.set(code, now);
    }

    /// What is damaged of this kind.
    #[must_use]
    pub fn of(&self, code: &'static str) -> Objects {
        self.lock().get(code).map(|kind| kind.now.clone()).unwrap_or_default()
    }

    /// Everything that is damaged now.
    #[must_use]
    pub fn all(&self) -> Vec<Damage> {
        let kinds = self.lock();
        let damages = kinds.iter().flat_map(|(code, kind)| {
            kind.now.iter().map(|(object, what)| Damage { code, object: object.clone(), what: what.clone() })
        });
        damages.collect()
    }

    /// For each of [`CODES`]: how many things are damaged now, and how many were found so since the worker started.
    #[must_use]
    pub fn counts(&self) -> Vec<(&'static str, u64, u64)> {
        let kinds = self.lock();
        let count =
            |code: &'static str| kinds.get(code).map_or((code, 0, 0), |kind| (code, kind.now.len() as u64, kind.found));
        CODES.into_iter().map(count).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_counted_once_and_named_until_it_is_mended() {
        let damages = Damages::default();
        let objects = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), "why".to_owned())).collect();
        damages.set(LAYER, objects(&["a", "b"]));
        damages.set(LAYER, objects(&["a", "b"]));
        damages.set(LAYER, objects(&["b"]));
        damages.add(VIEW, "1".to_owned(), "why".to_owned());
        let named: Vec<String> = damages.all().into_iter().map(|damage| damage.object).collect();
        assert_eq!(named, ["b", "1"]);
        let counts: Vec<_> = damages.counts().into_iter().filter(|(_, _, found)| *found > 0).collect();
        assert_eq!(counts, [(LAYER, 1, 2), (VIEW, 1, 1)]);
    }
}
