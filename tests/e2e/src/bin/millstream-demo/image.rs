//! The demo image: made once from Debian packages, kept between runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use millstream_e2e::image::{Image, pause};
use millstream_e2e::layer::{Packing, entries_of};
use sha2::{Digest as _, Sha256};

use crate::say;

const SCRIPT: &str = include_str!("../../../../demo/web-image.sh");
/// Tag of the image in the layout.
pub(crate) const TAG: &str = "web";

/// The OCI layout that holds the demo image and the pause image; made if it is not there or the script has changed.
pub(crate) fn layout(dir: &Path) -> Result<PathBuf> {
    let layout = dir.join("layout");
    let stamp = layout.join("made-by");
    let script = hex::encode(Sha256::digest(SCRIPT));
    if std::fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == script) {
        say("the image is there from an earlier run");
        return Ok(layout);
    }
    say("making the image from Debian packages (once, some minutes)");
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
    say(format_args!("compressing {} layers", names.len()));
    image.write(&layout, TAG)?;
    pause()?.write(&layout, "pause")?;
    std::fs::remove_dir_all(&trees)?;
    std::fs::write(stamp, script)?;
    Ok(layout)
}
