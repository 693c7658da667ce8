//! Merged views of lazy runs: built once, kept in the store, shown by the mount.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, anyhow};
use millstream_chunkstore::{Layer, Store, ViewKey};
use millstream_layerfs::{Below, LayerFs, View, ViewLayer, build_view};
use millstream_oci::Digest;
use tracing::info;

use crate::admission::Admission;
use crate::below::LowerDirs;
use crate::damage::{self, Damages};
use crate::readahead::Readahead;

/// All views of this node.
#[derive(Debug)]
pub struct Views {
    store: Arc<Store>,
    fs: Arc<LayerFs>,
    mountpoint: PathBuf,
    admission: Arc<Admission>,
    /// Views that cannot be shown, and why.
    broken: Mutex<BTreeMap<u32, String>>,
    damages: Damages,
    readahead: Readahead,
}

impl Views {
    /// Views of layers in `store`, shown by `fs` at `mountpoint`.
    #[must_use]
    pub fn new(store: Arc<Store>, fs: Arc<LayerFs>, mountpoint: PathBuf, damages: Damages) -> Self {
        let readahead = Readahead::of(&mountpoint);
        Self { store, fs, mountpoint, admission: Arc::default(), broken: Mutex::default(), damages, readahead }
    }

    /// How far the kernel reads around what is touched in them.
    pub(crate) const fn readahead(&self) -> &Readahead {
        &self.readahead
    }

    /// In which order layers are shown and removed.
    pub(crate) fn admission(&self) -> Arc<Admission> {
        Arc::clone(&self.admission)
    }

    /// Shows every view that is known and not shown yet. One whose file is damaged is made again, which needs nobody else; one
    /// whose layers are damaged is among [`Views::broken`] until they are whole and this is called again.
    pub fn restore(&self) -> anyhow::Result<()> {
        let _alone = self.admission.alone();
        let shown: HashSet<u32> = self.fs.views().into_iter().collect();
        let (mut restored, mut broken) = (0, BTreeMap::new());
        for (number, key) in self.store.views()? {
            if shown.contains(&number) {
                continue;
            }
            match self.show(number, &key) {
                Ok(()) => restored += 1,
                Err(error) => drop(broken.insert(number, format!("{error:#}"))),
            }
        }
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = broken;
        info!(views = restored, "views restored");
        Ok(())
    }

    /// Where damage of views is named, and all other damage of this node with it.
    #[must_use]
    pub const fn damages(&self) -> &Damages {
        &self.damages
    }

    /// Views that cannot be shown now, and why.
    #[must_use]
    pub fn broken(&self) -> BTreeMap<u32, String> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shows a view that has a number; from its file if that is whole. Called by one at a time.
    fn show(&self, number: u32, key: &ViewKey) -> anyhow::Result<()> {
        // First, because without its layers it cannot be shown whatever its file is.
        let layers = self.layers(key)?;
        let view = match self.open(number, key) {
            Ok(view) => view,
            Err(error) => {
                // One that a crash left without file is no damage, but cannot be told from it.
                let what = format!("{error:#}; it is made again from the tables of its layers");
                self.damages.add(damage::VIEW, number.to_string(), what);
                self.build(number, key, &layers)?
            }
        };
        self.fs.add(view);
        Ok(())
    }

    fn build(&self, number: u32, key: &ViewKey, layers: &[ViewLayer]) -> anyhow::Result<View> {
        let below = key.below.split(|byte| *byte == b':').filter(|dir| !dir.is_empty());
        let below = LowerDirs(below.map(|dir| PathBuf::from(OsStr::from_bytes(dir))).collect());
        let below = (!below.0.is_empty()).then_some(&below as &dyn Below);
        let bytes = build_view(layers, below).context("merging layers")?;
        self.store.write_view(number, &bytes)?;
        self.open(number, key)
    }

    fn layers(&self, key: &ViewKey) -> anyhow::Result<Vec<ViewLayer>> {
        let layer = |number: &u32| {
            let layer =
                self.store.layer_by_number(*number).ok_or_else(|| anyhow!("layer {number} is not in the store"))?;
            Ok(ViewLayer { number: *number, toc: Arc::clone(layer.toc()) })
        };
        key.layers.iter().map(layer).collect()
    }

    fn open(&self, number: u32, key: &ViewKey) -> anyhow::Result<View> {
        Ok(View::open(number, self.store.open_view(number)?, self.layers(key)?)?)
    }

    /// Compares the files of all views with their digests and makes those again that differ. Gives these, with what was wrong
    /// and, if they cannot be made now, why. Blocks.
    ///
    /// # Errors
    /// Those of the database.
    pub fn check(&self) -> anyhow::Result<Vec<(u32, String, Option<String>)>> {
        let _alone = self.admission.alone();
        let mut found = Vec::new();
        for (number, key) in self.store.views()? {
            let Err(what) = self.store.open_view(number) else { continue };
            let again = self.layers(&key).and_then(|layers| self.build(number, &key, &layers));
            let failed = again.map(|view| self.fs.add(view)).err().map(|error| format!("{error:#}"));
            found.push((number, what.to_string(), failed));
        }
        Ok(found)
    }

    /// Takes views with this layer away, until [`Views::restore`] shows them again: its table turned out to be damaged.
    ///
    /// # Errors
    /// Those of the database.
    pub fn hide_with(&self, layer: u32) -> anyhow::Result<()> {
        let _alone = self.admission.alone();
        for (number, key) in self.store.views()? {
            if key.layers.contains(&layer) {
                self.fs.remove(number);
            }
        }
        Ok(())
    }

    /// The directory that shows `run` (bottom first) merged, over `below` (top first).
    ///
    /// # Errors
    /// When a layer is not in the store or is being removed, or the view cannot be built or written.
    pub async fn path(self: &Arc<Self>, run: &[Digest], below: &[PathBuf]) -> anyhow::Result<PathBuf> {
        let layers: Vec<Arc<Layer>> = run
            .iter()
            .map(|digest| self.store.layer(digest).ok_or_else(|| anyhow!("layer {digest} is not in the store")))
            .collect::<anyhow::Result<_>>()?;
        let key = ViewKey {
            layers: layers.iter().map(|layer| layer.number()).collect(),
            below: below.iter().map(|dir| dir.as_os_str().as_bytes()).collect::<Vec<_>>().join(&b':'),
        };
        let (this, run) = (Arc::clone(self), run.to_vec());
        let shown = tokio::task::spawn_blocking(move || this.admission.show(&run, || this.ensure(&key))).await?;
        let number = shown.context("a layer is being removed")??;
        Ok(self.mountpoint.join(number.to_string()))
    }

    /// Called by one at a time.
    fn ensure(&self, key: &ViewKey) -> anyhow::Result<u32> {
        // First, because a key whose layers are gone would stay for ever.
        let layers = self.layers(key)?;
        let slot = self.store.allocate_view(key)?;
        if !slot.existing {
            self.fs.add(self.build(slot.number, key, &layers)?);
        } else if !self.fs.views().contains(&slot.number) {
            self.show(slot.number, key)?;
            self.broken.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot.number);
        }
        Ok(slot.number)
    }

    /// Takes away every view that shows one of these layers. Called by one at a time, and by nobody while a view is built.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn hide(&self, layers: &[u32]) -> anyhow::Result<()> {
        for (number, key) in self.store.views()? {
            if key.layers.iter().any(|layer| layers.contains(layer)) {
                self.fs.remove(number);
                self.broken.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
                self.store.remove_view(number)?;
            }
        }
        Ok(())
    }
}
