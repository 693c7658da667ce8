//! What the node remembers of images over restarts: which layers they have, where they came from, what was decided.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use millstream_oci::{ChainId, DiffId, Digest, ManifestDigest, chain_ids};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::index::IndexRecord;

/// `REPOSITORY@MANIFEST` to [`ImageRecord`] as JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("node_images");
/// Ascending number to [`Decision`] as JSON.
const DECISIONS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("node_decisions");
/// Name to value.
const SWITCHES: TableDefinition<'_, &str, bool> = TableDefinition::new("node_switches");
/// `REPOSITORY@MANIFEST` to [`IndexRecord`] as JSON.
const TO_INDEX: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("node_to_index");
const STREAMING: &str = "streaming";
/// Decisions that are kept; the oldest go first.
const MAX_DECISIONS: u64 = 1000;
/// How far back is looked for the last decision about the same image: as many pulls as may well run at once.
const RECENT: usize = 32;
/// Seconds for which a decision stands for those about the other layers of the image.
const JUST_NOW: i64 = 10;

/// A layer of an image, as the server described it when the image was first seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Digest of the blob.
    pub digest: Digest,
    /// Diff ID.
    pub diff_id: DiffId,
    /// Why it cannot be streamed, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ineligible: Option<String>,
    /// Whether it only cannot be streamed yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pending: bool,
}

/// An image that was or is lazy here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Reference as the client gave it.
    pub image: String,
    /// Digest of the platform's manifest.
    pub manifest: ManifestDigest,
    /// Bottom first.
    pub layers: Vec<LayerRecord>,
}

impl ImageRecord {
    /// Chain IDs, bottom first.
    #[must_use]
    pub fn chain_ids(&self) -> Vec<ChainId> {
        let diff_ids: Vec<DiffId> = self.layers.iter().map(|layer| layer.diff_id).collect();
        chain_ids(&diff_ids)
    }
}

/// One decision about an image, as `millstream explain` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Reference as the client gave it.
    pub image: String,
    /// Manifest digest; empty where the labels did not say.
    pub manifest: String,
    /// `lazy`, `local`, `deferred` or `failed`.
    pub outcome: String,
    /// Stable code; empty for `lazy` and `local`.
    pub code: String,
    /// For a person.
    pub reason: String,
    /// Seconds since 1970.
    pub decided_at: i64,
}

impl Decision {
    /// One that is made now.
    #[must_use]
    pub fn now(image: String, manifest: String, outcome: &str, code: &str, reason: String) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let decided_at = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        Self { image, manifest, outcome: outcome.to_owned(), code: code.to_owned(), reason, decided_at }
    }
}

/// The tables of the node in the shared database.
#[derive(Debug, Clone)]
pub struct Catalog {
    db: Arc<Database>,
}

impl Catalog {
    /// Creates the tables that are missing.
    ///
    /// # Errors
    /// Those of the database.
    pub fn open(db: Arc<Database>) -> anyhow::Result<Self> {
        let write = db.begin_write()?;
        write.open_table(IMAGES)?;
        write.open_table(DECISIONS)?;
        write.open_table(SWITCHES)?;
        write.open_table(TO_INDEX)?;
        write.commit()?;
        Ok(Self { db })
    }

    fn key(repository: &str, manifest: &ManifestDigest) -> String {
        format!("{repository}@{manifest}")
    }

    /// An image of a repository (`registry/name`). One whose record cannot be read is not known: its source has to be asked.
    ///
    /// # Errors
    /// Those of the database.
    pub fn image(&self, repository: &str, manifest: &ManifestDigest) -> anyhow::Result<Option<ImageRecord>> {
        let key = Self::key(repository, manifest);
        let table = self.db.begin_read()?.open_table(IMAGES)?;
        let Some(value) = table.get(key.as_str())? else { return Ok(None) };
        Ok(serde_json::from_slice(value.value()).ok())
    }

    /// Remembers an image.
    ///
    /// # Errors
    /// Those of the database.
    pub fn put_image(&self, repository: &str, record: &ImageRecord) -> anyhow::Result<()> {
        let write = self.db.begin_write()?;
        write
            .open_table(IMAGES)?
            .insert(Self::key(repository, &record.manifest).as_str(), serde_json::to_vec(record)?.as_slice())?;
        write.commit()?;
        Ok(())
    }

