//! The demo image, a wiki on PHP behind Apache: made once from Debian packages, kept between runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::image::{Image, ImageInfo, pause};
use crate::layer::{LayerInfo, Packing, entries_of};

/// What makes the image: it is made anew when one of these has changed.
const MADE_BY: &str = concat!(include_str!("../../demo/web-image.sh"), include_str!("layer.rs"));
/// Program that makes its base.
pub const PROGRAM: &str = "mmdebstrap";
/// Tag of the image in the layout.
pub const TAG: &str = "web";

/// The OCI layout that holds the demo image and the pause image; made if it is not there or what makes it has changed. `dir` is
/// an absolute path.
///
/// # Errors
///
/// If a package cannot be had, or a file cannot be written.
pub fn layout(dir: &Path) -> Result<PathBuf> {
    let layout = dir.join("layout");
    let stamp = layout.join("made-by");
    let made_by = hex::encode(Sha256::digest(MADE_BY));
    if std::fs::read_to_string(&stamp).is_ok_and(|before| before == made_by) {
        println!("- the image is there from an earlier run");
        return Ok(layout);
    }
    println!("- making the image from Debian packages (once, some minutes)");
    match std::fs::remove_dir_all(&layout) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let trees = dir.join("trees");
    let script_file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/web-image.sh");
    let status = Command::new("sh").arg(script_file).arg(&trees).status().context("starting web-image.sh")?;
    ensure!(status.success(), "web-image.sh failed");
    let mut names: Vec<_> = std::fs::read_dir(&trees)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    names.sort();
    let mut image = Image::new().entrypoint(&["/usr/local/bin/start"]);
    for tree in &names {
        image = image.layer(entries_of(tree)?, Packing::Gzip);
    }
    println!("- compressing {} layers", names.len());
    image.write(&layout, TAG)?;
    pause()?.write(&layout, "pause")?;
    std::fs::remove_dir_all(&trees)?;
    std::fs::write(stamp, made_by)?;
    Ok(layout)
}

/// The default place of the layout, shared by demo and tests.
///
/// # Errors
///
/// If it cannot be made.
pub fn default_dir() -> Result<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/demo");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    Ok(dir.canonicalize()?)
}

/// Digests and sizes of the image in the layout.
///
/// # Errors
///
/// If the layout does not have it.
pub fn info(layout: &Path) -> Result<ImageInfo> {
    let read = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    let blob = |digest: &str| layout.join("blobs/sha256").join(digest);
    let hex = |value: &Value| {
        let digest = value.as_str().and_then(|digest| digest.strip_prefix("sha256:"));
        digest.map(str::to_owned).context("a digest is missing")
    };
    let index = read(layout.join("index.json"))?;
    let mut images = index["manifests"].as_array().into_iter().flatten();
    let image = images.find(|one| one["annotations"]["org.opencontainers.image.ref.name"] == TAG);
    let digest = hex(&image.context("the layout has no image")?["digest"])?;
    let manifest = read(blob(&digest))?;
    let config = read(blob(&hex(&manifest["config"]["digest"])?))?;
    let diff_ids = config["rootfs"]["diff_ids"].as_array().into_iter().flatten();
    let layers = manifest["layers"].as_array().into_iter().flatten().zip(diff_ids);
    let layers = layers.map(|(layer, diff_id)| {
        let size = layer["size"].as_u64().context("a size is missing")?;
        Ok(LayerInfo { digest: hex(&layer["digest"])?, size, diff_id: hex(diff_id)? })
    });
    Ok(ImageInfo { manifest: format!("sha256:{digest}"), layers: layers.collect::<Result<_>>()? })
}
