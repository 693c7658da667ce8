//! Numbers, keys and states in the shared metadata database.

use std::path::Path;
use std::sync::Arc;

use millstream_oci::Digest;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::StoreError;
use crate::durable::{Faults, Step};

/// The largest layer or view number: 23 bits of a node id.
pub const MAX_NUMBER: u32 = (1 << 23) - 1;

/// SHA-256 of the blob -> [`LayerRecord`] as JSON.
const LAYERS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("chunkstore.layers");
/// View number -> [`ViewKey`] in its byte form.
const VIEWS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("chunkstore.views");
/// [`ViewKey`] in its byte form -> view number.
const VIEW_KEYS: TableDefinition<'_, &[u8], u32> = TableDefinition::new("chunkstore.view-keys");
/// View number -> SHA-256 of its file.
const VIEW_SUMS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("chunkstore.view-sums");
/// Kind of number -> the last one given out.
const COUNTERS: TableDefinition<'_, &str, u32> = TableDefinition::new("chunkstore.counters");

/// How far a layer can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerState {
    /// Its TOC is as good as whoever served it; chunks come as they are needed.
    Lazy,
    /// Wholly local, and the TOC was proven against blob digest and diff ID.
    Verified,
    /// Proven wrong. Nothing of it may be read.
    Quarantined {
        /// What was found.
        reason: String,
    },
}

/// What is known of a layer besides its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) number: u32,
    /// SHA-256 of the canonical TOC.
    pub(crate) toc: Digest,
    pub(crate) state: LayerState,
}

/// A layer with its record, or with why that cannot be read.
pub(crate) type Found = (Digest, Result<LayerRecord, StoreError>);

/// What a merged view is made of. Equal keys are the same view.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ViewKey {
    /// Numbers of its layers, bottom first.
    pub layers: Vec<u32>,
    /// Stands for whatever is below the run and shows through it; empty for nothing. Compared byte by byte.
    pub below: Vec<u8>,
}

impl ViewKey {
    fn to_bytes(&self) -> Vec<u8> {
        let count = u32::try_from(self.layers.len()).unwrap_or(u32::MAX);
        let mut bytes = count.to_le_bytes().to_vec();
        bytes.extend(self.layers.iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend_from_slice(&self.below);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (count, rest) = bytes.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(4)?;
        let (layers, below) = rest.split_at_checked(len)?;
        let layers = layers.as_chunks::<4>().0.iter().map(|number| u32::from_le_bytes(*number)).collect();
        Some(Self { layers, below: below.to_vec() })
    }
}

/// The number of a view, and whether its key had one already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ViewSlot {
    /// Between 1 and [`MAX_NUMBER`].
    pub number: u32,
    /// The key was known before; its file may exist.
    pub existing: bool,
}

/// The store's tables.
#[derive(Debug)]
pub(crate) struct Index {
    db: Arc<Database>,
    faults: Arc<dyn Faults>,
}

impl Index {
    /// Makes tables that are missing. Numbers begin above `numbers_above` where none was given out yet.
    pub(crate) fn open(db: Arc<Database>, faults: Arc<dyn Faults>, numbers_above: u32) -> Result<Self, StoreError> {
        let index = Self { db, faults };
        index.change(|tx| {
            tx.open_table(LAYERS)?;
            tx.open_table(VIEWS)?;
            tx.open_table(VIEW_KEYS)?;
            tx.open_table(VIEW_SUMS)?;
            let mut counters = tx.open_table(COUNTERS)?;
            for what in ["layer", "view"].into_iter().filter(|_| numbers_above > 0) {
                if counters.get(what)?.is_none() {
                    counters.insert(what, numbers_above.min(MAX_NUMBER))?;
                }
            }
            Ok(())
        })?;
        Ok(index)
    }

    fn change<T>(&self, f: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let tx = self.db.begin_write()?;
        let value = f(&tx)?;
        self.faults
            .before(Step::Commit, Path::new("metadata"))
            .map_err(|e| StoreError::io("commit", Path::new("metadata"), e))?;
        tx.commit()?;
        Ok(value)
    }