    /// All images with their repository. Records that cannot be read are left out: [`Catalog::unreadable`] has them.
    ///
    /// # Errors
    /// Those of the database.
    pub fn images(&self) -> anyhow::Result<Vec<(String, ImageRecord)>> {
        let table = self.db.begin_read()?.open_table(IMAGES)?;
        let mut images = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            let repository = key.value().rsplit_once('@').map_or(key.value(), |(repository, _)| repository).to_owned();
            if let Ok(record) = serde_json::from_slice(value.value()) {
                images.push((repository, record));
            }
        }
        Ok(images)
    }

    /// Images (`REPOSITORY@MANIFEST`) whose record cannot be read, and why.
    ///
    /// # Errors
    /// Those of the database.
    pub fn unreadable(&self) -> anyhow::Result<Vec<(String, String)>> {
        let table = self.db.begin_read()?.open_table(IMAGES)?;
        let mut images = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            if let Err(error) = serde_json::from_slice::<ImageRecord>(value.value()) {
                images.push((key.value().to_owned(), format!("its record cannot be read: {error}")));
            }
        }
        Ok(images)
    }

    /// Forgets images none of whose layers `keep` wants.
    ///
    /// # Errors
    /// Those of the database.
    pub fn forget_images(&self, keep: impl Fn(&Digest) -> bool) -> anyhow::Result<()> {
        let write = self.db.begin_write()?;
        write.open_table(IMAGES)?.retain(|_, value| {
            // What cannot be read may be wanted still; its source is asked.
            serde_json::from_slice::<ImageRecord>(value)
                .map_or(true, |record| record.layers.iter().any(|layer| keep(&layer.digest)))
        })?;
        write.commit()?;
        Ok(())
    }

    /// Adds a decision and drops the oldest beyond the limit. It takes the place of the last one about the same image if that
    /// says the same: an image of sixty layers has one decision, not sixty. Nothing is written if that is of a few seconds ago:
    /// the next layer, which is being recorded meanwhile, would wait for it.
    ///
    /// # Errors
    /// Those of the database.
    pub fn put_decision(&self, decision: &Decision) -> anyhow::Result<()> {
        let table = self.db.begin_read()?.open_table(DECISIONS)?;
        if repeated(&table, decision)?
            .is_some_and(|(_, earlier)| (0..JUST_NOW).contains(&(decision.decided_at - earlier)))
        {
            return Ok(());
        }
        let write = self.db.begin_write()?;
        {
            let mut table = write.open_table(DECISIONS)?;
            let number = table.last()?.map_or(0, |(key, _)| key.value() + 1);
            if let Some((same, _)) = repeated(&table, decision)? {
                table.remove(same)?;
            }
            table.insert(number, serde_json::to_vec(decision)?.as_slice())?;
            table.retain(|key, _| key + MAX_DECISIONS > number)?;
        }
        write.commit()?;
        Ok(())
    }

    /// Decisions about an image, the latest first; `wanted` is a reference as the client gave it or a manifest digest.
    ///
    /// # Errors
    /// Those of the database.
    pub fn decisions(&self, wanted: &str) -> anyhow::Result<Vec<Decision>> {
        let table = self.db.begin_read()?.open_table(DECISIONS)?;
        let mut decisions = Vec::new();
        for entry in table.iter()?.rev() {
            let (_, value) = entry?;
            if let Ok(decision) = serde_json::from_slice::<Decision>(value.value())
                && (decision.image == wanted || decision.manifest == wanted)
            {
                decisions.push(decision);
            }
        }
        Ok(decisions)
    }

    /// Remembers that an image is to be indexed.
    ///
    /// # Errors
    /// Those of the database.
    pub fn put_to_index(&self, name: &str, record: &IndexRecord) -> anyhow::Result<()> {
        let write = self.db.begin_write()?;
        write.open_table(TO_INDEX)?.insert(name, serde_json::to_vec(record)?.as_slice())?;
        write.commit()?;
        Ok(())
    }

    /// Forgets that an image is to be indexed.
    ///
    /// # Errors
    /// Those of the database.
    pub fn remove_to_index(&self, name: &str) -> anyhow::Result<()> {
        let write = self.db.begin_write()?;
        write.open_table(TO_INDEX)?.remove(name)?;
        write.commit()?;
        Ok(())
    }

    /// The image of this name, if it is to be indexed.
    ///
    /// # Errors
    /// Those of the database, or a record that cannot be read.
    pub fn one_to_index(&self, name: &str) -> anyhow::Result<Option<IndexRecord>> {
        let table = self.db.begin_read()?.open_table(TO_INDEX)?;
        let Some(value) = table.get(name)? else { return Ok(None) };
        serde_json::from_slice(value.value()).with_context(|| format!("image {name} to index")).map(Some)
    }

    /// Images to index, by name. Records that cannot be read are left out.
    ///
    /// # Errors
    /// Those of the database.
    pub fn to_index(&self) -> anyhow::Result<Vec<(String, IndexRecord)>> {
        let table = self.db.begin_read()?.open_table(TO_INDEX)?;
        let mut images = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            if let Ok(record) = serde_json::from_slice(value.value()) {
                images.push((key.value().to_owned(), record));
            }
        }
        Ok(images)
    }

    /// Whether new images are streamed; true until it was switched off.
    ///
    /// # Errors
    /// Those of the database.
    pub fn streaming(&self) -> anyhow::Result<bool> {
        let table = self.db.begin_read()?.open_table(SWITCHES)?;
        Ok(table.get(STREAMING)?.is_none_or(|value| value.value()))
    }

    /// Switches streaming of new images.
    ///
    /// # Errors
    /// Those of the database.
    pub fn set_streaming(&self, enabled: bool) -> anyhow::Result<()> {
        let write = self.db.begin_write()?;
        write.open_table(SWITCHES)?.insert(STREAMING, enabled)?;
        write.commit()?;
        Ok(())
    }
}

