//! The demo image, a wiki on PHP behind Apache: made once from Debian packages, kept between runs.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::answer::Question;
use crate::image::ImageInfo;
use crate::recipe::{self, Recipe};

pub use crate::recipe::PROGRAM;

/// Tag of the image in the layout.
pub const TAG: &str = "web";
/// How it is made.
pub const RECIPE: Recipe = Recipe {
    name: TAG,
    script: "demo/web-image.sh",
    text: include_str!("../../demo/web-image.sh"),
    incompressible: false,
};

/// What it is asked: its first page.
pub fn question() -> Question {
    Question::page("/dokuwiki/doku.php", "It works")
}

/// The OCI layout that holds the demo image and the pause image; made if it is not there or what makes it has changed. `dir` is
/// an absolute path.
///
/// # Errors
///
/// If a package cannot be had, or a file cannot be written.
pub fn layout(dir: &Path) -> Result<PathBuf> {
    RECIPE.layout(dir)
}

/// The default place of the layout, shared by demo, bench and tests.
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
    recipe::info(layout, TAG)
}
