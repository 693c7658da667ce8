//! Keeping a store within a limit: what was used least recently goes first.
//!
//! When something was used last is when its record was written last: [`Store::used`] writes it again. So it survives restarts,
//! and any object store can say it.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use futures::TryStreamExt;
use millstream_oci::Digest;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt};

use crate::StoreError;
use crate::store::{ImageRecord, Store, failed, image_path, layer_path};

/// Use is written down at most this often.
const STEP: Duration = Duration::from_secs(3600);
/// What was used or written within this time stays, limit or not: somebody may be about to read it.
const RECENT: Duration = Duration::from_secs(2 * 3600);

/// What [`Store::shrink`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shrunk {
    /// Bytes of the objects that are left.
    pub bytes: u64,
    /// Layers that were removed, with table and windows.
    pub layers: usize,
}

/// Objects that go together.
#[derive(Default)]
struct Group {
    bytes: u64,
    used: Option<SystemTime>,
    layer: Option<Digest>,
    /// In order of removal: the record that vouches for the others first.
    paths: Vec<Path>,
}

impl Store {
    /// Notes that `record`'s layers are in use.
    pub(crate) async fn used(&self, record: &ImageRecord, now: SystemTime) -> Result<(), StoreError> {
        let layers = record.layers.iter().filter(|layer| layer.is_ready()).map(|layer| layer_path(&layer.digest));
        for path in layers.chain([image_path(record.manifest, &record.repository)]) {
            let Some(meta) = self.head(&path).await? else { continue };
            if age(&meta, now) >= STEP
                && let Some(bytes) = self.get(&path).await?
            {
                self.put(&path, bytes).await?;
            }
        }
        Ok(())
    }

    /// Removes layers and images that were used least recently, until the objects have `limit` bytes together, or nothing is
    /// left but what `keep` wants and what was used within the last two hours.
    ///
    /// # Errors
    ///
    /// When the object store fails; what was removed until then stays removed, and what is there is whole.
    pub async fn shrink(
        &self,
        limit: u64,
        now: SystemTime,
        keep: &(dyn Fn(&Digest) -> bool + Send + Sync),
    ) -> Result<Shrunk, StoreError> {
        let mut groups = self.groups().await?;
        let mut result = Shrunk { bytes: groups.iter().map(|group| group.bytes).sum(), layers: 0 };
        groups.sort_by_key(|group| group.used);
        for group in groups {
            let recent = group.used.is_none_or(|used| now.duration_since(used).unwrap_or_default() < RECENT);
            if result.bytes <= limit || recent {
                break;
            }
            if self.is_wanted(&group, keep).await? {
                continue;
            }
            for path in &group.paths {
                match self.objects.delete(path).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(failed(path)(error)),
                }
            }
            result.bytes -= group.bytes;
            result.layers += usize::from(group.layer.is_some());
        }
        Ok(result)
    }

    /// Everything there is, by what goes together: a layer with what was made of it, an image with its startup profile. The record
    /// of a layer or an image says when it was used last.
    async fn groups(&self) -> Result<Vec<Group>, StoreError> {
        let mut objects = self.objects.list(None);
        let mut groups: HashMap<String, Group> = HashMap::new();
        let all = Path::default();
        while let Some(meta) = objects.try_next().await.map_err(failed(&all))? {
            let layer = blob_of(&meta.location);
            let key = layer.map_or_else(|| image_of(&meta.location), |layer| layer.hex());
            let group = groups.entry(key).or_default();
            group.bytes += meta.size;
            group.layer = layer;
            let written = Some(SystemTime::from(meta.last_modified));
            if is_record(&meta.location) {
                group.used = written;
                group.paths.insert(0, meta.location);
            } else {
                // Without a record it is an import that is under way or was broken off: its age counts.
                let has_record = group.paths.first().is_some_and(is_record);
                group.used = if has_record { group.used } else { group.used.max(written) };
                group.paths.push(meta.location);
            }
        }
        Ok(groups.into_values().collect())
    }

    async fn is_wanted(
        &self,
        group: &Group,
        keep: &(dyn Fn(&Digest) -> bool + Send + Sync),
    ) -> Result<bool, StoreError> {
        if let Some(layer) = &group.layer {
            return Ok(keep(layer));
        }
        let Some(image) = group.paths.first().filter(|path| path.as_ref().starts_with("images/")) else {
            return Ok(false);
        };
        // One that cannot be read is of no use to anybody.
        let record: Option<ImageRecord> = self.json(image).await.unwrap_or_default();
        Ok(record.is_some_and(|record| record.layers.iter().any(|layer| keep(&layer.digest))))
    }

    async fn head(&self, path: &Path) -> Result<Option<ObjectMeta>, StoreError> {
        match self.objects.head(path).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(path)(error)),
        }
    }
}

fn age(meta: &ObjectMeta, now: SystemTime) -> Duration {
    now.duration_since(meta.last_modified.into()).unwrap_or_default()
}

/// Whether an object is what the rest of its group goes with.
fn is_record(path: &Path) -> bool {
    path.as_ref().starts_with("layers/") || path.as_ref().starts_with("images/")
}

/// The image that an object is of; where it is of none, the object itself.
fn image_of(path: &Path) -> String {
    match path.as_ref().split_once('/') {
        Some(("recordings" | "profiles" | "packs", image)) => format!("images/{image}"),
        _ => path.to_string(),
    }
}

/// The layer that an object is of.
fn blob_of(path: &Path) -> Option<Digest> {
    let (kind, name) = path.as_ref().split_once('/')?;
    if !matches!(kind, "tocs" | "windows" | "packed" | "pieces" | "skeletons" | "layers") {
        return None;
    }
    format!("sha256:{name}").parse().ok()
}