    /// All layers; a record that cannot be read is an error of that layer only.
    pub(crate) fn layers(&self) -> Result<Vec<Found>, StoreError> {
        let tx = self.db.begin_read()?;
        let table = tx.open_table(LAYERS)?;
        let mut layers = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            // Only this module writes keys; one of another length names no layer.
            if let Ok(key) = <[u8; 32]>::try_from(key.value()) {
                layers.push((Digest::from_bytes(key), parse(value.value())));
            }
        }
        Ok(layers)
    }

    pub(crate) fn layer(&self, digest: &Digest) -> Result<Option<LayerRecord>, StoreError> {
        let tx = self.db.begin_read()?;
        let table = tx.open_table(LAYERS)?;
        table.get(digest.as_bytes().as_slice())?.map(|value| parse(value.value())).transpose()
    }

    /// Records a layer in state [`LayerState::Lazy`], under `number` or the next free one.
    pub(crate) fn put_layer(
        &self,
        digest: &Digest,
        toc: Digest,
        number: Option<u32>,
    ) -> Result<LayerRecord, StoreError> {
        self.change(|tx| {
            let number = match number {
                Some(number) => number,
                None => next_number(tx, "layer")?,
            };
            let record = LayerRecord { number, toc, state: LayerState::Lazy };
            put(tx, digest, &record)?;
            Ok(record)
        })
    }

    /// Records layers in state [`LayerState::Lazy`], each a digest and that of its TOC, under the next free numbers.
    pub(crate) fn put_layers(
        &self,
        layers: impl Iterator<Item = (Digest, Digest)>,
    ) -> Result<Vec<LayerRecord>, StoreError> {
        self.change(|tx| {
            layers
                .map(|(digest, toc)| {
                    let record = LayerRecord { number: next_number(tx, "layer")?, toc, state: LayerState::Lazy };
                    put(tx, &digest, &record)?;
                    Ok(record)
                })
                .collect()
        })
    }

    pub(crate) fn set_state(&self, digest: &Digest, state: &LayerState) -> Result<(), StoreError> {
        self.change(|tx| {
            let record = {
                let table = tx.open_table(LAYERS)?;
                let found = table.get(digest.as_bytes().as_slice())?;
                found.map(|value| parse(value.value())).transpose()?
            };
            let mut record = record.ok_or_else(|| StoreError::Unknown { object: digest.to_string() })?;
            record.state = state.clone();
            put(tx, digest, &record)
        })
    }

    pub(crate) fn forget_layer(&self, digest: &Digest) -> Result<(), StoreError> {
        self.change(|tx| {
            tx.open_table(LAYERS)?.remove(digest.as_bytes().as_slice())?;
            Ok(())
        })
    }

    pub(crate) fn allocate_view(&self, key: &ViewKey) -> Result<ViewSlot, StoreError> {
        let bytes = key.to_bytes();
        let known = {
            let tx = self.db.begin_read()?;
            tx.open_table(VIEW_KEYS)?.get(bytes.as_slice())?.map(|number| number.value())
        };
        if let Some(number) = known {
            return Ok(ViewSlot { number, existing: true });
        }
        self.change(|tx| {
            let mut keys = tx.open_table(VIEW_KEYS)?;
            // Somebody else may have been quicker between the two transactions.
            if let Some(number) = keys.get(bytes.as_slice())?.map(|number| number.value()) {
                return Ok(ViewSlot { number, existing: true });
            }
            let number = next_number(tx, "view")?;
            keys.insert(bytes.as_slice(), number)?;
            tx.open_table(VIEWS)?.insert(number, bytes.as_slice())?;
            Ok(ViewSlot { number, existing: false })
        })
    }

    pub(crate) fn views(&self) -> Result<Vec<(u32, ViewKey)>, StoreError> {
        let tx = self.db.begin_read()?;
        let mut views = Vec::new();
        for entry in tx.open_table(VIEWS)?.iter()? {
            let (number, key) = entry?;
            match ViewKey::from_bytes(key.value()) {
                Some(key) => views.push((number.value(), key)),
                None => tracing::error!(view = number.value(), "damaged key of a view"),
            }
        }
        Ok(views)
    }

    pub(crate) fn has_view(&self, number: u32) -> Result<bool, StoreError> {
        Ok(self.db.begin_read()?.open_table(VIEWS)?.get(number)?.is_some())
    }

    pub(crate) fn set_view_sum(&self, number: u32, sum: &Digest) -> Result<(), StoreError> {
        self.change(|tx| {
            tx.open_table(VIEW_SUMS)?.insert(number, sum.as_bytes().as_slice())?;
            Ok(())
        })
    }

    pub(crate) fn view_sum(&self, number: u32) -> Result<Option<Digest>, StoreError> {
        let tx = self.db.begin_read()?;
        let sum = tx.open_table(VIEW_SUMS)?.get(number)?;
        Ok(sum.and_then(|sum| <[u8; 32]>::try_from(sum.value()).ok()).map(Digest::from_bytes))
    }

    pub(crate) fn forget_view(&self, number: u32) -> Result<(), StoreError> {
        self.change(|tx| {
            let key = tx.open_table(VIEWS)?.remove(number)?.map(|key| key.value().to_vec());
            if let Some(key) = key {
                tx.open_table(VIEW_KEYS)?.remove(key.as_slice())?;
            }
            tx.open_table(VIEW_SUMS)?.remove(number)?;
            Ok(())
        })
    }
}

