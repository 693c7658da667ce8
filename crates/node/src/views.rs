//! Merged views of lazy runs: built once, kept in the store, shown by the mount.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use millstream_chunkstore::{Layer, Store, ViewKey};
use millstream_layerfs::{Below, LayerFs, View, ViewLayer, build_view};
use millstream_oci::Digest;
use tracing::{info, warn};

use crate::admission::Admission;
use crate::below::LowerDirs;

/// All views of this node.
#[derive(Debug)]
pub struct Views {
    store: Arc<Store>,
    fs: Arc<LayerFs>,
    mountpoint: PathBuf,
    admission: Arc<Admission>,
}

impl Views {
    /// Views of layers in `store`, shown by `fs` at `mountpoint`.
    #[must_use]
    pub fn new(store: Arc<Store>, fs: Arc<LayerFs>, mountpoint: PathBuf) -> Self {
        Self { store, fs, mountpoint, admission: Arc::default() }
    }

    /// In which order layers are shown and removed.
    pub(crate) fn admission(&self) -> Arc<Admission> {
        Arc::clone(&self.admission)
    }

    /// Shows every view that was known before. One that cannot be shown is reported and rebuilt when it is next asked for.
    pub fn restore(&self) -> anyhow::Result<()> {
        let mut shown = 0;
        for (number, key) in self.store.views()? {
            match self.open(number, &key) {
                Ok(view) => {
                    self.fs.add(view);
                    shown += 1;
                }
                Err(error) => warn!(view = number, error = format!("{error:#}"), "a view cannot be shown now"),
            }
        }
        info!(views = shown, "views restored");
        Ok(())
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
        if slot.existing {
            if self.fs.views().contains(&slot.number) {
                return Ok(slot.number);
            }
            match self.open(slot.number, key) {
                Ok(view) => {
                    self.fs.add(view);
                    return Ok(slot.number);
                }
                Err(error) => warn!(view = slot.number, error = format!("{error:#}"), "rebuilding a view"),
            }
        }
        let below: Vec<PathBuf> = key
            .below
            .split(|byte| *byte == b':')
            .filter(|dir| !dir.is_empty())
            .map(|dir| PathBuf::from(OsStr::from_bytes(dir)))
            .collect();
        let below = LowerDirs(below);
        let below = (!below.0.is_empty()).then_some(&below as &dyn Below);
        let bytes = build_view(&layers, below).context("merging layers")?;
        self.store.write_view(slot.number, &bytes)?;
        self.fs.add(self.open(slot.number, key)?);
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
                self.store.remove_view(number)?;
            }
        }
        Ok(())
    }
}