#[cfg(test)]
mod tests {
    use millstream_oci::{DiffId, ManifestDigest};

    use super::*;
    use crate::items::ItemWriter;
    use crate::store::{ImageLayer, LayerRecord};

    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// A store of the layers `names`, each with a TOC of 1000 bytes, and an image of each.
    async fn store(directory: &std::path::Path, names: &[&str]) -> Store {
        let store = Store::open(directory.to_str().unwrap()).unwrap();
        for name in names {
            let blob = Digest::of(name.as_bytes());
            store.put_toc(&blob, vec![0; 1000]).await.unwrap();
            let windows = ItemWriter::new(directory, 1).unwrap().finish(1).unwrap();
            store.put_windows(&blob, windows).await.unwrap();
            let packed = ItemWriter::new(directory, 1).unwrap().finish(1).unwrap();
            store.put_packed(&blob, packed).await.unwrap();
            store.put_pieces(&blob, vec![0; 32]).await.unwrap();
            let record = LayerRecord {
                format: millstream_toc::format::VERSION,
                toc: blob,
                diff_id: DiffId(blob),
                size: 1,
                spans: 1,
            };
            store.put_layer(&blob, &record).await.unwrap();
            store.put_image(&image(name)).await.unwrap();
            put_profile(&store, name).await;
        }
        store
    }

    const OF_A_PROFILE: [&str; 3] = ["recordings", "profiles", "packs"];

    async fn put_profile(store: &Store, name: &str) {
        let image = image_path(ManifestDigest(Digest::of(name.as_bytes())), &format!("r.example/{name}")).to_string();
        for kind in OF_A_PROFILE {
            store.put(&Path::from(image.replacen("images", kind, 1)), vec![0; 500].into()).await.unwrap();
        }
    }

    fn has_profile(directory: &std::path::Path, name: &str) -> bool {
        let image = Digest::of(name.as_bytes()).hex();
        let has = |kind: &&str| std::fs::read_dir(directory.join(kind).join(&image)).is_ok_and(|dir| dir.count() > 0);
        let count = OF_A_PROFILE.iter().filter(|kind| has(kind)).count();
        assert!(count == 0 || count == OF_A_PROFILE.len(), "{name}: all or nothing");
        count > 0
    }

    fn image(name: &str) -> ImageRecord {
        let digest = Digest::of(name.as_bytes());
        let layer = ImageLayer {
            digest,
            size: 1,
            diff_id: DiffId(digest),
            media: String::new(),
            ineligible: None,
            pending: false,
        };
        ImageRecord { repository: format!("r.example/{name}"), manifest: ManifestDigest(digest), layers: vec![layer] }
    }

    async fn has(store: &Store, name: &str) -> bool {
        let blob = Digest::of(name.as_bytes());
        let record = store.layer(&blob).await.unwrap().is_some();
        assert_eq!(store.toc(&blob).await.unwrap().is_some(), record, "{name}: all or nothing");
        record
    }

    /// Sets back the time at which everything of `name` was written.
    fn age_by(directory: &std::path::Path, name: &str, age: Duration) {
        let digest = Digest::of(name.as_bytes()).hex();
        let image = std::fs::read_dir(directory.join("images").join(&digest)).unwrap().next().unwrap().unwrap().path();
        let files = ["tocs", "windows", "packed", "pieces", "layers"].map(|kind| directory.join(kind).join(&digest));
        for file in files.into_iter().chain([image]) {
            let file = std::fs::File::options().append(true).open(file).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_used_least_recently_goes_first() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path(), &["old", "used", "new", "shown"]).await;
        let now = SystemTime::now();
        for (name, days) in [("shown", 9), ("old", 3), ("used", 4), ("new", 2)] {
            age_by(directory.path(), name, days * DAY);
        }
        store.used(&image("used"), now).await.unwrap();
        let shown = Digest::of(b"shown");
        let all = store.shrink(u64::MAX, now, &|_| false).await.unwrap();
        assert_eq!(all.layers, 0);
        let shrunk = store.shrink(all.bytes - 1, now, &|layer| *layer == shown).await.unwrap();
        assert!(shrunk.bytes < all.bytes && shrunk.layers == 1, "{shrunk:?}");
        // Its startup profile goes when it goes, however new that is.
        assert!(["used", "new", "shown"].iter().all(|name| has_profile(directory.path(), name)));
        assert!(!has(&store, "old").await && has(&store, "used").await && has(&store, "new").await);
        store.shrink(0, now, &|layer| *layer == shown).await.unwrap();
        assert_eq!(
            ["old", "used", "new", "shown"].map(|name| has_profile(directory.path(), name)),
            [false, true, false, true]
        );
        assert!(has(&store, "used").await, "used just now");
        assert!(has(&store, "shown").await, "wanted by its owner");
        assert!(store.image(ManifestDigest(shown), "r.example/shown").await.unwrap().is_some());
        assert!(!has(&store, "new").await);
        assert!(store.image(ManifestDigest(Digest::of(b"new")), "r.example/new").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn an_import_under_way_is_left_alone_and_one_that_was_broken_off_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path(), &[]).await;
        let blob = Digest::of(b"half");
        store.put_toc(&blob, vec![0; 1000]).await.unwrap();
        put_profile(&store, "of no image").await;
        let now = SystemTime::now();
        store.shrink(0, now, &|_| false).await.unwrap();
        assert!(store.toc(&blob).await.unwrap().is_some());
        let left = store.shrink(0, now + DAY, &|_| false).await.unwrap();
        assert_eq!(left, Shrunk { bytes: 0, layers: 1 });
    }
}
