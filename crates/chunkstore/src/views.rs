//! Merged views: persistent numbers and flat files that can always be made again from the TOCs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use millstream_oci::Digest;
use millstream_sys::map::GuardedMap;

use crate::{Store, StoreError, ViewKey, ViewSlot, durable};

/// The bytes of one view, mapped read-only.
#[derive(Debug)]
pub struct ViewBytes(GuardedMap);

impl ViewBytes {
    /// Whether the file was changed behind our back and reads as zeros in places.
    #[must_use]
    pub fn poisoned(&self) -> bool {
        self.0.poisoned()
    }
}

impl AsRef<[u8]> for ViewBytes {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl Store {
    /// The number of the view that `key` describes, a new one if it has none.
    ///
    /// # Errors
    /// [`StoreError::NoNumber`], those of the database.
    pub fn allocate_view(&self, key: &ViewKey) -> Result<ViewSlot, StoreError> {
        self.index.allocate_view(key)
    }

    /// Puts the bytes of a view in place, durably. Whoever has the old ones open keeps them. One view is written by one
    /// thread at a time.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] for a number that was not allocated, those of disk and database.
    pub fn write_view(&self, number: u32, bytes: &[u8]) -> Result<(), StoreError> {
        if !self.index.has_view(number)? {
            return Err(unknown(number));
        }
        durable::replace(&*self.faults, &self.view_path(number), bytes)?;
        self.index.set_view_sum(number, &Digest::of(bytes))
    }

    /// Maps the bytes that were written for a view, after comparing them with their digest.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] when none were written; [`StoreError::Damaged`] when they changed since, or a crash came
    /// between file and record: make the view again.
    pub fn open_view(&self, number: u32) -> Result<ViewBytes, StoreError> {
        let path = self.view_path(number);
        let sum = self.index.view_sum(number)?.ok_or_else(|| unknown(number))?;
        let damaged = || StoreError::Damaged { what: "view", object: number.to_string() };
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(damaged()),
            other => other.map_err(|e| StoreError::io("open", &path, e))?,
        };
        let map = GuardedMap::new(&file).map_err(|e| StoreError::io("map", &path, e))?;
        if Digest::of(map.as_ref()) != sum || map.poisoned() {
            return Err(damaged());
        }
        Ok(ViewBytes(map))
    }

    /// Every view that has a number, ascending.
    ///
    /// # Errors
    /// Those of the database.
    pub fn views(&self) -> Result<Vec<(u32, ViewKey)>, StoreError> {
        self.index.views()
    }

    /// Removes a view, its key and its file; its number is not used again. Whoever has it open keeps it.
    ///
    /// # Errors
    /// Those of database and disk; a file that could not be removed now is removed at the next start.
    pub fn remove_view(&self, number: u32) -> Result<(), StoreError> {
        self.index.forget_view(number)?;
        durable::remove_file(&self.view_path(number))
    }

    fn view_path(&self, number: u32) -> PathBuf {
        self.views_dir().join(number.to_string())
    }

    /// Removes files that no view number names.
    pub(crate) fn sweep_views(&self) -> Result<(), StoreError> {
        let known = self.index.views()?;
        let dir = self.views_dir();
        for entry in fs::read_dir(&dir).map_err(|e| StoreError::io("list", &dir, e))? {
            let path = entry.map_err(|e| StoreError::io("list", &dir, e))?.path();
            if !names_a_view(&path, &known)
                && let Err(error) = durable::remove_file(&path)
            {
                tracing::warn!(%error, "file of a removed view stays");
            }
        }
        Ok(())
    }
}

fn names_a_view(path: &Path, known: &[(u32, ViewKey)]) -> bool {
    let number = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<u32>().ok());
    number.is_some_and(|number| known.binary_search_by_key(&number, |(number, _)| *number).is_ok())
}

fn unknown(number: u32) -> StoreError {
    StoreError::Unknown { object: format!("view {number}") }
}
