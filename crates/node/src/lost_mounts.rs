//! Mounts of containers that stand on a mount of ours which is gone.
//!
//! When supervisor and worker end, so does the connection, and what runs on it has lost its files; the kernel cannot attach it
//! again. A new connection finds those mounts by their lower directories. They are written down, so that later workers tell
//! them from mounts that stand on the new connection.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tracing::warn;

/// Below the root.
const FILE: &str = "lost-mounts.json";
/// More are not remembered; a node has some hundred containers.
const MAX_MOUNTS: usize = 10_000;

/// An overlay mount with a lower directory of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LostMount {
    /// The kernel's number of the mount: given out anew after its end, so it counts only together with the place.
    id: u64,
    /// Where it is mounted.
    place: PathBuf,
}

/// The mounts that were lost.
#[derive(Debug, Default)]
pub struct LostMounts(Vec<LostMount>);

impl LostMounts {
    /// Those that stood when the present connection began. `begins` says that it begins now: then they are looked for and
    /// written down, before anything can be mounted on it.
    pub fn find(root: &Path, mountpoint: &Path, begins: bool) -> Self {
        let file = root.join(FILE);
        let found = if begins { record(&file, root, mountpoint) } else { read(&file) };
        Self(found.unwrap_or_else(|error| {
            warn!(error = format!("{error:#}"), "it is not known which containers have lost their mounts");
            Vec::new()
        }))
    }

    /// Those that are mounted still: place and what to do.
    #[must_use]
    pub fn still_mounted(&self) -> BTreeMap<String, String> {
        if self.0.is_empty() {
            return BTreeMap::new();
        }
        let now = fs::read_to_string(MOUNTINFO).unwrap_or_default();
        let now: Vec<LostMount> = now.lines().filter_map(parse).map(|mount| mount.0).collect();
        let still = self.0.iter().filter(|lost| now.contains(lost));
        let what = "this container has lost the files of its image, and the kernel cannot give them back; hint: create it again";
        still.map(|lost| (lost.place.display().to_string(), what.to_owned())).collect()
    }
}

const MOUNTINFO: &str = "/proc/self/mountinfo";

fn record(file: &Path, root: &Path, mountpoint: &Path) -> anyhow::Result<Vec<LostMount>> {
    let table = fs::read_to_string(MOUNTINFO).context("reading the table of mounts")?;
    let mounts = table.lines().filter_map(parse).filter(|(_, options)| stands_on(options, root, mountpoint));
    let mut mounts: Vec<LostMount> = mounts.map(|(mount, _)| mount).collect();
    mounts.truncate(MAX_MOUNTS);
    // No mount outlives the boot, so a power cut may take this file.
    fs::write(file, serde_json::to_vec(&mounts)?).with_context(|| format!("writing {}", file.display()))?;
    Ok(mounts)
}

fn read(file: &Path) -> anyhow::Result<Vec<LostMount>> {
    match fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("reading {}", file.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("reading {}", file.display())),
    }
}

/// An overlay mount with its options, of a line of the table.
fn parse(line: &str) -> Option<(LostMount, &str)> {
    let (mount, source) = line.split_once(" - ")?;
    let mut source = source.split(' ');
    if source.next()? != "overlay" {
        return None;
    }
    let options = source.nth(1)?;
    let mut mount = mount.split(' ');
    let id = mount.next()?.parse().ok()?;
    let place = PathBuf::from(unescape(mount.nth(3)?));
    Some((LostMount { id, place }, options))
}

/// Whether one of the lower directories is a view of ours. containerd shortens them to the part after a common beginning when
/// there are many; then the upper directory tells whose they are.
fn stands_on(options: &str, root: &Path, mountpoint: &Path) -> bool {
    let mut lowers = options
        .split(',')
        .filter_map(|option| option.strip_prefix("lowerdir"))
        .flat_map(|lowers| lowers.trim_start_matches(['+', '=']).split(':').filter(|lower| !lower.is_empty()));
    let upper = options.split(',').find_map(|option| option.strip_prefix("upperdir="));
    let ours = upper.is_some_and(|upper| Path::new(&unescape(upper)).starts_with(root));
    let name = mountpoint.file_name().map(Path::new);
    lowers.any(|lower| {
        let lower = PathBuf::from(unescape(lower));
        lower.starts_with(mountpoint) || (ours && name.is_some_and(|name| lower.starts_with(name)))
    })
}

/// Undoes the kernel's way to write blanks and backslashes in its tables.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(place: &str, options: &str) -> String {
        format!("36 35 98:0 / {place} rw,noatime master:1 - overlay overlay {options}")
    }

    #[test]
    fn mounts_on_ours_are_found_and_no_others() {
        let (root, mountpoint) = (Path::new("/var/lib/m s"), Path::new("/var/lib/m s/m"));
        for (options, expected) in [
            (r"rw,lowerdir=/var/lib/m\040s/m/7,upperdir=/var/lib/m\040s/s/3/fs,workdir=/w", true),
            (r"rw,lowerdir=/var/lib/m\040s/s/1/fs:/var/lib/m\040s/m/7,upperdir=/u", true),
            (r"rw,lowerdir+=/var/lib/m\040s/m/7,upperdir=/u", true),
            (r"rw,lowerdir=s/1/fs:m/7,upperdir=/var/lib/m\040s/s/3/fs", true),
            (r"rw,lowerdir=m/7,upperdir=/var/lib/other/s/3/fs", false),
            (r"rw,lowerdir=/var/lib/m\040s/s/1/fs,upperdir=/var/lib/m\040s/s/3/fs", false),
            (r"rw,lowerdir=/var/lib/m\040s/mm/7,upperdir=/u", false),
        ] {
            let line = line(r"/run/root\040fs", options);
            let (mount, options) = parse(&line).unwrap();
            assert_eq!(mount, LostMount { id: 36, place: "/run/root fs".into() });
            assert_eq!(stands_on(options, root, mountpoint), expected, "{options}");
        }
        assert!(parse("36 35 98:0 / /a rw - ext4 /dev/sda rw").is_none());
        assert!(parse("").is_none());
    }
}
