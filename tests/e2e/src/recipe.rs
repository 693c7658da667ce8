//! Images of real packages: made once by a script in a chroot, packed, and kept between runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::image::{Image, ImageInfo, manifest_of, pause};
use crate::layer::{LayerInfo, Packing, entries_of};

/// What all of them share: they are made anew when one of these has changed.
const SHARED: &str = concat!(include_str!("../../demo/stages.sh"), include_str!("layer.rs"));
/// Program that makes their base.
pub const PROGRAM: &str = "mmdebstrap";
/// Tag of the pause image in the layout.
pub const PAUSE: &str = "pause";
/// Directory among the trees that has all layers in one.
const FLAT: &str = "flat";

/// How an image is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// Tag of the image in the layout. What a script leaves in `flat` is `<name>-flat`.
    pub name: &'static str,
    /// Script that makes the trees, from the directory `tests`.
    pub script: &'static str,
    /// What it says.
    pub text: &'static str,
    /// Whether the content is not worth compressing.
    pub incompressible: bool,
}

impl Recipe {
    /// The OCI layout that holds the image and the pause image; made if it is not there or what makes it has changed. `dir` is
    /// an absolute path.
    ///
    /// # Errors
    ///
    /// If a package cannot be had, or a file cannot be written.
    pub fn layout(&self, dir: &Path) -> Result<PathBuf> {
        let layout = dir.join("layout");
        let stamp = layout.join("made-by");
        let made_by = hex::encode(Sha256::digest([self.text, SHARED].concat()));
        if std::fs::read_to_string(&stamp).is_ok_and(|before| before == made_by) {
            println!("- the image {} is there from an earlier run", self.name);
            return Ok(layout);
        }
        println!("- making the image {} from packages (once, some minutes)", self.name);
        match std::fs::remove_dir_all(&layout) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let trees = dir.join("trees");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(self.script);
        let status = Command::new("sh").arg(&script).arg(&trees).status();
        let status = status.with_context(|| format!("starting {}", self.script))?;
        ensure!(status.success(), "{} failed", self.script);
        self.pack(&trees, &layout)?;
        std::fs::remove_dir_all(&trees)?;
        std::fs::write(stamp, made_by)?;
        Ok(layout)
    }

    fn pack(&self, trees: &Path, layout: &Path) -> Result<()> {
        let mut names: Vec<_> = std::fs::read_dir(trees)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        names.sort();
        let (flat, layers): (Vec<_>, Vec<_>) = names.into_iter().partition(|tree| tree.ends_with(FLAT));
        println!("- compressing {} layers", layers.len());
        self.write(&layers, layout, self.name)?;
        if !flat.is_empty() {
            self.write(&flat, layout, &format!("{}-flat", self.name))?;
        }
        pause()?.write(layout, PAUSE).map(drop)
    }

    fn write(&self, trees: &[PathBuf], layout: &Path, tag: &str) -> Result<()> {
        let packing = if self.incompressible { Packing::GzipFast } else { Packing::Gzip };
        let mut image = Image::new().entrypoint(&["/usr/local/bin/start"]);
        for tree in trees {
            image = image.layer(entries_of(tree)?, packing);
        }
        image.write(layout, tag).map(drop)
    }
}

/// Digests and sizes of an image in a layout.
///
/// # Errors
///
/// If the layout does not have it.
pub fn info(layout: &Path, tag: &str) -> Result<ImageInfo> {
    let blob = |digest: &str| -> Result<Value> {
        let file = layout.join("blobs/sha256").join(digest);
        Ok(serde_json::from_slice(&std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?)?)
    };
    let hex = |value: &Value| {
        let digest = value.as_str().and_then(|digest| digest.strip_prefix("sha256:"));
        digest.map(str::to_owned).context("a digest is missing")
    };
    let digest = manifest_of(layout, tag)?;
    let manifest = blob(digest.trim_start_matches("sha256:"))?;
    let config = blob(&hex(&manifest["config"]["digest"])?)?;
    let diff_ids = config["rootfs"]["diff_ids"].as_array().into_iter().flatten();
    let layers = manifest["layers"].as_array().into_iter().flatten().zip(diff_ids);
    let layers = layers.map(|(layer, diff_id)| {
        let size = layer["size"].as_u64().context("a size is missing")?;
        Ok(LayerInfo { digest: hex(&layer["digest"])?, size, diff_id: hex(diff_id)? })
    });
    Ok(ImageInfo { manifest: digest, layers: layers.collect::<Result<_>>()? })
}
