//! What it is like to read a whole image through the root of its container.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use millstream_e2e::rig::drop_caches;

/// Bytes of one read, as those of `cat`.
const PIECE: usize = 128 << 10;
/// What a runtime mounts into a root.
const NOT_OF_THE_IMAGE: [&str; 3] = ["proc", "sys", "dev"];

/// Seconds to look at every attribute and to read every file, with caches dropped and without.
pub(crate) fn figures(root: &Path) -> Result<BTreeMap<String, f64>> {
    let mut figures = BTreeMap::new();
    let mut timed = |name: &str, cold: bool, act: &dyn Fn() -> Result<u64>| -> Result<u64> {
        if cold {
            drop_caches()?;
        }
        let started = Instant::now();
        let count = act()?;
        figures.insert(name.to_owned(), started.elapsed().as_secs_f64());
        Ok(count)
    };
    timed("walk_cold_s", true, &|| Ok(files(root)?.len() as u64))?;
    timed("walk_warm_s", false, &|| Ok(files(root)?.len() as u64))?;
    let all = files(root)?;
    let bytes = timed("read_cold_s", true, &|| read(&all))?;
    timed("read_warm_s", false, &|| read(&all))?;
    figures.insert("files".to_owned(), all.len() as f64);
    figures.insert("bytes".to_owned(), bytes as f64);
    Ok(figures)
}

/// The regular files, after a look at the attributes of everything.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))? {
            let entry = entry?;
            let path = entry.path();
            if directory == root && NOT_OF_THE_IMAGE.iter().any(|name| entry.file_name() == *name) {
                continue;
            }
            let meta = path.symlink_metadata().with_context(|| format!("looking at {}", path.display()))?;
            if meta.is_dir() {
                open.push(path);
            } else if meta.is_file() {
                found.push(path);
            }
        }
    }
    Ok(found)
}

fn read(files: &[PathBuf]) -> Result<u64> {
    let mut piece = vec![0; PIECE];
    let mut bytes = 0;
    for path in files {
        let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        loop {
            let length = file.read(&mut piece).with_context(|| format!("reading {}", path.display()))?;
            if length == 0 {
                break;
            }
            bytes += length as u64;
        }
    }
    Ok(bytes)
}
