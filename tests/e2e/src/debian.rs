//! A Debian base image: made once from packages, kept in the target directory between runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::image::Image;
use crate::layer::{Entry, Packing, entries_of};
use crate::need::profile_dir;
use crate::process::output;

/// What makes it.
pub const PROGRAM: &str = "mmdebstrap";
const SUITE: &str = "bookworm";
/// What else is in it: a program with file capabilities.
const PACKAGES: &str = "iputils-ping";
/// `cap_dac_override=ep`, version 2 of the format.
pub const DAC_OVERRIDE: [u8; 20] = [1, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A copy of `cat` that may read every file, by a file capability.
pub const READER: &str = "usr/local/bin/read-all";
/// A copy of `id` with set-user-id.
pub const ROOT_ID: &str = "usr/local/bin/root-id";

/// A base system with set-user-id programs and with file capabilities, in one gzip layer, and a small one above it.
///
/// # Errors
///
/// If it is not there yet and cannot be made.
pub fn image() -> Result<Image> {
    let tree = tree()?;
    let reader = std::fs::read(tree.join("bin/cat")).context("reading the base system's cat")?;
    let id = std::fs::read(tree.join("usr/bin/id")).context("reading the base system's id")?;
    let above = vec![
        Entry::directory("etc"),
        Entry::directory("root").mode(0o700),
        Entry::directory("usr"),
        Entry::directory("usr/local"),
        Entry::directory("usr/local/bin"),
        Entry::file("etc/hosts", "127.0.0.1 localhost\n"),
        Entry::file("etc/resolv.conf", ""),
        Entry::file("etc/hostname", ""),
        Entry::file("root/secret", "only root may read this\n").mode(0o600),
        Entry::file(ROOT_ID, id).mode(0o4755),
        Entry::file(READER, reader).mode(0o755).xattr("security.capability", DAC_OVERRIDE),
    ];
    let base = entries_of(&tree)?;
    Ok(Image::new().layer(base, Packing::Gzip).layer(above, Packing::Gzip).command(&["/bin/bash"]))
}

/// The base system's files.
fn tree() -> Result<PathBuf> {
    let dir = profile_dir().context("this program lies in no target directory")?.join("../e2e");
    let tree = dir.join("debian");
    if tree.is_dir() {
        return Ok(tree);
    }
    std::fs::create_dir_all(&dir)?;
    // Under another name until it is whole.
    let making = tempfile::tempdir_in(&dir)?;
    let mut command = Command::new(PROGRAM);
    command.args(["--quiet", "--variant=minbase", "--include", PACKAGES, SUITE]).arg(making.path());
    let sources = Path::new("/etc/apt/sources.list.d/debian.sources");
    command.arg(if sources.exists() { sources } else { Path::new("/etc/apt/sources.list") });
    output(&mut command).context("making a Debian base system")?;
    std::fs::rename(making.keep(), &tree).context("keeping the base system")?;
    Ok(tree)
}