fn parse(bytes: &[u8]) -> Result<LayerRecord, StoreError> {
    serde_json::from_slice(bytes).map_err(|e| StoreError::Record(e.to_string()))
}

fn put(tx: &WriteTransaction, digest: &Digest, record: &LayerRecord) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(record).map_err(|e| StoreError::Record(e.to_string()))?;
    tx.open_table(LAYERS)?.insert(digest.as_bytes().as_slice(), bytes.as_slice())?;
    Ok(())
}

/// The number after the last one; it counts as given out once the transaction is committed.
fn next_number(tx: &WriteTransaction, what: &'static str) -> Result<u32, StoreError> {
    let mut counters = tx.open_table(COUNTERS)?;
    let last = counters.get(what)?.map_or(0, |last| last.value());
    if last >= MAX_NUMBER {
        return Err(StoreError::NoNumber { what });
    }
    counters.insert(what, last + 1)?;
    Ok(last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index() -> (tempfile::TempDir, Index) {
        let dir = tempfile::tempdir().unwrap();
        let db = Arc::new(Database::create(dir.path().join("db")).unwrap());
        (dir, Index::open(db, Arc::new(crate::NoFaults), 0).unwrap())
    }

    #[test]
    fn numbers_end_and_do_not_wrap() {
        let (_dir, index) = index();
        index.change(|tx| Ok(tx.open_table(COUNTERS)?.insert("view", MAX_NUMBER - 1).map(|_| ())?)).unwrap();
        let key = |n| ViewKey { layers: vec![n], below: Vec::new() };
        assert_eq!(index.allocate_view(&key(1)).unwrap().number, MAX_NUMBER);
        assert!(matches!(index.allocate_view(&key(2)), Err(StoreError::NoNumber { what: "view" })));
        assert!(index.allocate_view(&key(1)).unwrap().existing);
    }

    #[test]
    fn a_damaged_record_is_an_error_of_its_layer_only() {
        let (_dir, index) = index();
        let (good, bad) = (Digest::of(b"good"), Digest::of(b"bad"));
        index.put_layer(&good, Digest::of(b"toc"), None).unwrap();
        index
            .change(|tx| Ok(tx.open_table(LAYERS)?.insert(bad.as_bytes().as_slice(), b"{".as_slice()).map(|_| ())?))
            .unwrap();
        let layers = index.layers().unwrap();
        assert_eq!(layers.len(), 2);
        for (digest, record) in layers {
            assert_eq!(record.is_ok(), digest == good);
        }
    }

    proptest! {
        #[test]
        fn view_keys_have_one_byte_form(layers in proptest::collection::vec(any::<u32>(), 0..6), below in proptest::collection::vec(any::<u8>(), 0..9)) {
            let key = ViewKey { layers, below };
            prop_assert_eq!(ViewKey::from_bytes(&key.to_bytes()), Some(key));
        }

        #[test]
        fn any_bytes_are_a_key_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..24)) {
            if let Some(key) = ViewKey::from_bytes(&bytes) {
                prop_assert_eq!(key.to_bytes(), bytes);
            }
        }
    }
}