/// Number and time of the last decision about the same image, if it is among the latest few and says the same as `decision`.
fn repeated(table: &impl ReadableTable<u64, &'static [u8]>, decision: &Decision) -> anyhow::Result<Option<(u64, i64)>> {
    for entry in table.iter()?.rev().take(RECENT) {
        let (key, value) = entry?;
        let Ok(earlier) = serde_json::from_slice::<Decision>(value.value()) else { continue };
        if (&earlier.image, &earlier.manifest) == (&decision.image, &decision.manifest) {
            let at = earlier.decided_at;
            let same = Decision { decided_at: decision.decided_at, ..earlier } == *decision;
            return Ok(same.then(|| (key.value(), at)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog() -> (tempfile::TempDir, Catalog) {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::create(dir.path().join("db")).unwrap();
        (dir, Catalog::open(Arc::new(db)).unwrap())
    }

    #[test]
    fn images_are_forgotten_with_their_last_layer() {
        let (_dir, catalog) = catalog();
        let layer = |text: &str| LayerRecord {
            pending: false,
            digest: Digest::of(text.as_bytes()),
            diff_id: DiffId(Digest::of(b"d")),
            ineligible: None,
        };
        let record = ImageRecord {
            image: "r/app:1".into(),
            manifest: ManifestDigest(Digest::of(b"m")),
            layers: vec![layer("a"), layer("b")],
        };
        catalog.put_image("r/app", &record).unwrap();
        assert_eq!(catalog.image("r/app", &record.manifest).unwrap().as_ref(), Some(&record));
        assert_eq!(catalog.image("r/other", &record.manifest).unwrap(), None);
        catalog.forget_images(|digest| *digest == Digest::of(b"b")).unwrap();
        assert_eq!(catalog.images().unwrap(), [("r/app".to_owned(), record)]);
        catalog.forget_images(|_| false).unwrap();
        assert!(catalog.images().unwrap().is_empty());
    }

    #[test]
    fn decisions_are_bounded_and_the_latest_comes_first() {
        let (_dir, catalog) = catalog();
        let decision = |code: &str, at| Decision {
            image: "r/app:1".into(),
            manifest: "sha256:m".into(),
            outcome: "deferred".into(),
            code: code.into(),
            reason: String::new(),
            decided_at: at,
        };
        for at in [0, 100, 200, 201] {
            catalog.put_decision(&decision("same", at)).unwrap();
        }
        catalog.put_decision(&decision("other", 202)).unwrap();
        let found = catalog.decisions("sha256:m").unwrap();
        assert_eq!(found, [decision("other", 202), decision("same", 200)]);
        // The clock was set back.
        catalog.put_decision(&decision("other", 2)).unwrap();
        assert_eq!(catalog.decisions("sha256:m").unwrap(), [decision("other", 2), decision("same", 200)]);
        for number in 0..i64::try_from(MAX_DECISIONS).unwrap() + 5 {
            catalog.put_decision(&decision(&number.to_string(), number)).unwrap();
        }
        assert_eq!(u64::try_from(catalog.decisions("r/app:1").unwrap().len()).unwrap(), MAX_DECISIONS);
    }

    #[test]
    fn streaming_is_on_until_switched_off() {
        let (_dir, catalog) = catalog();
        assert!(catalog.streaming().unwrap());
        catalog.set_streaming(false).unwrap();
        assert!(!catalog.streaming().unwrap());
    }
}
